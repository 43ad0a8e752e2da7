package updater

import (
	"encoding/json"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
)

// SlotFacts is what the disk says of one slot.
type SlotFacts struct {
	Priority, Tries uint8
	Successful      bool
}

// Bootable reports whether the boot loader may choose the slot.
func (s SlotFacts) Bootable() bool { return s.Priority > 0 && (s.Tries > 0 || s.Successful) }

// Facts is what can be seen at start, without the saved state.
type Facts struct {
	BootID  string
	Running string // label of the slot that is mounted
	Other   string // label of the slot that an update goes to
	Version string // of the running system
	Slots   map[string]SlotFacts
}

// An Event is something that happened. [Core.Step] decides what follows from it.
type Event interface{ event() }

type (
	// Start comes once, when the engine starts.
	Start struct{ Facts Facts }
	// Wake comes when the time that Core.Next named has come.
	Wake struct{}
	// CheckNow comes when a person or a program asks for a check now.
	CheckNow struct{ By string }
	// Answered is the end of an AskServer.
	Answered struct {
		Offer  *omaha.Offer
		Reason string // why there is no offer, in words
		Wedged bool   // the server believes that this host is mid-update
		Retry  time.Duration
		Err    error
	}
	// GatesAnswered is the end of an AskGates.
	GatesAnswered struct {
		Stage   Stage
		Answers []reboot.Answer
		Halted  string // the cluster has halted this version: why
	}
	// GatesChanged says that a gate may answer differently now (the semaphore was watched).
	GatesChanged struct{}
	// Checkpointed carries how far the payload has come; the data it speaks of is on the disk.
	Checkpointed struct{ Data json.RawMessage }
	// Applied says that the slot holds what the manifest promised, read back from the medium.
	Applied struct{}
	// ApplyFailed ends an Apply. Transient failures are tried again from the checkpoint.
	ApplyFailed struct {
		Err       error
		Code      int // Omaha error code
		Transient bool
	}
	// ArmedNow says that the new slot boots next; ArmFailed that it could not be made to.
	ArmedNow  struct{}
	ArmFailed struct{ Err error }
	// RebootFailed ends a Reboot that did not happen.
	RebootFailed struct{ Err error }
	// Judged is the end of a Health.
	Judged struct {
		Good   bool
		Reason string
	}
	// Confirmed says that the running slot is marked successful; ConfirmFailed that this did not work.
	Confirmed     struct{}
	ConfirmFailed struct{ Err error }
	// Delivered says that the first N reports reached the server, or why none did.
	Delivered struct {
		N   int
		Err error
	}
	// VerdictTaken says that the semaphore knows the verdict, or why it does not.
	VerdictTaken struct{ Err error }
)

func (Start) event()         {}
func (Wake) event()          {}
func (CheckNow) event()      {}
func (Answered) event()      {}
func (GatesAnswered) event() {}
func (GatesChanged) event()  {}
func (Checkpointed) event()  {}
func (Applied) event()       {}
func (ApplyFailed) event()   {}
func (ArmedNow) event()      {}
func (ArmFailed) event()     {}
func (RebootFailed) event()  {}
func (Judged) event()        {}
func (Confirmed) event()     {}
func (ConfirmFailed) event() {}
func (Delivered) event()     {}
func (VerdictTaken) event()  {}

// Stage says which gates are meant.
type Stage string

// The two places where gates stand.
const (
	BeforeDownload Stage = "download"
	BeforeReboot   Stage = "reboot"
)

// An Effect is something that [Core.Step] wants done. Effects of one step are carried out in order; Save, Disarm and Stay finish before
// the next one begins, the others report back with an event.
type Effect interface{ effect() }

type (
	// Save writes the state durably. What follows must not begin before it is on the disk.
	Save struct{}
	// AskServer makes one update check.
	AskServer struct {
		OnDemand bool
		Unwedge  bool // the server thinks that we are mid-update
		Whole    bool // no delta, please
	}
	// AskGates asks the gates of a stage about an offer.
	AskGates struct {
		Stage Stage
		Offer omaha.Offer
		Waive bool // the host's own gates are passed, whatever they say; the semaphore is not
	}
	// Apply fetches, checks and writes the payload of the update, and reads the slot back.
	Apply struct{}
	// Arm makes the verified slot boot next.
	Arm struct{}
	// Disarm takes the slot's bits away: it will not boot.
	Disarm struct{ Slot string }
	// Stay undoes the Arm of a rollback: the running slot boots next, and the other keeps the release that was good before.
	Stay struct {
		Slot   string
		Booted bool // the machine was started since: the slot may have been tried
	}
	// Reboot asks for the reboot.
	Reboot struct{ Reason string }
	// Health runs the health checks of this boot.
	Health struct{}
	// Confirm marks the running slot successful.
	Confirm struct{}
	// Deliver sends the reports that wait.
	Deliver struct{}
	// GiveVerdict tells the semaphore how the reboot went, which frees the slot.
	GiveVerdict struct{}
	// LeaveQueue takes a claim on the semaphore back, because no reboot will follow.
	LeaveQueue struct{ Reason string }
	// Note is told to people and programs: in the journal, the history, the metrics.
	Note struct {
		Kind    Kind
		Warn    bool
		Text    string // one line
		Version string // of the release that it is about
		Slot    string // that it is about
		Phase   Phase  // where the update stands
		Gate    string // that is against it
	}
)

func (Save) effect()        {}
func (AskServer) effect()   {}
func (AskGates) effect()    {}
func (Apply) effect()       {}
func (Arm) effect()         {}
func (Disarm) effect()      {}
func (Stay) effect()        {}
func (Reboot) effect()      {}
func (Health) effect()      {}
func (Confirm) effect()     {}
func (Deliver) effect()     {}
func (GiveVerdict) effect() {}
func (LeaveQueue) effect()  {}
func (Note) effect()        {}
