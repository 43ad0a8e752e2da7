// Package bitstest is the conformance suite of boot backends: of the partition table's own bits, and of every [partition.Bits]. It plays updates
// on a disk with two or three slots and lets the boot loader that goes with the backend say what boots.
package bitstest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"testing"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/devicetest"
	"github.com/flipside-linux/flipside/partition/gptimage"
)

// Machine is a disk with slots and the boot loader that goes with it.
type Machine interface {
	// Open opens the disk anew, as another process would.
	Open(t *testing.T) *partition.Disk
	// Boot does what happens at power-on, and returns the label of the slot that it starts.
	Boot(t *testing.T) string
}

// State is the boot bits that a slot begins with.
type State struct {
	Priority, Tries uint8
	Successful      bool
}

// Layout is the partition table of a disk with a slot for each of bits: USR-A, USR-B, and so on.
func Layout(bits []State) gptimage.Layout {
	l := gptimage.Layout{Sector: 512, UUID: "22222222-2222-4222-8222-222222222222", Align: 512}
	for i := range bits {
		id := "7130c94a-213a-4e5a-8e26-6cce9662f13" + string(rune('0'+i))
		l.Parts = append(l.Parts, gptimage.Partition{Label: "USR-" + string(rune('A'+i)), Type: gptimage.TypeUSR, UUID: id, Size: 8192})
	}
	return l
}

// Device is a disk with a layout.
func Device(t *testing.T, l gptimage.Layout) *devicetest.Memory {
	t.Helper()
	size, err := l.Size()
	if err != nil {
		t.Fatal(err)
	}
	m := devicetest.NewStrict(make([]byte, size), l.Sector)
	if err := errors.Join(l.Write(m), m.Flush()); err != nil {
		t.Fatal(err)
	}
	return m
}

var (
	good    = State{1, 0, true}
	better  = State{2, 0, true}
	nothing = State{}
	errAny  = errors.New("any error")
	release = bytes.Repeat([]byte("release."), 512)
)

// Run runs the suite. make makes a machine whose slots have the given bits.
func Run(t *testing.T, make func(t *testing.T, bits []State) Machine) {
	type machine struct {
		Machine
		t *testing.T
	}
	start := func(t *testing.T, bits ...State) machine { return machine{make(t, bits), t} }
	boots := func(m machine, want ...string) {
		m.t.Helper()
		for i, w := range want {
			if got := m.Boot(m.t); got != w {
				m.t.Errorf("boot %d is %s, want %s", i+1, got, w)
			}
		}
	}
	run := func(m machine, d *partition.Disk, label string) partition.Running {
		m.t.Helper()
		r, err := d.RunningFromLabel(label)
		if err != nil {
			m.t.Fatal(err)
		}
		return r
	}
	is := func(m machine, label string, want State) {
		m.t.Helper()
		s, err := m.Open(m.t).Slot(label)
		if err != nil {
			m.t.Fatal(err)
		}
		if got := (State{s.Priority, s.Tries, s.Successful}); got != want {
			m.t.Errorf("slot %s is %+v, want %+v", label, got, want)
		}
	}
	install := func(m machine, from, to string, tries int) {
		m.t.Helper()
		d := m.Open(m.t)
		r := run(m, d, from)
		target, err := d.Begin(r, to)
		if err != nil {
			m.t.Fatal(err)
		}
		is(m, to, nothing)
		if _, err := target.WriteAt(release, 0); err != nil {
			m.t.Fatal(err)
		}
		v, err := target.Verify(m.t.Context(), int64(len(release)), sha256.Sum256(release))
		if err == nil {
			err = d.Activate(r, v, tries)
		}
		if err != nil {
			m.t.Fatal(err)
		}
	}
	confirm := func(m machine, label string) {
		m.t.Helper()
		d := m.Open(m.t)
		if err := d.MarkSuccessful(run(m, d, label)); err != nil {
			m.t.Fatal(err)
		}
	}
	refused := func(t *testing.T, err, want error) {
		t.Helper()
		if err == nil || want != errAny && !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
	}

	t.Run("an update is tried, confirmed, and stays", func(t *testing.T) {
		m := start(t, better, good)
		boots(m, "USR-A")
		install(m, "USR-A", "USR-B", 1)
		is(m, "USR-B", State{3, 1, false})
		boots(m, "USR-B")
		is(m, "USR-B", State{3, 0, false})
		confirm(m, "USR-B")
		is(m, "USR-B", State{3, 0, true})
		is(m, "USR-A", better)
		boots(m, "USR-B", "USR-B")
		install(m, "USR-B", "USR-A", 1) // and back again
		boots(m, "USR-A")
		confirm(m, "USR-A")
		boots(m, "USR-A", "USR-A")
	})
	t.Run("a trial that is not confirmed falls back, after as many tries as were given", func(t *testing.T) {
		for tries := 1; tries <= 3; tries++ {
			m := start(t, better, good)
			install(m, "USR-A", "USR-B", tries)
			for range tries {
				boots(m, "USR-B")
			}
			boots(m, "USR-A", "USR-A")
			is(m, "USR-B", State{3, 0, false})
			install(m, "USR-A", "USR-B", 1) // and the slot can be written again
			boots(m, "USR-B", "USR-A")
		}
	})
	t.Run("confirmed with tries left, none is spent any more", func(t *testing.T) {
		m := start(t, good, nothing)
		install(m, "USR-A", "USR-B", 3)
		boots(m, "USR-B")
		confirm(m, "USR-B")
		boots(m, "USR-B", "USR-B", "USR-B", "USR-B")
		is(m, "USR-B", State{2, 0, true})
	})
	t.Run("a slot that is written to does not boot", func(t *testing.T) {
		m := start(t, good, better)
		d := m.Open(t)
		if _, err := d.Begin(run(m, d, "USR-A"), "USR-B"); err != nil {
			t.Fatal(err)
		}
		boots(m, "USR-A", "USR-A")
	})
	t.Run("the running slot is neither written to nor lost", func(t *testing.T) {
		m := start(t, good, nothing)
		d := m.Open(t)
		r := run(m, d, "USR-A")
		_, err := d.Begin(r, "USR-A")
		refused(t, err, partition.ErrRunning)
		refused(t, d.GoBack(r, "USR-A", 1), partition.ErrRunning)
		refused(t, d.MarkBad("USR-A"), partition.ErrLast)
		refused(t, d.GoBack(r, "USR-B", 1), partition.ErrNotProven)
		boots(m, "USR-A")
	})
	t.Run("nothing is written beside a running slot on trial", func(t *testing.T) {
		m := start(t, good, State{2, 1, false})
		boots(m, "USR-B")
		d := m.Open(t)
		_, err := d.Begin(run(m, d, "USR-B"), "USR-A")
		refused(t, err, partition.ErrNotProven)
		is(m, "USR-A", good)
	})
	t.Run("only what was verified, and not changed since, is activated", func(t *testing.T) {
		m := start(t, good, nothing)
		d := m.Open(t)
		r := run(m, d, "USR-A")
		refused(t, d.Activate(r, partition.Verified{}, 1), errAny)
		target, err := d.Begin(r, "USR-B")
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(bytes.Repeat([]byte{7}, 512))
		if _, err := target.Verify(t.Context(), 512, sum); err == nil {
			t.Error("a slot of something else was verified")
		}
		write := func() partition.Verified {
			if _, err := target.WriteAt(bytes.Repeat([]byte{7}, 512), 0); err != nil {
				t.Fatal(err)
			}
			v, err := target.Verify(t.Context(), 512, sum)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
		v := write()
		if _, err := target.WriteAt([]byte{8}, 4096); err != nil {
			t.Fatal(err)
		}
		refused(t, d.Activate(r, v, 1), partition.ErrStale)
		v = write()
		refused(t, d.Activate(r, v, 4), errAny)
		boots(m, "USR-A")
		if err := d.Activate(r, v, 1); err != nil {
			t.Fatal(err)
		}
		refused(t, d.Activate(r, v, 1), partition.ErrStale)
		boots(m, "USR-B", "USR-A")
	})
	t.Run("a slot that was good is gone back to, on trial", func(t *testing.T) {
		m := start(t, better, good)
		d := m.Open(t)
		if err := d.GoBack(run(m, d, "USR-A"), "USR-B", 1); err != nil {
			t.Fatal(err)
		}
		is(m, "USR-B", State{3, 1, false})
		if err := d.GoBack(run(m, d, "USR-A"), "USR-B", 3); err != nil { // it is on its way
			t.Fatal(err)
		}
		boots(m, "USR-B", "USR-A", "USR-A")
		d = m.Open(t)
		refused(t, d.GoBack(run(m, d, "USR-A"), "USR-B", 1), partition.ErrNotProven)
	})
	t.Run("a slot is made unbootable, as long as another is left", func(t *testing.T) {
		m := start(t, good, State{2, 1, false})
		if err := m.Open(t).MarkBad("USR-B"); err != nil {
			t.Fatal(err)
		}
		is(m, "USR-B", nothing)
		boots(m, "USR-A")
		refused(t, m.Open(t).MarkBad("USR-A"), partition.ErrLast)
		boots(m, "USR-A")
	})
	t.Run("when priorities are used up they are counted anew, in their order", func(t *testing.T) {
		m := start(t, State{15, 0, true}, nothing, State{14, 0, true})
		install(m, "USR-A", "USR-B", 1)
		is(m, "USR-A", better)
		is(m, "USR-C", good)
		is(m, "USR-B", State{3, 1, false})
		boots(m, "USR-B", "USR-A")
		if err := m.Open(t).MarkBad("USR-A"); err != nil {
			t.Fatal(err)
		}
		boots(m, "USR-C")
	})
	t.Run("thirty updates", func(t *testing.T) {
		m := start(t, better, good)
		from, to := "USR-A", "USR-B"
		for range 30 {
			install(m, from, to, 1)
			boots(m, to)
			confirm(m, to)
			boots(m, to)
			from, to = to, from
		}
	})
	t.Run("twice is the same as once", func(t *testing.T) {
		m := start(t, good, nothing)
		confirm(m, "USR-A")
		confirm(m, "USR-A")
		is(m, "USR-A", good)
		d := m.Open(t)
		for range 2 {
			if _, err := d.Begin(run(m, d, "USR-A"), "USR-B"); err != nil {
				t.Fatal(err)
			}
		}
		is(m, "USR-B", nothing)
		boots(m, "USR-A")
	})
}
