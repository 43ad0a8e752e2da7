// Package bootsim is the boot loader as an executable specification: what GRUB's gptprio chooses on a disk, and what it writes.
package bootsim

import "github.com/flipside-linux/flipside/partition"

// BootFile boots a disk image: it chooses a slot and spends its try.
func BootFile(path string) (partition.Slot, error) {
	d, err := partition.OpenDisk(path, partition.Options{})
	if err != nil {
		return partition.Slot{}, err
	}
	defer d.Close()
	slot, _, err := d.Boot()
	return slot, err
}

// Next returns what the boot loader would choose among slots now, without touching a disk.
func Next(slots []partition.Slot) (partition.Slot, bool) { return partition.Next(slots) }
