package writer

import (
	"errors"
	"io/fs"
	"slices"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/updater/postinstall"
	"github.com/flipside-linux/flipside/updater/trust"
	"github.com/flipside-linux/flipside/updater/wire"
)

// The protocol. Both ends send frames, with a body of at most maxBody bytes. The agent sends metadata and data, which are not answered, and
// calls, which are, each by one reply with its number. Steps come when they like. What went wrong with data is told by the next reply.
const (
	aCall     wire.Kind = 1 + iota // JSON of a call
	aMetadata                      // a piece of the beginning of a payload, before the call of Begin
	aData                          // bytes of part, for off
	aReply                         // JSON of an answer
	aStep                          // what is being done, in words
)

const (
	maxBody     = 2 << 20  // what an operation of most payloads makes, to be written at once
	maxMetadata = 65 << 20 // what package payload accepts, and its own signature
)

// call is what an agent asks for.
type call struct {
	Do      string   `json:"do"`
	Release *Release `json:"release,omitempty"`
	Back    *Back    `json:"back,omitempty"`
	Slot    string   `json:"slot,omitempty"`
	Version string   `json:"version,omitempty"`
	Part    int      `json:"part,omitempty"`
	Upto    int64    `json:"upto,omitempty"`
	Booted  bool     `json:"booted,omitempty"`
	Discard bool     `json:"discard,omitempty"`
}

// The calls.
const (
	doBegin   = "begin"
	doFlush   = "flush"
	doSettle  = "settle"
	doFinish  = "finish"
	doPrepare = "prepare"
	doArm     = "arm"
	doClose   = "close"
	doBack    = "go back"
	doDisarm  = "disarm"
	doStay    = "stay"
	doConfirm = "confirm"
	doRaise   = "raise"
)

// answer is the outcome of a call.
type answer struct {
	Failed bool     `json:"failed,omitempty"`
	Text   string   `json:"text,omitempty"`
	Kinds  []string `json:"kinds,omitempty"` // what errors.Is says of it
	Rose   bool     `json:"rose,omitempty"`  // the floor
}

// maxText bounds the text of an error.
const maxText = 16 << 10

func answerOf(err error) answer {
	if err == nil {
		return answer{}
	}
	a := answer{Failed: true, Text: err.Error()}
	a.Text = a.Text[:min(len(a.Text), maxText)]
	for _, k := range kinds() {
		if errors.Is(err, k.err) {
			a.Kinds = append(a.Kinds, k.name)
		}
	}
	return a
}

func (a answer) err() error {
	if !a.Failed {
		return nil
	}
	e := &remoteError{text: a.Text}
	for _, k := range kinds() {
		if slices.Contains(a.Kinds, k.name) {
			e.is = append(e.is, k.err)
		}
	}
	return e
}

// remoteError is an error of the writer, in the agent.
type remoteError struct {
	text string
	is   []error
}

func (e *remoteError) Error() string   { return e.text }
func (e *remoteError) Unwrap() []error { return e.is }

type errorKind struct {
	name string
	err  error
}

// kinds are the errors that somebody decides on, by their names on the socket.
func kinds() []errorKind {
	return []errorKind{
		{"disk", ErrDisk}, {"guard", ErrGuard}, {"secrets", ErrSecrets}, {"order", ErrOrder}, {"below floor", ErrBelowFloor},
		{"floor: behind", trust.ErrBehind},
		{"payload: no key", payload.ErrNoKey}, {"payload: unsigned", payload.ErrUnsigned}, {"payload: signature", payload.ErrSignature},
		{"payload: malformed", payload.ErrMalformed}, {"payload: unsupported", payload.ErrUnsupported}, {"payload: hash", payload.ErrHash},
		{"payload: size", payload.ErrSize}, {"payload: rollback", payload.ErrRollback}, {"payload: product", payload.ErrProduct},
		{"payload: source", payload.ErrSource}, {"payload: target", payload.ErrTarget}, {"payload: base", payload.ErrBase},
		{"slot: running", partition.ErrRunning}, {"slot: none", partition.ErrNoSlot}, {"slot: not proven", partition.ErrNotProven},
		{"slot: tried", partition.ErrTried}, {"slot: stale", partition.ErrStale}, {"slot: mismatch", partition.ErrMismatch},
		{"slot: geometry", partition.ErrGeometry}, {"slot: last", partition.ErrLast}, {"slot: settled", partition.ErrSettled},
		{"slot: busy", partition.ErrBusy}, {"slot: read-only", partition.ErrReadOnly},
		{"file: mismatch", atomicfile.ErrMismatch}, {"file: space", atomicfile.ErrSpace},
		{"file: not there", fs.ErrNotExist}, {"file: not permitted", fs.ErrPermission},
		{"post-install: failed", postinstall.ErrFailed}, {"post-install: temporary", postinstall.ErrTemporary}, {"post-install: timeout", postinstall.ErrTimeout},
	}
}
