package omaha

import (
	"fmt"
	"time"
)

// Answer is what a server said to an update check: an offer, or the reason why there is none.
type Answer struct {
	Offer        *Offer        // nil when there is nothing to install
	Reason       Reason        // why not; its Kind is Offered when there is an offer
	PollInterval time.Duration // how long the server asks us to wait, clamped to [MinPoll, MaxPoll]; 0 when it did not say
}

// Kind says what sort of reason it is, for a caller that decides.
type Kind string

// The kinds of answer.
const (
	Offered       Kind = "offered"       // there is an offer
	UpToDate      Kind = "up-to-date"    // the server has nothing newer for us
	Deferred      Kind = "deferred"      // the rollout policy says: come back later
	InProgress    Kind = "in-progress"   // the server believes that we are in the middle of an update
	NothingThere  Kind = "nothing-there" // the channel holds no release
	Misconfigured Kind = "misconfigured" // the server does not know our app, track or id: somebody has to look
	ServerTrouble Kind = "server"        // the server has a problem of its own
	Downgrade     Kind = "downgrade"     // the offered version is older than ours, and nobody here allowed that
	Unsupported   Kind = "unsupported"   // the server says that this host cannot run it
)

// Reason says in words why there is no offer. Text is made from what a server sent and is safe to print.
type Reason struct {
	Kind   Kind   `json:"kind"`
	Status string `json:"status,omitempty"` // the code on the wire, made printable
	Text   string `json:"text"`
}

func (r Reason) String() string {
	if r.Status == "" {
		return r.Text
	}
	return fmt.Sprintf("%s (%s)", r.Text, r.Status)
}

// refusal gives the reason for a value of app@status other than ok. The rollout codes are Nebraska's: it gives each of
// them together with updatecheck@status error-internal, so the app has to be looked at first.
func refusal(status string) (Reason, bool) {
	r := Reason{Status: status}
	switch status {
	case "error-maxUpdatesPerPeriodLimitReached":
		r.Kind, r.Text = Deferred, "the server lets no more hosts update in this period, come back later"
	case "error-maxConcurrentUpdatesLimitReached":
		r.Kind, r.Text = Deferred, "as many hosts update now as the server allows at once, come back later"
	case "error-maxTimedOutUpdatesLimitReached":
		r.Kind, r.Text = Deferred, "too many updates of other hosts timed out, the server has stopped the rollout"
	case "error-updatesDisabled":
		r.Kind, r.Text = Deferred, "updates are switched off on the server, or this is outside its hours"
	case "error-updateInProgressOnInstance":
		r.Kind, r.Text = InProgress, "the server believes that this host is in the middle of an update"
	case "error-noPackageFound":
		r.Kind, r.Text = NothingThere, "the server's channel holds no release"
	case "error-unknownApplicationOrGroup", "error-failedToRetrieveUpdatePackageInfo":
		r.Kind, r.Text = Misconfigured, "the server does not know this application, track or board"
	case "error-unknownApplication", "error-invalidAppId":
		r.Kind, r.Text = Misconfigured, "the server does not know this application id"
	case "error-instanceRegistrationFailed":
		r.Kind, r.Text = Misconfigured, "the server refuses this host's machine id or version"
	case "error-invalidVersion":
		r.Kind, r.Text = Misconfigured, "the server refuses this host's version"
	case "restricted":
		r.Kind, r.Text = Misconfigured, "the server restricts this application"
	case "error-couldNotCheckUpdatesStats", "error-internal":
		r.Kind, r.Text = ServerTrouble, "the server has an internal problem"
	default:
		return Reason{}, false
	}
	return r, true
}

// denial gives the reason for a value of updatecheck@status other than ok, of an app that is ok.
func denial(status string) (Reason, bool) {
	r := Reason{Status: status}
	switch status {
	case "noupdate":
		return Reason{Kind: UpToDate, Text: "the server has nothing newer"}, true
	case "error-internal", "error-hash":
		r.Kind, r.Text = ServerTrouble, "the server could not make an offer"
	case "error-osnotsupported", "error-hwnotsupported", "error-inexpressible":
		r.Kind, r.Text = Unsupported, "the server says that the release does not support this host"
	case "error-unsupportedProtocol", "error-pluginRestrictedHost":
		r.Kind, r.Text = Misconfigured, "the server does not serve this client"
	default:
		return Reason{}, false
	}
	return r, true
}
