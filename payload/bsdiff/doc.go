// Package bsdiff makes and applies the binary patches that payloads carry: BSDIFF40, the format of Colin Percival's bsdiff, and BSDF2, its
// successor, in which each of the three streams has a compressor of its own.
//
// A patch is a header of 32 bytes and three streams. The control stream holds triples of numbers: add, insert, seek. Applying it, the next add bytes
// are those of the old data plus those of the difference stream, byte by byte; the next insert bytes come from the extra stream; then the place in the
// old data moves by seek.
//
//	offset  size
//	0       8     "BSDIFF40", or "BSDF2" and the compressors of control, difference and extra: 0 none, 1 bzip2, 2 brotli
//	8       8     bytes of the control stream, as stored
//	16      8     bytes of the difference stream, as stored
//	24      8     bytes that applying it makes
//	32            the three streams; the last one ends with the patch
//
// Numbers are 64 bits, lowest byte first, with the sign in the highest bit.
package bsdiff
