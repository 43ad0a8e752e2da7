package powercut

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/partition/bls"
)

// forgetful is a directory that leaves one kind of step out.
type forgetful struct {
	bls.Dir
	without string
	left    *int // how often it did
}

// The zeros that are written first and last guard against clusters that were another entry's. This model has no such clusters, so that they are
// not among the steps that are left out.
const (
	tailFlush = "the flush of what is behind the first sector"
	headFlush = "the flush of the first sector"
	nameFlush = "the flush of the directory"
)

func (d forgetful) skip(what string) bool {
	if d.without != what {
		return false
	}
	*d.left++
	return true
}

func (d forgetful) Sync() error {
	if d.skip(nameFlush) {
		return nil
	}
	return d.Dir.Sync()
}

func (d forgetful) Create(name string) (atomicfile.File, error) {
	f, err := d.Dir.Create(name)
	return &forgetfulFile{File: f, dir: d}, err
}

type forgetfulFile struct {
	atomicfile.File
	dir  forgetful
	last string // kind of the last write
}

func (f *forgetfulFile) WriteAt(b []byte, off int64) (int, error) {
	switch f.last = ""; {
	case off > 0:
		f.last = tailFlush
	case len(bytes.Trim(b, "\x00")) > 0:
		f.last = headFlush
	}
	return f.File.WriteAt(b, off)
}

func (f *forgetfulFile) Sync() error {
	if f.last != "" && f.dir.skip(f.last) {
		return nil
	}
	return f.File.Sync()
}

// TestMutationEntries: with any one step of the boot entries' order of durability left out the enumeration sees a failure.
func TestMutationEntries(t *testing.T) {
	for _, tt := range []struct {
		boot    FileSystem
		without string
		back    bool // seen in going back to a slot and not in an update
	}{
		{FAT, headFlush, false},
		{FAT, tailFlush, false},
		{Journal, nameFlush, false},
		{FAT, "", false}, {Journal, "", false}, {FAT, "", true}, {Journal, "", true},
	} {
		left := 0
		r, err := newRig(512, Healthy, tt.boot, InEntries, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.mutate = func(d bls.Dir) bls.Dir { return forgetful{d, tt.without, &left} }
		r.restart()
		if tt.back {
			err = r.back()
		} else {
			err = r.update(Good)
		}
		if err != nil {
			t.Fatal(err)
		}
		r.mutate = nil
		var c Counts
		c.judge(Options{All: 12, Random: 200}, r, r.base, r.dev.Log, "without "+tt.without)
		switch {
		case tt.without == "" && len(c.Violations) > 0:
			t.Errorf("kernels on %s, with nothing left out: %s", tt.boot, c.Violations[0])
		case tt.without == "":
		case left == 0:
			t.Errorf("kernels on %s: %s never happens: the mutation does nothing", tt.boot, tt.without)
		case len(c.Violations) == 0:
			t.Errorf("kernels on %s: without %s nothing fails", tt.boot, tt.without)
		default:
			t.Logf("kernels on %s, without %s: %s", tt.boot, tt.without, c.Violations[0])
		}
	}
}

// back goes back to slot B, boots it and confirms it, and then back to A.
func (r *rig) back() error {
	if r.backend != InEntries {
		return errors.New("going back is judged with boot entries only")
	}
	for _, to := range []string{slotB, slotA} {
		from := slotA
		if to == slotA {
			from = slotB
		}
		err := r.do("go back", false, func() error {
			run, err := r.disk.RunningFromLabel(from)
			if err != nil {
				return err
			}
			return r.disk.GoBack(run, to, 1)
		})
		if err != nil {
			return err
		}
		label, err := r.powerOn()
		if err != nil || label != to {
			return fmt.Errorf("%s boots: %w", label, err)
		}
		err = r.do("mark successful", false, func() error {
			run, err := r.disk.RunningFromLabel(to)
			if err != nil {
				return err
			}
			return r.disk.MarkSuccessful(run)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// TestEntriesPriorities: priorities that are counted anew while a slot is activated leave what boots whole at every point, and in its order.
func TestEntriesPriorities(t *testing.T) {
	for _, boot := range []FileSystem{Journal, FAT} {
		r, err := newRig(512, Healthy, boot, InEntries, nil)
		if err != nil {
			t.Fatal(err)
		}
		// As after many updates: A has the highest priority there is.
		r.reset(r.base)
		slots, err := r.disk.Slots()
		if err != nil {
			t.Fatal(err)
		}
		high := slices.Clone(slots)
		high[0].Priority = 15
		bits := bls.Entries{Dir: r.entriesOf(r.dev), Template: entryTemplate()}
		if err := bits.Write(slots, high); err != nil {
			t.Fatal(err)
		}
		base := bytes.Clone(r.dev.Bytes())
		r.base = base
		r.reset(base)
		if err := r.update(Good); err != nil {
			t.Fatal(err)
		}
		var c Counts
		c.judge(Options{All: 10, Random: 100, Again: 31}, r, base, r.dev.Log, "counted anew")
		for _, v := range c.Violations {
			t.Error(v)
		}
		got := map[string]uint8{}
		for _, s := range must(r.disk.Slots()) {
			got[s.Label] = s.Priority
		}
		if want := map[string]uint8{slotA: 1, slotB: 2}; !maps.Equal(got, want) {
			t.Errorf("priorities %v, want %v", got, want)
		}
		t.Logf("kernels on %s: %v", boot, c)
	}
}
