package toxz

import (
	"encoding/binary"
	"math/bits"
)

// match is a place before that begins with the same bytes.
type match struct {
	size int
	back uint32 // its distance, less one
}

// How long and how far matches are looked for. They are those of xz -6.
const (
	nice  = 64 // a match as long as this is taken without looking for more
	depth = 48 // places that are compared with
)

const none = -1

// finder finds matches. All places seen so far with the same four bytes form a binary tree, ordered by what follows, with the newest at its root;
// shorter matches are found through the last place with the same two or three bytes.
type finder struct {
	src     []byte
	sons    []int32 // for each place: the tree of what is greater, and of what is smaller
	two     [1 << 10]int32
	three   [1 << 16]int32
	four    []int32
	shift   uint
	at      int // place that is entered next
	matches []match
}

func (f *finder) reset(src []byte) {
	f.src, f.at = src, 0
	if len(f.sons) < 2*len(src) {
		f.sons = make([]int32, 2*len(src))
	}
	n := min(max(bits.Len(uint(len(src))), 12), 20)
	f.shift = uint(32 - n)
	if len(f.four) < 1<<n {
		f.four = make([]int32, 1<<n)
	}
	for _, t := range [][]int32{f.two[:], f.three[:], f.four} {
		for i := range t {
			t[i] = none
		}
	}
}

// same counts how many bytes are equal from a and b on, up to limit. a is before b.
func same(src []byte, a, b, limit int) int {
	n := 0
	for n+8 <= limit && b+n+8 <= len(src) {
		if x := binary.LittleEndian.Uint64(src[a+n:]) ^ binary.LittleEndian.Uint64(src[b+n:]); x != 0 {
			return n + bits.TrailingZeros64(x)>>3
		}
		n += 8
	}
	for n < limit && src[a+n] == src[b+n] {
		n++
	}
	return n
}

// find returns the matches at a place, each longer than the one before. Places must be entered in order; the last one may be asked for again.
func (f *finder) find(at int) []match {
	if at < f.at {
		return f.matches
	}
	f.at, f.matches = at+1, f.matches[:0]
	f.enter(at, true)
	return f.matches
}

// skip enters the next n places.
func (f *finder) skip(n int) {
	for range n {
		f.enter(f.at, false)
		f.at++
	}
}

// enter puts a place into the tables, and notes what matches it.
func (f *finder) enter(at int, note bool) {
	limit := min(len(f.src)-at, nice)
	if limit < 4 {
		return
	}
	v := binary.LittleEndian.Uint32(f.src[at:])
	two, three := &f.two[(v<<16*0x9e3779b1)>>22], &f.three[(v<<8*0x9e3779b1)>>16]
	four := &f.four[(v*0x9e3779b1)>>f.shift]
	root := *four
	longest := 1
	if note {
		for _, p := range [2]int32{*two, *three} {
			if p == none {
				continue
			}
			if n := same(f.src, int(p), at, limit); n > longest {
				longest = n
				f.matches = append(f.matches, match{n, uint32(at - int(p) - 1)})
			}
		}
	}
	*two, *three, *four = int32(at), int32(at), int32(at)
	note = note && longest < limit
	longest = max(longest, 3)

	// The tree of at is made of the old one, which falls into what is smaller and what is greater than at.
	sons := f.sons
	greater, smaller := &sons[2*at], &sons[2*at+1]
	inGreater, inSmaller := 0, 0 // bytes that all of it has in common with at
	for left := depth; root != none && left > 0; left-- {
		p := int(root)
		n := min(inGreater, inSmaller)
		n += same(f.src, p+n, at+n, limit-n)
		if n > longest && note {
			longest = n
			f.matches = append(f.matches, match{n, uint32(at - p - 1)})
		}
		if n == limit { // at takes its place
			*greater, *smaller = sons[2*p], sons[2*p+1]
			return
		}
		if f.src[p+n] > f.src[at+n] {
			*greater = root
			greater = &sons[2*p+1]
			root, inGreater = *greater, n
		} else {
			*smaller = root
			smaller = &sons[2*p]
			root, inSmaller = *smaller, n
		}
	}
	*greater, *smaller = none, none
}
