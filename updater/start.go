package updater

import (
	"fmt"

	"github.com/flipside-linux/flipside/omaha"
)

// start holds the saved state against what the boot and the disk say. The disk wins.
func (s *steps) start(f Facts) {
	c := s.c
	c.Facts = f
	st := &c.State
	s.holds(f.Running, f.Version)
	s.checkIn(c.Timing.FirstCheck)
	u := st.Update
	if u == nil {
		s.startWithoutUpdate()
		return
	}
	newBoot := u.BootID != f.BootID
	switch {
	case f.Running == u.ToSlot && st.Phase == Failing && newBoot && u.Healthless != "":
		// The boot loader chose the bad side although its bits are gone. Another reboot would change nothing.
		s.failed(SlotTrouble, fmt.Errorf("slot %s was judged bad (%s) and was booted again; repair the other slot", u.ToSlot, u.Healthless))
		s.do(Save{})
	case f.Running == u.ToSlot && st.Phase == Failing:
		s.failing()
	case f.Running == u.ToSlot:
		// Also when the phase is still Applying: power was lost between arming the slot and saving that.
		s.trial()
	case f.Running != u.FromSlot:
		s.failed(SlotTrouble, fmt.Errorf("the host runs from %s, neither the old slot %s nor the new slot %s of the update to %q; the update is forgotten", f.Running, u.FromSlot, u.ToSlot, u.Offer.Version))
		s.forget()
	case st.Phase == Applying && u.Rollback != "":
		s.begin(Arm{})
	case u.Rollback != "" && s.slot(u.ToSlot).Successful:
		// Power was lost between undoing the rollback and saving that.
		if st.Phase == Rebooting {
			s.giveBack("the host does not go back")
		}
		s.stay()
	case st.Phase == Applying:
		// Resume, but ask the server first: the offer may be gone.
		s.note(UpdateResumed, "the update to %s was interrupted and goes on", u.Offer.Version)
		s.unarm(u.ToSlot) // it was armed, and that was not saved: the gates would not be asked about it
		c.checkDue = s.now
		st.Unwedge = true
		s.wake()
	case s.slot(u.ToSlot).Bootable():
		// Not booted yet: the daemon was restarted, or the machine was started from the old slot by hand.
		if st.Phase == Rebooting {
			s.enter(Armed)
			s.giveBack("the host did not boot the new side")
		}
		s.enter(Armed)
		c.gatesDue = s.now
		s.wake()
	case st.Phase == Armed && s.slot(u.ToSlot).Priority == 0 && (newBoot || st.Failures[u.Offer.Version].Held):
		// Cut short between giving the release up and saving that: nobody has booted it. A boot loader spends tries and leaves the priority.
		s.note(Ordered, "release %s was given up before it was booted", u.Offer.Version)
		s.do(Disarm{u.ToSlot}) // its secrets come after its bits
		s.do(LeaveQueue{"given up"})
		s.report(omaha.Failed(codeIgnoredPerPolicy))
		s.forget()
	case newBoot:
		reason := u.Healthless
		switch {
		case reason != "":
		case st.Phase == Trial:
			reason = "the first boot ended before the host was known to be healthy"
		default:
			reason = "the new side did not come up"
		}
		s.fellBack(reason)
	default:
		// Same boot, and the slot is not bootable: somebody took its bits away. Write and verify it again.
		s.enter(Applying)
		c.checkDue = s.now
		s.do(Save{})
		s.wake()
	}
}

func (s *steps) startWithoutUpdate() {
	c := s.c
	st := &c.State
	if st.Phase != Idle {
		s.enter(Idle)
	}
	if run := s.slot(c.Facts.Running); !run.Successful && c.Facts.Running != "" {
		// A slot on trial that this state knows nothing of: a fresh image, or the state was lost.
		st.Update = &Update{Offer: omaha.Offer{Version: c.Facts.Version}, FromSlot: c.Facts.Other, ToSlot: c.Facts.Running, Started: s.now, BootID: c.Facts.BootID}
		s.trial()
		return
	}
	if st.Verdict == nil {
		// In case the host still holds a reboot slot from a time that this state does not know. Freeing what is not held does nothing.
		st.Verdict = &Verdict{Healthy: true, Version: c.Facts.Version}
	}
	s.do(Save{})
	s.tell()
	s.deliver()
	s.wake()
}
