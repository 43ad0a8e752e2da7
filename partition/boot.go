package partition

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// ErrNoBoot means that the boot loader finds nothing to boot and stops.
var ErrNoBoot = errors.New("the boot loader finds no slot to boot")

// ErrElsewhere means that the boot bits are not in the partition table, and that a boot loader chooses which goes by something else.
var ErrElsewhere = errors.New("the boot bits are not in the partition table")

// Firmware is a way in which a table is read before a slot is chosen.
type Firmware int

const (
	// GRUB under SeaBIOS reads the table alone, and is strict: it needs the signature in sector 1, and when the primary header is valid it takes no
	// backup whose header says something else, even if the primary's entries are bad.
	GRUB Firmware = iota
	// UEFI takes any valid copy, and repairs the other before a boot loader runs.
	UEFI
)

func (f Firmware) String() string {
	if f == UEFI {
		return "UEFI"
	}
	return "GRUB"
}

// Next returns what GRUB's gptprio would choose among slots: the highest priority among those that have tries left or are successful, the first of
// equals; never priority 0.
func Next(slots []Slot) (Slot, bool) {
	var best Slot
	found := false
	for _, s := range slots {
		if s.Bootable() && (!found || s.Priority > best.Priority) {
			best, found = s, true
		}
	}
	return best, found
}

// Boot does what happens at power-on: GRUB's gptprio chooses a slot, and spends one of its tries, if it has any, before anything is
// loaded. Without a try to spend GRUB writes nothing, also not to repair a bad copy; with one it writes both copies, in its own order
// and without a flush between them. UEFI repairs first. The slot is returned as it is after the try was spent.
func (d *Disk) Boot(f Firmware) (slot Slot, wrote bool, err error) {
	if d.opt.Bits != nil {
		return Slot{}, false, fmt.Errorf("booting: %w", ErrElsewhere)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	ts := readTables(d.dev)
	t, err := ts.truth()
	if err != nil {
		return Slot{}, false, fmt.Errorf("%w: %w", ErrNoBoot, err)
	}
	if p := ts.primary; f == GRUB {
		if string(p.header[:8]) != gptSignature {
			return Slot{}, false, fmt.Errorf("%w: no GPT signature in sector 1", ErrNoBoot)
		}
		if p.err != nil && p.array != nil && !bytes.Equal(p.sealed(), ts.backup.sealed()) {
			return Slot{}, false, fmt.Errorf("%w: the primary header is valid, its entries are not, and the backup differs", ErrNoBoot)
		}
	} else if (p.err != nil) != (ts.backup.err != nil) {
		if err := d.repair(ts, t); err != nil {
			return Slot{}, false, fmt.Errorf("%w: the firmware cannot repair the table: %w", ErrNoBoot, err)
		}
		ts = readTables(d.dev)
		if t, err = ts.truth(); err != nil {
			return Slot{}, false, fmt.Errorf("%w: %w", ErrNoBoot, err)
		}
	}
	slot, ok := Next(d.slotsOf(t))
	if !ok {
		return Slot{}, false, fmt.Errorf("%w: no slot has a priority and tries left or success", ErrNoBoot)
	}
	if slot.Tries == 0 {
		return slot, false, nil
	}
	slot.Tries--
	if err := d.spend(ts, t, slot); err != nil {
		return Slot{}, false, fmt.Errorf("spending a try of slot %s: %w", slot.Label, err)
	}
	return slot, true, nil
}

// sealed is what a header says of the table's contents, the checksum of the entries with it.
func (t *table) sealed() []byte {
	if size := int(t.u32(12)); size >= minHeader && size <= len(t.header) {
		return t.common()
	}
	return nil
}

// spend writes a slot's tries as GRUB does: backup header, backup entries, primary header, primary entries, and no flush before the
// machine goes on. A copy that was bad is made from the good one, the backup where the primary says.
func (d *Disk) spend(ts tables, good *table, slot Slot) error {
	array := bytes.Clone(good.array)
	at := array[(slot.Index-1)*good.entrySize()+attrOffset:]
	a := binary.LittleEndian.Uint64(at) &^ (uint64(15) << triesShift)
	binary.LittleEndian.PutUint64(at, a|uint64(slot.Tries)<<triesShift)
	ss := int64(len(good.header))
	write := func(own *table, headerOff, entryOff, other int64) error {
		if own.err == nil {
			entryOff = own.entryOff
		}
		h := bytes.Clone(good.header)
		binary.LittleEndian.PutUint64(h[24:], uint64(headerOff/ss))
		binary.LittleEndian.PutUint64(h[32:], uint64(other/ss))
		binary.LittleEndian.PutUint64(h[72:], uint64(entryOff/ss))
		seal(h, array[:len(good.entries)])
		if err := d.writeAt(h, headerOff); err != nil {
			return err
		}
		return d.writeAt(array, entryOff)
	}
	backup := ts.backup.headerOff
	if err := write(ts.backup, backup, backup-int64(len(good.array)), ss); err != nil {
		return err
	}
	if err := write(ts.primary, ss, 2*ss, backup); err != nil {
		return err
	}
	return d.flush()
}
