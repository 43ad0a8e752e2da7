package host

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
)

// waived asks a gate and goes on whatever it says: somebody who may do so wants the reboot now.
type waived struct{ reboot.Gate }

func (g waived) Ask(ctx context.Context, now time.Time) reboot.Answer {
	a := g.Gate.Ask(ctx, now)
	if a.Verdict != reboot.Go {
		a = reboot.Answer{Verdict: reboot.Go, Why: "passed over by order: " + a.Why}
	}
	return a
}

func passedOver(gates []reboot.Gate) (list []reboot.Gate) {
	for _, g := range gates {
		list = append(list, waived{g})
	}
	return list
}

// Forecast implements updater.Gatekeeper. Nothing is claimed from the semaphore, and nobody who is logged in is warned.
func (g *gatekeeper) Forecast(ctx context.Context, stage updater.Stage, o omaha.Offer) []reboot.Answer {
	if stage == updater.BeforeDownload {
		return g.askDownload(ctx, o).Answers
	}
	quiet := &reboot.Panel{Gates: g.panel.Gates, Limit: g.panel.Limit}
	for _, gate := range g.panel.Last {
		if u, ok := gate.(*reboot.Users); ok {
			quiet.Gates = append(slices.Clone(quiet.Gates), &reboot.Users{Logind: u.Logind, Grace: u.Grace, Tell: func(string, string) error { return nil }})
		}
	}
	answers := quiet.Ask(ctx, g.now())
	if g.semaphore == nil {
		return answers
	}
	cluster, ok := g.semaphore.(interface {
		State(ctx context.Context, group string) (lock.State, error)
	})
	if !ok {
		return append(answers, reboot.Answer{Gate: "semaphore", Verdict: reboot.Unknown, Why: "it says nothing before it is asked for a slot", Hint: "it is asked before the reboot", Evidence: "lock.fleetlock"})
	}
	ctx, cancel := context.WithTimeout(ctx, g.timeout)
	defer cancel()
	st, err := cluster.State(ctx, g.group)
	if err != nil {
		return append(answers, reboot.Answer{Gate: "semaphore", Verdict: reboot.Unknown, Why: fmt.Sprintf("the semaphore of group %s cannot be asked: %v", g.group, err),
			Hint: "it is asked again before the reboot", Evidence: "flipside fleet status --group " + g.group})
	}
	return append(answers, g.outlook(st, o))
}

// outlook says what the semaphore would answer if this host queued up now.
func (g *gatekeeper) outlook(st lock.State, o omaha.Offer) reboot.Answer {
	a := reboot.Answer{Gate: "semaphore", Verdict: reboot.Go, Evidence: "flipside fleet status --group " + g.group}
	if h, ok := st.Halts[o.Version]; ok {
		a.Verdict, a.Since, a.Why = reboot.Wait, h.Since, fmt.Sprintf("release %s is halted for group %s: %s", o.Version, g.group, h.Reason)
		a.Hint = fmt.Sprintf("flipside fleet resume --group %s %s", g.group, o.Version)
		return a
	}
	if _, ok := st.Holder(g.host); ok {
		a.Why = "holds a slot of group " + g.group
		return a
	}
	free := st.Policy.Max - len(st.Holders)
	if free > 0 && len(st.Queue) == 0 {
		a.Why = fmt.Sprintf("%d of %d slots of group %s are free", free, st.Policy.Max, g.group)
		return a
	}
	a.Verdict, a.Hint = reboot.Wait, "its turn comes by itself; flipside fleet policy edit lets more hosts be down at once"
	a.Why = fmt.Sprintf("%d of %d slots of group %s are held, and %d hosts wait", len(st.Holders), st.Policy.Max, g.group, len(st.Queue))
	with := st
	with.Queue = append(append([]lock.Waiter(nil), st.Queue...), lock.Waiter{Claim: g.claim(o), Since: g.now(), Arrival: math.MaxInt64})
	turns, _ := with.Forecast(g.now())
	for _, t := range turns {
		if t.Host == g.host {
			a.Ask = t.At
		}
	}
	return a
}
