package host

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/config"
)

// gatekeeper asks the host's gates, and speaks with the cluster's semaphore if there is one.
type gatekeeper struct {
	download  []reboot.Gate
	panel     *reboot.Panel  // before the reboot
	before    reboot.Panel   // remembers since when a gate has been against a download
	target    *target        // holds the pin
	semaphore lock.Semaphore // nil: this host reboots without asking anybody
	group     string
	zone      string
	class     string
	host      string
	token     atomic.Int64 // of the last grant
	bootID    string
	version   string
	timeout   time.Duration
	now       func() time.Time
}

// lockName is what a host is called in the semaphore: for people by its alias, and for certain by its machine id, because two hosts with the same
// alias must not share a slot.
func lockName(alias, machineID string) string {
	name := alias + "-" + machineID[:min(8, len(machineID))]
	if alias == "" || lock.CheckHost(name) != nil {
		return machineID
	}
	return name
}

// LockName is what the host that c configures is called in the semaphore.
func LockName(c config.Config) (string, error) {
	id, err := readLine("machine id", c.Host.MachineID)
	if err != nil {
		return "", err
	}
	return lockName(c.Host.Alias, id), nil
}

func (g *gatekeeper) claim(o omaha.Offer) lock.Claim {
	return lock.Claim{
		Group: g.group, Host: g.host, BootID: g.bootID, From: g.version, To: o.Version,
		Zone: g.zone, Class: g.class, Reason: fmt.Sprintf("update from %s to %s", g.version, o.Version),
	}
}

// gate is the semaphore as the last gate before a reboot.
func (g *gatekeeper) gate(o omaha.Offer) *reboot.Semaphore {
	return &reboot.Semaphore{Lock: g.semaphore, Claim: g.claim(o)}
}

func (g *gatekeeper) Ask(ctx context.Context, stage updater.Stage, o omaha.Offer, waive bool) updater.GatesAnswered {
	if stage == updater.BeforeDownload {
		ev := g.askDownload(ctx, o)
		g.before.Remember(g.now(), ev.Answers)
		return ev
	}
	ev := updater.GatesAnswered{Stage: stage}
	panel := g.panel
	if waive {
		panel = &reboot.Panel{Gates: passedOver(panel.Gates), Last: passedOver(panel.Last), Limit: panel.Limit}
	}
	if g.semaphore == nil {
		ev.Answers = panel.Ask(ctx, g.now())
		return ev
	}
	gate := g.gate(o)
	ev.Answers = panel.Ask(ctx, g.now(), gate)
	ev.Halted = gate.Halted()
	g.token.Store(gate.Standing().Token)
	return ev
}

func (g *gatekeeper) askDownload(ctx context.Context, o omaha.Offer) updater.GatesAnswered {
	ev := updater.GatesAnswered{Stage: updater.BeforeDownload}
	_, pin := g.target.get()
	ev.Answers = append(reboot.Ask(ctx, g.now(), g.download), pinGate(pin, o))
	if g.semaphore == nil {
		return ev
	}
	// A release that the cluster has halted is not even fetched. If the cluster cannot be asked, fetching does no harm: it is asked again before the reboot.
	cluster, ok := g.semaphore.(interface {
		State(ctx context.Context, group string) (lock.State, error)
	})
	if !ok { // FleetLock does not tell
		return ev
	}
	ctx, cancel := context.WithTimeout(ctx, g.timeout)
	defer cancel()
	a := reboot.Answer{Gate: "halt", Verdict: reboot.Go}
	if st, err := cluster.State(ctx, g.group); err != nil {
		a.Why = "the semaphore cannot be asked; it will be before the reboot"
	} else if h, ok := st.Halts[o.Version]; ok {
		a.Verdict, a.Why, a.Since = reboot.Wait, fmt.Sprintf("release %s is halted for group %s: %s", o.Version, g.group, h.Reason), h.Since
		a.Hint, a.Evidence = fmt.Sprintf("flipside fleet resume --group %s %s", g.group, o.Version), "flipside fleet status --group "+g.group
		ev.Halted = h.Reason
	}
	ev.Answers = append(ev.Answers, a)
	return ev
}

func (g *gatekeeper) Changed(ctx context.Context, o omaha.Offer) error {
	if g.semaphore == nil {
		<-ctx.Done()
		return ctx.Err()
	}
	return g.semaphore.Wait(ctx, g.claim(o))
}

// Rebooting tells the cluster that this host goes down now. If that cannot be told, it does not go down.
func (g *gatekeeper) Rebooting(ctx context.Context, o omaha.Offer, waive bool) error {
	if g.semaphore == nil {
		if a, stop := reboot.First(g.panel.Local(ctx, g.now)); stop && !waive {
			return fmt.Errorf("%s: %s", a.Gate, a.Why)
		}
		return nil
	}
	mark, cancel := context.WithTimeout(ctx, g.timeout)
	defer cancel()
	if err := g.semaphore.Mark(mark, g.group, g.host, lock.Mark{Phase: lock.Rebooting, BootID: g.bootID, Token: g.token.Load()}); err != nil {
		return err
	}
	// The host's own gates once more, with nothing between them and the reboot: the semaphore may have taken its time.
	if a, stop := reboot.First(g.panel.Local(ctx, g.now)); stop && !waive {
		return fmt.Errorf("%s: %s", a.Gate, a.Why)
	}
	return nil
}

// Booted tells the cluster that the host is up again, not yet that it is well.
func (g *gatekeeper) Booted(ctx context.Context) error {
	if g.semaphore == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, g.timeout)
	defer cancel()
	err := g.semaphore.Mark(ctx, g.group, g.host, lock.Mark{Phase: lock.Booted, Version: g.version, BootID: g.bootID})
	if errors.Is(err, lock.ErrNotHeld) {
		return nil // a reboot that nobody asked for
	}
	return err
}

func (g *gatekeeper) Leave(ctx context.Context, reason string) error {
	return g.release(ctx, lock.Verdict{Outcome: lock.Cancelled, Reason: reason})
}

func (g *gatekeeper) Verdict(ctx context.Context, v updater.Verdict) error {
	lv := lock.Verdict{Outcome: lock.Failed, Version: v.Version, Reason: v.Reason}
	switch {
	case v.Cancelled:
		lv.Outcome = lock.Cancelled
	case v.Healthy:
		lv.Outcome = lock.Healthy
	}
	return g.release(ctx, lv)
}

// enrol leaves this host's key with its group, so that an owner can accept it before the host wants to reboot for the first time. It tries until the
// store answers.
func (g *gatekeeper) enrol(ctx context.Context) {
	k, ok := g.semaphore.(*lock.Keeper)
	if !ok {
		return
	}
	for wait := time.Second; ; wait = min(2*wait, 5*time.Minute) {
		if err := k.Enrol(ctx, g.group, g.host); err == nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

func (g *gatekeeper) release(ctx context.Context, v lock.Verdict) error {
	if g.semaphore == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, g.timeout)
	defer cancel()
	return g.semaphore.Release(ctx, g.group, g.host, v)
}
