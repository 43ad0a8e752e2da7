package build

import (
	"cmp"
	"context"
	"slices"
)

// similarity finds blocks of the old image that share some bytes with new data, at whatever distance from a block's border. Both are cut into anchors:
// places where a hash of the 64 bytes before happens to be small. Equal bytes make equal anchors, wherever they are.
type similarity struct {
	anchors []anchor // sorted by hash, then by block
	mask    uint64
}

type anchor struct {
	hash  uint32
	block int32
}

// maxAnchors bounds the memory of a similarity: 8 bytes for each.
const maxAnchors = 4 << 20

// newSimilarity indexes those old blocks that are not in the new image: what became of them is what a patch is made from.
func newSimilarity(ctx context.Context, p *plan) (*similarity, error) {
	kept := make([]bool, len(p.oldZero))
	for _, from := range p.origin {
		if from >= 0 {
			kept[from] = true
		}
	}
	var blocks []int
	for b, z := range p.oldZero {
		if !z && !kept[b] {
			blocks = append(blocks, b)
		}
	}
	s := &similarity{mask: 63}
	for int64(len(blocks))*blockSize/int64(s.mask+1) > maxAnchors {
		s.mask = s.mask<<1 | 1
	}
	for _, r := range runs(blocks) {
		var h uint64
		for at := 0; at < r.n; at += 256 {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			data, err := readRuns(p.old, []run{{start: r.start + at, n: min(256, r.n-at)}})
			if err != nil {
				return nil, err
			}
			h = s.cut(data, h, func(off int, h uint32) {
				s.anchors = append(s.anchors, anchor{h, int32(r.start + at + off/blockSize)})
			})
		}
	}
	slices.SortFunc(s.anchors, func(a, b anchor) int { return cmp.Or(cmp.Compare(a.hash, b.hash), cmp.Compare(a.block, b.block)) })
	return s, nil
}

// cut calls at for every anchor in data. h is the hash before it.
func (s *similarity) cut(data []byte, h uint64, at func(off int, h uint32)) uint64 {
	for i, c := range data {
		// Each step shifts what an older byte contributed up; after 64 of them it is gone.
		h = h<<1 + spread(c)
		if h>>40&s.mask == 0 {
			at(i, uint32(h>>8))
		}
	}
	return h
}

// spread makes 64 well mixed bits of a byte.
func spread(c byte) uint64 {
	x := (uint64(c) + 1) * 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// find returns old blocks that share anchors with data, those that share the most first.
func (s *similarity) find(data []byte) []int {
	const common = 16 // an anchor in more blocks than that says little
	votes := map[int]int{}
	s.cut(data, 0, func(_ int, h uint32) {
		at, _ := slices.BinarySearchFunc(s.anchors, h, func(a anchor, h uint32) int { return cmp.Compare(a.hash, h) })
		end := at
		for end < len(s.anchors) && s.anchors[end].hash == h {
			if end++; end-at > common {
				return
			}
		}
		for _, a := range s.anchors[at:end] {
			votes[int(a.block)]++
		}
	})
	list := make([]int, 0, len(votes))
	for b := range votes {
		list = append(list, b)
	}
	slices.SortFunc(list, func(a, b int) int { return cmp.Or(cmp.Compare(votes[b], votes[a]), cmp.Compare(a, b)) })
	return list
}
