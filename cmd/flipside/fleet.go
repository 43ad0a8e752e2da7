package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/omaha"
)

func (a *app) fleetCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:        "fleet",
		SuggestFor: []string{"lock", "semaphore"},
		Short:      "the cluster's reboots: who may when, who is down, who waits",
		Args:       cobra.NoArgs,
		Long: `Fleet works on the reboot semaphore that the hosts of a group share: its policy, and who holds a slot or waits for one.

Exit status: 0 done, 3 nothing to do, 5 blocked (something is halted, no slot is free, the window is closed), 7 etcd does not permit it, 8 too much competition, 1 otherwise.`,
	}
	s := a.semaphore(cmd)
	cmd.AddCommand(
		a.fleetStatus(s), a.fleetPlan(s), a.fleetHistory(s), a.fleetWatch(s), a.fleetPolicy(s),
		a.fleetPause(s), a.fleetResume(s), a.fleetSetMax(s), a.fleetAcquire(s), a.fleetRelease(s), a.fleetForceRelease(s),
		a.fleetServe(s), a.fleetImport(s),
		a.fleetSign(s), a.fleetKeys(s), a.fleetAccept(s), a.fleetForget(s), a.fleetEnrol(s),
	)
	return cmd
}

func (a *app) fleetStatus(s *semaphoreFlags) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "who holds, who waits, since when, for which version, what is halted",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				groups := []string{s.group}
				if all {
					var err error
					if groups, err = k.Groups(cmd.Context()); err != nil {
						return err
					}
				}
				halted := false
				docs := []groupDocument{}
				for i, g := range groups {
					st, err := k.State(cmd.Context(), g)
					if err != nil {
						return err
					}
					halted = halted || len(st.Halts) > 0
					docs = append(docs, groupDoc(groupSchema, g, st))
					if !a.json {
						if i > 0 {
							fmt.Fprintln(a.stdout)
						}
						if err := a.groupScreen(g, st, time.Now()).print(a.stdout); err != nil {
							return err
						}
					}
				}
				if a.json {
					if err := a.printJSON(struct {
						Schema string          `json:"schema"`
						Groups []groupDocument `json:"groups"`
					}{"flipside.fleet-status/v1", docs}); err != nil {
						return err
					}
				}
				if halted {
					return quiet(exitBlocked)
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every group that the store knows")
	return cmd
}

func (a *app) fleetPlan(s *semaphoreFlags) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "plan",
		Short: "forecast the order in which the hosts that wait will reboot, and when the last is done",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				st, err := k.State(cmd.Context(), s.group)
				if err != nil {
					return err
				}
				now := time.Now()
				turns, never := st.Forecast(now)
				if a.json {
					if turns == nil {
						turns = []lock.Turn{}
					}
					return a.printJSON(struct {
						Schema     string        `json:"schema"`
						Group      string        `json:"group"`
						RebootTime lock.Duration `json:"reboot_time"`
						Turns      []lock.Turn   `json:"turns"`
						Never      []lock.Waiter `json:"never,omitempty"`
					}{"flipside.fleet-plan/v1", s.group, lock.Duration(st.RebootTime()), turns, never})
				}
				return a.planScreen(s.group, st, all, now).print(a.stdout)
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "every host, however many there are")
	return cmd
}

func (a *app) fleetHistory(s *semaphoreFlags) *cobra.Command {
	var last int
	cmd := &cobra.Command{
		Use:   "history",
		Short: "the audit trail: who, what, when, from where, why",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				entries, err := k.History(cmd.Context(), s.group)
				if err != nil {
					return err
				}
				if last > 0 && len(entries) > last {
					entries = entries[len(entries)-last:]
				}
				if a.json {
					if entries == nil {
						entries = []lock.Entry{}
					}
					return a.printJSON(struct {
						Schema  string       `json:"schema"`
						Group   string       `json:"group"`
						Entries []lock.Entry `json:"entries"`
					}{"flipside.fleet-history/v1", s.group, entries})
				}
				out := a.sheet()
				a.entryTable(out, entries)
				return out.print(a.stdout)
			})
		},
	}
	cmd.Flags().IntVarP(&last, "last", "n", 0, "only the last `N` entries")
	return cmd
}

func (a *app) fleetWatch(s *semaphoreFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "watch",
		Short: "follow a group: a screen that is redrawn on a terminal, a line for every change elsewhere",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				if a.terminal() && !a.json {
					return a.watchScreen(cmd.Context(), k, s.group)
				}
				var printErr error
				err := k.Follow(cmd.Context(), s.group, func(st lock.State) bool {
					if a.json {
						printErr = json.NewEncoder(a.stdout).Encode(groupDoc(groupSchema, s.group, st)) // a line for each change
					} else {
						printErr = watchLine(a.stdout, st)
					}
					return printErr == nil
				})
				return errors.Join(err, printErr)
			})
		},
	}
}

func watchLine(w io.Writer, st lock.State) error {
	var holders []string
	for _, h := range st.Holders {
		phase := string(h.Phase)
		if !h.Late.IsZero() {
			phase = "late"
		}
		holders = append(holders, h.Host+" "+phase)
	}
	line := fmt.Sprintf("%s  %d of %d down, %d waiting", time.Now().Format(time.TimeOnly), len(st.Holders), st.Policy.Max, len(st.Queue))
	if len(holders) > 0 {
		line += ": " + strings.Join(holders, ", ")
	}
	for _, v := range slices.Sorted(maps.Keys(st.Halts)) {
		line += fmt.Sprintf("; %s halted: %s", v, st.Halts[v].Reason)
	}
	line = omaha.Printable(line)
	_, err := fmt.Fprintln(w, line)
	return err
}

func (a *app) fleetPause(s *semaphoreFlags) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "pause",
		Short: "let no further host reboot, until resume",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				st, err := k.State(cmd.Context(), s.group)
				if err != nil {
					return err
				}
				if st.Policy.Max == 0 {
					return withExit(exitNothing, fmt.Errorf("group %s is paused already", s.group))
				}
				if err := k.Pause(cmd.Context(), s.group, reason); err != nil {
					return err
				}
				return a.done(fmt.Sprintf("group %s is paused; it goes on with: flipside fleet resume --group %s", s.group, s.group))
			})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why, in words; kept in the audit trail")
	return cmd
}

func (a *app) fleetSetMax(s *semaphoreFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "set-max N",
		Short: "change how many hosts may be down at once; 0 pauses the group",
		Args:  exactArgs(1, "the number N"),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := strconv.Atoi(args[0])
			if err != nil || n < 0 {
				return usagef("max %q is not a number from 0 on", args[0])
			}
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				if err := k.SetMax(cmd.Context(), s.group, n); err != nil {
					return err
				}
				return a.done(fmt.Sprintf("up to %d host(s) of group %s may be down at once", n, s.group))
			})
		},
	}
}

func (a *app) fleetResume(s *semaphoreFlags) *cobra.Command {
	var all bool
	var reason string
	cmd := &cobra.Command{
		Use:   "resume [VERSION]",
		Short: "go on after a pause, or lift the halt of a version and forget its failures",
		Args:  cobra.MaximumNArgs(1),
		Long: `Resume without a VERSION lets a group go on that was paused, with the max that it had. With a VERSION, or --all, it lifts halts:
what failed is forgotten, and the next host may try. Look first.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 && all {
				return usagef("name a VERSION, or --all")
			}
			version := strings.Join(args, "")
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				st, err := k.State(cmd.Context(), s.group)
				if err != nil {
					return err
				}
				if version == "" && !all {
					return a.unpause(cmd.Context(), k, s.group, st, reason)
				}
				if _, halted := st.Halts[version]; len(st.Halts) == 0 || !all && !halted {
					return withExit(exitNothing, fmt.Errorf("nothing is halted in group %s%s", s.group, strings.TrimRight(" under version "+version, " ")))
				}
				if err := k.Resume(cmd.Context(), s.group, version, reason); err != nil {
					return err
				}
				return a.done(fmt.Sprintf("group %s goes on with %s", s.group, cmp.Or(version, "all versions")))
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "lift the halt of every version")
	cmd.Flags().StringVar(&reason, "reason", "", "why, in words; kept in the audit trail")
	return cmd
}

func (a *app) unpause(ctx context.Context, k *lock.Keeper, group string, st lock.State, reason string) error {
	switch {
	case st.Policy.Max > 0 && len(st.Halts) > 0:
		return usagef("group %s is not paused; halted is %s: name it, or --all", group, strings.Join(slices.Sorted(maps.Keys(st.Halts)), ", "))
	case st.Policy.Max > 0:
		return withExit(exitNothing, fmt.Errorf("group %s is not paused, and nothing is halted", group))
	case st.Policy.PausedMax == 0:
		return withHint(usagef("group %s has max 0, and it is not on record what it was before", group), "flipside fleet set-max --group %s N", group)
	}
	if err := k.Unpause(ctx, group, reason); err != nil {
		return err
	}
	return a.done(fmt.Sprintf("group %s goes on: up to %d host(s) may be down at once", group, st.Policy.PausedMax))
}

func (a *app) fleetForceRelease(s *semaphoreFlags) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "force-release HOST",
		Short: "take the slot of a host that will not come back",
		Args:  exactArgs(1, "the name of the HOST"),
		Long: `Force-release takes the slot of a host away, for a machine that is gone for good. Nobody but you knows that it is: if it is only
slow, there will be one host more down than the policy allows. It is written to the audit trail.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if reason == "" {
				return usagef("--reason is missing: why will %s not come back?", args[0])
			}
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				st, err := k.State(cmd.Context(), s.group)
				if err != nil {
					return err
				}
				h, ok := st.Holder(args[0])
				if !ok {
					return withExit(exitNothing, fmt.Errorf("%q holds no slot of group %s", args[0], s.group))
				}
				if err := k.Release(cmd.Context(), s.group, h.Host, lock.Verdict{Outcome: lock.Forced, Reason: reason, Token: h.Token}); err != nil {
					return err
				}
				return a.done(fmt.Sprintf("the slot of %s in group %s is free", h.Host, s.group))
			})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why, in words; kept in the audit trail")
	return cmd
}

const groupSchema = "flipside.fleet-group/v1"

type groupDocument struct {
	Schema   string                  `json:"schema"`
	Group    string                  `json:"group"`
	Policy   lock.Policy             `json:"policy"`
	Holders  []lock.Holder           `json:"holders"`
	Queue    []lock.Waiter           `json:"queue"`
	Failures map[string]lock.Failure `json:"failures,omitempty"`
	Halts    map[string]lock.Halt    `json:"halts,omitempty"`
	Measured lock.Duration           `json:"measured,omitempty"`
	Tampered []string                `json:"tampered,omitempty"`
}

func groupDoc(schema, group string, st lock.State) groupDocument {
	d := groupDocument{schema, group, st.Policy, st.Holders, st.Queue, st.Failures, st.Halts, st.Measured, st.Tampered}
	if d.Holders == nil {
		d.Holders = []lock.Holder{}
	}
	if d.Queue == nil {
		d.Queue = []lock.Waiter{}
	}
	return d
}
