package partition

import "fmt"

// Take is Boot for a boot stage that can flush, as cmd/flipside-init is: a bad copy of the table is repaired first, as a UEFI firmware
// would, and the try is spent in the order of writes that survives a power cut. The slot is returned as it is afterwards.
func (d *Disk) Take() (Slot, error) {
	if d.opt.Bits != nil {
		return Slot{}, fmt.Errorf("choosing a slot to boot: %w", ErrElsewhere)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var slot Slot
	err := d.edit(func(_ *table, slots []Slot) error {
		next, ok := Next(slots)
		if !ok {
			return fmt.Errorf("%w: no slot has a priority and tries left or success", ErrNoBoot)
		}
		for i := range slots {
			if s := &slots[i]; s.Index == next.Index {
				if s.Tries > 0 {
					s.Tries--
				}
				slot = *s
			}
		}
		return nil
	})
	if err != nil {
		return Slot{}, fmt.Errorf("choosing a slot to boot: %w", err)
	}
	return slot, nil
}
