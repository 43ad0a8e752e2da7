package payload

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload/metadata"
)

type bytesSource []byte

func (b bytesSource) Size() int64 { return int64(len(b)) }
func (b bytesSource) Open(_ context.Context, off int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(b[off:])), nil
}

// A manifest of major 1, and whatever is only inspected, is read before anybody has vouched for it: one that is made of millions of empty messages must not
// cost the memory that they would take.
func TestMemoryIsBoundedBeforeAnybodyIsBelieved(t *testing.T) {
	signatures := bytes.Repeat([]byte{0x2a, 0x00}, 15<<20) // new_partition_signature {}
	for name, c := range map[string]struct {
		major    uint64
		manifest []byte
	}{
		"operations": {1, bytes.Repeat([]byte{0x0a, 0x00}, maxManifestUnsigned/2)}, // partition_operations {}
		"signatures": {2, append(binary.AppendUvarint([]byte{0x6a}, uint64(len(signatures))), signatures...)},
	} {
		data := append([]byte("CrAU"), binary.BigEndian.AppendUint64(nil, c.major)...)
		data = binary.BigEndian.AppendUint64(data, uint64(len(c.manifest)))
		if c.major == 2 {
			data = append(data, 0, 0, 0, 0)
		}
		data = append(data, c.manifest...)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Inspect(t.Context(), bytesSource(data))
		runtime.ReadMemStats(&after)
		if !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: error = %v, want ErrMalformed", name, err)
		}
		// Reading it costs a few times its size, because a buffer grows; parsing it would have cost a hundred times.
		if got := after.TotalAlloc - before.TotalAlloc; got > 10*uint64(len(c.manifest)) {
			t.Errorf("%s: %d MiB were allocated for a manifest of %d MiB", name, got>>20, len(c.manifest)>>20)
		}
	}
}

// TestFewImageSignatures counts them alone: there are far fewer than there may be operations.
func TestFewImageSignatures(t *testing.T) {
	for n, ok := range map[int]bool{maxImageSignatures: true, maxImageSignatures + 1: false} {
		body := bytes.Repeat([]byte{0x2a, 0x00}, n)
		err := bound(append(binary.AppendUvarint([]byte{0x6a}, uint64(len(body))), body...), messageV2(), maxMessagesSigned)
		if (err == nil) != ok {
			t.Errorf("%d signatures: %v", n, err)
		}
	}
}

// FuzzSplit compares manifests that are parsed in pieces with the same parsed whole.
func FuzzSplit(f *testing.F) {
	op := func(n uint64) *metadata.InstallOperation {
		return &metadata.InstallOperation{Type: proto.Int32(8), DataOffset: &n, DataSha256Hash: make([]byte, 32), DstExtents: []*metadata.Extent{{StartBlock: &n, NumBlocks: &n}}}
	}
	info := &metadata.PartitionInfo{Size: proto.Uint64(4096)}
	for _, m := range []proto.Message{
		&metadata.Manifest{SignaturesSize: proto.Uint64(7), Partitions: []*metadata.PartitionUpdate{
			{PartitionName: proto.String("usr"), Operations: []*metadata.InstallOperation{op(1), op(2)}, NewPartitionInfo: info}, {PartitionName: proto.String("kernel")}, {Operations: []*metadata.InstallOperation{op(3)}},
		}},
		&metadata.ManifestV1{PartitionOperations: []*metadata.InstallOperation{op(1)}, NoopOperations: []*metadata.InstallOperation{op(2)}, Procedures: []*metadata.InstallProcedure{
			{Type: proto.Int32(1)}, {Operations: []*metadata.InstallOperation{op(4), op(5)}, NewInfo: info},
		}},
	} {
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, false)
		f.Add(data, true)
	}
	f.Fuzz(func(t *testing.T, data []byte, major1 bool) {
		in, rest := messageV2(), proto.Message(&metadata.Manifest{})
		whole := proto.Message(&metadata.Manifest{})
		if major1 {
			in, rest, whole = messageV1(), &metadata.ManifestV1{}, &metadata.ManifestV1{}
		}
		if bound(data, in, maxMessagesUnsigned) != nil {
			return
		}
		left, own, parts := split(data, in)
		want := proto.Unmarshal(data, whole)
		bad := proto.Unmarshal(left, rest)
		parse := func(raw [][]byte) (ops []*metadata.InstallOperation) {
			for _, b := range raw {
				var o metadata.InstallOperation
				if err := proto.Unmarshal(b, &o); err != nil && bad == nil {
					bad = err
				}
				ops = append(ops, &o)
			}
			return ops
		}
		switch m := rest.(type) {
		case *metadata.Manifest:
			if bad == nil && len(parts) != len(m.Partitions) {
				t.Fatalf("operations of %d partitions, of which there are %d", len(parts), len(m.Partitions))
			}
			for i, q := range m.Partitions {
				if bad == nil {
					q.Operations = parse(parts[i])
				}
			}
		case *metadata.ManifestV1:
			m.PartitionOperations = parse(own)
			if bad == nil && len(parts) != len(m.Procedures) {
				t.Fatalf("operations of %d procedures, of which there are %d", len(parts), len(m.Procedures))
			}
			for i, p := range m.Procedures {
				if bad == nil {
					p.Operations = parse(parts[i])
				}
			}
			whole.(*metadata.ManifestV1).NoopOperations = nil // nobody reads them
			if want != nil && bad == nil {
				return // what is wrong is in those
			}
		}
		if (want == nil) != (bad == nil) {
			t.Fatalf("whole: %v, in pieces: %v", want, bad)
		}
		if want == nil && !proto.Equal(whole, rest) {
			t.Errorf("whole: %v\nin pieces: %v", whole, rest)
		}
	})
}
