package toxz

import "math/bits"

// The properties of all streams: 3 bits of the byte before choose the probabilities of a literal, 2 bits of the place those of much else.
const (
	literalBits = 3 // lc
	placeBits   = 2 // pb
	places      = 1 << placeBits
	properties  = placeBits*45 + literalBits
)

const (
	states    = 12
	minMatch  = 2
	maxMatch  = 273
	sizes     = maxMatch - minMatch + 1
	slots     = 64
	near      = 128 // distances whose cost is in a table
	alignBits = 4
	sizeClass = 4 // distances of short matches have probabilities of their own
)

// What a step refers to: nothing, one of the last four distances, or a new one, which is repeats more.
const (
	literal = 1<<32 - 1
	repeats = 4
)

// history is what coding depends on beside the probabilities.
type history struct {
	state uint32 // what the last steps were; below 7 the last one was a literal
	last  [repeats]uint32
}

func (h *history) literal() {
	switch {
	case h.state < 4:
		h.state = 0
	case h.state < 10:
		h.state -= 3
	default:
		h.state -= 6
	}
}

// pick gives the state after a step that is first after a literal, and second after a match.
func (h *history) pick(first, second uint32) {
	if h.state < 7 {
		h.state = first
	} else {
		h.state = second
	}
}

// take makes a step.
func (h *history) take(back uint32, size int) {
	switch {
	case back == literal:
		h.literal()
	case back == 0 && size == 1:
		h.pick(9, 11)
	case back < repeats:
		d := h.last[back]
		copy(h.last[1:back+1], h.last[:back])
		h.last[0] = d
		h.pick(8, 11)
	default:
		copy(h.last[1:], h.last[:])
		h.last[0] = back - repeats
		h.pick(7, 10)
	}
}

// sizeModel is how the size of a match is coded.
type sizeModel struct {
	choice, choice2 uint16
	low, mid        [places][8]uint16
	high            [256]uint16
	cost            [places][sizes]uint32
}

// model is how everything is coded: the probabilities, and what they make of it in costs.
type model struct {
	costs
	literals    [1 << literalBits][0x300]uint16
	match, long [states][places]uint16
	repeat      [states]uint16
	repeat0     [states]uint16
	repeat1     [states]uint16
	repeat2     [states]uint16
	slot        [sizeClass][slots]uint16
	special     [10][32]uint16 // of the slots 4 to 13
	align       [1 << alignBits]uint16
	matchSize   sizeModel
	repeatSize  sizeModel

	slotCost  [sizeClass][slots]uint32
	nearCost  [sizeClass][near]uint32
	alignCost [1 << alignBits]uint32
	stale     int // steps since the costs were computed
}

func fill(lists ...[]uint16) {
	for _, p := range lists {
		for i := range p {
			p[i] = probInit
		}
	}
}

func (s *sizeModel) reset() {
	s.choice, s.choice2 = probInit, probInit
	for i := range places {
		fill(s.low[i][:], s.mid[i][:])
	}
	fill(s.high[:])
}

func (m *model) reset() {
	if m.costs[0] == 0 {
		m.costs.fill()
	}
	for i := range m.literals {
		fill(m.literals[i][:])
	}
	for i := range states {
		fill(m.match[i][:], m.long[i][:])
	}
	fill(m.repeat[:], m.repeat0[:], m.repeat1[:], m.repeat2[:], m.align[:])
	for i := range m.slot {
		fill(m.slot[i][:])
	}
	for i := range m.special {
		fill(m.special[i][:])
	}
	m.matchSize.reset()
	m.repeatSize.reset()
	m.estimate()
}

// slotOf is the coarse magnitude of a distance: its highest two bits, and how many follow.
func slotOf(d uint32) uint32 {
	if d < 4 {
		return d
	}
	n := uint32(bits.Len32(d)) - 1
	return n<<1 | d>>(n-1)&1
}

// estimate computes the costs anew.
func (m *model) estimate() {
	m.stale = 0
	m.matchSize.estimate(&m.costs)
	m.repeatSize.estimate(&m.costs)
	for i := range m.alignCost {
		m.alignCost[i] = m.reverse(m.align[:], uint32(i), alignBits)
	}
	for c := range sizeClass {
		for s := range slots {
			cost := m.tree(m.slot[c][:], uint32(s), 6)
			if s >= 14 {
				cost += uint32(s>>1-1-alignBits) << costBits
			}
			m.slotCost[c][s] = cost
		}
	}
	for d := range uint32(near) {
		s := slotOf(d)
		cost := uint32(0)
		if s >= 4 {
			n := s>>1 - 1
			cost = m.reverse(m.special[s-4][:], d-(2|s&1)<<n, int(n))
		}
		for c := range sizeClass {
			m.nearCost[c][d] = m.slotCost[c][s] + cost
		}
	}
}

func (s *sizeModel) estimate(t *costs) {
	var high [256]uint32
	base := t.one(s.choice) + t.one(s.choice2)
	for i := range high {
		high[i] = base + t.tree(s.high[:], uint32(i), 8)
	}
	for p := range places {
		for i := range 8 {
			s.cost[p][i] = t.zero(s.choice) + t.tree(s.low[p][:], uint32(i), 3)
			s.cost[p][8+i] = t.one(s.choice) + t.zero(s.choice2) + t.tree(s.mid[p][:], uint32(i), 3)
		}
		copy(s.cost[p][16:], high[:])
	}
}

func (s *sizeModel) encode(c *coder, size, place int) {
	switch n := uint32(size - minMatch); {
	case n < 8:
		c.bit(&s.choice, 0)
		c.tree(s.low[place][:], n, 3)
	case n < 16:
		c.bit(&s.choice, 1)
		c.bit(&s.choice2, 0)
		c.tree(s.mid[place][:], n-8, 3)
	default:
		c.bit(&s.choice, 1)
		c.bit(&s.choice2, 1)
		c.tree(s.high[:], n-16, 8)
	}
}

// encode writes one step.
func (m *model) encode(c *coder, h *history, src []byte, at int, s step) {
	place := at % places
	switch {
	case s.back == literal:
		c.bit(&m.match[h.state][place], 0)
		m.encodeLiteral(c, h, src, at)
	case s.back < repeats:
		c.bit(&m.match[h.state][place], 1)
		c.bit(&m.repeat[h.state], 1)
		if s.back == 0 {
			c.bit(&m.repeat0[h.state], 0)
			long := uint32(1)
			if s.size == 1 {
				long = 0
			}
			c.bit(&m.long[h.state][place], long)
		} else {
			c.bit(&m.repeat0[h.state], 1)
			if s.back == 1 {
				c.bit(&m.repeat1[h.state], 0)
			} else {
				c.bit(&m.repeat1[h.state], 1)
				c.bit(&m.repeat2[h.state], s.back-2)
			}
		}
		if s.size > 1 {
			m.repeatSize.encode(c, s.size, place)
		}
	default:
		c.bit(&m.match[h.state][place], 1)
		c.bit(&m.repeat[h.state], 0)
		m.matchSize.encode(c, s.size, place)
		d := s.back - repeats
		slot := slotOf(d)
		c.tree(m.slot[min(s.size-minMatch, sizeClass-1)][:], slot, 6)
		if slot >= 4 {
			n := int(slot>>1 - 1)
			rest := d - (2|slot&1)<<n
			if slot < 14 {
				c.reverse(m.special[slot-4][:], rest, n)
			} else {
				c.direct(rest>>alignBits, n-alignBits)
				c.reverse(m.align[:], rest, alignBits)
			}
		}
	}
	h.take(s.back, s.size)
	m.stale++
}

func (m *model) literalsAt(src []byte, at int) *[0x300]uint16 {
	if at == 0 {
		return &m.literals[0]
	}
	return &m.literals[src[at-1]>>(8-literalBits)]
}

func (m *model) encodeLiteral(c *coder, h *history, src []byte, at int) {
	p, v := m.literalsAt(src, at), uint32(src[at])
	if h.state < 7 {
		c.tree(p[:], v, 8)
		return
	}
	// The byte that the last match would have gone on with is a hint, until it is wrong.
	hint, same, s := uint32(src[at-int(h.last[0])-1]), uint32(0x100), uint32(1)
	for i := 7; i >= 0; i-- {
		hint <<= 1
		bit := v >> i & 1
		c.bit(&p[same+hint&same+s], bit)
		s = s<<1 | bit
		if hint>>8&1 != bit {
			same = 0
		}
	}
}

// literalCost is what the literal at a place costs, without saying that it is one.
func (m *model) literalCost(h *history, src []byte, at int) uint32 {
	p, v := m.literalsAt(src, at), uint32(src[at])
	sum := uint32(0)
	if h.state < 7 {
		for s := v | 0x100; s > 1; s >>= 1 {
			sum += m.bit(p[s>>1&0xff], s&1)
		}
		return sum
	}
	hint, same, s := uint32(src[at-int(h.last[0])-1]), uint32(0x100), uint32(1)
	for i := 7; i >= 0; i-- {
		hint <<= 1
		bit := v >> i & 1
		sum += m.bit(p[(same+hint&same+s)%0x300], bit)
		s = s<<1 | bit
		same &= ^(hint ^ bit<<8)
	}
	return sum
}

// repeatCost is what it costs to say which of the last distances a match is at, without its size.
func (m *model) repeatCost(state uint32, back, place int) uint32 {
	if back == 0 {
		return m.zero(m.repeat0[state]) + m.one(m.long[state][place])
	}
	sum := m.one(m.repeat0[state])
	if back == 1 {
		return sum + m.zero(m.repeat1[state])
	}
	return sum + m.one(m.repeat1[state]) + m.bit(m.repeat2[state], uint32(back-2))
}

func (m *model) distanceCost(d uint32, size int) uint32 {
	c := min(size-minMatch, sizeClass-1)
	if d < near {
		return m.nearCost[c][d]
	}
	return m.slotCost[c][slotOf(d)] + m.alignCost[d%(1<<alignBits)]
}
