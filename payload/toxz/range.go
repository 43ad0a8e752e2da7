package toxz

import "math/bits"

// Probabilities are of 11 bits: that the next bit is 0. One moves by a 32nd of what is missing.
const (
	probBits = 11
	probInit = 1 << (probBits - 1)
	probMove = 5
)

// coder is the range coder. Its zero value has to be reset.
type coder struct {
	low     uint64
	rng     uint32
	cache   byte // the byte that a carry may still change; pending-1 bytes of 0xff follow it
	pending int
	out     []byte
}

func (c *coder) reset() {
	c.low, c.rng, c.cache, c.pending, c.out = 0, 1<<32-1, 0, 1, c.out[:0]
}

// size is how many bytes finish will give, at the most.
func (c *coder) size() int { return len(c.out) + c.pending + 4 }

func (c *coder) shift() {
	if c.low < 0xff<<24 || c.low > 1<<32-1 {
		carry := byte(c.low >> 32)
		for b := c.cache; c.pending > 0; b, c.pending = 0xff, c.pending-1 {
			c.out = append(c.out, b+carry)
		}
		c.cache = byte(c.low >> 24)
	}
	c.pending++
	c.low = c.low & (1<<24 - 1) << 8
}

func (c *coder) finish() {
	for range 5 {
		c.shift()
	}
}

func (c *coder) bit(p *uint16, bit uint32) {
	bound := c.rng >> probBits * uint32(*p)
	if bit == 0 {
		c.rng = bound
		*p += (1<<probBits - *p) >> probMove
	} else {
		c.low += uint64(bound)
		c.rng -= bound
		*p -= *p >> probMove
	}
	if c.rng < 1<<24 {
		c.rng <<= 8
		c.shift()
	}
}

// direct writes the lowest n bits of v as they are.
func (c *coder) direct(v uint32, n int) {
	for n--; n >= 0; n-- {
		c.rng >>= 1
		c.low += uint64(c.rng & -(v >> n & 1))
		if c.rng < 1<<24 {
			c.rng <<= 8
			c.shift()
		}
	}
}

// tree writes the lowest n bits of v, the highest first, each with the probability that those before it choose.
func (c *coder) tree(p []uint16, v uint32, n int) {
	at := uint32(1)
	for n--; n >= 0; n-- {
		bit := v >> n & 1
		c.bit(&p[at], bit)
		at = at<<1 | bit
	}
}

// reverse is tree with the lowest bit first.
func (c *coder) reverse(p []uint16, v uint32, n int) {
	at := uint32(1)
	for range n {
		bit := v & 1
		v >>= 1
		c.bit(&p[at], bit)
		at = at<<1 | bit
	}
}

// Costs are in sixteenths of a bit.
const (
	costBits  = 4
	costShift = 4 // probabilities are looked up by their highest bits
)

// costs is the table of what a bit costs, by its probability.
type costs [1 << (probBits - costShift)]uint32

// fill computes the logarithms in integers, one binary place after the other, so that they are the same on every machine.
func (t *costs) fill() {
	for i := range t {
		w := uint32(i)<<costShift + 1<<(costShift-1)
		log := uint32(0)
		for range costBits {
			w *= w
			log <<= 1
			if n := bits.Len32(w); n > 16 {
				w >>= n - 16
				log += uint32(n - 16)
			}
		}
		t[i] = probBits<<costBits - 15 - log
	}
}

func (t *costs) zero(p uint16) uint32 { return t[p>>costShift&(1<<(probBits-costShift)-1)] }
func (t *costs) one(p uint16) uint32 {
	return t[(p^(1<<probBits-1))>>costShift&(1<<(probBits-costShift)-1)]
}

func (t *costs) bit(p uint16, bit uint32) uint32 {
	return t[(p^uint16(-bit)&(1<<probBits-1))>>costShift&(1<<(probBits-costShift)-1)]
}

func (t *costs) tree(p []uint16, v uint32, n int) uint32 {
	sum, at := uint32(0), uint32(1)
	for n--; n >= 0; n-- {
		bit := v >> n & 1
		sum += t.bit(p[at], bit)
		at = at<<1 | bit
	}
	return sum
}

func (t *costs) reverse(p []uint16, v uint32, n int) uint32 {
	sum, at := uint32(0), uint32(1)
	for range n {
		bit := v & 1
		v >>= 1
		sum += t.bit(p[at], bit)
		at = at<<1 | bit
	}
	return sum
}
