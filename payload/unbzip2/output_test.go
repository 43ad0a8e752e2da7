package unbzip2

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

// TestUnsort follows chains in every direction: whatever comes out must be what one walk forward, which is the format's definition, makes of it.
func TestUnsort(t *testing.T) {
	closed := 0
	for size := 1; size <= 7; size++ {
		for pattern := range 1 << size {
			last := letters(pattern, size)
			for origin := range size {
				d := Decoder{forward: make([]uint32, size), backward: make([]uint32, size), text: make([]byte, size)}
				for i := range size {
					d.forward[i] = uint32(last[i])
				}
				got, err := d.unsort(size, origin)
				if err != nil {
					if !errors.Is(err, ErrCorrupt) {
						t.Fatal(err)
					}
					continue
				}
				closed++
				if want := walk(last, origin); !bytes.Equal(got, want) {
					t.Errorf("%q from %d: %q, want %q", last, origin, got, want)
				}
			}
		}
	}
	if closed == 0 {
		t.Error("nothing was accepted")
	}
}

// letters writes the lowest bits of pattern as a and b.
func letters(pattern, size int) string {
	var b strings.Builder
	for i := range size {
		b.WriteByte('a' + byte(pattern>>i&1))
	}
	return b.String()
}

func walk(last string, origin int) []byte {
	var next []int
	for _, b := range "ab" {
		for i, c := range last {
			if c == b {
				next = append(next, i)
			}
		}
	}
	var text []byte
	for at := next[origin]; len(text) < len(last); at = next[at] {
		text = append(text, last[at])
	}
	return text
}
