// Package partition reads and changes the boot bits of a GPT and writes to the inactive slot, so that at every instant, also
// after a power cut, the boot loader finds a slot that holds a complete, verified image.
//
// # The story of an update
//
//	d, err := partition.OpenDisk("/dev/sda", partition.Options{})
//	run, err := d.RunningFromLabel("USR-A")    // proven by what is mounted; see package mounted
//	t, err := d.Begin(run, "USR-B")            // USR-B is unbootable now, on the medium
//	t.WriteAt(data, 0)                         // as often as it takes
//	v, err := t.Verify(ctx, size, sha256)      // read back past every cache
//	err = d.Activate(run, v, 1)                // USR-B boots next, once
//	// ... after the reboot, from USR-B:
//	err = d.MarkSuccessful(run)                // or the old slot boots again
//
// # Order of durability
//
//  1. A slot's boot bits are zero in both copies of the table before its first data byte is written.
//  2. All data is flushed, and read back from the medium, before the slot is made bootable.
//  3. A change of the table is one rewrite: primary entries, flush, primary header, flush, backup entries, flush, backup header, flush. Each
//     part is read back from the medium and compared. The primary header is one sector, and the moment of change. Of all orders
//     this one was seen to boot from every prefix with SeaBIOS and GRUB, which refuses a backup that differs from a valid primary header, and with OVMF.
//  4. A table with one bad copy is repaired first, in a step of its own that leaves the good copy alone. If both are valid and differ, the primary counts. If
//     both are bad, nothing is written.
//  5. Every change begins with a flush, under an exclusive lock of the whole disk, and reads the table after it: what a process that was killed
//     has written and not flushed must not be built upon.
//  6. After a flush that failed nothing is written or flushed through the same Disk: the kernel may have called pages clean that it could not write.
//
// # Where the boot bits are
//
// They are in the partition table, for GRUB with gptprio and for cmd/flipside-init. For systemd-boot they are in boot entries with counters: a [Bits] in
// [Options] says so, and package bls is one. The table is then read only for the places of slots. What is proven before a change, and what a change
// does to the bits, is the same code; a Bits reads them and makes them durable, under the same lock. Package bitstest is the conformance suite of both.
//
// Only attribute bits of slots and the checksums change. Everything else of the table, what no standard knows included, stays as it is, byte for
// byte, and only the sectors that change are written.
//
// # Types are proofs
//
// A [Running] says that somebody found out which slot runs; a [Target] cannot be had for that slot, nor for any other while the running one is itself on
// trial. A [Verified] comes from [Target.Verify] alone, and is void after any later write to the slot, through whatever target, after it was used, and
// when the slot's place or boot bits in the table, read again under the lock, are not what they were. Between processes a slot that may be written to is
// claimed by a lock on its bytes of the disk: the second one gets [ErrBusy].
//
// # What boots
//
// [Next] and [Disk.Boot] are the boot loader's rule; package bootsim tells it, and that of systemd-boot. Package powercut enumerates what a power cut may leave of whole
// updates. Package install is an update of a slot with its kernel and post-install program as one transaction, and atomicfile replaces the files
// that belong to it. Package mounted finds the running slot, gptimage makes images, devicetest has devices for tests.
package partition
