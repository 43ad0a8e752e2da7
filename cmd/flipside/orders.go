package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/control"
)

// said prints where the host stands after an order, under a line that says what was done.
func (a *app) said(st updater.Status, format string, args ...any) error {
	if a.json {
		return a.printJSON(st)
	}
	fmt.Fprintf(a.stdout, format+"\n", args...)
	if st.Why != "" {
		fmt.Fprintln(a.stdout, a.pen().wrap(st.Why, 0))
	}
	return nil
}

// confirm asks on the terminal. Without one, and without --yes, the answer is no.
func (a *app) confirm(yes bool, what string) error {
	if yes {
		return nil
	}
	f, ok := a.stdin.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return withHint(usagef("%s: there is no terminal to ask on", what), "--yes goes ahead without asking")
	}
	fmt.Fprintf(a.stderr, "%s? [y/N] ", what)
	answer, _ := bufio.NewReader(f).ReadString('\n')
	if s := strings.ToLower(strings.TrimSpace(answer)); s != "y" && s != "yes" {
		return withExit(exitNothing, errors.New("not done: the answer was no"))
	}
	return nil
}

func (a *app) pauseCommand() *cobra.Command {
	var length time.Duration
	var until string
	cmd := &cobra.Command{
		Use:   "pause [REASON]",
		Short: "take no update and do not reboot, until resumed or for a time",
		Long: `Pause stops updates and reboots for updates on this host. What is being written is finished; it does not reboot. The pause
outlives restarts and reboots.

Exit status: 0, 7 not permitted.`,
		Example: "  flipside pause --for 2h \"the rack is being moved\"",
		RunE: func(cmd *cobra.Command, args []string) error {
			c := control.Command{Action: control.Pause, Reason: strings.Join(args, " ")}
			switch {
			case length < 0:
				return usagef("--for %s is in the past", length)
			case length > 0 && until != "":
				return usagef("--for and --until say the same; one is enough")
			case length > 0:
				c.Until = time.Now().Add(length)
			case until != "":
				var err error
				if c.Until, err = parseInstant(until, time.Now()); err != nil {
					return err
				}
			}
			st, err := a.do(cmd.Context(), c)
			if err != nil {
				return err
			}
			if c.Until.IsZero() {
				return a.said(st, "paused until \"flipside resume\"")
			}
			return a.said(st, "paused until %s", c.Until.Local().Format(time.DateTime))
		},
	}
	cmd.Flags().DurationVar(&length, "for", 0, "resume by itself after this `time`, such as 2h30m")
	cmd.Flags().StringVar(&until, "until", "", "resume by itself at this `time`: 18:00, \"2026-12-24 18:00\" or RFC 3339")
	return cmd
}

// parseInstant reads a time of day (the next such), a local date and time, or RFC 3339.
func parseInstant(text string, now time.Time) (time.Time, error) {
	if t, err := time.ParseInLocation("15:04", text, time.Local); err == nil {
		day := time.Date(now.Year(), now.Month(), now.Day(), t.Hour(), t.Minute(), 0, 0, time.Local)
		if !day.After(now) {
			day = day.AddDate(0, 0, 1)
		}
		return day, nil
	}
	for _, layout := range []string{"2006-01-02 15:04", time.DateTime, time.DateOnly} {
		if t, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return t, nil
		}
	}
	if t, err := time.Parse(time.RFC3339, text); err == nil {
		return t, nil
	}
	return time.Time{}, usagef("%q is not a time such as 18:00 or \"2026-12-24 18:00\"", text)
}

func (a *app) resumeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "resume",
		Short: "end a pause",
		Args:  cobra.NoArgs,
		Long: `Resume ends a pause, and asks the gates again.

Exit status: 0, 3 updates are not paused, 7 not permitted.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := a.do(cmd.Context(), control.Command{Action: control.Resume})
			if err != nil {
				return err
			}
			if !a.json { // the gates are being asked again, and until they have answered the status says what they said before
				fmt.Fprintln(a.stdout, "resumed; the gates are asked again: flipside why")
				return nil
			}
			return a.said(st, "resumed")
		},
	}
}

func (a *app) pinCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "pin [VERSION]",
		Short: "take only this version, or versions under it",
		Args:  cobra.MaximumNArgs(1),
		Long: `Pin keeps the host within a version: 1.2 takes 1.2.9 and not 1.3.0. Without VERSION the host stays on the version that it runs.
The pin is kept on the state partition, wins over update.pin in the configuration and is shown by "flipside config show --origin".

Exit status: 0, 7 not permitted.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			version := ""
			if len(args) == 1 {
				version = args[0]
			} else {
				st, err := a.now(cmd.Context())
				if err != nil {
					return err
				}
				version = st.Version
			}
			if version == "" {
				return usagef("the version is empty")
			}
			st, err := a.do(cmd.Context(), control.Command{Action: control.SetPin, Value: version})
			if err != nil {
				return err
			}
			return a.said(st, "pinned to %s", version)
		},
	}
}

func (a *app) unpinCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "unpin",
		Short: "take what the configuration lets the host take",
		Args:  cobra.NoArgs,
		Long: `Unpin forgets what "flipside pin" said. A pin in the configuration stays.

Exit status: 0, 7 not permitted.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := a.do(cmd.Context(), control.Command{Action: control.SetPin})
			if err != nil {
				return err
			}
			if st.Pin != "" {
				return a.said(st, "the configuration still pins this host to %s (update.pin)", st.Pin)
			}
			return a.said(st, "not pinned any more")
		},
	}
}

func (a *app) rollbackCommand() *cobra.Command {
	var yes, belowFloor bool
	cmd := &cobra.Command{
		Use:   "rollback",
		Short: "go back to the release on the other slot",
		Args:  cobra.NoArgs,
		Long: `Rollback makes the other slot boot next, on trial like every new release, and reboots when the gates let the host. If it does not
come up healthy, the boot loader comes back to the release that runs now. If a release waits for its reboot, that one is given up
instead. The release that is left is not taken again before "flipside check --forgive VERSION", or before a newer one is offered.

A release below the floor of releases ("flipside trust"), or of which this host does not know the number, is gone back to only with --below-floor. The
floor stays where it is: what is offered must still be above it.

Exit status: 0 given up, 4 the other slot boots next, 3 there is nothing to go back to, 5 it is below the floor, 8 something is under way, 7 not permitted.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := a.now(cmd.Context())
			if err != nil {
				return err
			}
			what := fmt.Sprintf("leave release %s and go back to the other slot", st.Version)
			if st.Phase == updater.Armed {
				what = fmt.Sprintf("give up release %s before it was ever booted", st.Update.Version)
			}
			if err := a.confirm(yes, what); err != nil {
				return err
			}
			st, err = a.follow(cmd.Context(), control.Command{Action: control.Rollback, BelowFloor: belowFloor}, func(now updater.Status) bool {
				return now.Phase == updater.Applying && now.Update != nil && now.Update.Rollback != ""
			})
			if err != nil {
				return err
			}
			if err := a.said(st, "done: %s", what); err != nil {
				return err
			}
			return waitsForReboot(st)
		},
	}
	cmd.Flags().BoolVar(&belowFloor, "below-floor", false, "also to a release that is older than this host accepts")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func (a *app) cancelCommand() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "cancel",
		Short: "give up what waits for its reboot",
		Args:  cobra.NoArgs,
		Long: `Cancel gives up the release that is in place and waits for its reboot: its slot does not boot, and the release is not taken again before
"flipside check --forgive VERSION", or before a newer one is offered. A rollback that waits for its reboot is undone: the host stays on its
release, and the other slot is what it falls back to, as before.

Exit status: 0 given up, 3 nothing waits for a reboot, 8 something is under way, 7 not permitted.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := a.now(cmd.Context())
			if err != nil {
				return err
			}
			// A person who gives a release up does not want it again with the next check, which is what Cancel, and the older daemon, would do.
			c, what := control.Command{Action: control.Rollback}, "give up the release that waits for its reboot"
			switch u := st.Update; {
			case st.Phase != updater.Armed || u == nil:
				c.Action = control.Cancel // the daemon says why not
			case u.Rollback != "":
				c.Action, what = control.Cancel, fmt.Sprintf("stay on release %s", st.Version)
			default:
				what = fmt.Sprintf("give up release %s before it was ever booted", u.Version)
			}
			if st.Phase == updater.Armed {
				if err := a.confirm(yes, what); err != nil {
					return err
				}
			}
			if st, err = a.do(cmd.Context(), c); err != nil {
				return err
			}
			return a.said(st, "done: %s", what)
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func (a *app) rebootCommand() *cobra.Command {
	var now, yes bool
	cmd := &cobra.Command{
		Use:   "reboot",
		Short: "reboot into the release that waits, through the gates",
		Args:  cobra.NoArgs,
		Long: `Reboot asks the reboot gates at once. If one is against it, it says which, and the host goes on waiting. With --now the host's own
gates are passed over: pause, strategy, window, people who are logged in. The cluster's semaphore is not: a host never reboots for an
update without it.

Exit status: 0 the host reboots, 3 no release waits for a reboot, 5 a gate is against it, 7 not permitted, 8 something is under way.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := control.Command{Action: control.Reboot}
			if now {
				c.Action = control.RebootNow
				if err := a.confirm(yes, "reboot now, whatever the host's own gates say"); err != nil {
					return err
				}
			}
			st, err := a.follow(cmd.Context(), c, func(now updater.Status) bool { return now.Asking })
			if err != nil {
				return err
			}
			if a.json {
				err = a.printJSON(st)
			} else {
				_, err = fmt.Fprintln(a.stdout, a.pen().wrap(st.Why, 0))
			}
			if err == nil && st.Blocked && st.Phase == updater.Armed {
				return quiet(exitBlocked)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&now, "now", false, "pass over the host's own gates; only the semaphore is asked")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}
