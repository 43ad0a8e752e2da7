// Package toxz makes .xz streams of data that is in memory as a whole: the data of one operation of a payload.
//
// A payload is made once and fetched by every host, so that its size is worth more than the time it takes to make. This encoder finds matches with
// binary trees and chooses among them by what each way to go on would cost in bits, as the LZMA SDK and liblzma do. Libraries in Go take the
// longest match they see, and what they write is clearly larger. BenchmarkAppend says how size and time compare to
// [github.com/ulikunitz/xz] and, where it is installed, xz(1).
//
// The format is that of "The .xz File Format" 1.2.0: one stream, LZMA2 with or without the filter x86, CRC32. The same input gives the same bytes, on
// every machine. What is written is checked against package unxz, xz(1) and ulikunitz/xz.
package toxz
