package payload

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/flipside-linux/flipside/payload/metadata"
)

// Kind is the type of an operation, as its number in the manifest.
type Kind int32

// The operations of full payloads. Zstd is this project's own: numbers 11 to 14 mean different things to different vendors, so it has one far away
// from all of theirs, which every other reader refuses as unknown.
const (
	Replace   Kind = 0
	ReplaceBZ Kind = 1
	Zero      Kind = 6
	Discard   Kind = 7
	ReplaceXZ Kind = 8
	Zstd      Kind = 12122
)

var kindNames = map[Kind]string{
	Replace: "REPLACE", ReplaceBZ: "REPLACE_BZ", 2: "MOVE", 3: "BSDIFF", 4: "SOURCE_COPY", 5: "SOURCE_BSDIFF", Zero: "ZERO", Discard: "DISCARD",
	ReplaceXZ: "REPLACE_XZ", 9: "PUFFDIFF", 10: "BROTLI_BSDIFF", 11: "ZUCCHINI or REPLACE_ZSTD of another vendor", 12: "LZ4DIFF_BSDIFF or REPLACE_ZSTD of another vendor", 13: "LZ4DIFF_PUFFDIFF", 14: "zstd of another vendor", Zstd: "ZSTD",
}

func (k Kind) String() string {
	if n, ok := kindNames[k]; ok {
		return n
	}
	return fmt.Sprintf("operation %d", int32(k))
}

type extent struct{ off, n int64 } // bytes

type operation struct {
	kind   Kind
	part   int
	off, n int64 // of the blob, relative to the first one
	hash   [32]byte
	dst    []extent
	out    int64 // bytes that it writes
}

// operations checks all operations of one partition: nothing outside it, no block twice, and for a full payload no block left out.
func (p *Payload) operations(name string, size int64, ops []*metadata.InstallOperation, blob *int64) ([]operation, error) {
	blocks := (size + blockSize - 1) / blockSize
	limit := blocks
	if p.Major == 1 {
		limit = (blocks + 255) / 256 * 256 // the last extent always claims a whole MiB
	} else if size%blockSize != 0 {
		return nil, malformed("partition %q has %d bytes, not a multiple of %d", name, size, blockSize)
	}
	if int64(len(ops)) > limit {
		return nil, malformed("partition %q has %d operations for %d blocks", name, len(ops), blocks)
	}
	var written []span // by all operations; what they cost is bounded by the manifest's size, whatever they claim
	list := make([]operation, 0, len(ops))
	for i, o := range ops {
		bad := func(format string, args ...any) error {
			return malformed("partition %q, operation %d (%s): %s", name, i, Kind(o.GetType()), fmt.Sprintf(format, args...))
		}
		op := operation{kind: Kind(o.GetType()), part: len(p.Partitions)}
		if o.Type == nil {
			return nil, bad("it has no type")
		}
		data := o.GetDataLength() > 0
		switch op.kind {
		case Replace, ReplaceBZ, ReplaceXZ, Zstd:
			if !data {
				return nil, bad("it has no data")
			}
			if p.Major == 1 && op.kind != Replace && op.kind != ReplaceBZ {
				return nil, fmt.Errorf("%w: %s in a payload of major version 1", ErrUnsupported, op.kind)
			}
		case Zero, Discard:
			if data || o.DataOffset != nil {
				return nil, bad("it has data")
			}
		default:
			return nil, fmt.Errorf("%w: partition %q, operation %d: %s", ErrUnsupported, name, i, op.kind)
		}
		if len(o.SrcExtents) > 0 {
			return nil, bad("it has a source")
		}
		if data {
			if o.GetDataLength() > maxBlob {
				return nil, bad("%d bytes of data, at most %d", o.GetDataLength(), maxBlob)
			}
			if o.GetDataOffset() != uint64(*blob) {
				return nil, bad("its data is at %d, want %d: blobs follow each other", o.GetDataOffset(), *blob)
			}
			if len(o.DataSha256Hash) != 32 {
				return nil, bad("a data hash of %d bytes, want 32", len(o.DataSha256Hash))
			}
			op.off, op.n, op.hash = *blob, int64(o.GetDataLength()), [32]byte(o.DataSha256Hash)
			*blob += op.n
			if *blob > p.Size {
				return nil, bad("its data ends at %d, beyond the file", *blob)
			}
		}
		if len(o.DstExtents) == 0 {
			return nil, bad("it writes nowhere")
		}
		for _, e := range o.DstExtents {
			start, n := e.GetStartBlock(), e.GetNumBlocks()
			if n == 0 || start >= uint64(limit) || n > uint64(limit)-start {
				return nil, bad("it writes %d blocks at block %d of %d", n, start, blocks)
			}
			written = append(written, span{int64(start), int64(n), i})
			op.out += int64(n) * blockSize
			op.dst = append(op.dst, extent{int64(start) * blockSize, int64(n) * blockSize})
		}
		if data && op.out > maxOutput {
			return nil, bad("it writes %d bytes, at most %d", op.out, maxOutput)
		}
		list = append(list, op)
	}
	slices.SortFunc(written, func(a, b span) int { return cmp.Compare(a.start, b.start) })
	next := int64(0)
	for _, s := range written {
		switch {
		case s.start < next:
			return nil, malformed("partition %q, operation %d: it writes block %d a second time", name, s.op, s.start)
		case s.start > next && next < blocks:
			return nil, malformed("partition %q: block %d is not written", name, next)
		}
		next = s.start + s.n
	}
	if next < blocks {
		return nil, malformed("partition %q: block %d is not written", name, next)
	}
	return list, nil
}

// span is a run of blocks that an operation writes.
type span struct {
	start, n int64
	op       int
}
