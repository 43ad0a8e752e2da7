package updater

import (
	"fmt"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
)

// minGateGap is the least time between two questions to the reboot gates.
const minGateGap = 250 * time.Millisecond

// again keeps the time at which the gates are due through an answer that is on its way, and to a question from before.
func (s *steps) again() {
	if s.c.busy && s.c.State.Phase == Armed {
		s.c.gatesAgain = s.c.gatesDue
	}
}

func (s *steps) rebootGates(ev GatesAnswered) {
	c := s.c
	st := &c.State
	if st.Phase != Armed {
		s.do(LeaveQueue{"nothing waits for a reboot any more"}) // it was given up while the gates were asked, and they may have granted a slot
		s.wake()
		return
	}
	u := st.Update
	if ev.Halted != "" {
		// The release is bad for the cluster. It must not come up here either, not even after a power cut.
		if u.Rollback != "" {
			s.warn(Halted, "release %s is halted: %s; the host does not go back to it", u.Offer.Version, ev.Halted)
			s.giveBack("halted: " + ev.Halted)
			s.stay()
			return
		}
		s.warn(Halted, "release %s is halted: %s; slot %s is made unbootable again", u.Offer.Version, ev.Halted, u.ToSlot)
		s.do(Disarm{u.ToSlot})
		s.setSlot(u.ToSlot, SlotFacts{})
		s.giveBack("halted: " + ev.Halted)
		st.LastUpdate = &Done{From: u.FromVer, To: u.Offer.Version, At: s.now, Reason: "halted for the cluster: " + ev.Halted}
		st.LastAnswer = fmt.Sprintf("release %s, which is halted for the cluster: %s", u.Offer.Version, ev.Halted)
		s.report(omaha.Failed(codeIgnoredPerPolicy))
		s.forget()
		return
	}
	if _, stop := reboot.First(ev.Answers); stop {
		c.gatesDue = s.now.Add(c.Timing.GateRetry)
		for _, a := range ev.Answers {
			if a.Verdict != reboot.Go && a.Ask.After(s.now) && a.Ask.Before(c.gatesDue) {
				c.gatesDue = a.Ask
			}
		}
		if !c.gatesAgain.IsZero() {
			c.gatesDue = c.gatesAgain
		}
		s.rebootWaits(ev.Answers)
		s.wake()
		return
	}
	s.enter(Rebooting)
	s.do(Save{})
	s.note(RebootAsked, "rebooting from %s to %s", u.FromVer, u.Offer.Version)
	s.begin(Reboot{fmt.Sprintf("update from %s to %s", u.FromVer, u.Offer.Version)})
}

// rebootWaits tells which gate the host waits for, once for each.
func (s *steps) rebootWaits(answers []reboot.Answer) {
	a, _ := reboot.First(answers)
	if s.c.toldGate == a.Gate {
		return
	}
	s.c.toldGate = a.Gate
	n := s.c.about(Note{Kind: RebootWaits, Text: fmt.Sprintf("release %s waits to reboot: %s", s.c.State.Update.Offer.Version, a.Why)})
	n.Gate = a.Gate
	s.do(n)
}

func (s *steps) rebootFailed(err error) {
	c := s.c
	s.failed(RebootStuck, fmt.Errorf("rebooting: %w", err))
	c.waive = false
	c.gatesDue = s.now.Add(c.Timing.GateRetry)
	if c.State.Phase == Rebooting {
		s.enter(Armed)
		s.giveBack("the reboot did not happen: " + err.Error())
		return
	}
	s.do(Save{})
}

// giveBack gives a reboot slot back that was not used. Like a verdict it is kept until the semaphore has confirmed it.
func (s *steps) giveBack(reason string) {
	if s.c.State.Verdict == nil { // or else there is one that frees the slot too
		s.c.State.Verdict = &Verdict{Cancelled: true, Version: s.c.State.Update.Offer.Version, Reason: reason}
	}
	s.do(Save{})
	s.tell()
}
