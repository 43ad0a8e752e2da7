package partition

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"unsafe"
)

// Begin makes a slot unbootable, durably, and then gives write access to it. The running slot is refused, and so is every other one
// while the running slot is itself on trial: the host would be without a slot to fall back to.
func (d *Disk) Begin(r Running, label string) (*Target, error) {
	if r.slot.Label == "" {
		return nil, errors.New("preparing a slot: nobody found out which slot is running")
	}
	if label == r.slot.Label {
		return nil, fmt.Errorf("preparing slot %q: %w", label, ErrRunning)
	}
	var slot Slot
	err := d.edit(func(slots []Slot) error {
		run, err := find(slots, r.slot.Label)
		if err != nil {
			return err
		}
		if !run.Successful || run.Priority == 0 {
			return fmt.Errorf("%w: %s has priority %d, tries %d, successful %v; mark it successful first", ErrNotProven, run.Label, run.Priority, run.Tries, run.Successful)
		}
		for i := range slots {
			if slots[i].Label == label {
				slots[i].Priority, slots[i].Tries, slots[i].Successful = 0, 0, false
			}
		}
		slot, err = find(slots, label)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("preparing slot %q: %w", label, err)
	}
	return &Target{disk: d, slot: slot}, nil
}

// Target is write access to an inactive slot.
type Target struct {
	disk *Disk
	slot Slot
	gen  atomic.Int64 // counts writes; they come from several goroutines
}

// Slot says which slot it is.
func (t *Target) Slot() Slot { return t.slot }

// Size is that of the slot, in bytes.
func (t *Target) Size() int64 { return t.slot.Size }

func (t *Target) bounds(off, n int64) error {
	if off < 0 || n < 0 || off > t.slot.Size-n {
		return fmt.Errorf("bytes %d to %d are outside slot %s of %d bytes", off, off+n, t.slot.Label, t.slot.Size)
	}
	return nil
}

// WriteAt writes into the slot.
func (t *Target) WriteAt(p []byte, off int64) (int, error) {
	if err := t.bounds(off, int64(len(p))); err != nil {
		return 0, err
	}
	t.gen.Add(1)
	return t.disk.dev.WriteAt(p, t.slot.Start+off)
}

// ReadAt reads from the slot.
func (t *Target) ReadAt(p []byte, off int64) (int, error) {
	if err := t.bounds(off, int64(len(p))); err != nil {
		return 0, err
	}
	return t.disk.dev.ReadAt(p, t.slot.Start+off)
}

// Flush makes what was written durable.
func (t *Target) Flush() error { return t.disk.dev.Flush() }

// Verified is the proof that a slot holds, on the medium, exactly what it should. Only Verify makes one.
type Verified struct {
	target *Target
	gen    int64
	slot   Slot
}

// Verify flushes the slot, reads size bytes back from the medium and compares their hash.
func (t *Target) Verify(ctx context.Context, size int64, want [32]byte) (Verified, error) {
	if size <= 0 || size > t.slot.Size {
		return Verified{}, fmt.Errorf("verifying slot %s: %d bytes do not fit its %d", t.slot.Label, size, t.slot.Size)
	}
	if err := t.Flush(); err != nil {
		return Verified{}, fmt.Errorf("verifying slot %s: flushing: %w", t.slot.Label, err)
	}
	gen := t.gen.Load()
	h := sha256.New()
	buf := aligned(1 << 20)
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return Verified{}, err
		}
		p := buf[:min(int64(len(buf)), size-off)]
		n, err := readMedium(t.disk.dev, p, t.slot.Start+off)
		if n != len(p) && err == nil {
			err = io.ErrUnexpectedEOF
		}
		if n != len(p) {
			return Verified{}, fmt.Errorf("verifying slot %s at byte %d: %w", t.slot.Label, off, err)
		}
		h.Write(p)
		off += int64(n)
	}
	if got := [32]byte(h.Sum(nil)); got != want {
		return Verified{}, fmt.Errorf("%w: slot %s has SHA-256 %x, want %x", ErrMismatch, t.slot.Label, got, want)
	}
	return Verified{t, gen, t.slot}, nil
}

// aligned returns a buffer that O_DIRECT accepts.
func aligned(n int) []byte {
	const align = 4096
	b := make([]byte, n+align)
	off := align - int(uintptr(unsafe.Pointer(&b[0]))%align)
	return b[off : off+n]
}

// Activate makes a verified slot the one that boots next: highest priority, tries boots to prove itself, not successful.
func (d *Disk) Activate(r Running, v Verified, tries int) error {
	if v.target == nil || v.target.disk != d {
		return errors.New("activating a slot: it was not verified on this disk")
	}
	if v.target.gen.Load() != v.gen {
		return fmt.Errorf("activating slot %s: %w", v.slot.Label, ErrStale)
	}
	if tries < 1 || tries > 3 {
		return fmt.Errorf("activating slot %s: %d tries, want 1 to 3", v.slot.Label, tries)
	}
	err := d.edit(func(slots []Slot) error {
		if v.slot.Label == r.slot.Label {
			return ErrRunning
		}
		top := uint8(0)
		for _, s := range slots {
			if s.Label != v.slot.Label {
				top = max(top, s.Priority)
			}
		}
		if top == maxPriority {
			top = renumber(slots, v.slot.Label)
		}
		for i := range slots {
			if slots[i].UUID == v.slot.UUID && slots[i].Start == v.slot.Start {
				slots[i].Priority, slots[i].Tries, slots[i].Successful = top+1, uint8(tries), false
				return nil
			}
		}
		return ErrNoSlot
	})
	if err != nil {
		return fmt.Errorf("activating slot %s: %w", v.slot.Label, err)
	}
	return nil
}

// renumber gives all slots but one the lowest priorities that keep their order, and returns the highest.
func renumber(slots []Slot, but string) uint8 {
	var used [maxPriority + 1]bool
	for _, s := range slots {
		if s.Label != but {
			used[s.Priority] = true
		}
	}
	var to [maxPriority + 1]uint8
	next := uint8(0)
	for p := 1; p <= maxPriority; p++ {
		if used[p] {
			next++
			to[p] = next
		}
	}
	for i := range slots {
		if slots[i].Label != but {
			slots[i].Priority = to[slots[i].Priority]
		}
	}
	return next
}

// MarkSuccessful says that the running slot is good.
func (d *Disk) MarkSuccessful(r Running) error {
	return d.set(r.slot.Label, "marking slot %s successful", func(s *Slot) { s.Successful, s.Tries, s.Priority = true, 0, max(1, s.Priority) })
}

// MarkBad makes a slot unbootable.
func (d *Disk) MarkBad(label string) error {
	return d.set(label, "making slot %s unbootable", func(s *Slot) { s.Successful, s.Tries, s.Priority = false, 0, 0 })
}

func (d *Disk) set(label, what string, f func(*Slot)) error {
	err := d.edit(func(slots []Slot) error {
		if _, err := find(slots, label); err != nil {
			return err
		}
		others := false
		for i := range slots {
			if slots[i].Label == label {
				f(&slots[i])
			}
			others = others || slots[i].Bootable()
		}
		if !others {
			return errors.New("no slot would be left to boot")
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf(what+": %w", label, err)
	}
	return nil
}

func isAligned(p []byte) bool { return uintptr(unsafe.Pointer(&p[0]))%4096 == 0 }
