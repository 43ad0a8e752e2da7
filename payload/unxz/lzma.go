package unxz

import "encoding/binary"

// Sizes of the probability tables. Those that a state indexes have 16 columns of position bits.
const (
	states      = 12
	posColumns  = 16
	literalSize = 0x300
	maxLiteral  = literalSize << 4 // lc + lp is at most 4 in LZMA2
	distSlots   = 64
	alignBits   = 4
	minMatch    = 2
	window      = 32 // input that one symbol can never use up
	probInit    = 1 << 10
)

// length holds the probabilities that code the length of a match.
type length struct {
	choice, choice2 uint16
	low, mid        [posColumns << 3]uint16
	high            [256]uint16
}

// lzma is the state of an LZMA2 decoder, as it goes from one chunk to the next.
type lzma struct {
	literal        [maxLiteral]uint16
	match, long    [states << 4]uint16 // by state and position
	rep, repG0     [states]uint16
	repG1, repG2   [states]uint16
	slot           [4][distSlots]uint16
	special        [128]uint16
	align          [1 << alignBits]uint16
	matchLen       length
	repLen         length
	lc, lp, pb     uint32
	state          uint32
	rep0, rep1     uint32 // distances of the last matches, less one
	rep2, rep3     uint32
	tail           [1<<16 + window]byte // a chunk near the end of the input, with room behind it
	start          int                  // where the dictionary begins in dst
	dict           uint32
	needProps      bool
	needDictionary bool
}

func fill(p []uint16) {
	for i := range p {
		p[i] = probInit
	}
}

func (l *length) reset() {
	l.choice, l.choice2 = probInit, probInit
	fill(l.low[:])
	fill(l.mid[:])
	fill(l.high[:])
}

// resetState begins anew, with the same properties.
func (z *lzma) resetState() {
	fill(z.literal[:literalSize<<(z.lc+z.lp)])
	fill(z.match[:])
	fill(z.long[:])
	fill(z.rep[:])
	fill(z.repG0[:])
	fill(z.repG1[:])
	fill(z.repG2[:])
	for i := range z.slot {
		fill(z.slot[i][:])
	}
	fill(z.special[:])
	fill(z.align[:])
	z.matchLen.reset()
	z.repLen.reset()
	z.state, z.rep0, z.rep1, z.rep2, z.rep3 = 0, 0, 0, 0, 0
}

// decode decodes the LZMA2 chunks at the beginning of src up to their end marker, and returns how many bytes they took and gave.
func (z *lzma) decode(dst, src []byte, dict uint32) (used, n int, err error) {
	z.needDictionary, z.needProps, z.start, z.dict = true, true, 0, dict
	for pos := 0; ; {
		if pos >= len(src) {
			return pos, n, corrupt("it ends in a block")
		}
		control := src[pos]
		if control == 0 {
			return pos + 1, n, nil
		}
		if control == 1 || control >= 0xe0 {
			// The next chunk that is compressed must bring properties, and with them a fresh state.
			z.needDictionary, z.needProps, z.start = false, true, n
		} else if z.needDictionary {
			return pos, n, corrupt("a chunk needs a dictionary that is not there")
		}
		header := 3
		if control >= 0x80 {
			if header = 5; control >= 0xc0 {
				header = 6
			}
		} else if control > 2 {
			return pos, n, corrupt("a chunk of unknown kind %#x", control)
		}
		if pos+header > len(src) {
			return pos, n, corrupt("it ends in a block")
		}
		size := int(binary.BigEndian.Uint16(src[pos+1:])) + 1
		packed := size
		if control >= 0x80 {
			size += int(control&0x1f) << 16
			packed = int(binary.BigEndian.Uint16(src[pos+3:])) + 1
		}
		if size > len(dst)-n {
			return pos, n, ErrTooLong
		}
		if packed > len(src)-pos-header {
			return pos, n, corrupt("it ends in a block")
		}
		if control >= 0xc0 {
			props := uint32(src[pos+5])
			if props > (4*5+4)*9+8 {
				return pos, n, corrupt("a chunk's properties are wrong")
			}
			z.lc, z.lp, z.pb = props%9, props/9%5, props/45
			if z.lc+z.lp > 4 {
				return pos, n, corrupt("a chunk's properties are wrong")
			}
			z.needProps = false
		} else if control >= 0x80 && z.needProps {
			return pos, n, corrupt("a chunk without properties")
		}
		pos += header
		switch {
		case control < 0x80:
			copy(dst[n:], src[pos:pos+size])
		default:
			if control >= 0xa0 {
				z.resetState()
			}
			in := src[pos:]
			if len(in) < packed+window {
				in = z.tail[:packed+window]
				copy(in, src[pos:pos+packed])
				clear(in[packed:])
			} else {
				in = in[:packed+window]
			}
			if !z.chunk(dst[:n+size], n, in) {
				return pos, n, corrupt("a chunk cannot be decoded")
			}
		}
		pos += packed
		n += size
	}
}
