package toxz

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/flipside-linux/flipside/payload/bcj"
)

const (
	headerMagic = "\xfd7zXZ\x00"
	footerMagic = "YZ"
	checkCRC32  = 1
	filterX86   = 0x04
	filterLZMA2 = 0x21

	maxBlock  = 16 << 20 // what is larger is cut; memory is eleven times that of a block
	chunkIn   = 2 << 20  // that a chunk of LZMA2 may hold
	chunkOut  = 1 << 16  // and take
	chunkRoom = 1 << 13  // what a segment adds, but for data that is not worth compressing
	chunkRaw  = 1 << 16
)

// Encoder makes one stream after the other. Its zero value is ready for use; it keeps its tables, some ten bytes for each byte of the largest block.
type Encoder struct {
	finder  finder
	model   model
	parser  parser
	coder   coder
	history history
	text    []byte // what the filter made of a block
	other   []byte
}

// Append appends a stream with the bytes of src to dst. Where they look like x86 machine code, the filter for it is tried as well, which takes
// twice the time, and what is smaller is taken.
func (e *Encoder) Append(dst, src []byte) []byte {
	if !code(src) {
		return e.stream(dst, src, false)
	}
	e.other = e.stream(e.other[:0], src, true)
	begin := len(dst)
	dst = e.stream(dst, src, false)
	if len(e.other) < len(dst)-begin {
		dst = append(dst[:begin], e.other...)
	}
	return dst
}

// code reports whether there are more of what could be branches than there would be by chance.
func code(src []byte) bool {
	n := 0
	for i := 4; i < len(src); i++ {
		if src[i-4]&0xfe == 0xe8 && (src[i] == 0 || src[i] == 0xff) {
			n++
		}
	}
	return n > len(src)/512
}

// stream appends a stream.
func (e *Encoder) stream(dst, src []byte, x86 bool) []byte {
	dst = append(dst, headerMagic...)
	flags := [2]byte{0, checkCRC32}
	dst = append(dst, flags[:]...)
	dst = binary.LittleEndian.AppendUint32(dst, crc32.ChecksumIEEE(flags[:]))

	index := []byte{0}
	blocks := (len(src) + maxBlock - 1) / maxBlock
	index = binary.AppendUvarint(index, uint64(blocks))
	for range blocks {
		block := src[:min(len(src), maxBlock)]
		src = src[len(block):]
		begin := len(dst)
		dst = e.block(dst, block, x86)
		index = binary.AppendUvarint(index, uint64(len(dst)-begin+crc32.Size)) // without padding
		index = binary.AppendUvarint(index, uint64(len(block)))
		dst = pad(dst, len(dst)-begin)
		dst = binary.LittleEndian.AppendUint32(dst, crc32.ChecksumIEEE(block))
	}
	index = pad(index, len(index))
	index = binary.LittleEndian.AppendUint32(index, crc32.ChecksumIEEE(index))
	dst = append(dst, index...)

	footer := binary.LittleEndian.AppendUint32(nil, uint32(len(index)/4-1))
	footer = append(footer, flags[:]...)
	dst = binary.LittleEndian.AppendUint32(dst, crc32.ChecksumIEEE(footer))
	dst = append(dst, footer...)
	return append(dst, footerMagic...)
}

// pad makes n, the size of what b ends with, a multiple of four.
func pad(b []byte, n int) []byte { return append(b, make([]byte, -n&3)...) }

// block appends a block's header and chunks.
func (e *Encoder) block(dst, src []byte, x86 bool) []byte {
	var filters []byte
	count := byte(0)
	if x86 {
		count++
		filters = append(filters, filterX86, 0)
	}
	filters = append(filters, filterLZMA2, 1, dictionary(len(src)))
	header := append([]byte{0, count}, filters...)
	header = pad(header, len(header))
	header[0] = byte(len(header) / 4)
	header = binary.LittleEndian.AppendUint32(header, crc32.ChecksumIEEE(header))
	dst = append(dst, header...)
	if x86 {
		e.text = append(e.text[:0], src...)
		bcj.Encode(e.text)
		src = e.text
	}
	return e.lzma2(dst, src)
}

// dictionary is the code of the smallest dictionary that holds n bytes.
func dictionary(n int) byte {
	for code := byte(0); ; code++ {
		if uint64(2|code&1)<<(code/2+11) >= uint64(n) {
			return code
		}
	}
}

// What a chunk of LZMA2 begins with.
const (
	controlEnd        = 0x00
	controlRawFresh   = 0x01 // with a fresh dictionary
	controlRaw        = 0x02
	controlGoOn       = 0x80
	controlReset      = 0xa0 // of the probabilities
	controlProperties = 0xc0
	controlFresh      = 0xe0 // everything
)

// lzma2 appends chunks with the bytes of src, and the end marker.
func (e *Encoder) lzma2(dst, src []byte) []byte {
	e.finder.reset(src)
	e.reset()
	control := byte(controlFresh)
	for at := 0; at < len(src); {
		begin := at
		e.coder.reset()
		for at < len(src) && at-begin <= chunkIn-segment && e.coder.size() <= chunkOut-chunkRoom {
			steps := e.parse(src, at)
			for i := len(steps) - 1; i >= 0; i-- {
				e.model.encode(&e.coder, &e.history, src, at, steps[i])
				at += steps[i].size
			}
			if e.model.stale >= 128 {
				e.model.estimate()
			}
		}
		e.coder.finish()
		size, packed := at-begin, e.coder.out
		if len(packed) < size && len(packed) <= chunkOut {
			n := size - 1
			dst = append(dst, control|byte(n>>16), byte(n>>8), byte(n), byte((len(packed)-1)>>8), byte(len(packed)-1))
			if control >= controlProperties {
				dst = append(dst, properties)
			}
			dst = append(dst, packed...)
			control = controlGoOn
			continue
		}
		// What was learned from this is lost to whoever reads it.
		for left := src[begin:at]; len(left) > 0; {
			n := min(len(left), chunkRaw)
			kind := byte(controlRaw)
			if control == controlFresh {
				kind, control = controlRawFresh, controlProperties
			}
			dst = append(dst, kind, byte((n-1)>>8), byte(n-1))
			dst = append(dst, left[:n]...)
			left = left[n:]
		}
		if control != controlProperties {
			control = controlReset
		}
		e.reset()
	}
	return append(dst, controlEnd)
}

func (e *Encoder) reset() {
	e.model.reset()
	e.history = history{}
}
