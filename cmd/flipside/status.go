package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/control"
)

// controlSocket is where the daemon listens: what was asked for, or what its configuration says.
func (a *app) controlSocket() (string, error) {
	if a.socket != "" {
		return a.socket, nil
	}
	c, err := config.Load(a.config)
	if err != nil && a.config == "" {
		return config.Default().Socket(), nil // a daemon that runs can be asked also while its configuration is being mended
	}
	if err != nil {
		return "", err
	}
	return c.Socket(), nil
}

// ask sends one request to the daemon and gives its answers to yield.
func (a *app) ask(ctx context.Context, req control.Request, yield func(updater.Status) bool) error {
	socket, err := a.controlSocket()
	if err != nil {
		return err
	}
	err = control.Call(ctx, socket, req, yield)
	switch {
	case errors.Is(err, control.ErrNotRunning):
		return withHint(err, "systemctl status flipsided says why; --socket or --config name another daemon")
	case errors.Is(err, control.ErrDenied):
		return withHint(withExit(exitPermitted, err), "run it as root")
	}
	return err
}

func (a *app) statusCommand() *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "what this host runs, what it does, and why it does not move",
		Args:  cobra.NoArgs,
		Long: `Status asks flipsided and prints one line of state, one line of why, and the details behind them.

Exit status: 0, or 4 if a release is in place and waits for a reboot.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			method := "status"
			if watch {
				method = "watch"
			}
			var last updater.Status
			var printErr error
			err := a.ask(cmd.Context(), control.Request{Method: method}, func(st updater.Status) bool {
				last = st
				if a.json {
					printErr = a.printJSON(st)
				} else {
					if watch {
						fmt.Fprintf(a.stdout, "%s  %s\n", time.Now().Format("15:04:05"), st.Why)
						return true
					}
					printStatus(a.stdout, st, time.Now())
				}
				return printErr == nil
			})
			if err := errors.Join(err, printErr); err != nil {
				return err
			}
			if last.Phase == updater.Armed || last.Phase == updater.Rebooting {
				return quiet(exitReboot)
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on and print every change")
	return cmd
}

func printStatus(w io.Writer, st updater.Status, now time.Time) {
	fmt.Fprintf(w, "%s on %s, %s\n", st.Version, st.Slot, st.Phase)
	fmt.Fprintf(w, "%s\n", st.Why)
	if len(st.Slots) > 0 {
		fmt.Fprintln(w)
		tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(tw, "SLOT\tPRIORITY\tTRIES\tSUCCESSFUL\tSIZE\t")
		for _, s := range st.Slots {
			var marks []string
			if s.Running {
				marks = append(marks, "running")
			}
			if s.Next {
				marks = append(marks, "boots next")
			}
			fmt.Fprintf(tw, "%s\t%d\t%d\t%s\t%s\t%s\n", s.Label, s.Priority, s.Tries, yesNo(s.Successful), formatBytes(s.Size), strings.Join(marks, ", "))
		}
		tw.Flush()
	}
	if len(st.Gates) > 0 {
		fmt.Fprintf(w, "\nGates before the %s\n", st.Stage)
		for _, g := range st.Gates {
			printGate(w, g, now)
		}
	}
	for version, f := range st.Quarantine {
		fmt.Fprintf(w, "\nRelease %s failed here %d time(s), last %s: %s\n  not tried again before %s\n", version, f.Count, when(f.Last, now), f.Reason, f.Until.Local().Format(time.DateTime))
	}
	fmt.Fprintln(w)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if !st.LastCheck.IsZero() {
		answer := st.LastAnswer
		if st.LastError != "" && !st.ErrorAt.Before(st.LastCheck) {
			answer = "failed"
		}
		fmt.Fprintf(tw, "last check\t%s: %s\n", when(st.LastCheck, now), answer)
	}
	if !st.NextCheck.IsZero() {
		fmt.Fprintf(tw, "next check\t%s\n", when(st.NextCheck, now))
	}
	if st.LastError != "" {
		fmt.Fprintf(tw, "last error\t%s: %s\n", when(st.ErrorAt, now), st.LastError)
	}
	if u := st.LastUpdate; u != nil {
		outcome := "good"
		if !u.Good {
			outcome = "failed: " + u.Reason
		}
		fmt.Fprintf(tw, "last update\t%s: %s to %s, %s\n", when(u.At, now), u.From, u.To, outcome)
	}
	if st.Unsent > 0 {
		fmt.Fprintf(tw, "not yet reported\t%d event(s); the server has not acknowledged them\n", st.Unsent)
	}
	if st.Verdict != nil {
		fmt.Fprintf(tw, "%s\n", strings.TrimSuffix("semaphore\thas not yet been told how the last boot went: "+st.Verdict.Error, ": "))
	}
	tw.Flush()
}

func printGate(w io.Writer, g reboot.Answer, now time.Time) {
	line := fmt.Sprintf("  %-10s %-8s %s", g.Gate, g.Verdict, g.Why)
	if !g.Since.IsZero() {
		line += ", since " + when(g.Since, now)
	}
	if !g.Ask.IsZero() && g.Verdict != reboot.Go {
		line += ", asked again " + when(g.Ask, now)
	}
	fmt.Fprintln(w, strings.TrimRight(line, " "))
	if g.Hint != "" && g.Verdict != reboot.Go {
		fmt.Fprintf(w, "  %-10s %-8s -> %s\n", "", "", g.Hint)
	}
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// when prints an instant as people say it.
func when(t, now time.Time) string {
	d := now.Sub(t)
	switch {
	case d >= 0 && d < time.Minute:
		return fmt.Sprintf("%ds ago", int(d.Seconds()))
	case d < 0 && d > -time.Minute:
		return fmt.Sprintf("in %ds", int(-d.Seconds()))
	case d >= 0 && d < time.Hour:
		return fmt.Sprintf("%dm ago", int(d.Minutes()))
	case d < 0 && d > -time.Hour:
		return fmt.Sprintf("in %dm", int(-d.Minutes()))
	}
	return t.Local().Format(time.DateTime)
}
