package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/control"
)

func (a *app) checkCommand() *cobra.Command {
	var forgive []string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "ask the update server now",
		Long: `Check makes flipsided ask the update server at once and prints what it said. If a release is offered and no gate is
against it, flipsided goes on to take it; "flipside update" waits for that.

Exit status: 0 a release was offered, 3 there is nothing to do, 1 the check failed, 7 not permitted.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := a.checkNow(cmd.Context(), forgive)
			if err != nil {
				return err
			}
			return a.outcome(st)
		},
	}
	cmd.Flags().StringSliceVar(&forgive, "forgive", nil, "give a version that failed on this host another chance")
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
			st, err := a.checkNow(cmd.Context(), nil)
			if err != nil {
				return err
			}
			var bar *progress
			if st.Phase == updater.Applying {
				err = a.ask(cmd.Context(), control.Request{Method: "watch"}, func(now updater.Status) bool {
					st = now
					if p := st.Progress; p != nil && p.Total > 0 {
						if bar == nil {
							bar = a.progress("release "+st.Update.Version, p.Total)
						}
						bar.Set(p.Done)
					}
					return st.Phase == updater.Applying && !(st.LastError != "" && st.ErrorAt.After(st.LastCheck))
				})
				if bar != nil {
					bar.Done()
				}
				if err != nil {
					return err
				}
			}
			return a.outcome(st)
		},
	}
}

// checkNow asks for a check and waits until its answer, and that of the download gates, is in.
func (a *app) checkNow(ctx context.Context, forgive []string) (updater.Status, error) {
	asked := time.Now()
	if err := a.ask(ctx, control.Request{Method: "check", Forgive: forgive}, func(updater.Status) bool { return true }); err != nil {
		return updater.Status{}, err
	}
	var st updater.Status
	err := a.ask(ctx, control.Request{Method: "watch"}, func(now updater.Status) bool {
		st = now
		// The answer is in when the check is done and the next one is planned; gates that are being asked leave the phase idle.
		return st.LastCheck.Before(asked) || st.NextCheck.IsZero() || st.Asking
	})
	if err != nil {
		return st, err
	}
	if st.LastCheck.Before(asked) {
		return st, errors.New("flipsided stopped before it had an answer")
	}
	return st, nil
}

// outcome prints where the host stands after a check and chooses the exit status.
func (a *app) outcome(st updater.Status) error {
	if a.json {
		if err := a.printJSON(st); err != nil {
			return err
		}
	} else {
		fmt.Fprintln(a.stdout, st.Why)
	}
	switch {
	case st.LastError != "" && !st.ErrorAt.Before(st.LastCheck):
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
