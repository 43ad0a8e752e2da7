package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/bus"
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
func (a *app) ask(ctx context.Context, method string, yield func(updater.Status) bool) error {
	socket, err := a.controlSocket()
	if err != nil {
		return err
	}
	return daemonError(control.Call(ctx, socket, control.Request{Method: method}, yield))
}

// now asks for the status once.
func (a *app) now(ctx context.Context) (st updater.Status, err error) {
	err = a.ask(ctx, "status", func(s updater.Status) bool { st = s; return true })
	return st, err
}

// daemonError gives what the daemon answered an exit code and says what to do.
func daemonError(err error) error {
	switch {
	case errors.Is(err, bus.ErrTaken):
		return withHint(err, `"flipside status" shows what came of it, once flipsided answers`)
	case errors.Is(err, control.ErrNotRunning):
		return withHint(err, "systemctl status flipsided says why; --socket or --config name another daemon")
	case errors.Is(err, control.ErrDenied):
		return withHint(withExit(exitPermitted, err), "run it as root, or let polkit allow the action (docs/dbus.md)")
	case errors.Is(err, control.ErrBusy):
		return withHint(withExit(exitBusy, err), "end what still watches; root and the daemon's user have places of their own")
	case errors.Is(err, control.ErrNoAnswer):
		return withHint(err, `"flipside status" shows what came of an order; systemctl status flipsided says why it ended`)
	case errors.Is(err, updater.ErrNothing):
		return withExit(exitNothing, err)
	case errors.Is(err, updater.ErrUnderWay):
		return withHint(withExit(exitBusy, err), `"flipside watch" shows how far it is`)
	case errors.Is(err, updater.ErrBelowFloor):
		return withHint(withExit(exitBlocked, err), `"flipside rollback --below-floor" goes back all the same; the floor stays where it is`)
	case errors.Is(err, control.ErrBadCommand):
		return &usageError{err}
	}
	return err
}

func (a *app) statusCommand() *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "what this host runs, what it does, and why it does not move",
		Args:  cobra.NoArgs,
		Long: `Status asks flipsided and prints one line of state, one line of why, and the details behind them: the slots, what every gate
says since when and until when, where that can be seen and what changes it, the last check and the last error.

Exit status: 0, or 4 if a release is in place and waits for a reboot.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if watch {
				return a.watch(cmd.Context())
			}
			st, err := a.now(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				err = a.printJSON(st)
			} else {
				printStatus(a.stdout, a.pen(), st, time.Now())
			}
			if err != nil {
				return err
			}
			return waitsForReboot(st)
		},
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, `go on and print every change, as "flipside watch" does`)
	return cmd
}

// waitsForReboot is the exit status of commands that only look.
func waitsForReboot(st updater.Status) error {
	if st.Phase == updater.Armed || st.Phase == updater.Rebooting {
		return quiet(exitReboot)
	}
	return nil
}

func (a *app) whyCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "why",
		Short: "why this host does not move, and what would change that",
		Args:  cobra.NoArgs,
		Long: `Why prints one line that says what the host does or why it does not move, and for each gate that is against the next step
since when, until when, where that can be seen and what changes it.

Exit status: 0 nothing stops it, 4 a release waits for a reboot, 5 a gate is against the download.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := a.now(cmd.Context())
			if err != nil {
				return err
			}
			var against []reboot.Answer
			for _, g := range st.Gates {
				if g.Verdict != reboot.Go && st.Blocked {
					against = append(against, g)
				}
			}
			if a.json {
				err = a.printJSON(struct {
					Schema   string          `json:"schema"`
					Why      string          `json:"why"`
					Phase    updater.Phase   `json:"phase"`
					Blocked  bool            `json:"blocked"`
					Gates    []reboot.Answer `json:"gates"`
					Warnings []string        `json:"warnings,omitempty"`
				}{"flipside.why/v1", st.Why, st.Phase, st.Blocked, append([]reboot.Answer{}, against...), st.Warnings})
			} else {
				s := a.pen()
				fmt.Fprintln(a.stdout, s.paint(bold, s.wrap(st.Why, 0)))
				printGates(a.stdout, s, "\n", against, time.Now())
				for _, w := range st.Warnings {
					fmt.Fprintf(a.stdout, "\n%s\n", s.wrap("warning: "+w, 0))
				}
			}
			if err != nil {
				return err
			}
			if err := waitsForReboot(st); err != nil {
				return err
			}
			if st.Blocked {
				return quiet(exitBlocked)
			}
			return nil
		},
	}
}

func printStatus(w io.Writer, s pen, st updater.Status, now time.Time) {
	state := green
	switch {
	case st.Phase == updater.Failing, errored(st):
		state = red
	case st.Blocked, st.Phase == updater.Armed, st.Phase == updater.Trial, st.Phase == updater.Rebooting:
		state = yellow
	}
	fmt.Fprintf(w, "%s on %s, %s\n", s.paint(bold, st.Version), st.Slot, s.paint(state, string(st.Phase)))
	fmt.Fprintln(w, s.wrap(st.Why, 0))
	printSlots(w, s, st)
	if len(st.Gates) > 0 {
		fmt.Fprintf(w, "\n%s\n", s.paint(bold, "Gates before the "+string(st.Stage)))
		printGates(w, s, "", st.Gates, now)
	}
	for _, version := range slices.Sorted(maps.Keys(st.Quarantine)) {
		f := st.Quarantine[version]
		until := "not tried again before " + f.Until.Local().Format(time.DateTime)
		if f.Held {
			until = "not taken again before somebody says so"
		}
		fmt.Fprintf(w, "\n%s\n  %s\n  %s\n", s.paint(bold, "Put aside: release "+version), s.wrap(when(f.Last, now)+": "+f.Reason, 2),
			s.wrap(until+" (flipside check --forgive "+version+")", 2))
	}
	fmt.Fprintln(w)
	for _, r := range facts(st, now) {
		fmt.Fprintf(w, "%s%s\n", s.paint(faint, pad(r[0], 18)), s.wrap(r[1], 18))
	}
}

func errored(st updater.Status) bool {
	return st.LastError != "" && !st.ErrorAt.Before(st.LastCheck)
}

func printSlots(w io.Writer, s pen, st updater.Status) {
	if len(st.Slots) == 0 {
		return
	}
	var rows [][]cell
	for _, slot := range st.Slots {
		var marks []string
		if slot.Running {
			marks = append(marks, "running")
		}
		if slot.Next {
			marks = append(marks, "boots next")
		}
		row := cells(plain, slot.Label, fmt.Sprint(slot.Priority), fmt.Sprint(slot.Tries), yesNo(slot.Successful), formatBytes(slot.Size), strings.Join(marks, ", "))
		row[5].look = cyan
		rows = append(rows, row)
	}
	table := &sheet{pen: s}
	table.line("")
	table.table([]string{"SLOT", "PRIORITY", "TRIES", "SUCCESSFUL", "SIZE", ""}, rows)
	table.print(w)
}

// facts are the lines at the end of a status.
func facts(st updater.Status, now time.Time) (rows [][2]string) {
	add := func(name, format string, args ...any) {
		rows = append(rows, [2]string{name, fmt.Sprintf(format, args...)})
	}
	if st.Channel != "" {
		channel := st.Channel
		if st.Pin != "" {
			channel += ", pinned to " + st.Pin
		}
		add("channel", "%s", channel)
	}
	if !st.LastCheck.IsZero() {
		answer := st.LastAnswer
		if errored(st) {
			answer = "failed"
		}
		add("last check", "%s: %s", when(st.LastCheck, now), answer)
	}
	if !st.NextCheck.IsZero() {
		add("next check", "%s", when(st.NextCheck, now))
	}
	for _, w := range st.Warnings {
		add("warning", "%s", w)
	}
	if st.LastError != "" {
		add("last error", "%s: %s", when(st.ErrorAt, now), st.LastError)
	}
	if u := st.LastUpdate; u != nil {
		outcome := "good"
		if !u.Good {
			outcome = "failed: " + u.Reason
		}
		add("last update", "%s: %s to %s, %s", when(u.At, now), u.From, u.To, outcome)
	}
	if st.Unsent > 0 {
		add("not yet reported", "%d event(s); the server has not acknowledged them", st.Unsent)
	}
	if st.Verdict != nil {
		add("semaphore", "%s", strings.TrimSuffix("has not yet been told how the last boot went: "+st.Verdict.Error, ": "))
	}
	return rows
}

// printGates prints what gates say, in columns that fit their names, each after this.
func printGates(w io.Writer, s pen, before string, gates []reboot.Answer, now time.Time) {
	width := 10
	for _, g := range gates {
		width = max(width, utf8.RuneCountInString(g.Gate))
	}
	for _, g := range gates {
		fmt.Fprint(w, before)
		printGate(w, s, g, now, width)
	}
}

// printGate prints what a gate says, and for one that does not say go all that helps to change it.
func printGate(w io.Writer, s pen, g reboot.Answer, now time.Time, width int) {
	indent := width + 13
	colour := map[reboot.Verdict]style{reboot.Go: green, reboot.Wait: yellow}[g.Verdict]
	fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf("  %s %s %s", pad(g.Gate, width), s.paint(cmp.Or(colour, red), pad(string(g.Verdict), 9)), s.wrap(g.Why, indent)), " "))
	if g.Verdict == reboot.Go {
		return
	}
	var details []string
	if !g.Since.IsZero() {
		details = append(details, "since "+when(g.Since, now))
	}
	if !g.Ask.IsZero() {
		details = append(details, "until "+when(g.Ask, now))
	}
	if g.Evidence != "" {
		details = append(details, "see "+g.Evidence)
	}
	if len(details) > 0 {
		fmt.Fprintf(w, "%*s%s\n", indent, "", s.paint(faint, s.wrap(strings.Join(details, "; "), indent)))
	}
	if g.Hint != "" {
		fmt.Fprintf(w, "%*s%s\n", indent, "", s.paint(cyan, "-> "+s.wrap(g.Hint, indent+3)))
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
	d := now.Sub(t).Round(time.Second)
	if d.Abs() >= time.Minute {
		d = d.Round(time.Minute) // as the daemon rounds it where it says why
	}
	switch {
	case d >= 0 && d < time.Minute:
		return fmt.Sprintf("%ds ago", int(d.Seconds()))
	case d < 0 && d > -time.Minute:
		return fmt.Sprintf("in %ds", int(-d.Seconds()))
	case d >= 0 && d < time.Hour:
		return fmt.Sprintf("%dm ago", int(d.Minutes()))
	case d < 0 && d > -time.Hour:
		return fmt.Sprintf("in %dm", int(-d.Minutes()))
	case d < 0 && d > -24*time.Hour:
		return fmt.Sprintf("%s (in %dh%02dm)", t.Local().Format("15:04"), int(-d.Hours()), int(-d.Minutes())%60)
	}
	return t.Local().Format(time.DateTime)
}
