package build

import (
	"cmp"
	"container/heap"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload/metadata"
)

// inPlace orders the operations of a delta of major 1, whose readers copy the old image to the other slot and change it there: what reads a block
// must come before what writes it. Operations that wait for each other in a circle become one, which reads before it writes, where that is not too large.
// In other circles one has to do without the blocks for which it holds up another; the fewest blocks are chosen. They are first moved out of the
// way, to blocks that will be zeros in the end; where there are none left, the operation is made again from what is still there when its turn comes.
func (b *builder) inPlace(d *deltaMaker, ops []made) ([]made, error) {
	e, err := newEncoder(b.spec.Compression)
	if err != nil {
		return nil, err
	}
	_, next := d.graph(ops)
	sizes := make([]size, len(ops))
	for i, m := range ops {
		sizes[i] = size{writes: blocksIn(m.op.DstExtents), reads: blocksIn(m.op.SrcExtents), patch: m.n > 0}
	}
	if ops, err = b.join(d, e, ops, breakCircles(next, sizes)); err != nil {
		return nil, err
	}
	writer, next := d.graph(ops)
	breakCircles(next, nil)
	order := inOrder(next)
	turn := make([]int, len(ops))
	for at, i := range order {
		turn[i] = at
	}
	late := func(i, block int) bool { // block is overwritten before operation i reads it
		w := writer[block]
		return w >= 0 && turn[w] < turn[i]
	}
	moved, moves := d.moveAway(ops, late)
	taken := map[int]bool{}
	for _, to := range moved {
		taken[to] = true
	}
	for i := range ops {
		if err := b.ctx.Err(); err != nil {
			return nil, err
		}
		there := func(block int) bool {
			_, away := moved[block]
			return away || !taken[block] && !late(i, block)
		}
		again := false
		eachExtent(ops[i].op.SrcExtents, func(block int) { again = again || !there(block) })
		if again {
			if ops[i], err = d.encodeAgain(e, ops[i], there); err != nil {
				return nil, err
			}
			if err := b.spill(&ops[i]); err != nil {
				return nil, err
			}
		}
		var src []int
		eachExtent(ops[i].op.SrcExtents, func(block int) {
			if to, ok := moved[block]; ok && late(i, block) {
				block = to
			}
			src = append(src, block)
		})
		ops[i].op.SrcExtents = extents(runs(src))
	}
	for _, i := range order {
		moves = append(moves, ops[i])
	}
	return moves, nil
}

// edge leads from an operation to one that has to come after it, since it writes so many of the blocks that the first one reads.
type edge struct {
	to, blocks int
	cut        bool
}

// graph says which operation writes each block, -1 for none, and which have to come after which.
func (d *deltaMaker) graph(ops []made) (writer []int, next [][]edge) {
	writer = make([]int, max(len(d.origin), len(d.oldZero)))
	for i := range writer {
		writer[i] = -1
	}
	for i, m := range ops {
		eachExtent(m.op.DstExtents, func(block int) { writer[block] = i })
	}
	next = make([][]edge, len(ops))
	for i, m := range ops {
		var all []edge
		eachExtent(m.op.SrcExtents, func(block int) {
			if w := writer[block]; w >= 0 && w != i {
				all = append(all, edge{to: w, blocks: 1})
			}
		})
		next[i] = sum(all)
	}
	return writer, next
}

// sum makes one edge of those that lead to the same operation.
func sum(all []edge) []edge {
	slices.SortFunc(all, func(a, b edge) int { return cmp.Compare(a.to, b.to) })
	out := all[:0]
	for _, e := range all {
		if k := len(out) - 1; k >= 0 && out[k].to == e.to {
			out[k].blocks += e.blocks
		} else {
			out = append(out, e)
		}
	}
	return out
}

// size is what an operation writes and reads, in blocks.
type size struct {
	writes, reads int
	patch         bool // and not a move
}

func (s size) and(t size) size {
	return size{writes: s.writes + t.writes, reads: s.reads + t.reads, patch: s.patch || t.patch}
}

// fits says whether one operation may have it.
func (s size) fits() bool {
	return s.reads <= maxWindow && (!s.patch || s.writes <= maxUnit) // a move writes what it reads
}

// breakCircles goes through the edges until there are no circles. Whenever it comes to one, it joins the operations in it if together they
// are not too large, and otherwise cuts the edge in it that stands for the fewest blocks. Without sizes it joins none. It returns, for each operation, the
// first of those that it is joined with.
func breakCircles(next [][]edge, sizes []size) []int {
	const (
		unseen = iota
		onPath
		done
	)
	state, at, place := make([]byte, len(next)), make([]int, len(next)), make([]int, len(next))
	group := make([]int, len(next))
	for i := range group {
		group[i] = i
	}
	in := func(i int) int {
		for group[i] != i {
			group[i] = group[group[i]]
			i = group[i]
		}
		return i
	}
	var path []int
	push := func(i int) {
		state[i], place[i] = onPath, len(path)
		path = append(path, i)
	}
	for start := range next {
		if state[in(start)] == unseen {
			push(in(start))
		}
		for len(path) > 0 {
			i := path[len(path)-1]
			if at[i] == len(next[i]) {
				state[i] = done
				path = path[:len(path)-1]
				continue
			}
			e := &next[i][at[i]]
			to := in(e.to)
			if e.cut || to == i || state[to] == done {
				at[i]++
				continue
			}
			if state[to] == unseen {
				push(to)
				continue
			}
			circle := path[place[to]:]
			if sizes != nil {
				var all size
				for _, n := range circle {
					all = all.and(sizes[n])
				}
				if all.fits() {
					var edges []edge
					for _, n := range circle {
						group[n] = to
						edges = append(edges, next[n]...)
					}
					for k := range edges {
						edges[k].to = in(edges[k].to)
					}
					edges = slices.DeleteFunc(edges, func(e edge) bool { return e.cut || e.to == to })
					next[to], at[to], sizes[to] = sum(edges), 0, all
					path = path[:place[to]+1]
					continue
				}
			}
			least := len(circle) - 1
			for k := len(circle) - 2; k >= 0; k-- {
				if next[circle[k]][at[circle[k]]].blocks < next[circle[least]][at[circle[least]]].blocks {
					least = k
				}
			}
			next[circle[least]][at[circle[least]]].cut = true
			for _, n := range circle[least+1:] { // what they lead to is seen again where something else leads to them
				state[n] = unseen
			}
			path = path[:place[to]+least+1]
		}
	}
	for i := range group {
		group[i] = in(i)
	}
	return group
}

// join makes one operation of each group.
func (b *builder) join(d *deltaMaker, e *encoder, ops []made, group []int) ([]made, error) {
	members := map[int][]made{}
	for i, g := range group {
		members[g] = append(members[g], ops[i])
	}
	var out []made
	for i, g := range group {
		if g != i {
			continue
		}
		list := members[g]
		if len(list) == 1 {
			out = append(out, list[0])
			continue
		}
		if err := b.ctx.Err(); err != nil {
			return nil, err
		}
		var src, dst []int
		patches := false
		for _, m := range list {
			patches = patches || m.n > 0
			eachExtent(m.op.SrcExtents, func(block int) { src = append(src, block) })
			eachExtent(m.op.DstExtents, func(block int) { dst = append(dst, block) })
		}
		if !patches {
			out = append(out, move(src, dst))
			continue
		}
		slices.Sort(src)
		m, err := d.encodeFrom(e, unit{blocks: dst}, slices.Compact(src))
		if err == nil {
			err = b.spill(&m)
		}
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, nil
}

// move makes an operation that copies blocks.
func move(src, dst []int) made {
	n := proto.Uint64(uint64(len(src)) * blockSize)
	return made{op: &metadata.InstallOperation{Type: proto.Int32(int32(kindMove)), SrcExtents: extents(runs(src)), DstExtents: extents(runs(dst)), SrcLength: n, DstLength: n}}
}

// inOrder puts operations into an order in which each edge leads to a later one, and otherwise as they are.
func inOrder(next [][]edge) []int {
	waits := make([]int, len(next))
	each := func(i int, do func(to int)) {
		for _, e := range next[i] {
			if !e.cut {
				do(e.to)
			}
		}
	}
	for i := range next {
		each(i, func(to int) { waits[to]++ })
	}
	ready := &smallest{}
	for i, n := range waits {
		if n == 0 {
			heap.Push(ready, i)
		}
	}
	var order []int
	for ready.Len() > 0 {
		i := heap.Pop(ready).(int)
		order = append(order, i)
		each(i, func(to int) {
			if waits[to]--; waits[to] == 0 {
				heap.Push(ready, to)
			}
		})
	}
	return order
}

// moveAway makes moves of blocks that are overwritten too early, as long as there are blocks for it that nobody reads, and that are written last. Those
// are not zeros any more.
func (d *deltaMaker) moveAway(ops []made, late func(i, block int) bool) (moved map[int]int, moves []made) {
	read := make([]bool, max(len(d.origin), len(d.oldZero)))
	for _, m := range ops {
		eachExtent(m.op.SrcExtents, func(block int) { read[block] = true })
	}
	var spare []int
	for i, from := range d.origin {
		if from == zero && !read[i] {
			spare = append(spare, i)
		}
	}
	moved = map[int]int{}
	var from []int
	for i, m := range ops {
		eachExtent(m.op.SrcExtents, func(block int) {
			if _, ok := moved[block]; !ok && late(i, block) && len(from) < len(spare) {
				to := spare[len(from)]
				moved[block] = to
				from = append(from, block)
				if to < len(d.oldZero) {
					d.oldZero[to] = false
				}
			}
		})
	}
	for part := range slices.Chunk(from, maxUnit) {
		moves = append(moves, move(part, spare[:len(part)]))
		spare = spare[len(part):]
	}
	return moved, moves
}

// encodeAgain makes an operation from those old blocks that are still there: a copy from what is left of them, a patch from whatever is like it.
func (d *deltaMaker) encodeAgain(e *encoder, m made, there func(block int) bool) (made, error) {
	u := m.unit
	if len(u.blocks) == 0 {
		eachExtent(m.op.DstExtents, func(block int) { u.blocks = append(u.blocks, block) })
	}
	var window []int
	if m.n > 0 {
		data, err := readRuns(d.new, runs(u.blocks))
		if err != nil {
			return made{}, err
		}
		window = d.window(u, data, there)
	} else {
		eachExtent(m.op.SrcExtents, func(block int) {
			if there(block) {
				window = append(window, block)
			}
		})
	}
	return d.encodeFrom(e, u, window)
}

// encodeFrom makes the smaller of a patch of some old blocks, and the whole data.
func (d *deltaMaker) encodeFrom(e *encoder, u unit, window []int) (made, error) {
	dst := runs(u.blocks)
	data, err := readRuns(d.new, dst)
	if err != nil {
		return made{}, err
	}
	patched, ok, err := d.patchFrom(u, data, window)
	if err != nil {
		return made{}, err
	}
	c := e.encode(data)
	if c.err != nil {
		return made{}, c.err
	}
	whole := made{op: &metadata.InstallOperation{Type: proto.Int32(int32(c.kind)), DstExtents: extents(dst)}, data: c.data}
	if ok && patched.size() < whole.size() {
		return patched, nil
	}
	return whole, nil
}

func blocksIn(list []*metadata.Extent) (n int) {
	for _, e := range list {
		n += int(e.GetNumBlocks())
	}
	return n
}

func eachExtent(list []*metadata.Extent, do func(block int)) {
	for _, e := range list {
		for i := range e.GetNumBlocks() {
			do(int(e.GetStartBlock() + i))
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
