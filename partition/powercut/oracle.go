package powercut

import (
	"bytes"
	"fmt"
	"io"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/devicetest"
)

// oracle judges the disks that a power cut may leave.
type oracle struct {
	r     *rig
	base  []byte
	calls []call
	saves []save
	log   []devicetest.Op
	grub  bool // the start boots under GRUB alone too, and so must every state
}

func newOracle(r *rig, base []byte) *oracle {
	o := &oracle{r: r, base: base, calls: r.calls, saves: r.saves, log: r.dev.Log}
	_, err := o.choose(base, partition.GRUB)
	o.grub = err == nil
	return o
}

// view is a disk that is looked at: what is written to it lies on top and leaves the image alone.
type view struct {
	image  []byte
	sector int
	top    []devicetest.Op
}

// view is the disk proper of an image.
func (o *oracle) view(image []byte) *view {
	return &view{image: image[:o.r.size], sector: o.r.sector}
}

// all is the whole image, the file systems included.
func (o *oracle) all(image []byte) *view { return &view{image: image, sector: o.r.sector} }

func (v *view) Size() int64                 { return int64(len(v.image)) }
func (v *view) SectorSize() int             { return v.sector }
func (v *view) Flush() error                { return nil }
func (v *view) FlushRange(_, _ int64) error { return nil }
func (v *view) Discard(off, n int64) error  { return nil }

func (v *view) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || int64(len(p)) > v.Size()-off {
		return 0, io.ErrShortWrite
	}
	v.top = append(v.top, devicetest.Op{Off: off, Data: bytes.Clone(p)})
	return len(p), nil
}

func (v *view) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || int64(len(p)) > v.Size()-off {
		return 0, io.EOF
	}
	copy(p, v.image[off:])
	for _, op := range v.top {
		from, to := max(off, op.Off), min(off+int64(len(p)), op.Off+int64(len(op.Data)))
		if from < to {
			copy(p[from-off:to-off], op.Data[from-op.Off:])
		}
	}
	return len(p), nil
}

// tables are the parts of an image that hold the partition table.
func (o *oracle) tables(image []byte) [][]byte {
	parts := o.r.layout.Parts
	last := parts[len(parts)-1]
	return [][]byte{image[:parts[0].Start], image[last.Start+last.Size : o.r.size]}
}

// check returns what is wrong with a state.
func (o *oracle) check(s state) error {
	if err := o.boots(s.image); err != nil {
		return err
	}
	if err := o.armed(s.image); err != nil {
		return err
	}
	if err := o.state(s); err != nil {
		return err
	}
	return o.order(s)
}

// boots: there is a valid table under every reading; the slot that it chooses is whole; the running slot is as it was.
func (o *oracle) boots(image []byte) error {
	for _, f := range []partition.Firmware{partition.UEFI, partition.GRUB} {
		if f == partition.GRUB && !o.grub {
			continue
		}
		label, err := o.choose(image, f)
		if err != nil {
			return fmt.Errorf("%v: %w", f, err)
		}
		if err := o.whole(image, label); err != nil {
			return fmt.Errorf("%v boots %s: %w", f, label, err)
		}
	}
	return o.whole(image, slotA)
}

// whole: a slot holds a complete release, and the boot partition the kernel of the same release for it.
func (o *oracle) whole(image []byte, label string) error {
	got, kernels := o.r.slot(image, label), o.r.kernelsOf(o.all(image))
	releases, name := []int{0}, kernelA
	if label == slotB {
		releases, name = []int{1, 2}, kernelB
	}
	for _, i := range releases {
		if bytes.Equal(got, [][]byte{o.r.run, o.r.old, o.r.release}[i]) {
			if !bytes.Equal(kernels.read(name), o.r.kernels[i]) {
				return fmt.Errorf("%s is not the kernel of what is in slot %s", name, label)
			}
			return nil
		}
	}
	return fmt.Errorf("slot %s is not a complete release", label)
}

// state: the saved state is the old one or the new one, and once a save has returned, the new one.
func (o *oracle) state(s state) error {
	got := o.r.stateOf(o.all(s.image)).read(stateFile)
	for i := len(o.saves) - 1; i >= 0; i-- {
		switch v := o.saves[i]; {
		case s.cut <= v.from:
		case bytes.Equal(got, v.data):
			return nil
		case s.cut >= v.to:
			return fmt.Errorf("the saved state is %q, want %q", got, v.data)
		}
	}
	return fmt.Errorf("the saved state is %q, neither the old one nor the new one", got)
}

// armed: also by a copy of the table that does not count now, no slot is bootable that is not whole. The other may be lost to a bad sector.
func (o *oracle) armed(image []byte) error {
	if o.r.backend == InEntries {
		return o.entries(image)
	}
	for _, damage := range []int{-1, o.r.sector, int(o.r.size) - o.r.sector} {
		m := o.view(image)
		if damage >= 0 {
			m.top = []devicetest.Op{{Off: int64(damage + 60), Data: []byte{image[damage+60] ^ 0xff}}}
		}
		slots, err := partition.NewDisk(m, partition.Options{}).Slots()
		if err != nil {
			continue
		}
		for _, s := range slots {
			if s.Bootable() {
				if err := o.whole(image, s.Label); err != nil {
					return fmt.Errorf("one copy of the table says that slot %s is bootable: %w", s.Label, err)
				}
			}
		}
	}
	return nil
}

// order: between two calls, what the last one did is on the disk, in both copies. Inside of one, the table is one that the proven
// order of writes goes through: all writes before one, and of that one any sectors.
func (o *oracle) order(s state) error {
	before, booted := o.base, false
	for i, c := range o.calls {
		if s.cut <= c.from {
			break
		}
		if s.cut >= c.to {
			before, booted = c.after, c.boot
			continue
		}
		// A call that was killed goes on in the next: its writes and those of its successor are one sequence.
		to := c.to
		for j := i; j+1 < len(o.calls) && o.calls[j].after == nil; j++ {
			to = o.calls[j+1].to
		}
		return o.inside(s, before, o.log[c.from:min(to, len(o.log))])
	}
	if !booted { // what the firmware renamed may be lost until somebody flushes it
		if err := o.settled(s.image, before); err != nil {
			return err
		}
	}
	return o.equal(s.image, before, nil, nil, "between two changes the table is not what the last one made")
}

func (o *oracle) inside(s state, before []byte, ops []devicetest.Op) error {
	now := bytes.Clone(before)
	var err error
	for _, op := range ops {
		if op.Kind != devicetest.Write {
			continue
		}
		next := bytes.Clone(now)
		copy(next[op.Off:], op.Data)
		if err = o.equal(s.image, now, next, &op, ""); err == nil {
			return nil
		}
		now = next
	}
	return o.equal(s.image, now, nil, nil, "the table is not one that the order of writes goes through")
}

// equal compares the table with now, or, in the sectors that op writes, with now or next.
func (o *oracle) equal(image, now, next []byte, op *devicetest.Op, what string) error {
	ss := o.r.sector
	got, want := o.tables(image), o.tables(now)
	for i := range got {
		if bytes.Equal(got[i], want[i]) {
			continue
		}
		at := 0
		if i == 1 {
			at = int(o.r.size) - len(got[i])
		}
		for off := 0; off < len(got[i]); off += ss {
			sector := got[i][off : off+ss]
			if bytes.Equal(sector, want[i][off:off+ss]) {
				continue
			}
			if abs := at + off; op != nil && int64(abs) >= op.Off && int64(abs) < op.Off+int64(len(op.Data)) && bytes.Equal(sector, next[abs:abs+ss]) {
				continue
			}
			return fmt.Errorf("sector %d: %s", (at+off)/ss, what)
		}
	}
	return nil
}

// recovers: the production recovery makes the table whole, a second one finds nothing to do, and what boots is what would have booted
// before. It returns the rig of the recovery, for its own crashes.
func (o *oracle) recovers(s state) (*rig, error) {
	want, err := o.choose(s.image, partition.UEFI)
	if err != nil {
		return nil, err
	}
	if partition.NewDisk(o.view(s.image), partition.Options{}).Table().Healthy {
		return nil, nil
	}
	r := *o.r
	r.reset(s.image)
	if err := r.recover(); err != nil {
		return nil, err
	}
	writes := func() (n int) {
		for _, op := range r.dev.Log {
			if op.Kind == devicetest.Write && op.Off < r.size { // to flush an entry is to write it, on FAT
				n++
			}
		}
		return n
	}
	n := writes()
	again, err := r.open(r.dev).Repair()
	if err != nil || again != "" || writes() != n {
		return nil, fmt.Errorf("a second recovery did %q, %d writes: %w", again, writes()-n, err)
	}
	if t := partition.NewDisk(window{r.dev, r.size}, partition.Options{}).Table(); !t.Healthy {
		return nil, fmt.Errorf("the table is damaged after the recovery: %v; %v", t.Primary.Err, t.Backup.Err)
	}
	got, err := o.choose(r.dev.Bytes(), partition.GRUB)
	if err != nil || got != want {
		return nil, fmt.Errorf("%s boots after the recovery, %s before it: %w", got, want, err)
	}
	if n > 0 {
		return &r, nil
	}
	return nil, nil
}

// judge boots what was left, and asks somebody else about it.
func (o *oracle) judge(s state, judge func(Left) error) error {
	dev := o.all(s.image)
	label, err := o.r.choose(dev, partition.UEFI)
	if err != nil {
		return err
	}
	slots, err := o.r.open(dev).Slots()
	if err != nil {
		return err
	}
	return judge(Left{label, slots, o.r.stateOf(o.all(s.image)).read(stateFile)})
}

// again: on the disk that was recovered, a whole new update goes through.
func (o *oracle) again(s state) error {
	r := *o.r
	r.reset(s.image)
	run, err := r.disk.RunningFromLabel(slotA)
	if err != nil {
		return err
	}
	a := run.Slot()
	next, ok := partition.Next(must(r.disk.Slots()))
	if !ok {
		return partition.ErrNoBoot
	}
	// After the trial boot slot B may run; A is what it falls back to, and an update into B begins from A only.
	if next.Label == slotB && !next.Successful {
		if _, err := r.powerOn(); err != nil {
			return err
		}
	}
	if !a.Successful {
		return fmt.Errorf("slot %s lost its success", a.Label)
	}
	if err := r.install(run); err != nil {
		return fmt.Errorf("a new update on what was left: %w", err)
	}
	label, err := r.powerOn()
	if err != nil || label != slotB {
		return fmt.Errorf("a new update on what was left boots %q: %w", label, err)
	}
	if !bytes.Equal(r.slot(r.dev.Bytes(), slotB), r.release) {
		return fmt.Errorf("a new update on what was left wrote something else")
	}
	return nil
}

// must turns an unreadable table into one without slots.
func must(slots []partition.Slot, err error) []partition.Slot {
	if err != nil {
		return nil
	}
	return slots
}
