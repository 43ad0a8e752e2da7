// Package fleetlock speaks the FleetLock protocol, as a client (of airlock and its kin) and as a server (for Zincati and its kin, on
// top of any [lock.Semaphore]).
//
// # Protocol
//
// POST <base>/v1/pre-reboot takes a slot, POST <base>/v1/steady-state gives it back; both carry the header
// "fleet-lock-protocol: true" and {"client_params":{"id":"...","group":"..."}}. 200 is yes; everything else is no, with
// {"kind":"...","value":"..."}. The protocol knows no queue, no verdict and no reason.
//
// # What the server adds
//
// Kinds that can be told apart: failed_lock_semaphore_full, halted, outside_window, paused, store_unavailable, conflict,
// invalid_client_identity, not_permitted, not_held. A Retry-After where trying again helps. Conflicts in the store are retried here. An object
// "flipside" beside client_params may say the boot id, the versions, the zone, the class and the reason, so that halts work; servers that do not know it
// ignore it. With "phase": "rebooting" in it a pre-reboot takes no slot: it says that the host goes down now by the one that it holds, and is refused (not_held) if
// it holds none any more. POST <base>/v1/verdict takes a failed verdict.
//
// # What the client does without
//
// Only a 200 from the server itself is yes: a redirect is not followed, and a web page is no answer. Something between the two, such as a page to log in at, says 200 to
// everybody, and all hosts would reboot at once.
//
// Other servers cannot be told that a version failed. Giving the slot back then would send the next host into the same failure. So
// [Client.Release] keeps the slot and says so with [ErrNoVerdict], until a person releases it.
package fleetlock

import "errors"

// ErrNoVerdict means that the server cannot take a failed verdict. The slot is kept, so that no other host follows.
var ErrNoVerdict = errors.New("this FleetLock server cannot be told that a version failed; the slot is kept, so that no other host follows, until the version is forgiven (flipside check --forgive)")

const (
	header  = "fleet-lock-protocol"
	maxBody = 64 << 10

	pathLock    = "/v1/pre-reboot"
	pathUnlock  = "/v1/steady-state"
	pathVerdict = "/v1/verdict"
)

// The kinds of refusal that the server answers with.
const (
	KindFull        = "failed_lock_semaphore_full"
	KindHalted      = "halted"
	KindWindow      = "outside_window"
	KindPaused      = "paused"
	KindUnavailable = "store_unavailable"
	KindConflict    = "conflict"
	KindIdentity    = "invalid_client_identity"
	KindPermission  = "not_permitted"
	KindNotHeld     = "not_held"
	KindInternal    = "internal_error"
)

type message struct {
	Client clientParams `json:"client_params"`
	More   *details     `json:"flipside,omitempty"`
}

type clientParams struct {
	ID    string `json:"id"`
	Group string `json:"group"`
}

type details struct {
	BootID  string `json:"boot_id,omitempty"`
	From    string `json:"from,omitempty"`
	To      string `json:"to,omitempty"`
	Reason  string `json:"reason,omitempty"`
	Zone    string `json:"zone,omitempty"`
	Class   string `json:"class,omitempty"`
	Phase   string `json:"phase,omitempty"` // "rebooting": the host goes down now
	Outcome string `json:"outcome,omitempty"`
	Version string `json:"version,omitempty"`
}

type refusal struct {
	Kind  string `json:"kind"`
	Value string `json:"value"`
}
