package bcj

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

func TestBranch(t *testing.T) {
	b := append(make([]byte, 16), 0xe8, 0x10, 0, 0, 0, 0x90, 0x90)
	Encode(b)
	if want := append(make([]byte, 16), 0xe8, 0x25, 0, 0, 0, 0x90, 0x90); !bytes.Equal(b, want) {
		t.Errorf("a call 16 bytes ahead from byte 21 is % x, want % x", b[16:], want[16:])
	}
}

// TestThereAndBack uses bytes that are opcodes and top bytes far more often than in any program.
func TestThereAndBack(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	changed := 0
	for range 20_000 {
		want := make([]byte, rng.IntN(40))
		for i := range want {
			want[i] = [...]byte{0xe8, 0xe9, 0, 0xff, 1, byte(rng.Uint32())}[rng.IntN(6)]
		}
		got := bytes.Clone(want)
		Encode(got)
		if !bytes.Equal(got, want) {
			changed++
		}
		Decode(got)
		if !bytes.Equal(got, want) {
			t.Fatalf("% x comes back as % x", want, got)
		}
	}
	if changed == 0 {
		t.Error("nothing was ever changed")
	}
}
