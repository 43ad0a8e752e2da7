// Package updater is the engine: it takes one update from the poll to a confirmed boot, and always knows
// why it is not moving.
//
// # The two halves
//
// [Core] is pure. It holds the saved [State] and turns one [Event] into a list of [Effect]s: no clock, no disk, no network.
// Everything that must be decided is decided there, and the transcripts under testdata tell it as stories.
// [Engine] carries the effects out (Omaha, payload, partition, gates, health, reboot) and feeds what came of them back in.
//
// # The order of durability
//
// What must be on the disk before what:
//
//  1. The state that names the update and its slot, before the slot is touched.
//  2. The slot's priority, tries and successful as zero, before its first data byte changes (partition.Disk.Begin).
//  3. Data, before the checkpoint that says it is there.
//  4. All data, read back from the medium and compared, before the slot is made bootable (partition.Disk.Activate takes
//     only what partition.Target.Verify made).
//  5. The state "armed", before the first reboot gate is asked. If power is lost between 4 and 5 the disk is right and the
//     state is behind; [Core] recognises the trial boot by the slot it runs from.
//  6. The state "rebooting", before the reboot is asked for.
//  7. "Successful" on the disk, before the semaphore is given back and the server is told.
//
// After every start the saved state is held against what the disk and the boot say, and the disk wins.
//
// # Gates
//
// Whatever may stop an update is a gate and answers the same question in the same way: may we go on; if not, why, and
// when should we ask again ([reboot.Answer]). Download gates (pause, pin, quarantine, halt) are asked before the slot is touched,
// reboot gates (strategy, window, semaphore) before the reboot. [Status] carries the answers, and [Status.Why] is the
// first one that does not say go.
package updater
