package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/bus"
	"github.com/flipside-linux/flipside/updater/control"
)

func (a *app) checkCommand() *cobra.Command {
	var forgive []string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "ask the update server now",
		Long: `Check makes flipsided ask the update server at once and prints what it said. If a release is offered and no gate is
against it, flipsided goes on to take it; "flipside update" waits for that.

Exit status: 0 a release was offered, 3 there is nothing to do, 4 one waits for a reboot, 5 a policy is against it, 1 the check failed,
7 not permitted.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := a.answered(cmd.Context(), control.Command{Action: control.Check, Forgive: forgive})
			if err != nil {
				return err
			}
			return a.outcome(st)
		},
	}
	cmd.Flags().StringSliceVar(&forgive, "forgive", nil, "give a `version` that failed or was taken back on this host another chance")
	return cmd
}

func (a *app) updateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "update",
		Short: "ask the update server now and follow the update until it waits for the reboot",
		Long: `Update makes flipsided ask the update server at once, and follows what comes of it until the new release is in place and
waits for the reboot, or until there is nothing to do.

Exit status: 4 a release is in place and waits for a reboot, 3 nothing to do, 1 the update failed, 5 a policy is against it, 7 not permitted.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := a.answered(cmd.Context(), control.Command{Action: control.Check})
			if err != nil {
				return err
			}
			var bar *progress
			if more := st.Phase == updater.Applying; more {
				err = a.ask(cmd.Context(), "watch", func(now updater.Status) bool {
					st = now
					if p := st.Progress; p != nil && p.Total > 0 {
						if bar == nil {
							bar = a.progress("release "+st.Update.Version, p.Total)
						}
						bar.Set(p.Done)
					}
					more = st.Phase == updater.Applying && !(st.LastError != "" && st.ErrorAt.After(st.LastCheck))
					return more
				})
				if bar != nil {
					bar.Done()
				}
				if err == nil && more {
					err = withHint(errors.New("flipsided ended before the release was in place"), "it goes on when it is started again")
				}
				if err != nil {
					return err
				}
			}
			return a.outcome(st)
		},
	}
}

// do tells the daemon to do something and returns the status after it. Whom the socket does not let may still be let by polkit, on the bus.
func (a *app) do(ctx context.Context, c control.Command) (updater.Status, error) {
	socket, err := a.controlSocket()
	if err != nil {
		return updater.Status{}, err
	}
	st, err := control.Do(ctx, socket, c)
	if a.mayAskBus(err) && !c.BelowFloor {
		var onBus error
		st, onBus = a.busClient().Do(ctx, c)
		if errors.Is(onBus, bus.ErrTaken) { // whom the socket lets give no orders may still look
			if now, err := a.now(ctx); err == nil {
				return now, nil
			}
		}
		if !errors.Is(onBus, control.ErrNotRunning) {
			return st, daemonError(onBus)
		}
	}
	return st, daemonError(err)
}

// follow is do for what takes its time: it gives the status after the order, and each that comes then, to yield until that returns false or the daemon ends, and returns
// the last one. With one connection for both, what an order ends the daemon with is not missed.
func (a *app) follow(ctx context.Context, c control.Command, yield func(updater.Status) bool) (st updater.Status, err error) {
	socket, err := a.controlSocket()
	if err != nil {
		return st, err
	}
	more := false
	look := func(now updater.Status) bool {
		st = now
		more = yield(now)
		return more
	}
	err = daemonError(control.Follow(ctx, socket, c, look))
	if errors.Is(err, control.ErrDenied) || errors.Is(err, control.ErrBusy) { // on the bus nobody can follow
		if st, err = a.do(ctx, c); err == nil {
			look(st)
		}
	}
	if err == nil && more { // nor with an older daemon
		if err = a.ask(ctx, "watch", look); errors.Is(err, control.ErrNotRunning) {
			err = nil
		}
	}
	if err == nil && more {
		err = daemonError(control.ErrNoAnswer)
	}
	return st, err
}

// mayAskBus says whether the daemon that does not let us on its socket, or has no place there, is worth asking on the bus. On the system's bus is the system's daemon, and no other that somebody has named.
func (a *app) mayAskBus(err error) bool {
	return (errors.Is(err, control.ErrDenied) || errors.Is(err, control.ErrBusy)) && (a.bus != "" || a.socket == "" && a.config == "")
}

func (a *app) busClient() bus.Client {
	f, ok := a.stdin.(*os.File)
	return bus.Client{Address: a.bus, Ask: ok && term.IsTerminal(int(f.Fd()))}
}

// answered tells the daemon to do something that ends in a check, and waits until its answer, and that of the download gates, is in.
func (a *app) answered(ctx context.Context, c control.Command) (updater.Status, error) {
	asked := time.Now()
	return a.follow(ctx, c, func(now updater.Status) bool {
		// The answer is in when the check is done and the next one is planned; gates that are being asked leave the phase idle.
		return now.LastCheck.Before(asked) || now.NextCheck.IsZero() || now.Asking
	})
}

// outcome prints where the host stands after a check and chooses the exit status.
func (a *app) outcome(st updater.Status) error {
	if a.json {
		if err := a.printJSON(st); err != nil {
			return err
		}
	} else {
		fmt.Fprintln(a.stdout, a.pen().wrap(st.Why, 0))
	}
	switch {
	case errored(st):
		return quiet(exitFailed)
	case st.Phase == updater.Armed || st.Phase == updater.Rebooting:
		return quiet(exitReboot)
	case st.Phase == updater.Applying:
		return nil
	}
	if st.Blocked {
		return quiet(exitBlocked)
	}
	return quiet(exitNothing)
}
