package server

import (
	"time"
	"unique"
)

// State is how far a host is with an update, as far as its events tell.
type State string

// The states of a host.
const (
	Seen        State = "seen"        // known, and never offered anything
	Current     State = "current"     // runs what its channel holds
	Held        State = "held"        // there is something newer, and it has to wait
	Granted     State = "granted"     // was offered an update
	Downloading State = "downloading" //
	Downloaded  State = "downloaded"  // complete, signature good
	Installed   State = "installed"   // waits for its reboot
	Complete    State = "complete"    // booted the new version
	Failed      State = "failed"      // reported an error
	TimedOut    State = "timed-out"   // was granted an update and not heard of in time
)

// active says whether a host in this state counts as one that updates now.
func (s State) active() bool {
	return s == Granted || s == Downloading || s == Downloaded || s == Installed
}

// Host is what the server knows about one machine.
type Host struct {
	ID       string `json:"id"`
	Alias    string `json:"alias,omitempty"`
	Version  string `json:"version"`
	Track    string `json:"track"`
	Channel  string `json:"channel,omitempty"` // the file that decides for it
	Board    string `json:"board,omitempty"`
	OEM      string `json:"oem,omitempty"`
	State    State  `json:"state"`
	Why      string `json:"why,omitempty"`    // why it got no update at its last check
	Waits    string `json:"waits,omitempty"`  // why it does not move, in its own words
	Target   string `json:"target,omitempty"` // the version that it was granted
	Previous string `json:"previous,omitempty"`

	Proof *Proof `json:"proof,omitempty"` // of its last boot

	ErrorCode int       `json:"error_code,omitempty"` // of its last failure
	Failed    string    `json:"failed,omitempty"`     // the version that failed
	Failures  int       `json:"failures,omitempty"`   // how often that version failed
	FailedAt  time.Time `json:"failed_at,omitzero"`
	FirstSeen time.Time `json:"first_seen"`
	LastSeen  time.Time `json:"last_seen"`
	GrantedAt time.Time `json:"granted_at,omitzero"`
	ChangedAt time.Time `json:"changed_at"` // of State
}

// intern lets hosts share the words that many of them have: a hundred thousand hosts run few versions on few channels.
func (h *Host) intern() *Host {
	for _, s := range []*string{&h.Version, &h.Track, &h.Channel, &h.Board, &h.OEM, &h.Why, &h.Target, &h.Previous, &h.Failed} {
		*s = unique.Make(*s).Value()
	}
	return h
}

// set changes the state and remembers when.
func (h *Host) set(state State, now time.Time) {
	if h.State != state {
		h.State, h.ChangedAt = state, now
	}
}

// retryAt returns when a version that failed here may be tried again: failures that speak against the release make it
// wait, twice as long each time, up to a day. Clients should remember that themselves; not all do.
func (h *Host) retryAt(version string, first time.Duration) time.Time {
	if h.Failed != version || !blamesRelease(h.ErrorCode) {
		return time.Time{}
	}
	return h.FailedAt.Add(min(first<<min(max(h.Failures-1, 0), 10), 24*time.Hour))
}

// codeWords says what an error number of update_engine means.
func codeWords(code int) string {
	switch {
	case code >= 2000 && code < 3000:
		return "the update server answered with an HTTP error"
	case code == 9:
		return "the download broke off"
	case code == 10, code == 11:
		return "the payload is not the one that was announced"
	case code >= 12 && code <= 18, code >= 24 && code <= 26:
		return "the payload or the written slot did not verify"
	case code >= 19 && code <= 23, code >= 27 && code <= 29, code == 32, code == 33, code == 38:
		return "the payload is damaged or cannot be applied"
	case code == 5:
		return "the post-install step failed"
	case code == 7, code == 8, code == 14:
		return "the slot could not be written"
	case code == 34:
		return "the server's answer was not accepted"
	case code == 44:
		return "the new version did not come up, the host went back"
	}
	return "the update failed"
}

// blamesRelease says whether a failure speaks against the release: not the network, not the server, not a policy.
func blamesRelease(code int) bool {
	switch {
	case code >= 2000, code == 2, code == 3, code == 9, code == 30, code == 31, code >= 34 && code <= 37, code == 40:
		return false
	}
	return true
}
