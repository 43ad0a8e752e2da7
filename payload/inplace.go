package payload

import "fmt"

// maxInPlace bounds the images of in-place deltas (major 1), and with that the memory for following their blocks.
const maxInPlace = 8 << 30

// A block of the target, while the operations of an in-place delta are gone through: the block of the old image that it holds, or one of these.
const (
	holdsNothing = -1 - iota
	holdsData
	holdsZeros
)

// resolve turns an in-place delta into one that reads the old image and writes the new one, as the deltas of major 2 do.
//
// Operations of major 1 work on one partition, which holds the old image when they begin: each reads blocks that no operation before it has
// overwritten, or that one before it has put aside. Here, each read is followed back to the block of the old image that it stands for, a write that
// is overwritten later is left out, and blocks that nobody writes are copied at the end. So the operations may be carried out in any order, again
// and again, and the old image is never touched.
func resolve(q *Partition, part int) error {
	if q.Size > maxInPlace || q.OldSize > maxInPlace {
		return fmt.Errorf("%w: an in-place delta of more than %d GiB", ErrUnsupported, maxInPlace>>30)
	}
	blocks, oldBlocks := blocksOf(q.Size), blocksOf(q.OldSize)
	limit := (max(blocks, oldBlocks) + 255) / 256 * 256
	holds, writer := make([]int32, limit), make([]int32, limit)
	for b := range holds {
		holds[b], writer[b] = int32(b), -1
		if int64(b) >= oldBlocks {
			holds[b] = holdsNothing
		}
	}
	// What all operations together read and write is bounded, since each of them takes that long here.
	budget := 4 * limit
	for i := range q.ops {
		op := &q.ops[i]
		var content []int32
		for _, e := range op.src {
			if budget -= e.n / blockSize; budget < 0 {
				return malformed("partition %q: its operations read and write more than four times the image", q.Name)
			}
			for b := e.off / blockSize; b < (e.off+e.n)/blockSize; b++ {
				c := int32(holdsZeros)
				if !e.hole {
					c = holds[b]
				}
				if c == holdsData || c == holdsNothing {
					return fmt.Errorf("%w: partition %q, operation %d (%s): it reads block %d, which an operation before it made", ErrUnsupported, q.Name, i, op.kind, b)
				}
				content = append(content, c)
			}
		}
		if op.kind == Move || op.kind == BSDiff {
			op.src = runs(content)
		}
		at := 0
		for _, e := range op.dst {
			if budget -= e.n / blockSize; budget < 0 {
				return malformed("partition %q: its operations read and write more than four times the image", q.Name)
			}
			for b := e.off / blockSize; b < (e.off+e.n)/blockSize; b, at = b+1, at+1 {
				if e.hole {
					continue
				}
				holds[b], writer[b] = holdsData, int32(i)
				if op.kind == Move {
					holds[b] = content[at]
				}
			}
		}
	}
	for i := range q.ops {
		op := &q.ops[i]
		var places []int32
		for _, e := range op.dst {
			for b := e.off / blockSize; b < (e.off+e.n)/blockSize; b++ {
				if e.hole || writer[b] != int32(i) || b >= blocks {
					places = append(places, holdsZeros)
				} else {
					places = append(places, int32(b))
				}
			}
		}
		op.dst = runs(places)
	}
	var rest []int32
	for b := range int32(blocks) {
		if writer[b] >= 0 {
			continue
		}
		if holds[b] != b {
			return malformed("partition %q: block %d is not written", q.Name, b)
		}
		rest = append(rest, b)
	}
	if len(rest) > 0 {
		op := operation{kind: Move, part: part, src: runs(rest), dst: runs(rest), in: int64(len(rest)) * blockSize}
		op.out, op.use, op.gives = op.in, op.in, op.in
		q.ops = append(q.ops, op)
	}
	return nil
}

// runs joins blocks that follow each other to extents. Negative ones are holes.
func runs(blocks []int32) []extent {
	var out []extent
	for _, b := range blocks {
		if n := len(out); n > 0 {
			last := &out[n-1]
			if b < 0 && last.hole || b >= 0 && !last.hole && last.off+last.n == int64(b)*blockSize {
				last.n += blockSize
				continue
			}
		}
		e := extent{n: blockSize, hole: b < 0}
		if b >= 0 {
			e.off = int64(b) * blockSize
		}
		out = append(out, e)
	}
	return out
}
