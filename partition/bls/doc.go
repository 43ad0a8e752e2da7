// Package bls keeps the boot bits of slots in boot entries with counters, for hosts whose boot loader is systemd-boot, and not GRUB with
// gptprio or flipside-init: it is a [partition.Bits]. The partition table only says where the slots are, and is not written to.
//
//	entries := &bls.Entries{Dir: atomicfile.OS("/boot/loader/entries"), Template: "efi /flipside/vmlinuz-{letter}\n"}
//	d, err := partition.OpenDisk("/dev/sda", partition.Options{Bits: entries})
//
// # The entries
//
// A slot's entry is a file of the Boot Loader Specification (UAPI.1), named for the slot's letter: flipside-b.conf for USR-B.
//
//	sort-key flipside
//	version 02
//	efi /flipside/vmlinuz-b
//
// The first two lines are ours and say the priority; the others are the template's. What the bits are is in the name, as the specification
// has it for boot counting:
//
//	none              not bootable
//	flipside-b+1.conf     one try left; systemd-boot renames it to flipside-b+0-1.conf before it starts the kernel
//	flipside-b+0-1.conf   its try is spent
//	flipside-b.conf       successful
//
// An entry without try sorts behind all others, and of the others the highest version is started. If several entries of a slot are there, because a
// change was cut off, those of the highest version count. A slot's entry whose name has capitals, which to a FAT is the same name, is [ErrForeign].
//
// # Order of durability
//
// The entries lie on a FAT, where a name and contents reach the medium in any order, and where to rename a file may leave both names or none.
// So nothing is renamed here, and the moment of change is a sector:
//
//  1. An entry comes into being with a first sector of zeros, which systemd-boot passes over; it is flushed, then its first sector is
//     written and flushed, then the directory.
//  2. An entry goes by a first sector of zeros, which is flushed, before its name is removed. Clusters that are free hold no entry.
//  3. A priority changes in place, in the first sector.
//  4. What says the new bits is there before what said the old ones goes. A slot that is marked successful has two entries meanwhile.
//  5. Before anything is read that a change builds upon, all entries are flushed ([Entries.Settle]).
//
// The renaming of the counter is the firmware's. If a power cut leaves no name, the slot on trial is not bootable any more, and the old one boots.
//
// # What belongs to it
//
// systemd-bless-boot.service must be masked, because it says of a boot that it is good before anybody has looked; flipsided says it. In
// loader.conf there must be no "default": it would go before the order of the entries. There is no dead end as with GRUB: when no entry has
// a try left or success, systemd-boot starts the first one anyway.
package bls
