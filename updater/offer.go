package updater

import (
	"fmt"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
)

// downloadGates starts the download if every gate says go. A host on its way to another release gives that up for a newer offer.
func (s *steps) downloadGates(ev GatesAnswered) {
	c := s.c
	st := &c.State
	offer := c.offered
	c.offered = nil
	if offer == nil {
		s.wake()
		return
	}
	if q, ok := s.quarantine(*offer); ok {
		c.answers = append(c.answers, q)
	}
	if a, stop := reboot.First(c.answers); stop {
		s.do(Note{Kind: NotTaken, Text: fmt.Sprintf("release %s is not taken: %s", offer.Version, a.Why), Version: offer.Version, Gate: a.Gate, Phase: st.Phase})
		if !a.Ask.IsZero() && a.Ask.Before(c.checkDue) && a.Ask.After(s.now) {
			c.checkDue = a.Ask
		}
		s.do(Save{})
		s.wake()
		return
	}
	instead := ""
	switch {
	case st.Update != nil && st.Phase == Applying && samePayload(st.Update.Offer, *offer):
		st.Update.Offer = *offer // its addresses may have changed
	default:
		if st.Phase == Armed {
			instead = fmt.Sprintf(" instead of release %s, which is given up", st.Update.Offer.Version)
			s.do(LeaveQueue{"release " + offer.Version + " is newer"})
			s.unarm(st.Update.ToSlot)
		}
		st.Update = &Update{Offer: *offer, FromSlot: c.Facts.Running, FromVer: c.Facts.Version, ToSlot: c.Facts.Other, Started: s.now}
	}
	s.unarm(st.Update.ToSlot)
	st.Update.BootID = c.Facts.BootID
	s.enter(Applying)
	s.setSlot(st.Update.ToSlot, SlotFacts{})
	s.holds(st.Update.ToSlot, "")
	s.do(Save{})
	s.note(UpdateStarted, "taking release %s to %s%s", offer.Version, st.Update.ToSlot, instead)
	s.report(omaha.DownloadStarted())
	s.begin(Apply{})
}

// samePayload reports whether two offers are of the same bytes.
func samePayload(a, b omaha.Offer) bool { return a.SHA256 == b.SHA256 && a.Size == b.Size }

// sameRelease reports whether two offers are of one release: the same bytes, or it whole and as a delta.
func sameRelease(a, b omaha.Offer) bool {
	return samePayload(a, b) || a.Version == b.Version && a.Delta != b.Delta
}

// unfit reports whether an error, by its Omaha code, may lie in what a delta is applied to, or in the delta, and not in the release that it makes: the
// slot or a file does not hold what it should, the old image is another one, wrong hash, malformed, unknown operation.
func unfit(code int) bool {
	switch code {
	case 15, 16, 20, 23, 29, 45:
		return true
	}
	return false
}

func (s *steps) applyFailed(ev ApplyFailed) {
	c := s.c
	st := &c.State
	if st.Update == nil {
		return
	}
	v := st.Update.Offer.Version
	if st.Update.Rollback != "" {
		s.failed(UpdateFailed, fmt.Errorf("going back to %s: %w", st.Update.ToSlot, ev.Err))
		s.stay() // whatever became of the table
		return
	}
	if ev.Transient {
		st.CheckFails++
		s.failed(UpdateFailed, fmt.Errorf("taking release %s: %w", v, ev.Err))
		s.checkIn(s.backoff(st.CheckFails))
		st.Unwedge = true
		s.do(Save{})
		s.wake()
		return
	}
	// Once: a delta that comes although none was asked for is a release like any other, with its quarantine.
	if st.Update.Offer.Delta && !st.Whole && unfit(ev.Code) {
		s.failed(UpdateFailed, fmt.Errorf("the delta to release %s cannot be used here; the whole release is asked for: %w", v, ev.Err))
		st.Whole = true
		c.checkDue = s.now
		s.forget()
		return
	}
	s.failed(UpdateRefused, fmt.Errorf("release %s is refused: %w", v, ev.Err))
	s.quarantined(v, ev.Err.Error())
	st.LastUpdate = &Done{From: c.Facts.Version, To: v, At: s.now, Reason: ev.Err.Error()}
	s.report(omaha.Failed(ev.Code))
	s.forget()
}
