package trust

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/flipside-linux/flipside/partition/atomicfile"
)

// What a floor may refuse for, beside what the TPM says.
var (
	ErrNumber = errors.New("a release's number makes no sense")
	ErrLost   = errors.New("the floor in the TPM is gone")
)

// Mode says where the floor is kept.
type Mode string

// The modes. Whatever the mode, the file and the running release count too.
const (
	Auto     Mode = "auto" // in the TPM once it is provisioned
	WithTPM  Mode = "tpm"  // in the TPM; without a provisioned one no payload is accepted
	FileOnly Mode = "file" // the TPM is not asked
)

// Level is where the floor stands, and from where.
type Level struct {
	Number  int64  `json:"number"` // the highest of the three
	TPM     int64  `json:"tpm"`
	File    int64  `json:"file"`
	Release int64  `json:"release"` // the running one's
	Keeper  string `json:"keeper"`  // "tpm" or "file": what a restored disk cannot lower, or what it can
	Warning string `json:"warning,omitempty"`
}

// Pending is a release that is armed and has not proven itself.
type Pending struct {
	Number  int64  `json:"number"`
	Slot    string `json:"slot"`
	Version string `json:"version"`
}

// Release is one that was found good in a slot.
type Release struct {
	Number  int64  `json:"number"`
	Version string `json:"version"`
}

// Floor is the number below which no payload is accepted. It is safe for use by several goroutines of one process.
type Floor struct {
	Path    string // of its file
	Mode    Mode   // "" is Auto
	Device  string // of the TPM; "" is DefaultDevice
	Release int64  // the running release's own number; 0 if it names none
	// ReadOnly writes nothing when the floor is only looked at: the file is somebody else's.
	ReadOnly bool

	mu sync.Mutex
}

// record is the content of the file.
type record struct {
	Schema  string   `json:"schema"`
	Floor   int64    `json:"floor"`
	TPM     bool     `json:"tpm"` // the floor is in the TPM too
	Pending *Pending `json:"pending,omitempty"`
	// Slots are the releases that were last found good in each slot, by label. It is asked before going back to one.
	Slots map[string]Release `json:"slots,omitempty"`
}

const recordSchema = "flipside.trust/v1"

// maxRecord is more than the file ever has.
const maxRecord = 1 << 20

var errRecord = errors.New("the floor's file cannot be read")

// decodeRecord reads the content of the file.
func decodeRecord(data []byte) (record, error) {
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return record{}, fmt.Errorf("%w: %w", errRecord, err)
	}
	if r.Schema != recordSchema {
		return record{}, fmt.Errorf("%w: it has schema %q, want %q", errRecord, r.Schema, recordSchema)
	}
	if r.Floor < 0 || r.Floor > MaxNumber {
		return record{}, fmt.Errorf("%w: %w", errRecord, errNumber(r.Floor))
	}
	if p := r.Pending; p != nil && (p.Number < 0 || p.Number > MaxNumber) {
		return record{}, fmt.Errorf("%w: %w", errRecord, errNumber(p.Number))
	}
	for _, s := range r.Slots {
		if s.Number < 0 || s.Number > MaxNumber {
			return record{}, fmt.Errorf("%w: %w", errRecord, errNumber(s.Number))
		}
	}
	return r, nil
}

// load reads the file. A file that is not there is a floor of 0; so is one that cannot be read, because who can write rubbish into it can
// delete it as well, and rubbish must not stop a host's updates. The TPM and the running release keep what they know.
func (f *Floor) load() (record, string, error) {
	file, err := os.Open(f.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return record{Schema: recordSchema}, "", nil
	}
	if err != nil {
		return record{}, "", fmt.Errorf("reading the floor: %w", err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return record{}, "", fmt.Errorf("reading the floor: %w", err)
	}
	dir, err := os.Stat(filepath.Dir(f.Path))
	if err != nil {
		return record{}, "", fmt.Errorf("reading the floor: %w", err)
	}
	// A sticky bit says that others may make files in the directory, too.
	if st, ok := info.Sys().(*syscall.Stat_t); ok && dir.Mode()&fs.ModeSticky != 0 && os.Geteuid() == 0 && st.Uid != 0 {
		return record{Schema: recordSchema}, fmt.Sprintf("%s is not root's, but user %d's", f.Path, st.Uid), nil
	}
	data, err := io.ReadAll(io.LimitReader(file, maxRecord))
	if err != nil {
		return record{}, "", fmt.Errorf("reading the floor: %w", err)
	}
	r, err := decodeRecord(data)
	if err != nil {
		return record{Schema: recordSchema}, fmt.Sprintf("%s: %v", f.Path, err), nil
	}
	return r, "", nil
}

func (f *Floor) save(r record) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("saving the floor: %w", err)
	}
	if err := atomicfile.Write(atomicfile.OS(filepath.Dir(f.Path)), filepath.Base(f.Path), append(data, '\n')); err != nil {
		return fmt.Errorf("saving the floor: %w", err)
	}
	return nil
}

// Level reads the floor. An error means that it is not known, and that no payload may be accepted until it is.
func (f *Floor) Level() (Level, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l, _, err := f.level()
	return l, err
}

func (f *Floor) level() (Level, record, error) {
	r, warning, err := f.load()
	if err != nil {
		return Level{}, r, err
	}
	l := Level{File: r.Floor, Release: f.Release, Keeper: "file", Warning: warning}
	if f.Mode != FileOnly {
		n, err := f.fromTPM()
		switch {
		case err == nil:
			l.TPM, l.Keeper = n, "tpm"
			if !r.TPM && !f.ReadOnly { // the file was lost, or is older than the TPM's floor
				r.TPM = true
				if err := f.save(r); err != nil {
					l.Warning = err.Error()
				}
			}
		case f.Mode == WithTPM:
			return l, r, fmt.Errorf("the floor of releases is not known: %w", err)
		case r.TPM && errors.Is(err, ErrNotPrepared):
			return l, r, fmt.Errorf("%w: it was cleared or replaced; flipside trust reset makes a new one: %w", ErrLost, err)
		case r.TPM:
			return l, r, fmt.Errorf("the floor of releases is not known: %w", err)
		}
	}
	l.Number = max(l.TPM, l.File, l.Release)
	return l, r, nil
}

func (f *Floor) fromTPM() (int64, error) {
	t, err := OpenTPM(f.Device)
	if err != nil {
		return 0, err
	}
	defer t.Close()
	return t.Floor()
}

// Propose remembers the number of a release that is about to be armed. It is on the disk when Propose returns.
func (f *Floor) Propose(p Pending) error {
	if p.Number < 0 || p.Number > MaxNumber {
		return errNumber(p.Number)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	r, _, err := f.load()
	if err != nil {
		return err
	}
	r.Pending = &p
	return f.save(r)
}

// Confirm raises the floor to what was proposed for the release that runs from slot, once it is known to be good. It reports whether the floor
// rose. Calling it again does nothing. If the TPM cannot be asked, or has not caught up ([ErrBehind]), the file rises all the same, the release stays pending for the TPM, and the
// error says so. It also remembers which release the slot holds, for [Floor.Admits].
func (f *Floor) Confirm(ctx context.Context, slot, version string) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, warning, err := f.load()
	if err != nil {
		return false, err
	}
	proposed := r.Pending != nil && r.Pending.Slot == slot && r.Pending.Version == version
	old := r.Slots[slot]
	now := Release{Number: f.Release, Version: version}
	switch {
	case proposed:
		now.Number = max(now.Number, r.Pending.Number)
	case old.Version == version:
		now.Number = max(now.Number, old.Number)
	}
	if now != old {
		r.Slots = maps.Clone(r.Slots)
		if r.Slots == nil {
			r.Slots = map[string]Release{}
		}
		r.Slots[slot] = now
	}
	if !proposed {
		if now == old || warning != "" { // a file that cannot be read stays, for somebody to look at
			return false, nil
		}
		return false, f.save(r)
	}
	rose := r.Pending.Number > r.Floor
	r.Floor = max(r.Floor, r.Pending.Number)
	if err := f.save(r); err != nil {
		return false, err
	}
	if f.Mode != FileOnly {
		err := f.raise(ctx, r.Pending.Number)
		switch {
		case err == nil:
			r.TPM = true
		case f.Mode != WithTPM && !r.TPM && (errors.Is(err, ErrNoTPM) || errors.Is(err, ErrNotPrepared)):
		default:
			return rose, fmt.Errorf("release %s is good, and the TPM does not know it yet: %w", version, err)
		}
	}
	r.Pending = nil
	return rose, f.save(r)
}

// Admits reports whether the release in a slot, which was good there before, may run again: nil if its number is not below the floor. An error says
// the numbers, or that they are not known. Whoever can write to the disk can make it say anything, but could flip the slots as well.
func (f *Floor) Admits(slot string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	l, r, err := f.level()
	if err != nil {
		return err
	}
	held, known := r.Slots[slot]
	switch {
	case l.Number == 0:
		return nil
	case !known:
		return fmt.Errorf("the number of the release in slot %s is not known, and the floor is %d", slot, l.Number)
	case held.Number < l.Number:
		return fmt.Errorf("release %s in slot %s has number %d, and the floor is %d", held.Version, slot, held.Number, l.Number)
	}
	return nil
}

func (f *Floor) raise(ctx context.Context, number int64) error {
	t, err := OpenTPM(f.Device)
	if err != nil {
		return err
	}
	defer t.Close()
	return t.Raise(ctx, number)
}

// Provision moves the floor into the TPM. It begins at the highest of number and what the file and the running release know; if that is 0, where the first
// release with a number will be. A floor that is there already rises as far as that; a long way it goes in steps, until ctx ends.
func (f *Floor) Provision(ctx context.Context, password []byte, number int64) error {
	if number < 0 || number > MaxNumber {
		return errNumber(number)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	r, _, err := f.load()
	if err != nil {
		return err
	}
	t, err := OpenTPM(f.Device)
	if err != nil {
		return err
	}
	defer t.Close()
	number = max(number, r.Floor, f.Release)
	if err := t.Provision(password, number); err != nil {
		return err
	}
	for { // it was there before
		err := t.Raise(ctx, number)
		if err == nil {
			break
		}
		if !errors.Is(err, ErrBehind) || ctx.Err() != nil {
			return err
		}
	}
	r.Floor, r.TPM = number, true
	return f.save(r)
}

// Reset makes the floor number, also a lower one. If the TPM keeps a floor, or should, it takes the owner's password; interrupted, it is to be done
// again, and no payload is accepted in between.
func (f *Floor) Reset(password []byte, number int64) error {
	if number < 0 || number > MaxNumber {
		return errNumber(number)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	r, _, err := f.load()
	if err != nil {
		return err
	}
	if f.Mode != FileOnly {
		t, err := OpenTPM(f.Device)
		switch {
		case err == nil:
			defer t.Close()
			if _, err := t.Floor(); err != nil && !r.TPM && f.Mode != WithTPM && errors.Is(err, ErrNotPrepared) {
				break // never was there
			}
			// The file must know of the TPM before the TPM forgets: power lost now must not open the door.
			r.TPM = true
			if err := f.save(r); err != nil {
				return err
			}
			if err := t.Remove(password); err != nil {
				return err
			}
			if err := t.Provision(password, number); err != nil {
				return err
			}
		case errors.Is(err, ErrNoTPM) && f.Mode != WithTPM:
			r.TPM = false // the TPM is gone for good: the host goes on with its file
		default:
			return err
		}
	}
	r.Floor, r.Pending = number, nil
	return f.save(r)
}

// ReleaseNumber reads FLIPSIDE_TIMESTAMP from an os-release file: the number of the release that it belongs to, 0 if it names none.
func ReleaseNumber(osRelease []byte) (int64, error) {
	for line := range strings.Lines(string(osRelease)) {
		v, ok := strings.CutPrefix(strings.TrimSpace(line), "FLIPSIDE_TIMESTAMP=")
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.Trim(v, `"'`), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%w: FLIPSIDE_TIMESTAMP is %q", ErrNumber, v)
		}
		if n < 0 || n > MaxNumber {
			return 0, errNumber(n)
		}
		return n, nil
	}
	return 0, nil
}
