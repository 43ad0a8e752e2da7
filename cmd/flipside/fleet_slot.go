package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/updater/config"
	daemon "github.com/flipside-linux/flipside/updater/host"
)

func (a *app) fleetAcquire(s *semaphoreFlags) *cobra.Command {
	var c lock.Claim
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "acquire",
		Short: "take a slot for a host, or a place in the queue",
		Args:  cobra.NoArgs,
		Long: `Acquire asks for a slot and prints where the host stands. With --wait it waits until the slot is granted. A host that does not
get a slot keeps its place in the queue for some minutes; asking again keeps it longer.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := s.host(&c.Host); err != nil {
				return err
			}
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				c.Group = s.group
				st, err := a.acquire(cmd.Context(), k, c, wait)
				if err == nil && st.Granted {
					// Nobody knows what the caller does with it: from now on only a release frees it.
					err = k.Mark(cmd.Context(), c.Group, c.Host, lock.Mark{Phase: lock.Rebooting, Token: st.Token})
				}
				if err != nil {
					return err
				}
				if a.json {
					err = a.printJSON(struct {
						Schema string `json:"schema"`
						Group  string `json:"group"`
						Host   string `json:"host"`
						lock.Standing
					}{"flipside.fleet-standing/v1", c.Group, c.Host, st})
				} else {
					fmt.Fprintln(a.stdout, standingLine(c, st))
				}
				if err == nil && !st.Granted {
					err = quiet(exitBlocked)
				}
				return err
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Host, "host", "", "`name` of the host (default this host's)")
	f.StringVar(&c.From, "from", "", "`version` that runs")
	f.StringVar(&c.To, "to", "", "`version` that the reboot leads to")
	f.StringVar(&c.Reason, "reason", "", "why, in words")
	f.StringVar(&c.Zone, "zone", "", "failure domain of the host")
	f.StringVar(&c.Class, "class", "", "priority class")
	f.DurationVar(&wait, "wait", 0, "how long to wait for the slot")
	return cmd
}

func (s *semaphoreFlags) host(host *string) error {
	if *host != "" {
		return nil
	}
	name, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("looking for this host's name: %w", err)
	}
	*host = name
	return nil
}

func (a *app) acquire(ctx context.Context, k *lock.Keeper, c lock.Claim, patience time.Duration) (lock.Standing, error) {
	limit, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	last := ""
	for {
		st, err := k.Request(ctx, c)
		if err != nil || st.Granted || st.Halted != "" || patience <= 0 {
			return st, err
		}
		if line := standingLine(c, st); line != last && !a.json {
			fmt.Fprintln(a.stderr, line)
			last = line
		}
		err = k.Wait(limit, c)
		switch {
		case ctx.Err() != nil:
			return st, errors.Join(ctx.Err(), k.Release(context.WithoutCancel(ctx), c.Group, c.Host, lock.Verdict{Outcome: lock.Withdrawn, Reason: "interrupted"}))
		case limit.Err() != nil:
			return st, nil
		case err != nil:
			return st, err
		}
	}
}

func standingLine(c lock.Claim, st lock.Standing) string {
	switch {
	case st.Halted != "":
		return fmt.Sprintf("%s: release %s is halted for group %s: %s", c.Host, c.To, c.Group, st.Halted)
	case st.Granted:
		return fmt.Sprintf("%s holds a slot of group %s, token %d", c.Host, c.Group, st.Token)
	}
	line := fmt.Sprintf("%s waits at position %d for a slot of group %s", c.Host, st.Position, c.Group)
	if st.Blocked != "" {
		line += ": " + st.Blocked
	}
	var names []string
	for _, h := range st.Holders {
		names = append(names, h.Host)
	}
	if len(names) > 0 {
		line += fmt.Sprintf(" (%d of %d held by %s)", len(names), st.Max, strings.Join(names, ", "))
	}
	return line
}

func (a *app) fleetRelease(s *semaphoreFlags) *cobra.Command {
	var host, verdict string
	var v lock.Verdict
	outcomes := []lock.Outcome{lock.Healthy, lock.Failed, lock.Cancelled}
	cmd := &cobra.Command{
		Use:   "release",
		Short: "give a host's slot, or its place in the queue, back",
		Args:  cobra.NoArgs,
		Long: `Release gives back what acquire has taken under the same name, by default that of the machine. The slot of the host's own daemon has another name,
which flipside fleet status shows, and the daemon gives it back itself. Ends with 3 if there was nothing to give back.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := s.host(&host); err != nil {
				return err
			}
			if v.Outcome = lock.Outcome(verdict); !slices.Contains(outcomes, v.Outcome) {
				return usagef("--verdict %q is not one of healthy, failed, cancelled", verdict)
			}
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				st, err := k.State(cmd.Context(), s.group)
				if err != nil {
					return err
				}
				if err := k.Release(cmd.Context(), s.group, host, v); err != nil {
					return err
				}
				if v.Outcome != lock.Failed && !has(st, host) { // a failure counts without a slot too
					return a.nothingReleased(st, s.group, host)
				}
				return a.done(fmt.Sprintf("%s holds no slot of group %s any more", host, s.group))
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&host, "host", "", "`name` of the host (default this host's)")
	f.StringVar(&verdict, "verdict", string(lock.Cancelled), "what became of the reboot: healthy, failed, cancelled")
	f.StringVar(&v.Version, "version", "", "`version` that was tried")
	f.StringVar(&v.Reason, "reason", "", "why, in words")
	f.Int64Var(&v.Token, "token", 0, "only release the grant with this `token`")
	return cmd
}

// has reports whether a host has a slot, or waits for one.
func has(st lock.State, host string) bool {
	_, held := st.Holder(host)
	return held || slices.ContainsFunc(st.Queue, func(w lock.Waiter) bool { return w.Host == host })
}

// nothingReleased says that a host had nothing to give back, and who it was that was meant, perhaps: the daemon goes by another name than the machine's.
func (a *app) nothingReleased(st lock.State, group, host string) error {
	err := withExit(exitNothing, fmt.Errorf("%s holds no slot of group %s, and does not wait for one", host, group))
	c, loadErr := config.Load(a.config)
	if loadErr != nil {
		return err
	}
	if name, nameErr := daemon.LockName(c); nameErr == nil && name != host && has(st, name) {
		return withHint(err, "flipsided of this host goes by %s there: --host %s", name, name)
	}
	return err
}
