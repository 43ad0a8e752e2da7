package partition

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// edit changes attribute bits in one rewrite of both copies, under the lock of the whole disk. The table is read again under the lock.
func (d *Disk) edit(change func(*table, []Slot) error) error {
	unlock, ts, _, err := d.begin()
	if err != nil {
		return err
	}
	defer unlock()
	good := ts.primary
	slots, err := d.slots(good)
	if err != nil {
		return err
	}
	was := slices.Clone(slots)
	if err := change(good, slots); err != nil {
		return err
	}
	if d.opt.Bits != nil {
		return d.writeBits(was, slots)
	}
	array := bytes.Clone(good.array)
	for _, s := range slots {
		at := array[(s.Index-1)*good.entrySize()+attrOffset:]
		a := binary.LittleEndian.Uint64(at) &^ attributesMask
		a |= uint64(s.Priority)<<priorityShift | uint64(s.Tries)<<triesShift
		if s.Successful {
			a |= successfulBit
		}
		binary.LittleEndian.PutUint64(at, a)
	}
	if bytes.Equal(array, good.array) {
		return nil
	}
	// Primary entries, primary header, backup entries, backup header, a flush after each: every prefix boots on every firmware.
	for _, t := range []*table{ts.primary, ts.backup} {
		if err := d.writeCopy(writesOf(t, array[:len(good.entries)])); err != nil {
			return fmt.Errorf("writing the partition table: %w", err)
		}
	}
	return nil
}

// writeBits changes boot bits that are not in the table.
func (d *Disk) writeBits(was, now []Slot) error {
	if d.failed != nil {
		return d.failed
	}
	if slices.Equal(was, now) {
		return nil
	}
	if err := d.opt.Bits.Write(was, now); err != nil {
		d.failed = fmt.Errorf("writing the boot bits failed, and what they are is not known until the disk is opened again: %w", err)
		return d.failed
	}
	return nil
}

// begin locks the disk, makes sure that what is read is also what a power cut leaves, and returns a table of two good copies, repaired
// if it was not one.
func (d *Disk) begin() (unlock func(), ts tables, repaired string, err error) {
	if d.opt.ReadOnly {
		return nil, ts, "", fmt.Errorf("changing the partition table: %w", ErrReadOnly)
	}
	unlock, err = d.lock()
	if err != nil {
		return nil, ts, "", err
	}
	fail := func(err error) (func(), tables, string, error) {
		unlock()
		return nil, tables{}, "", err
	}
	// A process that was killed may have left a change that is written and not flushed. To build upon it, or to find that nothing needs to be
	// changed, would be to trust what the next power cut takes back.
	if err := d.flush(); err != nil {
		return fail(err)
	}
	if d.opt.Bits != nil {
		if err := d.opt.Bits.Settle(); err != nil {
			d.failed = fmt.Errorf("flushing the boot bits failed, and what they are is not known until the disk is opened again: %w", err)
			return fail(d.failed)
		}
	}
	ts = readTables(d.dev)
	good, err := ts.truth()
	if err != nil {
		return fail(err)
	}
	if ts.healthy() {
		return unlock, ts, "", nil
	}
	repaired = describe(ts)
	if err := d.repair(ts, good); err != nil {
		return fail(fmt.Errorf("repairing the partition table (%s): %w", repaired, err))
	}
	if ts = readTables(d.dev); !ts.healthy() {
		return fail(fmt.Errorf("repairing the partition table (%s): it is still damaged after the repair", repaired))
	}
	return unlock, ts, repaired, nil
}

// describe says what is wrong with a table.
func describe(ts tables) string {
	switch {
	case ts.primary.err != nil:
		return fmt.Sprintf("the primary copy is rewritten from the backup: %v", ts.primary.err)
	case ts.backup.err != nil:
		return fmt.Sprintf("the backup copy is rewritten from the primary: %v", ts.backup.err)
	}
	return "the backup copy is rewritten from the primary, from which it differs"
}

// Repair makes both copies of the table valid and equal, and says what it did: nothing if they are. The primary counts if it is valid.
func (d *Disk) Repair() (what string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	unlock, _, what, err := d.begin()
	if err != nil {
		return "", err
	}
	unlock()
	return what, nil
}

// Damage says what Repair would do, or why it would refuse, and changes nothing.
func (d *Disk) Damage() (what string, err error) {
	ts := readTables(d.dev)
	good, err := ts.truth()
	if err != nil || ts.healthy() {
		return "", err
	}
	what = describe(ts)
	if _, err := d.repairs(ts, good); err != nil {
		return "", fmt.Errorf("repairing the partition table (%s): %w", what, err)
	}
	return what, nil
}

// write is bytes and where they go on the disk.
type write struct {
	data []byte
	off  int64
}

// writesOf are the sectors of one copy that change: of its entries, then its header.
func writesOf(t *table, entries []byte) []write {
	ss := len(t.header)
	array := bytes.Clone(t.array)
	copy(array, entries)
	header := bytes.Clone(t.header)
	seal(header, entries)
	first, last := 0, len(array)
	for first < last && bytes.Equal(array[first:first+ss], t.array[first:first+ss]) {
		first += ss
	}
	for last > first && bytes.Equal(array[last-ss:last], t.array[last-ss:last]) {
		last -= ss
	}
	writes := []write{{array[first:last], t.entryOff + int64(first)}, {header, t.headerOff}}
	if first == last {
		return writes[1:]
	}
	return writes
}

// writeCopy makes writes, each followed by a flush and read back from the medium.
func (d *Disk) writeCopy(writes []write) error {
	for _, w := range writes {
		if err := d.writeAt(w.data, w.off); err != nil {
			return err
		}
		if err := d.flush(); err != nil {
			return err
		}
		back := Buffer(len(w.data))
		if _, err := readMedium(d.dev, back, w.off); err != nil {
			return fmt.Errorf("reading back %d bytes at byte %d of the disk: %w", len(back), w.off, err)
		}
		if !bytes.Equal(back, w.data) {
			return fmt.Errorf("what was written at byte %d of the disk is not what is on the medium", w.off)
		}
	}
	return nil
}

// preview is a disk as it will be after writes that were not made yet.
type preview struct {
	Device
	writes []write
}

// ReadMedium reads what is on the medium, and over it what is to be written. Sectors that are to be written need not be readable.
func (p preview) ReadMedium(b []byte, off int64) (int, error) {
	for _, w := range p.writes {
		if off >= w.off && off+int64(len(b)) <= w.off+int64(len(w.data)) {
			return copy(b, w.data[off-w.off:]), nil
		}
	}
	n, err := readMedium(p.Device, b, off)
	for _, w := range p.writes {
		if from, to := max(off, w.off), min(off+int64(n), w.off+int64(len(w.data))); from < to {
			copy(b[from-off:to-off], w.data[from-w.off:])
		}
	}
	return n, err
}

// repair rewrites the copy that is bad, or the backup if both are valid and differ. The good copy is not touched, and nothing is written unless
// the whole table will be healthy.
func (d *Disk) repair(ts tables, good *table) error {
	writes, err := d.repairs(ts, good)
	if err != nil {
		return err
	}
	return d.writeCopy(writes)
}

// repairs are the writes that make a bad copy from the good one, and the whole table healthy.
func (d *Disk) repairs(ts tables, good *table) ([]write, error) {
	ss := uint64(len(good.header))
	sectors := uint64(len(good.array)) / ss
	var header, entries uint64
	old := ts.backup
	if good == ts.primary {
		header = good.u64(32)
		entries = header - sectors
	} else {
		old = ts.primary
		header, entries = 1, 2
	}
	// A copy that is only partly bad stays where it is.
	if old.array != nil && len(old.array) == len(good.array) && uint64(old.headerOff) == header*ss {
		entries = uint64(old.entryOff) / ss
	}
	end := uint64(d.dev.Size()) / ss
	if header < 1 || header >= end || entries < 2 || entries >= end || entries+sectors > end {
		return nil, fmt.Errorf("the other copy would be at sector %d, outside the disk of %d sectors", header, end)
	}
	place := []extent{{header, header}, {entries, entries + sectors - 1}}
	taken := []extent{{uint64(good.headerOff) / ss, uint64(good.headerOff) / ss}, {uint64(good.entryOff) / ss, uint64(good.entryOff)/ss + sectors - 1}, {good.u64(40), good.u64(48)}}
	for _, e := range good.extents() {
		taken = append(taken, e)
	}
	for _, p := range place {
		for _, q := range taken {
			if p.overlaps(q) {
				return nil, fmt.Errorf("the other copy would be at sectors %d to %d, where something else is", p.first, p.last)
			}
		}
	}
	bad := &table{header: bytes.Clone(good.header), headerOff: int64(header * ss), entryOff: int64(entries * ss), array: Buffer(len(good.array))}
	if _, err := readMedium(d.dev, bad.array, bad.entryOff); err != nil {
		// A sector that cannot be read may be one that can be written: then all of it is.
		for i, b := range good.entries {
			bad.array[i] = ^b
		}
		copy(bad.array[len(good.entries):], good.array[len(good.entries):])
	}
	binary.LittleEndian.PutUint64(bad.header[24:], header)
	binary.LittleEndian.PutUint64(bad.header[32:], uint64(good.headerOff)/ss)
	binary.LittleEndian.PutUint64(bad.header[72:], entries)
	writes := writesOf(bad, good.entries)
	after := readTables(preview{d.dev, writes})
	if err := errors.Join(after.primary.err, after.backup.err); err != nil {
		return nil, fmt.Errorf("it would be damaged after the repair, so nothing was written: %w", err)
	}
	if !after.healthy() {
		return nil, errors.New("the copies would differ after the repair, so nothing was written: the good one says that the other is somewhere else")
	}
	return writes, nil
}
