package partition

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Begin makes a slot unbootable, durably, and then gives write access to it. The running slot is refused, and so is every other one
// while the running slot is itself on trial: the host would be without a slot to fall back to. Begin also voids every proof that the
// slot had. Nobody else gets write access to the slot until the Disk is closed or the slot is activated: they get ErrBusy.
func (d *Disk) Begin(r Running, label string) (*Target, error) {
	fail := func(err error) (*Target, error) { return nil, fmt.Errorf("preparing slot %q: %w", label, err) }
	if r.slot.Label == "" {
		return fail(errors.New("nobody found out which slot is running"))
	}
	if label == r.slot.Label {
		return fail(ErrRunning)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var slot Slot
	var release func()
	err := d.edit(func(t *table, slots []Slot) error {
		s, err := d.checkRunning(r, slots)
		if err != nil {
			return err
		}
		if !s.Successful || s.Priority == 0 {
			return fmt.Errorf("%w: %s has priority %d, tries %d, successful %v; mark it successful first", ErrNotProven, s.Label, s.Priority, s.Tries, s.Successful)
		}
		if slot, err = find(slots, label); err != nil {
			return err
		}
		if err := t.checkSlot(slot); err != nil {
			return err
		}
		if d.claimed[slot.Index] == nil {
			if release, err = d.claim(slot.Start, slot.Size); err != nil {
				return err
			}
		}
		for i := range slots {
			if slots[i].Index == slot.Index {
				slots[i].Priority, slots[i].Tries, slots[i].Successful = 0, 0, false
				slot = slots[i]
			}
		}
		return nil
	})
	if err != nil {
		if release != nil {
			release()
		}
		return fail(err)
	}
	if release != nil {
		d.claimed[slot.Index] = release
	}
	d.gen[slot.Index]++
	return &Target{disk: d, slot: slot, era: d.eras[slot.Index]}, nil
}

// checkRunning finds the running slot in a table that was just read, and that it is still what it was.
func (d *Disk) checkRunning(r Running, slots []Slot) (Slot, error) {
	s, err := find(slots, r.slot.Label)
	if err != nil {
		return Slot{}, fmt.Errorf("the running slot: %w", err)
	}
	if !s.same(r.slot) {
		return Slot{}, fmt.Errorf("the running slot %s: %w: it is not where it was", s.Label, ErrGeometry)
	}
	return s, nil
}

// Target is write access to an inactive slot. Its methods may be called from several goroutines.
type Target struct {
	disk *Disk
	slot Slot
	era  int // activations of the slot before this target

	settling sync.Mutex // one reads back at a time, and who writes behind it need not wait
	settled  int64      // bytes from the beginning that are final, flushed, read back and hashed
	hash     hash.Hash  // of them
	reader   reader

	mu      sync.Mutex
	final   int64 // bytes from the beginning that are not written to any more: what is settled, and what is being settled
	holders int   // calls that settle, or wait to
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

// change admits a change of the slot's bytes: inside the slot, before it was activated, and not below what is settled.
func (t *Target) change(off, n int64) error {
	if err := t.bounds(off, n); err != nil {
		return err
	}
	if t.era != t.disk.eras[t.slot.Index] {
		return fmt.Errorf("writing to slot %s: it was activated, and is not written to any more", t.slot.Label)
	}
	if off < t.final {
		return fmt.Errorf("writing to slot %s at byte %d: %w, up to byte %d", t.slot.Label, off, ErrSettled, t.final)
	}
	t.disk.gen[t.slot.Index]++
	return nil
}

// WriteAt writes into the slot. Every proof that the slot had is void.
func (t *Target) WriteAt(p []byte, off int64) (int, error) {
	t.disk.mu.Lock()
	defer t.disk.mu.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.change(off, int64(len(p))); err != nil {
		return 0, err
	}
	if err := t.disk.writeAt(p, t.slot.Start+off); err != nil {
		return 0, fmt.Errorf("slot %s: %w", t.slot.Label, err)
	}
	return len(p), nil
}

// ReadAt reads from the slot.
func (t *Target) ReadAt(p []byte, off int64) (int, error) {
	if err := t.bounds(off, int64(len(p))); err != nil {
		return 0, err
	}
	return t.disk.dev.ReadAt(p, t.slot.Start+off)
}

// Discard says that a range of the slot is of no interest. Its contents are undefined afterwards.
func (t *Target) Discard(off, n int64) error {
	t.disk.mu.Lock()
	defer t.disk.mu.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.change(off, n); err != nil {
		return err
	}
	if t.disk.opt.ReadOnly {
		return ErrReadOnly
	}
	return t.disk.dev.Discard(t.slot.Start+off, n)
}

// Flush makes what was written durable. After an error the target is of no use: to know what is on the medium, begin anew.
func (t *Target) Flush() error {
	t.disk.mu.Lock()
	defer t.disk.mu.Unlock()
	return t.disk.flush()
}

// Settle promises that the bytes before upto are final. They are flushed, read back from the medium and hashed, so that Verify need not
// read them again; to write them again is an error. While one call reads back, another one may flush.
func (t *Target) Settle(upto int64) error {
	if err := t.bounds(0, upto); err != nil {
		return fmt.Errorf("settling: %w", err)
	}
	t.hold(upto) // before the flush: what is read back is what was flushed
	err := t.Flush()
	t.settling.Lock()
	defer t.settling.Unlock()
	defer t.leave()
	if err != nil {
		return fmt.Errorf("settling slot %s: %w", t.slot.Label, err)
	}
	if upto <= t.settled {
		return nil
	}
	if t.hash == nil {
		t.hash = sha256.New()
	}
	if err := t.settle(context.Background(), upto); err != nil {
		return fmt.Errorf("settling: %w", err)
	}
	return nil
}

// hold lets nobody write to the bytes before upto.
func (t *Target) hold(upto int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.holders++
	t.final = max(t.final, upto)
}

// leave ends a hold. What was not settled is open again when nobody else is about to settle it. The caller holds settling.
func (t *Target) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.holders--; t.holders == 0 {
		t.final = t.settled
	}
}

// settle reads back and hashes what is held and flushed, up to a byte. The caller holds settling.
func (t *Target) settle(ctx context.Context, upto int64) (err error) {
	t.settled, err = t.readBack(ctx, t.hash, t.settled, upto)
	return err
}

// readBack hashes bytes of the slot as they are on the medium, and says how far it came.
func (t *Target) readBack(ctx context.Context, h io.Writer, off, upto int64) (int64, error) {
	return t.reader.hash(ctx, t.disk.dev, t.slot, h, off, upto)
}

func hashMedium(ctx context.Context, dev Device, s Slot, h io.Writer, off, upto int64) (int64, error) {
	return new(reader).hash(ctx, dev, s, h, off, upto)
}

// reader reads slots back. It keeps its buffers, and hashes what is in one while the medium fills the other.
type reader struct{ bufs [2][]byte }

// hash hashes bytes of a slot as they are on the medium, and says how far it came.
func (r *reader) hash(ctx context.Context, dev Device, s Slot, h io.Writer, off, upto int64) (int64, error) {
	if off >= upto {
		return off, nil
	}
	for i := range r.bufs {
		if size := min(hugePage, upto-off); int64(len(r.bufs[i])) < size {
			r.bufs[i] = Buffer(int(size))
		}
	}
	type piece struct {
		data []byte
		err  error
	}
	read := func(i int, from int64) <-chan piece {
		c := make(chan piece, 1)
		p := r.bufs[i][:min(int64(len(r.bufs[i])), upto-from)]
		go func() {
			n, err := readMedium(dev, p, s.Start+from)
			if n != len(p) && err == nil {
				err = io.ErrUnexpectedEOF
			}
			if n == len(p) {
				err = nil
			}
			c <- piece{p, err}
		}()
		return c
	}
	next := read(0, off)
	for i := 1; ; i ^= 1 {
		p := <-next
		if p.err != nil {
			return off, fmt.Errorf("reading back slot %s at byte %d: %w", s.Label, off, p.err)
		}
		if err := ctx.Err(); err != nil {
			return off, err
		}
		to := off + int64(len(p.data))
		if to < upto {
			next = read(i, to)
		}
		h.Write(p.data)
		if off = to; off == upto {
			return off, nil
		}
	}
}

// Verified is the proof that a slot holds, on the medium, exactly what it should. Only Verify makes one.
type Verified struct {
	disk *Disk
	gen  int
	slot Slot
}

// Slot says which slot it is.
func (v Verified) Slot() Slot { return v.slot }

// Verify flushes the slot, reads the first size bytes back from the medium and compares their hash.
func (t *Target) Verify(ctx context.Context, size int64, want [32]byte) (Verified, error) {
	if size <= 0 || size > t.slot.Size {
		return Verified{}, fmt.Errorf("verifying slot %s: %d bytes do not fit its %d", t.slot.Label, size, t.slot.Size)
	}
	t.settling.Lock()
	defer t.settling.Unlock()
	if t.settled > 0 && t.settled <= size {
		t.hold(size)
		defer t.leave()
	}
	t.disk.mu.Lock()
	gen := t.disk.gen[t.slot.Index]
	err := t.disk.flush()
	t.disk.mu.Unlock()
	if err != nil {
		return Verified{}, fmt.Errorf("verifying slot %s: %w", t.slot.Label, err)
	}
	var got [32]byte
	if t.settled > 0 && t.settled <= size {
		err = t.settle(ctx, size)
		got = [32]byte(t.hash.Sum(nil))
	} else {
		h := sha256.New()
		_, err = t.readBack(ctx, h, 0, size)
		got = [32]byte(h.Sum(nil))
	}
	if err != nil {
		return Verified{}, fmt.Errorf("verifying: %w", err)
	}
	if got != want {
		return Verified{}, fmt.Errorf("%w: slot %s has SHA-256 %x, want %x", ErrMismatch, t.slot.Label, got, want)
	}
	return Verified{t.disk, gen, t.slot}, nil
}

// Check reads the first size bytes of a slot from the medium and compares their hash. It changes nothing and proves nothing: the slot may
// be written to at any time.
func (d *Disk) Check(ctx context.Context, label string, size int64, want [32]byte) error {
	s, err := d.Slot(label)
	if err != nil {
		return err
	}
	if size <= 0 || size > s.Size {
		return fmt.Errorf("checking slot %s: %d bytes do not fit its %d", label, size, s.Size)
	}
	h := sha256.New()
	if _, err := hashMedium(ctx, d.dev, s, h, 0, size); err != nil {
		return fmt.Errorf("checking: %w", err)
	}
	if got := [32]byte(h.Sum(nil)); got != want {
		return fmt.Errorf("%w: slot %s has SHA-256 %x, want %x", ErrMismatch, label, got, want)
	}
	return nil
}

// Activate makes a verified slot the one that boots next: highest priority, tries boots to prove itself, not successful. It refuses when
// the slot was written to since, or is not where and what it was when it was verified. After it the slot's targets write no more.
func (d *Disk) Activate(r Running, v Verified, tries int) error {
	fail := func(err error) error { return fmt.Errorf("activating slot %q: %w", v.slot.Label, err) }
	if v.disk != d {
		return fail(errors.New("it was not verified on this disk"))
	}
	if tries < 1 || tries > 3 {
		return fail(fmt.Errorf("%d tries, want 1 to 3", tries))
	}
	if v.slot.Label == r.slot.Label {
		return fail(ErrRunning)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	err := d.edit(func(t *table, slots []Slot) error {
		if d.gen[v.slot.Index] != v.gen {
			return ErrStale
		}
		run, err := d.checkRunning(r, slots)
		if err != nil {
			return err
		}
		if !run.Successful || run.Priority == 0 {
			return fmt.Errorf("%w: %s", ErrNotProven, run.Label)
		}
		now, err := find(slots, v.slot.Label)
		if err != nil {
			return err
		}
		if !now.same(v.slot) {
			return fmt.Errorf("%w: %s is not where it was when it was verified", ErrGeometry, now.Label)
		}
		if now != v.slot {
			return fmt.Errorf("%w: somebody changed its boot bits to priority %d, tries %d, successful %v", ErrStale, now.Priority, now.Tries, now.Successful)
		}
		if err := t.checkSlot(now); err != nil {
			return err
		}
		if err := raise(slots, now.Index, tries); err != nil {
			return err
		}
		// Whatever becomes of the rewrite, from here on the slot may be bootable.
		d.eras[now.Index]++
		return nil
	})
	if err != nil {
		return fail(err)
	}
	d.gen[v.slot.Index]++
	if release := d.claimed[v.slot.Index]; release != nil {
		release()
		delete(d.claimed, v.slot.Index)
	}
	return nil
}

// raise makes a slot the one that boots next, with tries to prove itself.
func raise(slots []Slot, index, tries int) error {
	top := uint8(0)
	for _, s := range slots {
		if s.Index != index {
			top = max(top, s.Priority)
		}
	}
	if top == maxPriority {
		top = renumber(slots, index)
	}
	if top >= maxPriority {
		return fmt.Errorf("the other slots use all priorities up to %d", maxPriority)
	}
	for i := range slots {
		if slots[i].Index == index {
			slots[i].Priority, slots[i].Tries, slots[i].Successful = top+1, uint8(tries), false
		}
	}
	return nil
}

// other changes boot bits in favour of or against a slot that does not run, with a running slot that is known to be good.
func (d *Disk) other(r Running, label string, change func(run, now Slot, slots []Slot) error) error {
	if label == r.slot.Label {
		return ErrRunning
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.edit(func(t *table, slots []Slot) error {
		run, err := d.checkRunning(r, slots)
		if err != nil {
			return err
		}
		if !run.Successful || run.Priority == 0 {
			return fmt.Errorf("%w: %s", ErrNotProven, run.Label)
		}
		now, err := find(slots, label)
		if err != nil {
			return err
		}
		if err := t.checkSlot(now); err != nil {
			return err
		}
		return change(run, now, slots)
	})
}

// GoBack makes a slot that was good before boot next, with tries to prove itself again. Its proof are its own boot bits: they are taken
// away before the first byte of a slot changes. The running slot must be known to be good, because it is what the other falls back to.
func (d *Disk) GoBack(r Running, label string, tries int) error {
	fail := func(err error) error { return fmt.Errorf("going back to slot %q: %w", label, err) }
	if tries < 1 || tries > 3 {
		return fail(fmt.Errorf("%d tries, want 1 to 3", tries))
	}
	err := d.other(r, label, func(run, now Slot, slots []Slot) error {
		if next, ok := Next(slots); ok && next.Index == now.Index && !now.Successful {
			return nil // it is on its way already, and no try is added
		}
		if !now.Successful || now.Priority == 0 {
			return fmt.Errorf("%w: %s has priority %d, tries %d, successful %v, which does not show that it was ever good", ErrNotProven, now.Label, now.Priority, now.Tries, now.Successful)
		}
		return raise(slots, now.Index, tries)
	})
	if err != nil {
		return fail(err)
	}
	return nil
}

// Stay undoes GoBack before the other slot was booted: the running slot boots next again, and the other is what it falls back to, as it was
// before. The caller knows that it was GoBack, and not Activate, that put the slot first, and with how many tries; 0 means that the machine was
// not started since. A slot that has lost a try may be one that did not come up: ErrTried, and nothing is written.
func (d *Disk) Stay(r Running, label string, tries int) error {
	fail := func(err error) error {
		return fmt.Errorf("staying on slot %q instead of going back to %q: %w", r.slot.Label, label, err)
	}
	err := d.other(r, label, func(run, now Slot, slots []Slot) error {
		switch {
		case now.Successful && now.Priority > 0: // done already, or never begun
		case now.Priority == 0 || now.Tries == 0 || tries > 0 && int(now.Tries) != tries:
			return fmt.Errorf("%w: %s has priority %d and %d tries of %d", ErrTried, now.Label, now.Priority, now.Tries, tries)
		}
		if next, ok := Next(slots); ok && next.Index == run.Index && now.Successful {
			return nil
		}
		if err := raise(slots, run.Index, 0); err != nil {
			return err
		}
		for i := range slots {
			switch slots[i].Index {
			case run.Index:
				slots[i].Successful = true
			case now.Index:
				slots[i].Tries, slots[i].Successful = 0, true
			}
		}
		return nil
	})
	if err != nil {
		return fail(err)
	}
	return nil
}

// renumber gives all slots but one the lowest priorities that keep their order, and returns the highest.
func renumber(slots []Slot, but int) uint8 {
	var used, to [maxPriority + 1]uint8
	for _, s := range slots {
		if s.Index != but {
			used[s.Priority] = 1
		}
	}
	next := uint8(0)
	for p := 1; p <= maxPriority; p++ {
		next += used[p]
		to[p] = next
	}
	for i := range slots {
		if slots[i].Index != but && slots[i].Priority > 0 {
			slots[i].Priority = to[slots[i].Priority]
		}
	}
	return next
}

// MarkSuccessful says that the running slot is good: it needs no more tries, and none is spent on it.
func (d *Disk) MarkSuccessful(r Running) error {
	err := d.set(r.slot.Label, func(s *Slot) error {
		if !s.same(r.slot) {
			return fmt.Errorf("%w: it is not where it was", ErrGeometry)
		}
		s.Successful, s.Tries, s.Priority = true, 0, max(1, s.Priority)
		return nil
	})
	if err != nil {
		return fmt.Errorf("marking slot %q successful: %w", r.slot.Label, err)
	}
	return nil
}

// MarkBad makes a slot unbootable. It refuses when no other slot would be left to boot.
func (d *Disk) MarkBad(label string) error {
	err := d.set(label, func(s *Slot) error {
		s.Successful, s.Tries, s.Priority = false, 0, 0
		return nil
	})
	if err != nil {
		return fmt.Errorf("making slot %q unbootable: %w", label, err)
	}
	return nil
}

// set changes the boot bits of one slot.
func (d *Disk) set(label string, change func(*Slot) error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.edit(func(_ *table, slots []Slot) error {
		s, err := find(slots, label)
		if err != nil {
			return err
		}
		if err := change(&s); err != nil {
			return err
		}
		left := false
		for i := range slots {
			if slots[i].Index == s.Index {
				slots[i] = s
			}
			left = left || slots[i].Bootable()
		}
		if !left {
			return ErrLast
		}
		return nil
	})
}

const hugePage = 2 << 20

// Buffer returns n bytes to write from, and to read into, around the page cache: they begin where O_DIRECT wants it. From 2 MiB on they are of huge
// pages where the kernel has some, so that a device is asked for megabytes at once instead of for each run of scattered 4 KiB pages.
func Buffer(n int) []byte {
	align := 4096
	if n >= hugePage {
		align = hugePage
	}
	b := make([]byte, n+align)
	off := -int(uintptr(unsafe.Pointer(&b[0]))) & (align - 1)
	b = b[off : off+n : off+n]
	if align == hugePage {
		unix.Madvise(b[:n&^(hugePage-1)], unix.MADV_HUGEPAGE) // advice: without it they are small pages
	}
	return b
}

func isAligned(p []byte) bool { return uintptr(unsafe.Pointer(&p[0]))%4096 == 0 }
