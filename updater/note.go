package updater

import "fmt"

// Kind is what a [Note] tells, as a stable word: programs look for it in the journal, where each has its own message id, and in
// the history.
type Kind string

// Everything that is told.
const (
	Started       Kind = "started"        // the daemon runs
	Stopping      Kind = "stopping"       // the daemon was told to end
	Reloaded      Kind = "reloaded"       // the configuration was read again, or could not be
	CheckFailed   Kind = "check-failed"   // the server could not be asked
	NotTaken      Kind = "not-taken"      // a gate is against a release that is offered
	UpdateStarted Kind = "update-started" // a payload is fetched and written to the other slot
	UpdateResumed Kind = "update-resumed" // an update that was interrupted goes on
	UpdateFailed  Kind = "update-failed"  // it could not be fetched or written; it is tried again
	UpdateRefused Kind = "update-refused" // the payload is wrong; it is not tried again for a while
	Withdrawn     Kind = "withdrawn"      // the server took its offer back
	UpdateArmed   Kind = "update-armed"   // the release is on the other slot, verified, and boots next
	RebootWaits   Kind = "reboot-waits"   // a gate is against the reboot
	RebootAsked   Kind = "reboot-asked"   // the machine goes down
	RebootStuck   Kind = "reboot-failed"  // it did not
	Halted        Kind = "halted"         // the cluster has stopped the release
	TrialBoot     Kind = "trial-boot"     // the first boot of a release: is it good?
	Healthy       Kind = "healthy"        // it is, and is marked successful
	Unhealthy     Kind = "unhealthy"      // it is not
	FellBack      Kind = "fell-back"      // the host runs the release from before again
	SlotTrouble   Kind = "slot-trouble"   // the slots are not as they should be
	Semaphore     Kind = "semaphore"      // the cluster's semaphore does not know what it should
	Unreported    Kind = "unreported"     // an event did not reach the server
	Ordered       Kind = "ordered"        // a person or a program wants something else: a rollback, a cancel, a reboot now
	StateTrouble  Kind = "state-trouble"  // the saved state cannot be read or written
)

func (s *steps) note(k Kind, f string, a ...any) { s.tellAbout(k, false, fmt.Sprintf(f, a...)) }
func (s *steps) warn(k Kind, f string, a ...any) { s.tellAbout(k, true, fmt.Sprintf(f, a...)) }

func (s *steps) tellAbout(k Kind, warn bool, text string) {
	s.do(s.c.about(Note{Kind: k, Warn: warn, Text: text}))
}

// about says which release and slot a note is about: those of the update under way, else those that run.
func (c *Core) about(n Note) Note {
	n.Version, n.Slot, n.Phase = c.Facts.Version, c.Facts.Running, c.State.Phase
	if u := c.State.Update; u != nil {
		n.Version, n.Slot = u.Offer.Version, u.ToSlot
	}
	return n
}
