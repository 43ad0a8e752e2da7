package lock

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"
	"unicode"
)

// A Semaphore gives out leave to reboot. It is what a host needs; what the owner of the cluster needs besides is in [Keeper]. Every method is safe for use by several goroutines, bounded in time, and can be
// called again after a lost reply without doing its work twice.
//
// Errors: [ErrUnavailable] if the store cannot be asked (nothing is known then, and nobody may reboot), [ErrConflict] if the store
// changed faster than this client could follow, [ErrInvalid] for a claim, group or policy that makes no sense, [ErrSchema] for a
// state that this version cannot read, [ErrUnsigned] in a group whose policy is signed, for what the right key has not signed.
type Semaphore interface {
	// Request asks for a slot, or asks again: a host that waits keeps its place, a host that holds a slot is told so, with the same
	// token. A version that is halted is not granted and does not wait: Standing.Halted says why.
	Request(ctx context.Context, c Claim) (Standing, error)
	// Wait returns nil when the standing of a host that waits may have changed. It watches; it does not poll. Call Request then.
	Wait(ctx context.Context, c Claim) error
	// Mark records how far the reboot of a holder has come: Rebooting just before it, Booted after it. It fails with [ErrNotHeld]
	// if the host holds no slot (any more), with [ErrHalted] if a host that has not rebooted yet had better not,
	// and with [ErrClosed] if the policy's window has closed since the grant.
	Mark(ctx context.Context, group, host string, m Mark) error
	// Release gives a slot, or a place in the queue, back with a verdict. Releasing what is not held is not an error.
	Release(ctx context.Context, group, host string, v Verdict) error
}

// Claim is a host's wish to reboot.
type Claim struct {
	Group  string `json:"group"`
	Host   string `json:"host"`
	BootID string `json:"boot_id,omitempty"` // of the running system
	From   string `json:"from,omitempty"`    // version that runs
	To     string `json:"to,omitempty"`      // version that the reboot leads to
	Reason string `json:"reason,omitempty"`
	Zone   string `json:"zone,omitempty"`  // failure domain: a rack, a data centre
	Class  string `json:"class,omitempty"` // priority class; see Policy.Classes
}

// Standing is where a claim stands.
type Standing struct {
	Granted  bool      `json:"granted"`
	Token    int64     `json:"token,omitempty"`    // fencing token: the store's revision of the grant
	Position int       `json:"position,omitempty"` // in the queue, 1 is next; 0 if granted or halted
	Holders  []Holder  `json:"holders,omitempty"`
	Max      int       `json:"max"`
	Halted   string    `json:"halted,omitempty"` // why this version is halted
	Blocked  string    `json:"blocked,omitempty"`
	Ask      time.Time `json:"ask,omitzero"`      // when the policy lets somebody go on, if that is known and only time stands against it
	Expected time.Time `json:"expected,omitzero"` // when the slot is likely to come, from how long reboots took
}

// Phase is where the life of a holder stands.
type Phase string

// The life of a claim: it waits, is granted, reboots, has booted. A verdict ends it.
const (
	Waiting   Phase = "waiting"
	Granted   Phase = "granted"
	Rebooting Phase = "rebooting"
	Booted    Phase = "booted"
)

// Mark is a step in the life of a holder.
type Mark struct {
	Phase   Phase  // Rebooting or Booted
	Version string // that was booted
	BootID  string // of the new boot
	Token   int64  // if not 0, only the grant with this token is marked
}

// Outcome is what became of a reboot.
type Outcome string

// The verdicts.
const (
	Healthy   Outcome = "healthy"   // the host is up and well
	Failed    Outcome = "failed"    // the version did not work on the host; counts against the failure budget
	Cancelled Outcome = "cancelled" // no reboot happened, or none is wanted any more
	Withdrawn Outcome = "withdrawn" // not just now: as Cancelled, but a host that is already rebooting keeps its slot
	Forced    Outcome = "forced"    // an operator gave the slot of a host back; says nothing about the version
)

// Verdict ends the life of a holder.
type Verdict struct {
	Outcome Outcome `json:"outcome"`
	Version string  `json:"version,omitempty"` // that was tried; of the claim if empty
	Reason  string  `json:"reason,omitempty"`
	Token   int64   `json:"token,omitempty"` // if not 0, only the grant with this token is released
	By      string  `json:"by,omitempty"`    // who says so, if not the host itself
}

// What can go wrong, for callers to decide on.
var (
	ErrUnavailable = errors.New("the store cannot be asked")
	ErrConflict    = errors.New("the store changed too fast")
	ErrInvalid     = errors.New("invalid")
	ErrSchema      = errors.New("the state in the store cannot be read by this version")
	ErrNotHeld     = errors.New("no slot is held")
	ErrHalted      = errors.New("the version is halted")
	ErrClosed      = errors.New("no reboot window is open")
	ErrFenced      = errors.New("the token is of an older grant")
	ErrUnsigned    = errors.New("it is not signed by who may say so")
)

var groupName = regexp.MustCompile(`^[a-zA-Z0-9-][a-zA-Z0-9.-]{0,127}$`)

// CheckGroup reports whether a group may have this name: the letters that FleetLock allows, and no leading dot, so that no
// name can be taken for a path.
func CheckGroup(group string) error {
	if !groupName.MatchString(group) {
		return fmt.Errorf("%w group name %q: want letters, digits, dots and dashes, at most 128, no leading dot", ErrInvalid, group)
	}
	return nil
}

// CheckHost reports whether a host may have this name.
func CheckHost(host string) error {
	if host == "" || len(host) > 255 || strings.ContainsFunc(host, func(r rune) bool { return r == '/' || unicode.IsSpace(r) || !unicode.IsPrint(r) }) {
		return fmt.Errorf("%w host name %q: want 1 to 255 printable characters without spaces and slashes", ErrInvalid, host)
	}
	return nil
}

// What a host may write into the shared state is bounded.
const (
	maxText    = 512
	maxVersion = 100
	maxPolicy  = 4096 // what was changed in a policy, in the audit trail
)

func (c Claim) check() (Claim, error) {
	if err := CheckGroup(c.Group); err != nil {
		return c, err
	}
	if err := CheckHost(c.Host); err != nil {
		return c, err
	}
	for _, s := range []*string{&c.BootID, &c.Reason, &c.Zone, &c.Class} {
		*s = clip(*s)
	}
	c.From, c.To = clipTo(c.From, maxVersion), clipTo(c.To, maxVersion)
	return c, nil
}

// clip makes a text of a host fit to be kept, and to be shown on the terminals of others.
func clip(s string) string { return clipTo(s, maxText) }

func clipTo(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit-len("...")], "") + "..."
	}
	return s
}
