package payload

import (
	"cmp"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload/metadata"
)

// Kind is the type of an operation, as its number in the manifest.
type Kind int32

// The operations that are read. Zstd is this project's own: numbers 11 to 14 mean different things to different vendors, so it has one far away
// from all of theirs, which every other reader refuses as unknown.
const (
	Replace      Kind = 0
	ReplaceBZ    Kind = 1
	Move         Kind = 2 // major 1
	BSDiff       Kind = 3 // major 1
	SourceCopy   Kind = 4
	SourceBSDiff Kind = 5
	Zero         Kind = 6
	Discard      Kind = 7
	ReplaceXZ    Kind = 8
	BrotliBSDiff Kind = 10
	Zstd         Kind = 12122
)

var kindNames = map[Kind]string{
	Replace: "REPLACE", ReplaceBZ: "REPLACE_BZ", Move: "MOVE", BSDiff: "BSDIFF", SourceCopy: "SOURCE_COPY", SourceBSDiff: "SOURCE_BSDIFF", Zero: "ZERO", Discard: "DISCARD",
	ReplaceXZ: "REPLACE_XZ", 9: "PUFFDIFF", BrotliBSDiff: "BROTLI_BSDIFF", 11: "ZUCCHINI or REPLACE_ZSTD of another vendor", 12: "LZ4DIFF_BSDIFF or REPLACE_ZSTD of another vendor", 13: "LZ4DIFF_PUFFDIFF", 14: "zstd of another vendor", Zstd: "ZSTD",
}

func (k Kind) String() string {
	if n, ok := kindNames[k]; ok {
		return n
	}
	return fmt.Sprintf("operation %d", int32(k))
}

// rule says what an operation of a kind has, and where it may be.
type rule struct {
	v1, v2        bool
	minor         int // lowest minor version of major 2
	data, sources bool
}

var rules = map[Kind]rule{
	Replace:      {v1: true, v2: true, data: true},
	ReplaceBZ:    {v1: true, v2: true, data: true},
	Move:         {v1: true, sources: true},
	BSDiff:       {v1: true, data: true, sources: true},
	SourceCopy:   {v2: true, minor: 2, sources: true},
	SourceBSDiff: {v2: true, minor: 2, data: true, sources: true},
	Zero:         {v2: true},
	Discard:      {v2: true},
	ReplaceXZ:    {v2: true, data: true},
	BrotliBSDiff: {v2: true, minor: 4, data: true, sources: true},
	Zstd:         {v2: true, data: true},
}

// extent is a run of bytes. In major 1 it may be a hole: its bytes read as zeros, and are not written.
type extent struct {
	off, n int64
	hole   bool
}

type operation struct {
	kind    Kind
	part    int
	n       int64 // bytes of data
	hash    [32]byte
	src     []extent
	in      int64 // bytes of them
	use     int64 // of which a patch sees so many
	srcHash *[32]byte
	dst     []extent
	out     int64 // bytes that it writes
	gives   int64 // of which a patch makes so many; the rest is zeros
}

// cost is the memory that carrying an operation out takes.
func (o *operation) cost() int64 {
	switch o.kind {
	case Zero, Discard, Move, SourceCopy:
		return 2 * copyBuffer
	}
	return o.n + o.in + o.out
}

// copyBuffer is how many bytes are copied or filled with zeros at a time.
const copyBuffer = 1 << 20

// hole is the block number of what is not there.
const hole = 1<<64 - 1

// operations checks all operations of one partition: nothing outside it, no block twice, and no block left out. blob is where the data
// of the next operation has to be, and moves on. ops are as on the wire.
func (p *Payload) operations(q *Partition, ops [][]byte, blob *int64) error {
	name, blocks, oldBlocks := q.Name, blocksOf(q.Size), blocksOf(q.OldSize)
	limit := blocks
	inPlace := p.Major == 1 && q.OldSize > 0
	switch {
	case p.Major == 2 && (q.Size%blockSize != 0 || q.OldSize%blockSize != 0):
		return malformed("partition %q has %d bytes and had %d, not a multiple of %d", name, q.Size, q.OldSize, blockSize)
	case inPlace:
		limit = (max(blocks, oldBlocks) + 255) / 256 * 256
	case p.Major == 1:
		limit = (blocks + 255) / 256 * 256 // the last extent always claims a whole MiB
	}
	if int64(len(ops)) > 2*limit {
		return malformed("partition %q has %d operations for %d blocks", name, len(ops), blocks)
	}
	q.ops = make([]operation, 0, len(ops))
	var o metadata.InstallOperation
	for i, data := range ops {
		if err := proto.Unmarshal(data, &o); err != nil {
			return malformed("the manifest cannot be read: partition %q, operation %d: %v", name, i, err)
		}
		op, err := p.operation(q, &o, *blob, limit, oldBlocks)
		if err != nil {
			return fmt.Errorf("partition %q, operation %d (%s): %w", name, i, Kind(o.GetType()), err)
		}
		*blob += op.n
		q.ops = append(q.ops, op)
	}
	if inPlace {
		return resolve(q, len(p.Partitions))
	}
	return covered(q, blocks)
}

func blocksOf(size int64) int64 { return (size + blockSize - 1) / blockSize }

// operation checks one operation by itself.
func (p *Payload) operation(q *Partition, o *metadata.InstallOperation, blob, limit, oldBlocks int64) (operation, error) {
	op := operation{kind: Kind(o.GetType()), part: len(p.Partitions)}
	if o.Type == nil {
		return op, malformed("it has no type")
	}
	r, ok := rules[op.kind]
	switch {
	case !ok:
		return op, fmt.Errorf("%w: such operations are not known here", ErrUnsupported)
	case p.Major == 1 && !r.v1 || p.Major == 2 && !r.v2:
		return op, fmt.Errorf("%w: not in major version %d", ErrUnsupported, p.Major)
	case r.minor > p.Minor && p.Major == 2:
		return op, malformed("not in minor version %d", p.Minor)
	case r.sources && q.OldSize == 0:
		return op, malformed("the partition has no old image")
	}
	if data := o.GetDataLength() > 0; data != r.data || !data && p.Major == 2 && o.DataOffset != nil {
		return op, malformed("%d bytes of data", o.GetDataLength())
	}
	if r.data {
		switch {
		case o.GetDataLength() > maxBlob:
			return op, malformed("%d bytes of data, at most %d", o.GetDataLength(), maxBlob)
		case o.GetDataOffset() != uint64(blob):
			return op, malformed("its data is at %d, want %d: blobs follow each other", o.GetDataOffset(), blob)
		case len(o.DataSha256Hash) != 32:
			return op, malformed("a data hash of %d bytes, want 32", len(o.DataSha256Hash))
		}
		op.n, op.hash = int64(o.GetDataLength()), [32]byte(o.DataSha256Hash)
		if blob+op.n > p.Size {
			return op, malformed("its data ends at %d, beyond the file", blob+op.n)
		}
	}
	var err error
	if op.dst, op.out, err = p.extents(o.DstExtents, limit); err != nil {
		return op, malformed("it writes %v", err)
	}
	if len(op.dst) == 0 {
		return op, malformed("it writes nowhere")
	}
	if len(o.SrcExtents) > 0 != r.sources {
		return op, malformed("%d source extents", len(o.SrcExtents))
	}
	if op.src, op.in, err = p.extents(o.SrcExtents, oldBlocks); err != nil && p.Major == 1 {
		op.src, op.in, err = p.extents(o.SrcExtents, limit) // blocks beyond the old image that an earlier operation filled
	}
	if err != nil {
		return op, malformed("it reads %v", err)
	}
	if r.data && (op.out > maxOutput || op.in > maxOutput) {
		return op, malformed("it writes %d bytes from %d, at most %d", op.out, op.in, maxOutput)
	}
	if r.data && p.Major == 1 && !p.vouched && op.n+op.in+op.out > maxCostUnsigned {
		return op, malformed("it takes %d MiB of memory, at most %d where nobody has signed the manifest", (op.n+op.in+op.out)>>20, maxCostUnsigned>>20)
	}
	if (op.kind == Move || op.kind == SourceCopy) && op.in != op.out {
		return op, malformed("it copies %d bytes to %d", op.in, op.out)
	}
	op.use, op.gives = op.in, op.out
	if r.sources && r.data && (p.Major == 1 || p.Minor < 4) { // the last blocks may be there in part
		for _, l := range []struct {
			claim *uint64
			bytes *int64
		}{{o.SrcLength, &op.use}, {o.DstLength, &op.gives}} {
			if l.claim == nil {
				continue
			}
			if *l.claim == 0 || *l.claim > uint64(*l.bytes) || *l.claim <= uint64(*l.bytes-blockSize) {
				return op, malformed("a length of %d bytes for extents of %d", *l.claim, *l.bytes)
			}
			*l.bytes = int64(*l.claim)
		}
	}
	if r.sources && p.Major == 2 {
		switch {
		case len(o.SrcSha256Hash) == 32:
			op.srcHash = (*[32]byte)(o.SrcSha256Hash)
		case len(o.SrcSha256Hash) > 0 || p.Minor >= 3:
			return op, malformed("a source hash of %d bytes, want 32", len(o.SrcSha256Hash))
		}
	}
	return op, nil
}

// extents checks extents against the number of blocks there are, and returns them in bytes, and how many bytes they are.
func (p *Payload) extents(list []*metadata.Extent, blocks int64) (out []extent, total int64, err error) {
	out = make([]extent, 0, len(list))
	for _, e := range list {
		start, n := e.GetStartBlock(), e.GetNumBlocks()
		if start == hole && p.Major == 1 && n > 0 && n <= uint64(blocks) {
			out = append(out, extent{n: int64(n) * blockSize, hole: true})
		} else if n == 0 || start >= uint64(blocks) || n > uint64(blocks)-start {
			return nil, 0, fmt.Errorf("%d blocks at block %d of %d", n, start, blocks)
		} else {
			out = append(out, extent{off: int64(start) * blockSize, n: int64(n) * blockSize})
		}
		if total += out[len(out)-1].n; total > maxPartition {
			return nil, 0, fmt.Errorf("more than %d bytes", int64(maxPartition))
		}
	}
	return out, total, nil
}

// covered checks that every block is written exactly once. What it costs is bounded by the manifest's size, whatever that claims.
func covered(q *Partition, blocks int64) error {
	type span struct {
		extent
		op int
	}
	var written []span
	for i, op := range q.ops {
		for _, e := range op.dst {
			if !e.hole {
				written = append(written, span{e, i})
			}
		}
	}
	slices.SortFunc(written, func(a, b span) int { return cmp.Compare(a.off, b.off) })
	next, end := int64(0), blocks*blockSize
	for _, s := range written {
		switch {
		case s.off < next:
			return malformed("partition %q, operation %d: it writes block %d a second time", q.Name, s.op, s.off/blockSize)
		case s.off > next && next < end:
			return malformed("partition %q: block %d is not written", q.Name, next/blockSize)
		}
		next = s.off + s.n
	}
	if next < end {
		return malformed("partition %q: block %d is not written", q.Name, next/blockSize)
	}
	return nil
}
