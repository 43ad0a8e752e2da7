// Package bootsim is the boot loader as an executable specification: what GRUB's gptprio chooses on a disk, and what it writes.
//
// Among the slots with tries left or success it takes the highest priority, the first in the table of equals; priority 0 is never taken. If the
// slot has tries left, one is spent, on both copies of the table, before anything is loaded, also when the slot is successful.
// With nothing to take it stops; unlike cgpt's "next" it has no last resort.
//
// What is chosen among the slots is the same everywhere; which tables can be read is not. Firmware says how: [partition.GRUB] is GRUB alone
// under a BIOS, [partition.UEFI] any firmware that repairs tables before a boot loader runs.
//
// [SystemdBoot] is the same for systemd-boot, which goes by boot entries with counters (package bls writes them) and not by the table.
package bootsim

import "github.com/flipside-linux/flipside/partition"

// BootFile boots a disk image: it chooses a slot and spends its try.
func BootFile(path string) (partition.Slot, error) {
	d, err := partition.OpenDisk(path, partition.Options{})
	if err != nil {
		return partition.Slot{}, err
	}
	defer d.Close()
	slot, _, err := d.Boot(partition.GRUB)
	return slot, err
}

// Choose boots a device: it chooses a slot, spends its try, and reports whether anything was written.
func Choose(dev partition.Device, f partition.Firmware) (slot partition.Slot, wrote bool, err error) {
	return partition.NewDisk(dev, partition.Options{}).Boot(f)
}

// Next returns what the boot loader would choose among slots now, without touching a disk.
func Next(slots []partition.Slot) (partition.Slot, bool) { return partition.Next(slots) }
