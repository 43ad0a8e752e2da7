package unxz_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/flipside-linux/flipside/payload/unxz"
)

// stream wraps the chunks of one LZMA2 block that decodes to size bytes, with everything around them as it must be.
func stream(chunks []byte, size int) []byte {
	withSum := func(b, p []byte) []byte {
		return binary.LittleEndian.AppendUint32(append(b, p...), crc32.ChecksumIEEE(p))
	}
	b := withSum([]byte("\xfd7zXZ\x00"), []byte{0, 0})
	b = withSum(b, []byte{2, 0, 0x21, 1, 8, 0, 0, 0}) // a dictionary of 64 KiB
	b = append(b, chunks...)
	b = append(b, make([]byte, -len(chunks)&3)...)
	index := binary.AppendUvarint([]byte{0, 1}, uint64(12+len(chunks)))
	index = binary.AppendUvarint(index, uint64(size))
	index = append(index, make([]byte, -len(index)&3)...)
	b = withSum(b, index)
	footer := append(binary.LittleEndian.AppendUint32(nil, uint32(len(index)/4)), 0, 0)
	b = binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(footer))
	return append(append(b, footer...), "YZ"...)
}

// chunks makes a sequence of chunks that may or may not be allowed. A range coder that is fed with nothing but zeros decodes them in every
// state, so that what decides is which resets come when, and whether each chunk uses its input up exactly.
func chunks(rng *rand.Rand, text []byte) (b []byte, size int) {
	controls := []byte{1, 2, 0x80, 0xa0, 0xc0, 0xe0}
	for i := range 1 + rng.IntN(5) {
		control := controls[rng.IntN(len(controls))]
		if i == 0 && rng.IntN(8) > 0 {
			control = []byte{1, 0xe0}[control>>7] // else hardly anything is accepted
		}
		switch {
		case control < 0x80:
			n := 1 + rng.IntN(5)
			b = append(b, control, 0, byte(n-1))
			b, size = append(b, "abcde"[:n]...), size+n
			continue
		case rng.IntN(3) == 0: // a real chunk, which needs the state that it was made with
			b = append(append(b, control&0xe0|text[0]&0x1f), text[1:5]...)
			if control >= 0xc0 {
				b = append(b, text[5])
			}
			b, size = append(b, text[6:len(text)-1]...), size+int(binary.BigEndian.Uint16(text[1:]))+1
			continue
		}
		n, packed := 1+rng.IntN(3), 5+rng.IntN(2)+rng.IntN(16)/15
		b = append(b, control&0xe0, 0, byte(n-1), 0, byte(packed-1))
		if control >= 0xc0 {
			b = append(b, []byte{0x5d, 0, 4, 36, 44, 0xe0, 0xe1}[rng.IntN(16)%7])
		}
		b, size = append(b, make([]byte, packed)...), size+n
	}
	if rng.IntN(20) == 0 {
		b[rng.IntN(len(b))] ^= 1 << rng.IntN(8)
	}
	return append(b, 0), size
}

// TestResets goes through what a chunk may rely on.
func TestResets(t *testing.T) {
	const (
		fresh   = "\xe0\x00\x00\x00\x05\x5d\x00\x00\x00\x00\x00\x00" // a dictionary, properties, state: and one byte
		props   = "\xc0\x00\x00\x00\x05\x5d\x00\x00\x00\x00\x00\x00"
		state   = "\xa0\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00"
		nothing = "\x80\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00"
		plain   = "\x02\x00\x00a"
		cleared = "\x01\x00\x00a" // the dictionary, and what is not compressed
	)
	var d unxz.Decoder
	for _, c := range []struct {
		chunks string
		size   int
		ok     bool
	}{
		{fresh + state + nothing + plain + nothing, 5, true},
		{fresh + props, 2, true},
		{cleared + props + nothing, 3, true},
		{fresh + cleared + props, 3, true},
		{props, 1, false}, {state, 1, false}, {nothing, 1, false}, {plain, 1, false}, // without a dictionary
		{cleared + state, 2, false}, {cleared + nothing, 2, false}, // without properties
		{fresh + cleared + state, 3, false}, {fresh + cleared + nothing, 3, false}, {fresh + cleared + plain + state, 4, false}, // which went with the dictionary
		{"\x03\x00\x00a", 1, false}, {fresh + "\x7f\x00\x00a", 2, false},
	} {
		n, err := d.Decode(make([]byte, 8), stream(append([]byte(c.chunks), 0), c.size))
		if c.ok && (err != nil || n != c.size) || !c.ok && !errors.Is(err, unxz.ErrCorrupt) {
			t.Errorf("%x: %d bytes, %v", c.chunks, n, err)
		}
	}
}

// TestChunks compares with xz what is accepted and what is refused. A mutation of a stream does not show that: its checksums are wrong.
func TestChunks(t *testing.T) {
	text := compress(t, sample(400), "--format=raw", "--lzma2=preset=0")
	rng, dir := rand.New(rand.NewPCG(3, 4)), t.TempDir()
	data := make(map[string][]byte)
	args := []string{"-qqdk"}
	for i := range 600 {
		name := filepath.Join(dir, fmt.Sprint(i))
		data[name] = stream(chunks(rng, text))
		if err := os.WriteFile(name+".xz", data[name], 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, name+".xz")
	}
	exec.Command("xz", args...).Run() // it fails, and leaves no file where it refuses
	var d unxz.Decoder
	out := make([]byte, 1<<16)
	accepted := 0
	for name, stream := range data {
		want, refErr := os.ReadFile(name)
		n, err := d.Decode(out, stream)
		if (err == nil) != (refErr == nil) || err == nil && !bytes.Equal(out[:n], want) {
			t.Errorf("%x: %d bytes, %v; xz: %d bytes, %v", stream[24:], n, err, len(want), refErr)
		}
		if err == nil {
			accepted++
		}
	}
	if accepted < len(data)/20 || accepted > len(data)*19/20 {
		t.Errorf("%d of %d accepted: that compares nothing", accepted, len(data))
	}
	t.Logf("%d of %d accepted", accepted, len(data))
}
