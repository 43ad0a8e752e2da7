// Package trust keeps what a host has learned to believe: how old a release may be, whose signatures count, and who this host is.
//
// # The floor
//
// Every release of major version 2 carries a signed number, max_timestamp: seconds since 1970 of the newest thing in it. A host never
// accepts a payload whose number is below its floor, and the floor rises to the number of a release only after that release has
// booted and was found healthy. [Floor] keeps it in three places and goes by the highest:
//
//   - in the TPM, in steps of a day, as a counter that no command can lower (see [TPM.Raise]);
//   - in a file, to the second;
//   - in the running release's own os-release (FLIPSIDE_TIMESTAMP), which lies on the read-only side.
//
// A payload of major version 1 may carry the number too, as field 14 of its manifest, which older readers skip. One without a number
// has number 0: it is below every floor, and a host that only ever took such payloads has no floor.
//
// Order of durability: the number of a new release is on the disk as pending before its slot is armed; the slot is marked successful before the
// floor rises; the file rises before the TPM does. Power lost between two of these leaves a floor that is too low, never too
// high, and the next start or the next confirmation makes good for it.
//
// # Keys
//
// [LoadKeys] reads the pinned keys from directories of drop-ins. Whether a key is in its time is judged by the signed number of the
// payload and by the floor, not by a clock: a clock that cannot be proven neither unlocks anything nor locks anybody out. The clock only
// decides when to warn.
//
// # The device key and the proof of a boot
//
// [Device] is a key that was made in the TPM and cannot leave it, as a [crypto.Signer] for TLS. A [Proof] is a TPM quote, by a
// second key that signs nothing but what the TPM itself says, over the PCRs, a nonce of the server, the slot and the version. [Makers] says whose TPM that key is in.
//
// # Secrets that are sealed to PCRs
//
// [PCRKeys] says whether a slot's boot will lead to PCR values that a key has authorised, by predicting PCR 11 of its unified kernel image ([ReadKernel]), before the
// slot is armed. [TPM.Seal] makes a secret that opens for those. The signatures are JSON as systemd-measure writes it.
//
// Formats: TPM 2.0 Library specification, parts 1 to 3, through go-tpm's direct API.
package trust
