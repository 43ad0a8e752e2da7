package unbzip2

import (
	"io"
	"math/bits"
)

// Reader reads a stream in pieces, where its size is not known beforehand. Apart from the decoder's tables, which any number of readers
// share, it keeps one block before its run lengths are undone: 900 KB at the most, whatever it holds.
type Reader struct {
	d         *Decoder
	src       reader
	limit     int    // bytes of a block
	block     []byte // before its run lengths are undone
	text      []byte // what is left of it
	last      byte
	same      int // equal bytes up to now
	more      int // repetitions of last that are still to come
	crc, want uint32
	sum       uint32
	begun, in bool
	err       error
}

// NewReader reads the stream src, all of it. The readers of one decoder must be used by one goroutine.
func (d *Decoder) NewReader(src []byte) *Reader { return &Reader{d: d, src: reader{src: src}} }

// Read gives the next bytes. io.EOF means that every checksum held and that nothing follows.
func (r *Reader) Read(p []byte) (int, error) {
	n := 0
	for n == 0 && r.err == nil && len(p) > 0 {
		n = r.expand(p)
		r.crc = update(r.crc, p[:n])
		if n == 0 {
			r.err = r.next()
		}
	}
	if n > 0 || len(p) == 0 {
		return n, nil
	}
	return 0, r.err
}

// expand undoes the run lengths of the block, as far as there is room.
func (r *Reader) expand(p []byte) int {
	n := 0
	for n < len(p) {
		if r.more > 0 {
			p[n] = r.last
			r.more--
			n++
			continue
		}
		if len(r.text) == 0 {
			break
		}
		b := r.text[0]
		r.text = r.text[1:]
		if r.same == 4 {
			r.more, r.same = int(b), 0
			continue
		}
		if r.same == 0 || b != r.last {
			r.same = 0
		}
		r.same++
		r.last = b
		p[n] = b
		n++
	}
	return n
}

// next goes on to the next block.
func (r *Reader) next() error {
	if !r.begun {
		limit, err := r.src.header()
		if err != nil {
			return err
		}
		r.begun, r.limit = true, limit
	}
	if r.in {
		if bits.Reverse32(r.crc) != r.want {
			return corrupt("a block's checksum is wrong")
		}
		r.sum = bits.RotateLeft32(r.sum, 1) ^ r.want
		r.in = false
	}
	more, want, err := r.src.section()
	if err != nil {
		return err
	}
	if !more {
		if err := r.src.end(r.sum, want); err != nil {
			return err
		}
		return io.EOF
	}
	size, origin, err := r.d.block(&r.src, r.limit)
	if err != nil {
		return err
	}
	text, err := r.d.unsort(size, origin)
	if err != nil {
		return err
	}
	r.block = append(r.block[:0], text...)
	r.text = r.block
	r.in, r.want, r.crc, r.same, r.more = true, want, 0, 0, 0
	return nil
}
