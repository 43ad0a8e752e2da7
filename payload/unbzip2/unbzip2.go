// Package unbzip2 decodes bzip2 streams that are in memory as a whole into a buffer whose size is known: the data of one operation of a payload.
//
// Most of the time that bzip2 takes goes into following a chain of references through a table of 4 MB, one cache miss for each byte.
// The standard library follows one chain. Here two are followed at a time, one from each end of the block, so that the misses overlap; Huffman codes are
// read by table and not bit by bit, and nothing is allocated after the first block. BenchmarkDecode says what that gains. The standard library is the
// reference: this package is fuzzed against it.
//
// One stream is read; randomised blocks (which no bzip2 since 1996 makes) and anything after the stream are refused.
package unbzip2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
)

// What can be wrong with a stream.
var (
	ErrCorrupt = errors.New("damaged bzip2 stream")
	ErrTooLong = errors.New("the bzip2 stream holds more than there is room for")
)

func corrupt(what string) error { return fmt.Errorf("%w: %s", ErrCorrupt, what) }

const (
	blockMagic = 0x314159265359
	endMagic   = 0x177245385090
	maxBlock   = 900_000
	groupSize  = 50 // symbols that use the same table
	maxTables  = 6
	maxSymbols = 258
	maxBits    = 20
	fastBits   = 10
)

// Decoder decodes one stream after the other. Its zero value is ready for use. It keeps tables of nine bytes for each byte of the largest block,
// 8 MB at the most.
type Decoder struct {
	forward, backward []uint32
	text              []byte
	tables            [maxTables]table
	selectors         [18002]byte
}

// table is a Huffman code: codes of up to fastBits bits are looked up, longer ones compared with the last code of their length.
type table struct {
	fast  [1 << fastBits]uint16 // symbol<<5 | bits; 0 is a longer code
	last  [maxBits + 2]int32    // code that is beyond those of this length, left aligned to maxBits
	base  [maxBits + 2]int32    // what to take off a code to have its place in order
	order [maxSymbols]uint16
}

// Decode decodes the stream src, all of it, into dst, and returns how many bytes it gave. It never gives more than dst has room for.
func (d *Decoder) Decode(dst, src []byte) (int, error) {
	r := reader{src: src}
	limit, err := r.header()
	if err != nil {
		return 0, err
	}
	// A block of what fits into dst has at most a quarter more bytes before its run lengths are undone.
	d.reserve(min(limit, len(dst)+len(dst)/4+1), 0)
	n, sum := 0, uint32(0)
	for {
		more, want, err := r.section()
		if err != nil {
			return n, err
		}
		if !more {
			return n, r.end(sum, want)
		}
		size, origin, err := d.block(&r, limit)
		if err != nil {
			return n, err
		}
		text, err := d.unsort(size, origin)
		if err != nil {
			return n, err
		}
		m, err := expand(dst[n:], text)
		if err != nil {
			return n, err
		}
		if bits.Reverse32(update(0, dst[n:n+m])) != want {
			return n, corrupt("a block's checksum is wrong")
		}
		n += m
		sum = bits.RotateLeft32(sum, 1) ^ want
	}
}

// header reads the stream's header, and returns the most bytes that a block may have.
func (r *reader) header() (limit int, err error) {
	if head := r.bits(32); head>>8 != 'B'<<16|'Z'<<8|'h' || head&0xff < '1' || head&0xff > '9' {
		return 0, corrupt("it does not begin as one")
	}
	return int(r.src[3]-'0') * 100_000, nil
}

// section reads what a block, or the end, begins with, and the checksum that follows.
func (r *reader) section() (more bool, sum uint32, err error) {
	magic := uint64(r.bits(24))<<24 | uint64(r.bits(24))
	sum = r.bits(32)
	switch {
	case r.over():
		return false, 0, corrupt("it ends too soon")
	case magic == blockMagic:
		return true, sum, nil
	case magic == endMagic:
		return false, sum, nil
	}
	return false, 0, corrupt("a block of unknown kind")
}

// end checks the end of the stream.
func (r *reader) end(sum, want uint32) error {
	if sum != want {
		return corrupt("its checksum is wrong")
	}
	if left := len(r.src) - r.bytes(); left > 0 {
		return fmt.Errorf("%w: %d bytes after its end", ErrCorrupt, left)
	}
	return nil
}

// update goes on with a CRC-32 whose register has its bits in the other order than everybody else has them: each byte is turned round.
func update(crc uint32, p []byte) uint32 {
	var buf [1024]byte
	for len(p) > 0 {
		n := min(len(p), len(buf))
		i := 0
		for ; i+8 <= n; i += 8 { // eight at a time
			binary.LittleEndian.PutUint64(buf[i:], bits.ReverseBytes64(bits.Reverse64(binary.LittleEndian.Uint64(p[i:]))))
		}
		for ; i < n; i++ {
			buf[i] = bits.Reverse8(p[i])
		}
		crc = crc32.Update(crc, crc32.IEEETable, buf[:n])
		p = p[n:]
	}
	return crc
}

// reader reads bits, the highest first. Behind the end it gives zeros, and over says so.
type reader struct {
	src  []byte
	pos  int    // of the next byte
	acc  uint64 // bits that are read, at the top
	have uint   // how many
}

// fill makes sure of 56 bits.
func (r *reader) fill() {
	if r.pos+8 <= len(r.src) {
		r.acc |= binary.BigEndian.Uint64(r.src[r.pos:]) >> r.have
		n := (63 - r.have) >> 3
		r.pos += int(n)
		r.have += n << 3
		return
	}
	for r.have <= 56 {
		if r.pos < len(r.src) {
			r.acc |= uint64(r.src[r.pos]) << (56 - r.have)
		}
		r.pos++
		r.have += 8
	}
}

func (r *reader) bits(n uint) uint32 {
	if r.have < n {
		r.fill()
	}
	v := uint32(r.acc >> (64 - n))
	r.acc <<= n
	r.have -= n
	return v
}

// bytes returns how many bytes were used, the last one perhaps in part.
func (r *reader) bytes() int { return r.pos - int(r.have>>3) }

func (r *reader) over() bool { return r.bytes() > len(r.src) }

// block reads a block up to its byte counts and chain, and returns its size and where its chain begins.
func (d *Decoder) block(r *reader, limit int) (size, origin int, err error) {
	if r.bits(1) != 0 {
		return 0, 0, corrupt("a randomised block")
	}
	origin = int(r.bits(24))
	var mtf [256]byte
	used := 0
	rows := r.bits(16)
	for i := range 16 {
		if rows>>(15-i)&1 == 0 {
			continue
		}
		row := r.bits(16)
		for j := range 16 {
			if row>>(15-j)&1 != 0 {
				mtf[used] = byte(i<<4 | j)
				used++
			}
		}
	}
	if used == 0 {
		return 0, 0, corrupt("a block without symbols")
	}
	selectors, err := d.codes(r, used+2)
	if err != nil {
		return 0, 0, err
	}
	if size, err = d.symbols(r, limit, selectors, uint16(used+1), &mtf); err != nil {
		return 0, 0, err
	}
	if origin >= size {
		return 0, 0, corrupt("a block begins outside itself")
	}
	return size, origin, nil
}

// codes reads the Huffman tables, and which of them is used when.
func (d *Decoder) codes(r *reader, symbols int) (selectors int, err error) {
	tables := int(r.bits(3))
	if tables < 2 || tables > maxTables {
		return 0, corrupt("a wrong number of Huffman tables")
	}
	selectors = int(r.bits(15))
	if selectors == 0 {
		return 0, corrupt("no selectors")
	}
	order := [maxTables]byte{0, 1, 2, 3, 4, 5}
	for i := range selectors {
		j := 0
		for r.bits(1) == 1 {
			if j++; j >= tables {
				return 0, corrupt("a wrong selector")
			}
		}
		v := order[j]
		copy(order[1:j+1], order[:j])
		order[0] = v
		// More selectors than a block has symbols for are allowed, and of no use.
		if i < len(d.selectors) {
			d.selectors[i] = v
		}
	}
	selectors = min(selectors, len(d.selectors))
	var lengths [maxSymbols]byte
	for t := range tables {
		n := int(r.bits(5))
		for i := range symbols {
			for {
				if n < 1 || n > maxBits {
					return 0, corrupt("a Huffman code of a wrong length")
				}
				if r.bits(1) == 0 {
					break
				}
				n += 1 - 2*int(r.bits(1))
			}
			lengths[i] = byte(n)
		}
		if r.over() {
			return 0, corrupt("it ends too soon")
		}
		if !d.tables[t].build(lengths[:symbols]) {
			return 0, corrupt("a Huffman table that cannot be")
		}
	}
	return selectors, nil
}

// build makes the table for codes of these lengths. It reports whether there is one; it need not be complete.
func (t *table) build(lengths []byte) bool {
	var count [maxBits + 2]int32
	for _, n := range lengths {
		count[n]++
	}
	var next [maxBits + 2]int32 // place in order
	code, place := int32(0), int32(0)
	for n := 1; n <= maxBits; n++ {
		next[n] = place
		t.base[n] = code - place
		code += count[n]
		place += count[n]
		if code > 1<<n {
			return false
		}
		t.last[n] = code << (maxBits - n)
		code <<= 1
	}
	clear(t.fast[:])
	for s, n := range lengths {
		at := next[n]
		next[n]++
		t.order[at] = uint16(s)
		if n <= fastBits {
			first := int(at+t.base[n]) << (fastBits - n)
			for i := range 1 << (fastBits - n) {
				t.fast[first+i] = uint16(s)<<5 | uint16(n)
			}
		}
	}
	return true
}

// grow makes the tables larger, for at least want symbols if the block may have so many, and keeps the first n.
func (d *Decoder) grow(n, want, limit int) []uint32 {
	if want = max(want, 2*n, 1<<14); want > limit/2 {
		want = limit
	}
	d.reserve(want, n)
	return d.forward[:min(len(d.forward), limit)]
}

// reserve makes tables for want symbols, if they are not as large yet, and keeps the first n.
func (d *Decoder) reserve(want, n int) {
	if want > len(d.forward) {
		old := d.forward
		d.forward, d.backward, d.text = make([]uint32, want), make([]uint32, want), make([]byte, want)
		copy(d.forward, old[:n])
	}
}

// symbols reads the symbols of a block into forward, a byte in each place, and returns how many there are.
func (d *Decoder) symbols(r *reader, limit, selectors int, end uint16, mtf *[256]byte) (int, error) {
	out := d.forward[:min(len(d.forward), limit)]
	n, run, weight := 0, 0, 1
	for group := range selectors {
		t := &d.tables[d.selectors[group]%maxTables]
		for range groupSize {
			if r.have < maxBits {
				r.fill()
			}
			var sym uint16
			if e := t.fast[r.acc>>(64-fastBits)]; e != 0 {
				sym = e >> 5
				r.acc <<= e & 31
				r.have -= uint(e & 31)
			} else {
				code := int32(r.acc >> (64 - maxBits))
				bits := uint(fastBits + 1)
				for bits <= maxBits && code >= t.last[bits] {
					bits++
				}
				if bits > maxBits {
					return 0, corrupt("a code that is not in its table")
				}
				sym = t.order[code>>(maxBits-bits)-t.base[bits]]
				r.acc <<= bits
				r.have -= bits
			}
			if sym < 2 { // a run's length, in a number system of its own: digits 1 and 2, the lowest first
				if weight > maxBlock {
					return 0, corrupt("a run that is too long")
				}
				run += weight << sym
				weight <<= 1
				continue
			}
			if run > 0 {
				if run > len(out)-n {
					if out = d.grow(n, n+run, limit); run > len(out)-n {
						return 0, corrupt("a block that is too long")
					}
				}
				b, to := uint32(mtf[0]), out[n:n+run]
				for i := range to {
					to[i] = b
				}
				n += run
				run, weight = 0, 1
			}
			if sym == end {
				if r.over() {
					return 0, corrupt("it ends too soon")
				}
				if n == 0 {
					return 0, corrupt("a block of nothing")
				}
				return n, nil
			}
			if n == len(out) {
				if out = d.grow(n, n+1, limit); n == len(out) {
					return 0, corrupt("a block that is too long")
				}
			}
			i := int(sym-1) & 0xff
			b := mtf[i]
			if i < 16 {
				for ; i > 0; i-- {
					mtf[i] = mtf[i-1]
				}
			} else {
				copy(mtf[1:i+1], mtf[:i])
			}
			mtf[0] = b
			out[n] = uint32(b)
			n++
		}
		if r.over() {
			return 0, corrupt("it ends too soon")
		}
	}
	return 0, corrupt("a block without an end")
}
