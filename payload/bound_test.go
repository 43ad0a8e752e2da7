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

// A manifest of major 1 is read before anybody has vouched for it: one that is made of millions of empty operations must not cost
// the memory that they would take.
func TestMemoryIsBoundedBeforeAnybodyIsBelieved(t *testing.T) {
	manifest := bytes.Repeat([]byte{0x0a, 0x00}, 30<<20) // partition_operations {}
	data := append([]byte("CrAU"), binary.BigEndian.AppendUint64(nil, 1)...)
	data = binary.BigEndian.AppendUint64(data, uint64(len(manifest)))
	data = append(data, manifest...)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := Inspect(t.Context(), bytesSource(data))
	runtime.ReadMemStats(&after)
	if !errors.Is(err, ErrMalformed) {
		t.Errorf("error = %v, want ErrMalformed", err)
	}
	// Reading it costs a few times its size, because a buffer grows; parsing it would have cost a hundred times.
	if got := after.TotalAlloc - before.TotalAlloc; got > 10*uint64(len(manifest)) {
		t.Errorf("%d MiB were allocated for a manifest of %d MiB", got>>20, len(manifest)>>20)
	}
}
