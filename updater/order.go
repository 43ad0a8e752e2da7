package updater

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
)

// Orders are what a person or a program may ask of a host beside a check. What cannot be done now is refused with one of these.
var (
	// ErrNothing means that there is nothing to do it to.
	ErrNothing = errors.New("there is nothing to do")
	// ErrUnderWay means that something is under way that must end first.
	ErrUnderWay = errors.New("not now")
	// ErrBelowFloor means that the other slot's release is below the floor of releases, or not known to be above it.
	ErrBelowFloor = errors.New("the release to go back to may be older than this host accepts")

	errAsking = fmt.Errorf("%w: the server, or a gate, is being asked", ErrUnderWay)
)

// A question to the server takes a second, and an order that comes just then waits for its end instead of being refused for a matter of chance.
const (
	askingPatience = 20 * time.Second
	askingPoll     = 50 * time.Millisecond
)

type (
	// Cancelled comes when somebody gives the update up that is in place and waits for its reboot.
	Cancelled struct{ By string }
	// WentBack comes when somebody wants the other slot's release again, with BelowFloor also one that is older than the host accepts.
	WentBack struct {
		By         string
		BelowFloor bool
	}
	// Hurried comes when somebody wants the reboot now: the gates are asked at once. With Waive, only the cluster's semaphore can still be against it.
	Hurried struct {
		By    string
		Waive bool
	}
)

func (Cancelled) event() {}
func (WentBack) event()  {}
func (Hurried) event()   {}

// Refuses says why an order cannot be carried out now; nil if it can.
func (c *Core) Refuses(ev Event) error {
	st := &c.State
	switch ev.(type) {
	case Cancelled:
		switch st.Phase {
		case Armed:
			return nil
		case Idle:
			return fmt.Errorf("%w: no release is in place that could be given up", ErrNothing)
		}
	case WentBack:
		switch st.Phase {
		case Armed:
			if st.Update.Rollback == "" {
				return nil
			}
			return fmt.Errorf("%w: %s is chosen to boot next already; \"flipside cancel\" undoes that", ErrNothing, st.Update.ToSlot)
		case Idle:
			if c.busy {
				return errAsking
			}
			if f := c.Facts.Slots[c.Facts.Other]; !f.Bootable() || !f.Successful {
				return fmt.Errorf("%w: slot %s holds no release that was ever good here", ErrNothing, c.Facts.Other)
			}
			return nil
		}
	case Hurried:
		switch st.Phase {
		case Armed:
			return nil
		case Idle:
			return fmt.Errorf("%w: no release waits for a reboot", ErrNothing)
		}
	default:
		return nil
	}
	return fmt.Errorf("%w: the host is %s", ErrUnderWay, st.Phase)
}

// cancelled gives the release up: its slot does not boot.
func (s *steps) cancelled(why string) {
	st := &s.c.State
	u := st.Update
	if u.Rollback != "" {
		s.note(Ordered, "the way back to release %s is given up: %s; %s stays what the host falls back to", u.Offer.Version, why, u.ToSlot)
		s.do(LeaveQueue{why})
		s.stay()
		return
	}
	s.note(Ordered, "release %s is given up: %s; slot %s is made unbootable", u.Offer.Version, why, u.ToSlot)
	s.do(Save{}) // if somebody put the release aside, that stays so even if this is cut short
	s.do(LeaveQueue{why})
	s.do(Disarm{u.ToSlot})
	s.setSlot(u.ToSlot, SlotFacts{})
	st.LastUpdate = &Done{From: u.FromVer, To: u.Offer.Version, At: s.now, Reason: why}
	st.LastAnswer = fmt.Sprintf("release %s, which was given up", u.Offer.Version)
	s.report(omaha.Failed(codeIgnoredPerPolicy))
	s.forget()
}

// stay ends a rollback that was armed and will not be booted: the host stays on its release, which therefore was not taken back.
func (s *steps) stay() {
	st := &s.c.State
	u := st.Update
	s.do(Stay{u.ToSlot, u.BootID != s.c.Facts.BootID})
	s.setSlot(u.ToSlot, SlotFacts{Priority: 1, Successful: true})
	delete(st.Failures, u.FromVer)
	s.forget()
}

// unknown stands for the version of a release that this state does not know.
const unknown = "(unknown)"

// wentBack makes the other slot boot next, on trial, and puts the release that is left aside until somebody forgives it.
func (s *steps) wentBack(by string, belowFloor bool) {
	c := s.c
	st := &c.State
	why := "taken back by " + by
	if st.Phase == Armed {
		s.heldBack(st.Update.Offer.Version, why)
		s.cancelled(why)
		return
	}
	s.heldBack(c.Facts.Version, why)
	other := cmp.Or(st.Holds[c.Facts.Other], unknown)
	if u := st.LastUpdate; other == unknown && u != nil && u.Good && u.To == c.Facts.Version && u.From != "" {
		other = u.From
	}
	st.Update = &Update{
		Offer: omaha.Offer{Version: other}, FromSlot: c.Facts.Running, FromVer: c.Facts.Version, ToSlot: c.Facts.Other,
		Started: s.now, BootID: c.Facts.BootID, Rollback: by, BelowFloor: belowFloor,
	}
	s.enter(Applying)
	s.do(Save{})
	also := ""
	if belowFloor {
		also = ", even if it is older than this host accepts"
	}
	s.note(Ordered, "going back from release %s to release %s on %s: asked for by %s%s", c.Facts.Version, other, c.Facts.Other, by, also)
	s.begin(Arm{})
}

// heldBack puts a version aside until somebody forgives it.
func (s *steps) heldBack(version, why string) {
	st := &s.c.State
	if st.Failures == nil {
		st.Failures = map[string]Failure{}
	}
	f := st.Failures[version]
	f.Count++
	f.Reason, f.Last, f.Held = why, s.now, true
	st.Failures[version] = f
}

func (s *steps) hurried(ev Hurried) {
	s.c.waive = s.c.waive || ev.Waive
	if ev.Waive {
		s.note(Ordered, "%s wants the reboot now; only the semaphore is still asked", ev.By)
	}
	s.c.gatesDue = s.now
	s.again()
	s.wake()
}

// datedBy gives answers that do not say since when they are so the time at which the same gate first gave that answer.
func datedBy(before, answers []reboot.Answer, now time.Time) []reboot.Answer {
	for i := range answers {
		a := &answers[i]
		if a.Verdict == reboot.Go || !a.Since.IsZero() {
			continue
		}
		a.Since = now
		for _, b := range before {
			if b.Gate == a.Gate && b.Verdict == a.Verdict && !b.Since.IsZero() {
				a.Since = b.Since
			}
		}
	}
	return answers
}

// order carries an order out, or says why not.
func (e *Engine) order(ctx context.Context, ev Event) error {
	for end := time.Now().Add(askingPatience); ; {
		var refused error
		err := e.do(ctx, func() []Effect {
			if refused = e.Core.Refuses(ev); refused != nil {
				return nil
			}
			return e.Core.Step(time.Now(), ev)
		})
		if err != nil || refused != errAsking || time.Now().After(end) {
			return errors.Join(err, refused)
		}
		select {
		case <-ctx.Done():
			return refused
		case <-time.After(askingPoll):
		}
	}
}

// Cancel gives up the release that is in place and waits for its reboot.
func (e *Engine) Cancel(ctx context.Context, by string) error { return e.order(ctx, Cancelled{by}) }

// GoBack makes the other slot boot next, and reboots when the gates let the host. A release that waits for its reboot is given up instead.
// With belowFloor it also goes back to a release that is older than the host accepts.
func (e *Engine) GoBack(ctx context.Context, by string, belowFloor bool) error {
	return e.order(ctx, WentBack{by, belowFloor})
}

// RebootNow asks the reboot gates at once; with waive only the semaphore.
func (e *Engine) RebootNow(ctx context.Context, by string, waive bool) error {
	return e.order(ctx, Hurried{by, waive})
}

// Reconsider asks the gates again, because one of them was changed by hand.
func (e *Engine) Reconsider(ctx context.Context) error {
	return e.do(ctx, func() []Effect {
		c := e.Core
		if c.State.Phase == Idle && len(c.answers) > 0 {
			if _, stop := reboot.First(c.answers); stop {
				return c.Step(time.Now(), CheckNow{"a gate that was changed"})
			}
			return nil
		}
		return c.Step(time.Now(), GatesChanged{})
	})
}
