// Package unxz decodes .xz streams that are in memory as a whole into a buffer whose size is known: the data of one operation of a payload.
//
// Libraries for streams keep a dictionary of the size that the stream declares, fill it, and copy out of it. Here the output buffer is the
// dictionary: nothing is allocated and nothing is copied twice, which makes this decoder faster than the general ones
// in Go (BenchmarkDecode says by how much). They are its reference: it is fuzzed against [github.com/ulikunitz/xz].
//
// The format is that of "The .xz File Format" 1.2.0 with the filters LZMA2 and x86 BCJ, and the checks none, CRC32, CRC64 and SHA-256.
// One stream, of any number of blocks; padding and further streams are refused.
package unxz

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/crc64"

	"github.com/flipside-linux/flipside/payload/bcj"
)

// What can be wrong with a stream.
var (
	ErrCorrupt     = errors.New("damaged xz stream")
	ErrUnsupported = errors.New("unsupported xz stream")
	ErrTooLong     = errors.New("the xz stream holds more than there is room for")
)

// MaxDictionary is the largest dictionary, in bytes, that a stream may declare. It costs no memory here; it would cost it elsewhere.
const MaxDictionary = 64 << 20

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}

const (
	headerSize = 12
	footerSize = 12
	filterX86  = 0x04
	filterLZMA = 0x21
)

// Decoder decodes one stream after the other. Its zero value is ready for use. It holds about 100 KiB and no reference to what it worked on.
type Decoder struct {
	lzma    lzma
	records []record
	crc64   *crc64.Table
}

// record is what the index must say of a block.
type record struct{ unpadded, size uint64 }

// Decode decodes the stream src, all of it, into dst, and returns how many bytes it gave. It never gives more than dst has room for.
func (d *Decoder) Decode(dst, src []byte) (int, error) {
	if len(src) < headerSize || string(src[:6]) != "\xfd7zXZ\x00" {
		return 0, corrupt("it does not begin as one")
	}
	if crc32.ChecksumIEEE(src[6:8]) != binary.LittleEndian.Uint32(src[8:]) {
		return 0, corrupt("the stream header's checksum is wrong")
	}
	if src[6] != 0 || src[7] > 15 {
		return 0, fmt.Errorf("%w: flags %x", ErrUnsupported, src[6:8])
	}
	check := src[7]
	size, ok := map[byte]int{0: 0, 1: 4, 4: 8, 10: 32}[check]
	if !ok {
		return 0, fmt.Errorf("%w: check number %d", ErrUnsupported, check)
	}
	d.records = d.records[:0]
	pos, n := headerSize, 0
	for {
		if pos >= len(src) {
			return n, corrupt("it ends too soon")
		}
		if src[pos] == 0 {
			break
		}
		used, got, err := d.block(dst[n:], src[pos:], check, size)
		n += got
		if err != nil {
			return n, err
		}
		pos += used
	}
	index, err := d.index(src[pos:])
	if err != nil {
		return n, err
	}
	footer := src[pos+index:]
	if len(footer) < footerSize {
		return n, corrupt("it ends too soon")
	}
	switch {
	case string(footer[10:12]) != "YZ" || crc32.ChecksumIEEE(footer[4:10]) != binary.LittleEndian.Uint32(footer):
		return n, corrupt("its footer is wrong")
	case uint64(binary.LittleEndian.Uint32(footer[4:]))*4+4 != uint64(index) || !bytes.Equal(footer[8:10], src[6:8]):
		return n, corrupt("its footer does not belong to it")
	case len(footer) > footerSize:
		return n, corrupt("%d bytes after its end", len(footer)-footerSize)
	}
	return n, nil
}

// block decodes the block at the beginning of src, and returns how many bytes it took and gave.
func (d *Decoder) block(dst, src []byte, check byte, checkSize int) (used, n int, err error) {
	size := (int(src[0]) + 1) * 4
	if size > len(src) {
		return 0, 0, corrupt("it ends in a block header")
	}
	if crc32.ChecksumIEEE(src[:size-4]) != binary.LittleEndian.Uint32(src[size-4:]) {
		return 0, 0, corrupt("a block header's checksum is wrong")
	}
	h, err := parseBlockHeader(src[1 : size-4])
	if err != nil {
		return 0, 0, err
	}
	body := src[size:]
	packed, n, err := d.lzma.decode(dst, body, h.dict)
	if err != nil {
		return 0, n, err
	}
	if h.packed != nil && *h.packed != uint64(packed) || h.size != nil && *h.size != uint64(n) {
		return 0, n, corrupt("a block has %d bytes in %d, and its header says something else", n, packed)
	}
	if h.x86 {
		bcj.Decode(dst[:n])
	}
	end := (packed + 3) &^ 3
	if end+checkSize > len(body) {
		return 0, n, corrupt("it ends in a block")
	}
	for _, b := range body[packed:end] {
		if b != 0 {
			return 0, n, corrupt("a block's padding is not zero")
		}
	}
	if !d.check(check, dst[:n], body[end:end+checkSize]) {
		return 0, n, corrupt("a block's checksum is wrong")
	}
	d.records = append(d.records, record{uint64(size + packed + checkSize), uint64(n)})
	return size + end + checkSize, n, nil
}

type blockHeader struct {
	packed, size *uint64
	x86          bool
	dict         uint32
}

// parseBlockHeader reads a block header, without its size and its checksum.
func parseBlockHeader(b []byte) (h blockHeader, err error) {
	damaged := corrupt("a damaged block header")
	if len(b) == 0 {
		return h, damaged
	}
	flags := b[0]
	b = b[1:]
	if flags&0x3c != 0 {
		return h, fmt.Errorf("%w: block flags %#x", ErrUnsupported, flags)
	}
	for _, f := range []struct {
		bit byte
		to  **uint64
	}{{0x40, &h.packed}, {0x80, &h.size}} {
		if flags&f.bit != 0 {
			v, n := uvarint(b)
			if n == 0 {
				return h, damaged
			}
			*f.to, b = &v, b[n:]
		}
	}
	if h.packed != nil && *h.packed == 0 {
		return h, damaged
	}
	filters := int(flags&3) + 1
	for i := range filters {
		id, n := uvarint(b)
		if n == 0 {
			return h, damaged
		}
		b = b[n:]
		size, n := uvarint(b)
		if n == 0 || size > uint64(len(b)-n) {
			return h, damaged
		}
		props := b[n : n+int(size)]
		b = b[n+int(size):]
		switch {
		case id == filterLZMA && i == filters-1 && len(props) == 1:
			bits := props[0]
			if bits > 40 {
				return h, damaged
			}
			dict := uint64(2|bits&1) << (bits/2 + 11)
			if dict > MaxDictionary {
				return h, fmt.Errorf("%w: a dictionary of %d MiB, at most %d", ErrUnsupported, dict>>20, MaxDictionary>>20)
			}
			h.dict = uint32(dict)
		case id == filterX86 && i == 0 && filters == 2 && (len(props) == 0 || len(props) == 4 && binary.LittleEndian.Uint32(props) == 0):
			h.x86 = true
		default:
			return h, fmt.Errorf("%w: filter %#x", ErrUnsupported, id)
		}
	}
	for _, c := range b {
		if c != 0 {
			return h, damaged
		}
	}
	return h, nil
}

// check reports whether a block's check is right.
func (d *Decoder) check(kind byte, data, sum []byte) bool {
	switch kind {
	case 1:
		return crc32.ChecksumIEEE(data) == binary.LittleEndian.Uint32(sum)
	case 4:
		if d.crc64 == nil {
			d.crc64 = crc64.MakeTable(crc64.ECMA)
		}
		return crc64.Checksum(data, d.crc64) == binary.LittleEndian.Uint64(sum)
	case 10:
		return sha256.Sum256(data) == [32]byte(sum)
	}
	return true
}

// index checks the index at the beginning of src against the blocks, and returns its size.
func (d *Decoder) index(src []byte) (int, error) {
	pos := 1
	next := func() (uint64, bool) {
		v, n := uvarint(src[pos:])
		pos += n
		return v, n > 0
	}
	if n, ok := next(); !ok || n != uint64(len(d.records)) {
		return 0, corrupt("its index is wrong")
	}
	for _, r := range d.records {
		unpadded, ok := next()
		size, ok2 := next()
		if !ok || !ok2 || unpadded != r.unpadded || size != r.size {
			return 0, corrupt("its index is wrong")
		}
	}
	for ; pos%4 != 0; pos++ {
		if pos >= len(src) || src[pos] != 0 {
			return 0, corrupt("its index is wrong")
		}
	}
	if len(src) < pos+4 || crc32.ChecksumIEEE(src[:pos]) != binary.LittleEndian.Uint32(src[pos:]) {
		return 0, corrupt("its index's checksum is wrong")
	}
	return pos + 4, nil
}

// uvarint reads a number of at most 63 bits, in its shortest form. A length of 0 is an error.
func uvarint(b []byte) (uint64, int) {
	v, n := binary.Uvarint(b)
	if n <= 0 || n > 9 || n > 1 && b[n-1] == 0 {
		return 0, 0
	}
	return v, n
}
