package updater

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/partition/atomicfile"
)

// Phase is where an update stands.
type Phase string

// The phases of an update, in order. A host that has nothing to do is idle.
const (
	Idle      Phase = "idle"      // nothing is under way
	Applying  Phase = "applying"  // a payload is being fetched, checked and written to the inactive slot
	Armed     Phase = "armed"     // the new slot is verified and boots next; the reboot gates decide when
	Rebooting Phase = "rebooting" // the gates said go and the reboot has been asked for
	Trial     Phase = "trial"     // this is the first boot of the new slot; it is not yet known to be good
	Failing   Phase = "failing"   // the trial was bad; the host is on its way back to the old slot
)

// Update is the update under way.
type Update struct {
	Offer      omaha.Offer     `json:"offer"`
	FromSlot   string          `json:"from_slot"`
	FromVer    string          `json:"from_version"`
	ToSlot     string          `json:"to_slot"`
	Started    time.Time       `json:"started"`
	BootID     string          `json:"boot_id"`              // the boot in which it was written
	Checkpoint json.RawMessage `json:"checkpoint,omitempty"` // of package payload
	Armed      time.Time       `json:"armed,omitzero"`
	Healthless string          `json:"unhealthy,omitempty"`   // why the trial boot was judged bad
	Rollback   string          `json:"rollback,omitempty"`    // who wants the other slot's release back; nothing is fetched or written
	BelowFloor bool            `json:"below_floor,omitempty"` // that person wants it even if it is older than the host accepts
}

// Failure is what a host remembers of a version that did not work, because no server does.
type Failure struct {
	Count  int       `json:"count"`
	Reason string    `json:"reason"`
	Last   time.Time `json:"last"`
	Until  time.Time `json:"until"`          // not tried again before
	Held   bool      `json:"held,omitempty"` // not tried again before somebody forgives it
}

// Verdict is what the semaphore has not yet been told about a reboot.
type Verdict struct {
	Healthy   bool   `json:"healthy"`
	Cancelled bool   `json:"cancelled,omitempty"` // there was no reboot: it says nothing about the version
	Version   string `json:"version"`             // the version that was tried
	Reason    string `json:"reason,omitempty"`
	Error     string `json:"error,omitempty"` // why the semaphore has not taken it
}

// State is everything that must survive a kill -9 or a power cut. The zero State is that of a host that never updated.
type State struct {
	Schema   string             `json:"schema"`
	Phase    Phase              `json:"phase"`
	Since    time.Time          `json:"since,omitzero"` // when the phase was entered
	Update   *Update            `json:"update,omitempty"`
	Failures map[string]Failure `json:"failures,omitempty"`
	Reports  []omaha.Event      `json:"reports,omitempty"` // that the server has not acknowledged
	Verdict  *Verdict           `json:"verdict,omitempty"`
	Holds    map[string]string  `json:"holds,omitempty"`   // the release that is complete in each slot, by label, as far as it is known
	Unwedge  bool               `json:"unwedge,omitempty"` // the server thinks that we are mid-update and we are not
	Whole    bool               `json:"whole,omitempty"`   // a delta did not fit: until a release is in place and good, whole payloads are asked for

	LastCheck  time.Time `json:"last_check,omitzero"`
	LastAnswer string    `json:"last_answer,omitempty"` // what the server said, in words
	LastError  string    `json:"last_error,omitempty"`
	ErrorAt    time.Time `json:"error_at,omitzero"`
	CheckFails int       `json:"check_fails,omitempty"` // checks that failed in a row

	LastUpdate *Done `json:"last_update,omitempty"`
}

// Done is the outcome of the last update that ended.
type Done struct {
	From   string    `json:"from"`
	To     string    `json:"to"`
	At     time.Time `json:"at"`
	Good   bool      `json:"good"`
	Reason string    `json:"reason,omitempty"`
}

const stateSchema = "flipside.state/v1"

// Store keeps the State in one file. The file is replaced as a whole: after a power cut it is the old one or the new one.
type Store struct{ Path string }

// ErrState means that the saved state is not one this program can read. It is never overwritten silently.
var ErrState = errors.New("the saved state cannot be read")

// Load reads the state. A file that is not there is the zero State.
func (s Store) Load() (State, error) {
	data, err := os.ReadFile(s.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return State{Schema: stateSchema, Phase: Idle}, nil
	}
	if err != nil {
		return State{}, fmt.Errorf("reading the state: %w", err)
	}
	var st State
	if err := json.Unmarshal(data, &st); err != nil {
		return State{}, fmt.Errorf("%w: %s: %w", ErrState, s.Path, err)
	}
	if st.Schema != stateSchema {
		return State{}, fmt.Errorf("%w: %s has schema %q, want %q", ErrState, s.Path, st.Schema, stateSchema)
	}
	if st.Phase == "" {
		st.Phase = Idle
	}
	return st, nil
}

// Save replaces the state durably: a temporary file beside it, flushed, renamed over it, and the directory flushed.
func (s Store) Save(st State) error {
	st.Schema = stateSchema
	data, err := json.MarshalIndent(st, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding the state: %w", err)
	}
	if err := atomicfile.Write(atomicfile.OS(filepath.Dir(s.Path)), filepath.Base(s.Path), append(data, '\n')); err != nil {
		return fmt.Errorf("saving the state: %w", err)
	}
	return nil
}
