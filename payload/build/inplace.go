package build

import (
	"container/heap"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload/metadata"
)

// inPlace orders the operations of a delta of major 1, whose readers copy the old image to the other slot and change it there: what reads a block
// must come before what writes it. Where operations wait for each other in a circle, the blocks that the cheapest of them waits to read are first
// moved out of the way, to blocks that will be zeros in the end; where there are none left, it is given its whole data instead.
func (b *builder) inPlace(d *deltaMaker, ops []made) ([]made, error) {
	writer := map[uint64]int{} // of each block
	for i, m := range ops {
		eachExtent(m.op.DstExtents, func(block uint64) { writer[block] = i })
	}
	waits := make([]int, len(ops)) // for how many reads, by other operations, of blocks that it writes
	reads := func(i int, do func(writer int)) {
		eachExtent(ops[i].op.SrcExtents, func(block uint64) {
			if w, ok := writer[block]; ok && w != i {
				do(w)
			}
		})
	}
	for i := range ops {
		reads(i, func(w int) { waits[w]++ })
	}
	ready := &smallest{}
	for i, n := range waits {
		if n == 0 {
			heap.Push(ready, i)
		}
	}
	release := func(i int) {
		reads(i, func(w int) {
			if waits[w]--; waits[w] == 0 {
				heap.Push(ready, w)
			}
		})
	}
	// Blocks that nobody reads, and that are written last.
	read := make([]bool, max(len(d.origin), len(d.oldZero)))
	for _, m := range ops {
		eachExtent(m.op.SrcExtents, func(block uint64) { read[block] = true })
	}
	var spare []int
	for i, from := range d.origin {
		if from == zero && !read[i] {
			spare = append(spare, i)
		}
	}
	var order []made
	done := make([]bool, len(ops))
	e, err := newEncoder(b.spec.Compression)
	if err != nil {
		return nil, err
	}
	for left := len(ops); left > 0; {
		if err := b.ctx.Err(); err != nil {
			return nil, err
		}
		if ready.Len() == 0 {
			victim, least := -1, 0
			for i, m := range ops {
				n := 0
				reads(i, func(int) { n++ })
				if !done[i] && len(m.op.SrcExtents) > 0 && n > 0 && (victim < 0 || n < least) {
					victim, least = i, n
				}
			}
			if victim < 0 {
				return nil, fmt.Errorf("ordering the operations: %d of %d wait for nothing", left, len(ops))
			}
			if least <= len(spare) {
				moves := d.moveAway(ops[victim].op, func(block uint64) bool {
					w, ok := writer[block]
					return ok && w != victim
				}, spare[:least])
				spare = spare[least:]
				order = append(order, moves.before)
				for _, w := range moves.freed(writer) {
					if waits[w]--; waits[w] == 0 {
						heap.Push(ready, w)
					}
				}
				continue
			}
			release(victim)
			var dst []run
			for _, x := range ops[victim].op.DstExtents {
				dst = append(dst, run{start: int(x.GetStartBlock()), n: int(x.GetNumBlocks())})
			}
			data, err := readRuns(d.new, dst)
			if err != nil {
				return nil, err
			}
			c := e.encode(data)
			if c.err != nil {
				return nil, c.err
			}
			m := made{op: &metadata.InstallOperation{Type: proto.Int32(int32(c.kind)), DstExtents: extents(dst)}, data: c.data}
			if err := b.spill(&m); err != nil {
				return nil, err
			}
			ops[victim] = m
			continue
		}
		i := heap.Pop(ready).(int)
		done[i] = true
		left--
		order = append(order, ops[i])
		release(i)
	}
	return order, nil
}

// away is what moves the source of an operation out of the way.
type away struct {
	before made  // the move itself
	from   []int // blocks that the operation does not read any more
}

func (a away) freed(writer map[uint64]int) []int {
	var list []int
	for _, b := range a.from {
		list = append(list, writer[uint64(b)])
	}
	return list
}

// moveAway makes an operation read some of its blocks from others, and a move that brings them there. The blocks are not zeros any more.
func (d *deltaMaker) moveAway(op *metadata.InstallOperation, must func(block uint64) bool, to []int) away {
	var a away
	var src []int
	used := to
	eachExtent(op.SrcExtents, func(block uint64) {
		if !must(block) {
			src = append(src, int(block))
			return
		}
		a.from = append(a.from, int(block))
		src = append(src, to[0])
		if to[0] < len(d.oldZero) {
			d.oldZero[to[0]] = false
		}
		to = to[1:]
	})
	op.SrcExtents = extents(runs(src))
	n := proto.Uint64(uint64(len(a.from)) * blockSize)
	a.before.op = &metadata.InstallOperation{Type: proto.Int32(int32(kindMove)), SrcExtents: extents(runs(a.from)), DstExtents: extents(runs(used)), SrcLength: n, DstLength: n}
	return a
}

func eachExtent(list []*metadata.Extent, do func(block uint64)) {
	for _, e := range list {
		for i := range e.GetNumBlocks() {
			do(e.GetStartBlock() + i)
		}
	}
}

// smallest is a heap of indexes.
type smallest []int

func (s smallest) Len() int           { return len(s) }
func (s smallest) Less(i, j int) bool { return s[i] < s[j] }
func (s smallest) Swap(i, j int)      { s[i], s[j] = s[j], s[i] }
func (s *smallest) Push(x any)        { *s = append(*s, x.(int)) }
func (s *smallest) Pop() any {
	old := *s
	x := old[len(old)-1]
	*s = old[:len(old)-1]
	return x
}
