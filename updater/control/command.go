package control

import (
	"context"
	"errors"
	"time"

	"github.com/flipside-linux/flipside/updater"
)

// Action is something that the daemon can be told to do. Whoever may do it is decided by the socket (root and the daemon's own user) and
// on the bus by the polkit action that [Action.Polkit] names.
type Action string

// Everything that the daemon can be told to do.
const (
	Check      Action = "check"       // ask the server now
	Pause      Action = "pause"       // take no update and do not reboot
	Resume     Action = "resume"      // the end of that
	SetChannel Action = "set-channel" // ask for another channel
	SetPin     Action = "set-pin"     // take only some versions
	Cancel     Action = "cancel"      // give up the release that waits for its reboot
	Rollback   Action = "rollback"    // go back to the other slot's release
	Reboot     Action = "reboot"      // ask the reboot gates now
	RebootNow  Action = "reboot-now"  // pass over the host's own gates; the semaphore is asked all the same
	Reload     Action = "reload"      // read the configuration again
)

// Actions lists them all, in the order of the reference.
func Actions() []Action {
	return []Action{Check, Pause, Resume, SetChannel, SetPin, Cancel, Rollback, Reboot, RebootNow, Reload}
}

// Polkit is the id of the polkit action that allows an Action.
func (a Action) Polkit() string { return "org.flipside.updater1." + string(a) }

// Command is an Action with what belongs to it.
type Command struct {
	Action  Action    `json:"action"`
	Forgive []string  `json:"forgive,omitempty"` // check: versions that failed here and get another chance
	Reason  string    `json:"reason,omitempty"`  // pause: for people
	Until   time.Time `json:"until,omitzero"`    // pause: when it ends by itself
	Value   string    `json:"value,omitempty"`   // set-channel, set-pin; empty: what the configuration says

	BelowFloor bool `json:"below_floor,omitempty"` // rollback: also to a release below the floor of releases
}

// ErrBadCommand means that a command makes no sense.
var ErrBadCommand = errors.New("bad command")

// Daemon is what the socket and the bus give access to.
type Daemon interface {
	// Status says everything about the host, and returns a channel that is closed when something changes.
	Status(context.Context) (updater.Status, <-chan struct{})
	// Do carries a command out, or starts what takes long. Errors may be [ErrBadCommand], updater.ErrNothing, updater.ErrUnderWay and
	// updater.ErrBelowFloor.
	Do(ctx context.Context, by string, c Command) error
	// Plan says what would happen with the offers of a channel; "" is the host's own. Nothing changes.
	Plan(ctx context.Context, channel string) (updater.Plan, error)
}
