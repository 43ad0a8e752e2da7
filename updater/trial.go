package updater

import (
	"errors"
	"fmt"
	"time"

	"github.com/flipside-linux/flipside/omaha"
)

func (s *steps) trial() {
	u := s.c.State.Update
	applying := s.c.State.Phase == Applying // then the slot may still hold what was there before
	s.enter(Trial)
	u.BootID = s.c.Facts.BootID
	if u.Rollback != "" || applying {
		u.Offer.Version = s.c.Facts.Version
	}
	s.do(Save{})
	s.note(TrialBoot, "first boot of release %s from %s: checking its health", u.Offer.Version, u.ToSlot)
	s.begin(Health{})
}

func (s *steps) judged(ev Judged) {
	c := s.c
	u := c.State.Update
	if ev.Good {
		s.begin(Confirm{})
		return
	}
	s.failed(Unhealthy, fmt.Errorf("release %s is not healthy: %s", u.Offer.Version, ev.Reason))
	if !s.slot(u.FromSlot).Bootable() {
		s.failed(Unhealthy, errors.Join(fmt.Errorf("release %s is not healthy: %s", u.Offer.Version, ev.Reason), errors.New("there is no other slot to go back to; the health is checked again")))
		c.gatesDue = s.now.Add(c.Timing.GateRetry)
		s.do(Save{})
		return
	}
	u.Healthless = ev.Reason
	s.failing()
}

func (s *steps) failing() {
	u := s.c.State.Update
	s.enter(Failing)
	s.do(Save{})
	s.do(Disarm{u.ToSlot})
	s.note(RebootAsked, "rebooting to go back from %s", u.Offer.Version)
	s.begin(Reboot{"the new side is not healthy: " + u.Healthless})
}

func (s *steps) confirmed() {
	c := s.c
	st := &c.State
	u := st.Update
	s.setSlot(u.ToSlot, SlotFacts{Priority: max(1, s.slot(u.ToSlot).Priority), Successful: true})
	s.note(Healthy, "release %s is healthy and confirmed", u.Offer.Version)
	if u.FromVer != "" {
		st.LastUpdate = &Done{From: u.FromVer, To: u.Offer.Version, At: s.now, Good: true}
		s.report(omaha.Booted(u.FromVer))
	}
	st.Verdict = &Verdict{Healthy: true, Version: u.Offer.Version}
	delete(st.Failures, u.Offer.Version)
	st.Whole = false
	st.LastError, st.ErrorAt = "", time.Time{}
	st.LastAnswer = fmt.Sprintf("release %s, which is in place and healthy now", u.Offer.Version)
	st.Update = nil
	s.enter(Idle)
	s.do(Save{})
	s.tell()
	s.wake()
}

// fellBack is the end of an update whose new side was bad or never came up: the host runs from the old side again.
func (s *steps) fellBack(reason string) {
	c := s.c
	st := &c.State
	u := st.Update
	s.failed(FellBack, fmt.Errorf("release %s failed and the host is back on %s: %s", u.Offer.Version, c.Facts.Version, reason))
	s.quarantined(u.Offer.Version, reason)
	if u.Rollback != "" {
		delete(st.Failures, u.FromVer) // the host is on it again, so it was not taken back
	}
	st.LastUpdate = &Done{From: u.FromVer, To: u.Offer.Version, At: s.now, Reason: reason}
	st.Verdict = &Verdict{Version: u.Offer.Version, Reason: reason}
	if u.Rollback != "" {
		// One host that cannot go back says nothing about a release that the others run: it must not spend their failure budget.
		st.Verdict.Cancelled, st.Verdict.Reason = true, "going back failed: "+reason
	}
	s.report(omaha.Failed(omaha.CodeRollback))
	st.Update = nil
	s.enter(Idle)
	s.do(Save{})
	s.do(Disarm{u.ToSlot})
	s.tell()
	s.wake()
}
