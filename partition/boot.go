package partition

import (
	"errors"
	"fmt"
)

// ErrNoBoot means that the boot loader finds nothing to boot and stops.
var ErrNoBoot = errors.New("the boot loader finds no slot to boot")

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

// Boot does what GRUB's gptprio does at power-on: it chooses a slot, and spends one of its tries, if it has any, before anything is loaded. A table with one bad
// copy is repaired only if a try is written. A primary whose header is valid and whose entries are not hides a backup with another header: GRUB stops there.
func (d *Disk) Boot() (slot Slot, wrote bool, err error) {
	ts := readTables(d.dev)
	t, err := ts.truth()
	if err != nil {
		return Slot{}, false, fmt.Errorf("%w: %w", ErrNoBoot, err)
	}
	if p := ts.primary; p.err != nil && p.entries != nil && ts.backup.u32(88) != p.u32(88) {
		return Slot{}, false, fmt.Errorf("%w: the primary header is valid, its entries are not, and the backup differs", ErrNoBoot)
	}
	if string(ts.primary.header[:8]) != gptSignature {
		return Slot{}, false, fmt.Errorf("%w: no GPT signature in the primary header", ErrNoBoot)
	}
	slot, ok := Next(d.slotsOf(t))
	if !ok {
		return Slot{}, false, fmt.Errorf("%w: no slot has a priority and tries left or success", ErrNoBoot)
	}
	if slot.Tries == 0 {
		return slot, false, nil
	}
	slot.Tries--
	err = d.edit(func(_ *table, slots []Slot) error {
		for i := range slots {
			if slots[i].Index == slot.Index {
				slots[i].Tries--
			}
		}
		return nil
	})
	return slot, true, err
}
