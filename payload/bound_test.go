package payload

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"testing"
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
		"operations": {1, bytes.Repeat([]byte{0x0a, 0x00}, 30<<20)}, // partition_operations {}
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
