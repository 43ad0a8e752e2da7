package unxz

import "encoding/binary"

// adapt turns the rounding of a probability's update, 5 bits at a time, into that of a bit that is 0: -2048 + 31.
const adapt = 1<<32 - 2017

// chunk decodes one LZMA chunk: it fills dst from op on. in is the chunk with window bytes behind it that belong to something else. It reports
// whether the chunk used its input up exactly, and never referred to what is not there.
//
// This is where the time goes. The range decoder's state lives in local variables; a bit's decoding is written out wherever there is one, for
// there are no macros, and a function with a pointer to its probability costs a third of the speed. Input is read through a pointer to
// an array: one check of bounds for each symbol and none for each bit, since no symbol uses 32 bytes up. Bits whose value is as
// good as random are decoded without a branch: m is all ones where the bit is 0.
func (z *lzma) chunk(dst []byte, op int, in []byte) bool {
	limit := len(in) - window
	if limit < 5 || in[0] != 0 {
		return false
	}
	rng, code := uint32(0xffffffff), binary.BigEndian.Uint32(in[1:])
	ip := 5
	state, rep0, rep1, rep2, rep3 := z.state, z.rep0, z.rep1, z.rep2, z.rep3
	posMask, litMask, lc := uint32(1)<<z.pb-1, uint32(1)<<z.lp-1, z.lc&15
	start, dict := z.start, z.dict
	for op < len(dst) {
		if ip > limit {
			return false
		}
		w, k := (*[window]byte)(in[ip:]), 0
		here := uint32(op - start)
		column := here & posMask & 15
		prob := &z.match[(state<<4|column)%(states<<4)]
		if rng < 1<<24 {
			rng, code, k = rng<<8, code<<8|uint32(w[k&31]), k+1
		}
		bound := (rng >> 11) * uint32(*prob)
		if code < bound { // a literal
			rng = bound
			*prob += (1<<11 - *prob) >> 5
			before := uint32(0)
			if op > start {
				before = uint32(dst[op-1])
			}
			at := ((here&litMask)<<lc + before>>(8-lc)) * literalSize
			if at > maxLiteral-literalSize {
				return false
			}
			p := (*[literalSize]uint16)(z.literal[at:])
			s := uint32(1)
			if state >= 7 { // the byte that the last match would have gone on with is a hint
				if rep0 >= uint32(op-start) {
					return false
				}
				hint := uint32(dst[op-1-int(rep0)])
				offs := uint32(0x100)
				for s < 0x100 {
					hint <<= 1
					bit := hint & offs
					q := &p[(offs+bit+s)%literalSize]
					if rng < 1<<24 {
						rng, code, k = rng<<8, code<<8|uint32(w[k&31]), k+1
					}
					v := uint32(*q)
					bound := (rng >> 11) * v
					m := uint32(int64(uint64(code)-uint64(bound)) >> 63)
					rng -= bound
					rng += m & (bound - rng)
					code -= bound &^ m
					*q = uint16(v - uint32(int32(v+m&adapt)>>5))
					s = s<<1 + 1 + m
					offs &= bit ^ m
				}
			} else {
				for s < 0x100 {
					q := &p[s&0xff]
					if rng < 1<<24 {
						rng, code, k = rng<<8, code<<8|uint32(w[k&31]), k+1
					}
					v := uint32(*q)
					bound := (rng >> 11) * v
					m := uint32(int64(uint64(code)-uint64(bound)) >> 63)
					rng -= bound
					rng += m & (bound - rng)
					code -= bound &^ m
					*q = uint16(v - uint32(int32(v+m&adapt)>>5))
					s = s<<1 + 1 + m
				}
			}
			dst[op] = byte(s)
			op++
			ip += k
			switch {
			case state < 4:
				state = 0
			case state < 10:
				state -= 3
			default:
				state -= 6
			}
			continue
		}
		rng -= bound
		code -= bound
		*prob -= *prob >> 5

		l := &z.matchLen
		prob = &z.rep[state%states]
		if rng < 1<<24 {
			rng, code, k = rng<<8, code<<8|uint32(w[k&31]), k+1
		}
		bound = (rng >> 11) * uint32(*prob)
		isMatch := code < bound
		if isMatch {
			rng = bound
			*prob += (1<<11 - *prob) >> 5
			rep3, rep2, rep1 = rep2, rep1, rep0
			if state < 7 {
				state = 7
			} else {
				state = 10
			}
		} else { // at one of the last distances
			rng -= bound
			code -= bound
			*prob -= *prob >> 5
			l = &z.repLen
			prob = &z.repG0[state%states]
			if rng < 1<<24 {
				rng, code, k = rng<<8, code<<8|uint32(w[k&31]), k+1
			}
			bound = (rng >> 11) * uint32(*prob)
			if code < bound {
				rng = bound
				*prob += (1<<11 - *prob) >> 5
				prob = &z.long[(state<<4|column)%(states<<4)]
				if rng < 1<<24 {
					rng, code, k = rng<<8, code<<8|uint32(w[k&31]), k+1
				}
				bound = (rng >> 11) * uint32(*prob)
				if code < bound { // one byte
					rng = bound
					*prob += (1<<11 - *prob) >> 5
					if rep0 >= uint32(op-start) {
						return false
					}
					dst[op] = dst[op-1-int(rep0)]
					op++
					ip += k
					if state < 7 {
						state = 9
					} else {
						state = 11
					}
					continue
				}
				rng -= bound
				code -= bound
				*prob -= *prob >> 5
			} else {
				rng -= bound
				code -= bound
				*prob -= *prob >> 5
				prob = &z.repG1[state%states]
				if rng < 1<<24 {
					rng, code, k = rng<<8, code<<8|uint32(w[k&31]), k+1
				}
				bound = (rng >> 11) * uint32(*prob)
				if code < bound {
					rng = bound
					*prob += (1<<11 - *prob) >> 5
					rep0, rep1 = rep1, rep0
				} else {
					rng -= bound
					code -= bound
					*prob -= *prob >> 5
					prob = &z.repG2[state%states]
					if rng < 1<<24 {
						rng, code, k = rng<<8, code<<8|uint32(w[k&31]), k+1
					}
					bound = (rng >> 11) * uint32(*prob)
					if code < bound {
						rng = bound
						*prob += (1<<11 - *prob) >> 5
						rep0, rep1, rep2 = rep2, rep0, rep1
					} else {
						rng -= bound
						code -= bound
						*prob -= *prob >> 5
						rep0, rep1, rep2, rep3 = rep3, rep0, rep1, rep2
					}
				}
			}
			if state < 7 {
				state = 8
			} else {
				state = 11
			}
		}

		// The length: a tree of 3 bits for the shortest, another for the next, one of 8 for the rest.
		var n, top uint32
		var tree []uint16
		if rng < 1<<24 {
			rng, code, k = rng<<8, code<<8|uint32(w[k&31]), k+1
		}
		bound = (rng >> 11) * uint32(l.choice)
		if code < bound {
			rng = bound
			l.choice += (1<<11 - l.choice) >> 5
			tree, top, n = l.low[column<<3:][:8], 8, minMatch
		} else {
			rng -= bound
			code -= bound
			l.choice -= l.choice >> 5
			if rng < 1<<24 {
				rng, code, k = rng<<8, code<<8|uint32(w[k&31]), k+1
			}
			bound = (rng >> 11) * uint32(l.choice2)
			if code < bound {
				rng = bound
				l.choice2 += (1<<11 - l.choice2) >> 5
				tree, top, n = l.mid[column<<3:][:8], 8, minMatch+8
			} else {
				rng -= bound
				code -= bound
				l.choice2 -= l.choice2 >> 5
				tree, top, n = l.high[:], 256, minMatch+16
			}
		}
		s := uint32(1)
		for s < top {
			q := &tree[s]
			if rng < 1<<24 {
				rng, code, k = rng<<8, code<<8|uint32(w[k&31]), k+1
			}
			v := uint32(*q)
			bound := (rng >> 11) * v
			m := uint32(int64(uint64(code)-uint64(bound)) >> 63)
			rng -= bound
			rng += m & (bound - rng)
			code -= bound &^ m
			*q = uint16(v - uint32(int32(v+m&adapt)>>5))
			s = s<<1 + 1 + m
		}
		n += s - top

		if isMatch { // a new distance: its magnitude, then the bits below
			p := &z.slot[min(n-minMatch, 3)]
			s := uint32(1)
			for s < distSlots {
				q := &p[s%distSlots]
				if rng < 1<<24 {
					rng, code, k = rng<<8, code<<8|uint32(w[k&31]), k+1
				}
				v := uint32(*q)
				bound := (rng >> 11) * v
				m := uint32(int64(uint64(code)-uint64(bound)) >> 63)
				rng -= bound
				rng += m & (bound - rng)
				code -= bound &^ m
				*q = uint16(v - uint32(int32(v+m&adapt)>>5))
				s = s<<1 + 1 + m
			}
			rep0 = s - distSlots
			if rep0 >= 4 {
				bits := rep0>>1 - 1
				slot := rep0
				rep0 = 2 | rep0&1
				base, count := z.align[:], uint32(alignBits)
				if slot < 14 {
					rep0 <<= bits & 31
					base, count = z.special[rep0-slot:], bits
				} else {
					for range bits - alignBits {
						if rng < 1<<24 {
							rng, code, k = rng<<8, code<<8|uint32(w[k&31]), k+1
						}
						rng >>= 1
						code -= rng
						m := uint32(int32(code) >> 31)
						code += rng & m
						rep0 = rep0<<1 + 1 + m
					}
					rep0 <<= alignBits
				}
				s := uint32(1)
				for i := range count {
					q := &base[s]
					if rng < 1<<24 {
						rng, code, k = rng<<8, code<<8|uint32(w[k&31]), k+1
					}
					v := uint32(*q)
					bound := (rng >> 11) * v
					m := uint32(int64(uint64(code)-uint64(bound)) >> 63)
					rng -= bound
					rng += m & (bound - rng)
					code -= bound &^ m
					*q = uint16(v - uint32(int32(v+m&adapt)>>5))
					s = s<<1 + 1 + m
					rep0 += (1 + m) << (i & 31)
				}
			}
		}
		ip += k

		size := int(n)
		if rep0 >= uint32(op-start) || rep0 >= dict || size > len(dst)-op {
			return false
		}
		dist := int(rep0) + 1
		from, end := op-dist, op+size
		switch {
		case dist >= 8 && len(dst)-op >= size+8:
			// Eight bytes at a time; what is written beyond the end will be written again.
			for at := op; at < end; at, from = at+8, from+8 {
				binary.LittleEndian.PutUint64(dst[at:], binary.LittleEndian.Uint64(dst[from:]))
			}
		case dist == 1:
			b, to := dst[from], dst[op:end]
			for i := range to {
				to[i] = b
			}
		default:
			for at := op; at < end; at, from = at+1, from+1 {
				dst[at] = dst[from]
			}
		}
		op = end
	}
	if rng < 1<<24 {
		code, ip = code<<8|uint32(in[ip]), ip+1
	}
	z.state, z.rep0, z.rep1, z.rep2, z.rep3 = state, rep0, rep1, rep2, rep3
	return ip == limit && code == 0
}
