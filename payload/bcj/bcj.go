// Package bcj is the x86 branch filter of .xz: in machine code it makes the operands of CALL (E8) and JMP (E9), which say how far away their target
// is, say where it is. Branches to the same place are then the same bytes, and compress better.
package bcj

import "encoding/binary"

// Encode makes operands absolute, in place.
func Encode(b []byte) { convert(b, 1) }

// Decode undoes Encode.
func Decode(b []byte) { convert(b, 1<<32-1) }

// convert adds sign times its place to each operand, as signed numbers of 25 bits. An operand counts only if its top byte is 00 or FF, and if the bytes just
// before it do not look like another branch.
func convert(b []byte, sign uint32) {
	// mask has a bit for each of the three bytes before the opcode that was itself taken for an opcode.
	allowed := [8]bool{true, true, true, false, true, false, false, false}
	number := [8]uint{0, 1, 2, 2, 3, 3, 3, 3}
	mask, last := uint32(0), -5
	for i := 0; i+5 <= len(b); {
		if b[i]&0xfe != 0xe8 {
			i++
			continue
		}
		if gap := i - last; gap > 3 {
			mask = 0
		} else {
			mask = mask << (gap - 1) & 7
			if mask != 0 {
				if probe := b[i+4-int(number[mask])]; !allowed[mask] || probe == 0 || probe == 0xff {
					last = i
					mask = mask<<1&7 | 1
					i++
					continue
				}
			}
		}
		last = i
		if top := b[i+4]; top != 0 && top != 0xff {
			mask = mask<<1&7 | 1
			i++
			continue
		}
		v := binary.LittleEndian.Uint32(b[i+1:])
		for {
			v += sign * uint32(i+5)
			if mask == 0 {
				break
			}
			shift := number[mask] * 8
			if probe := byte(v >> (24 - shift)); probe != 0 && probe != 0xff {
				break
			}
			v ^= 1<<(32-shift) - 1
		}
		if v&(1<<24) != 0 {
			v |= 0xff000000
		} else {
			v &= 0x00ffffff
		}
		binary.LittleEndian.PutUint32(b[i+1:], v)
		i += 5
	}
}
