package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/control"
)

func (a *app) planCommand() *cobra.Command {
	var channel string
	cmd := &cobra.Command{
		Use:   "plan",
		Short: "what an update would do now: version, size, bytes to fetch, when it may reboot",
		Args:  cobra.NoArgs,
		Long: `Plan asks the update server what it would offer, and the gates what they would say. It writes nothing, fetches nothing of the
release and takes no place in the queue of the semaphore.

Exit status: 0 the update would be taken, 3 there is none, 4 it is in place already, 5 a gate is against it, 7 not permitted.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.plan(cmd, channel) },
	}
	cmd.Flags().StringVar(&channel, "channel", "", "what the offers of this `channel` would do")
	return cmd
}

func (a *app) plan(cmd *cobra.Command, channel string) error {
	socket, err := a.controlSocket()
	if err != nil {
		return err
	}
	p, err := control.Plan(cmd.Context(), socket, channel)
	if a.mayAskBus(err) {
		if onBus, e := a.busClient().Plan(cmd.Context(), channel); !errors.Is(e, control.ErrNotRunning) {
			p, err = onBus, e
		}
	}
	if err != nil {
		return daemonError(err)
	}
	if a.json {
		err = a.printJSON(p)
	} else {
		printPlan(a.stdout, a.pen(), p, time.Now())
	}
	if err != nil {
		return err
	}
	_, against := reboot.First(p.Download)
	switch {
	case p.Offer == nil:
		return quiet(exitNothing)
	case p.Offer.InPlace:
		return quiet(exitReboot)
	case against:
		return quiet(exitBlocked)
	}
	return nil
}

func printPlan(w io.Writer, s pen, p updater.Plan, now time.Time) {
	if p.Offer == nil {
		fmt.Fprintln(w, s.wrap(fmt.Sprintf("nothing to do on channel %s: %s", p.Channel, p.Reason), 0))
		return
	}
	o := p.Offer
	fmt.Fprintf(w, "%s -> %s  %s\n", p.Version, s.paint(bold, o.Version), s.paint(faint, "channel "+p.Channel+describeOffer(o)))
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "  %s%s\n", s.paint(faint, pad(name, 10)), s.wrap(fmt.Sprintf(format, args...), 12))
	}
	row("from", "slot %s, which stays as it is", p.Slot)
	if o.InPlace {
		row("to", "slot %s, where it is in place already", o.ToSlot)
	} else {
		row("to", "slot %s, whose release is written over", o.ToSlot)
		row("fetch", "%s of %s", formatBytes(o.Fetch), formatBytes(o.Size))
	}
	if a, stop := reboot.First(p.Download); stop && !o.InPlace {
		row("download", "not now: %s", a.Why)
	} else if !o.InPlace {
		row("download", "at once")
	}
	switch a, stop := reboot.First(p.Reboot); {
	case !stop:
		row("reboot", "as soon as the release is in place")
	case p.Earliest.IsZero():
		row("reboot", "not before this changes: %s", a.Why)
	default:
		row("reboot", "not before %s: %s", when(p.Earliest, now), a.Why)
	}
	stage := func(name string, answers []reboot.Answer) {
		if len(answers) == 0 {
			return
		}
		fmt.Fprintf(w, "\n%s\n", s.paint(bold, "Gates before the "+name))
		printGates(w, s, "", answers, now)
	}
	stage("download", p.Download)
	stage("reboot", p.Reboot)
}

func describeOffer(o *updater.PlannedUpdate) string {
	text := ""
	if o.Delta {
		text += ", a delta"
	}
	if o.Downgrade {
		text += ", older than what runs"
	}
	if o.Floor {
		text += ", a version on the way that is not skipped"
	}
	return text
}
