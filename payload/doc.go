// Package payload reads, verifies and applies CrAU update payloads, major versions 1 and 2. It is a library with no idea of hosts: it
// gets bytes from a [Source] and writes images to [Target]s.
//
// # The order of trust
//
//  1. [Open] reads the header and checks sizes against each other before it allocates anything.
//  2. The metadata signature must be by a pinned key before the manifest is parsed (major 2, or a detached one). Major 1 has none: its
//     manifest is parsed within tight bounds, and the signature at the end of the file covers it.
//  3. The whole manifest is checked before anything is written: every block written once, none outside, data without gaps.
//  4. [Payload.Apply] checks the hash of each operation's data before it is decoded, and decodes to exactly the size that was announced.
//  5. The payload signature must hold over everything that was obeyed, or Apply fails.
//  6. Whether the medium holds what was written is for the caller to find out: read it back and compare with [Partition].SHA256, as
//     [FileTarget] does.
//
// A delta reads old images besides. They are known to be the right ones before anything is written ([Payload.CheckSources]), and are never written to.
//
// A [Keyring] without keys accepts nothing.
//
// # The order of durability
//
// A [Checkpoint] is made after the targets were flushed, so what it speaks of is on the disk. It names the payload by the hash of its
// manifest, and carries the state of the running hashes, so that the signature at the end covers also what an earlier run had read.
//
// # The pipeline
//
// One goroutine reads the data in order and hashes it; a worker for each processor checks, decodes and writes. Writes may land out of order. Another
// goroutine has targets that are a [Settler] read back what is final. Memory is bounded by a budget for the operations under way.
//
// bzip2 and xz are decoded by package unbzip2 and package unxz. With the libraries that there are in Go, which decode streams of unknown length, most of the time of an
// apply went into them, and a C engine kept up with two processors. Those libraries are what the decoders are fuzzed against. zstd is
// klauspost/compress, which keeps up. "make bench-payload" measures all of it against C, in one run.
//
// The format, with what is refused and why the zstd operation has the number it has, is in docs/payload-format.md.
package payload
