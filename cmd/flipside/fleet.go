package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/lock"
)

func (a *app) fleetCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "fleet",
		Short: "the cluster's reboot policy: set it, watch it, stop it",
		Args:  cobra.NoArgs,
		Long: `Fleet works on the reboot policy and state that a group of hosts shares.

Exit status: 0 done, 3 nothing to do, 5 something is halted (status), 7 etcd does not permit it, 1 otherwise.`,
	}
	s := a.semaphore(cmd)
	cmd.AddCommand(
		a.fleetStatus(s), a.fleetPlan(s), a.fleetHistory(s), a.fleetWatch(s), a.fleetPolicy(s),
		a.fleetPause(s), a.lockResume(s), a.fleetForceRelease(s), a.fleetServe(s), a.fleetImport(s),
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
			return s.with(func(k *lock.Keeper) error {
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
					docs = append(docs, groupDoc("", g, st))
					if !a.json {
						if i > 0 {
							fmt.Fprintln(a.stdout)
						}
						printGroup(a.stdout, g, st, time.Now())
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
	return &cobra.Command{
		Use:   "plan",
		Short: "forecast the order in which the hosts that wait will reboot, and when the last is done",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.with(func(k *lock.Keeper) error {
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
				if st.RebootTime() == 0 && len(st.Queue) > 0 {
					fmt.Fprintln(a.stdout, "nobody knows yet how long a reboot takes here; reboot_time in the policy says it until it is measured")
				}
				tw := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
				for i, t := range turns {
					fmt.Fprintf(tw, "%d\t%s\t%s\t%s\n", i+1, t.Host, t.To, t.At.Local().Format(time.DateTime))
				}
				tw.Flush()
				if n := len(turns); n > 0 {
					fmt.Fprintf(a.stdout, "the last of %d hosts is done about %s, if every reboot takes %s\n", n, turns[n-1].Done.Local().Format(time.DateTime), st.RebootTime().Round(time.Second))
				}
				for _, w := range never {
					fmt.Fprintf(a.stdout, "%s gets no turn as things are\n", w.Host)
				}
				if len(st.Queue) == 0 {
					fmt.Fprintln(a.stdout, "nobody waits")
				}
				return nil
			})
		},
	}
}

func (a *app) fleetHistory(s *semaphoreFlags) *cobra.Command {
	var last int
	cmd := &cobra.Command{
		Use:   "history",
		Short: "the audit trail: who, what, when, from where, why",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.with(func(k *lock.Keeper) error {
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
				tw := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
				for _, e := range entries {
					by := e.By
					if by == e.Host {
						by = ""
					}
					fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", e.Time.Local().Format(time.DateTime), e.What, e.Host, e.Version, e.Why, by)
				}
				return tw.Flush()
			})
		},
	}
	cmd.Flags().IntVarP(&last, "last", "n", 0, "only the last `N` entries")
	return cmd
}

func (a *app) fleetWatch(s *semaphoreFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "watch",
		Short: "print the state of a group whenever it changes",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.with(func(k *lock.Keeper) error {
				var printErr error
				err := k.Follow(cmd.Context(), s.group, func(st lock.State) bool {
					if a.json {
						printErr = json.NewEncoder(a.stdout).Encode(groupDoc("flipside.lock-status/v1", s.group, st)) // a line for each change
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
	for v, h := range st.Halts {
		line += fmt.Sprintf("; %s halted: %s", v, h.Reason)
	}
	_, err := fmt.Fprintln(w, line)
	return err
}

func (a *app) fleetPause(s *semaphoreFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "pause",
		Short: "let no further host reboot (sets max to 0)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.with(func(k *lock.Keeper) error {
				st, err := k.State(cmd.Context(), s.group)
				if err != nil {
					return err
				}
				if st.Policy.Max == 0 {
					return withExit(exitNothing, fmt.Errorf("group %s is paused already", s.group))
				}
				if err := k.SetMax(cmd.Context(), s.group, 0); err != nil {
					return err
				}
				return a.done(fmt.Sprintf("group %s is paused; it goes on with: flipside lock set-max --group %s %d", s.group, s.group, st.Policy.Max))
			})
		},
	}
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
			return s.with(func(k *lock.Keeper) error {
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

func (a *app) fleetPolicy(s *semaphoreFlags) *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "read, change or check the reboot policy of a group", Args: cobra.NoArgs}
	var why string
	get := &cobra.Command{
		Use:   "get",
		Short: "print the policy, in the form that set takes",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.with(func(k *lock.Keeper) error {
				st, err := k.State(cmd.Context(), s.group)
				if err != nil {
					return err
				}
				return a.printJSON(st.Policy)
			})
		},
	}
	set := &cobra.Command{
		Use:   "set FILE",
		Short: "replace the policy by that of a JSON or TOML file (- is standard input)",
		Args:  exactArgs(1, "the FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := a.readPolicy(args[0])
			if err != nil {
				return err
			}
			return s.with(func(k *lock.Keeper) error {
				if err := k.SetPolicy(cmd.Context(), s.group, p, why); err != nil {
					return err
				}
				return a.done("the policy of group " + s.group + " is set")
			})
		},
	}
	set.Flags().StringVar(&why, "reason", "", "why, in words; kept in the audit trail")
	check := &cobra.Command{
		Use:   "check FILE",
		Short: "check a policy without setting it, and say when its windows open",
		Args:  exactArgs(1, "the FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := a.readPolicy(args[0])
			if err != nil {
				return err
			}
			now := time.Now()
			st := p.Window(now)
			switch {
			case st.Open && st.Until.IsZero():
				return a.done("the policy is good; its window is always open")
			case st.Open:
				return a.done("the policy is good; its window is open until " + st.Until.Local().Format(time.DateTime))
			case st.Next.IsZero():
				return withExit(exitFailed, fmt.Errorf("the policy can be read, but no host will ever reboot: %s", st.Why))
			}
			return a.done("the policy is good; its window opens " + st.Next.Local().Format(time.DateTime))
		},
	}
	cmd.AddCommand(get, set, check)
	return cmd
}

// readPolicy reads a policy that a person has written. What it does not name has the default; what nobody knows is an error.
func (a *app) readPolicy(path string) (lock.Policy, error) {
	var data []byte
	var err error
	if path == "-" {
		data, err = io.ReadAll(io.LimitReader(a.stdin, 1<<20))
	} else {
		data, err = os.ReadFile(path)
	}
	if err != nil {
		return lock.Policy{}, fmt.Errorf("reading the policy: %w", err)
	}
	name := cmp.Or(strings.TrimPrefix(path, "-"), "standard input")
	if trimmed := bytes.TrimSpace(data); len(trimmed) == 0 || trimmed[0] != '{' {
		var m map[string]any
		if err := toml.Unmarshal(data, &m); err != nil {
			return lock.Policy{}, fmt.Errorf("reading the policy: %s: %w", name, err)
		}
		if data, err = json.Marshal(m); err != nil {
			return lock.Policy{}, fmt.Errorf("reading the policy: %s: %w", name, err)
		}
	}
	p := lock.DefaultPolicy()
	if err := json.Unmarshal(data, &p); err != nil {
		return lock.Policy{}, fmt.Errorf("reading the policy: %s: %w", name, err)
	}
	if unknown := p.Unknown(); len(unknown) > 0 {
		return lock.Policy{}, withHint(usagef("%s: unknown field %q in the policy", name, unknown[0]), "flipside fleet policy get prints the fields that are set")
	}
	if err := p.Check(); err != nil {
		return lock.Policy{}, fmt.Errorf("%s: %w", name, err)
	}
	return p, nil
}
