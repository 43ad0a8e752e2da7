package unbzip2

// unsort undoes the Burrows-Wheeler transform of the block in forward.
//
// Sorted by what follows them, the bytes of the block form chains. With the last column in hand, the next byte of the text is found by forward, and the
// one before by backward. Both are followed at once, from the two ends of the text to its middle.
func (d *Decoder) unsort(size, origin int) ([]byte, error) {
	forward, backward := d.forward[:size], d.backward[:size]
	var start [256]uint32
	for _, v := range forward {
		start[v&0xff]++
	}
	sum := uint32(0)
	for i, n := range start {
		start[i] = sum
		sum += n
	}
	for i, v := range forward {
		b := v & 0xff
		at := start[b]
		start[b]++
		backward[i] = at<<8 | b
		forward[at] |= uint32(i) << 8
	}
	text := d.text[:size]
	lo, hi := forward[origin]>>8, uint32(origin)
	i, j := 0, size-1
	for i < j {
		if lo >= uint32(size) || hi >= uint32(size) {
			return nil, corrupt("a chain that leaves its block")
		}
		f, b := forward[lo], backward[hi]
		text[i], text[j] = byte(f), byte(b)
		lo, hi = f>>8, b>>8
		i, j = i+1, j-1
	}
	// From the two sides they must come to the same place, else this is the transform of no text, and the chains are not one.
	if i == j {
		text[i] = byte(forward[lo])
	} else {
		hi = forward[hi] >> 8
	}
	if lo != hi {
		return nil, corrupt("a chain that does not close")
	}
	return text, nil
}

// expand undoes the run lengths: four equal bytes are followed by the number of further ones.
func expand(dst, text []byte) (int, error) {
	n := 0
	for len(text) > 0 {
		// Up to and with the next four equal bytes everything is as it is.
		i, same := 1, 1
		for ; i < len(text) && same < 4; i++ {
			if text[i] != text[i-1] {
				same = 0
			}
			same++
		}
		if i > len(dst)-n {
			return n, ErrTooLong
		}
		n += copy(dst[n:], text[:i])
		if same < 4 || i == len(text) {
			break
		}
		more := int(text[i])
		if more > len(dst)-n {
			return n, ErrTooLong
		}
		b, to := text[i-1], dst[n:n+more]
		for k := range to {
			to[k] = b
		}
		n += more
		text = text[i+1:]
	}
	return n, nil
}
