package unxz_test

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	ref "github.com/ulikunitz/xz"

	"github.com/flipside-linux/flipside/payload/unxz"
)

// sample makes data as images have it: text, code, runs, noise.
func sample(n int) []byte {
	b := make([]byte, 0, n+64)
	rng := rand.New(rand.NewPCG(1, uint64(n)))
	for len(b) < n {
		switch rng.IntN(5) {
		case 0:
			b = fmt.Appendf(b, "/usr/lib/%d/lib%d.so.%d\n", rng.IntN(20), rng.IntN(300), rng.IntN(4))
		case 1:
			b = append(b, make([]byte, rng.IntN(300))...)
		case 2:
			for range rng.IntN(64) {
				b = append(b, byte(rng.Uint32()))
			}
		case 3: // what a branch filter looks for
			b = append(b, 0xe8, byte(rng.Uint32()), byte(rng.IntN(4)), 0, byte(0-rng.IntN(2)), 0xe9, 0xe8)
		case 4:
			if len(b) > 0 {
				at := rng.IntN(len(b))
				b = append(b, b[at:min(len(b), at+rng.IntN(400))]...)
			}
		}
	}
	return b[:n]
}

// compress runs the system's xz.
func compress(t testing.TB, data []byte, args ...string) []byte {
	t.Helper()
	path, err := exec.LookPath("xz")
	if err != nil {
		t.Skip("xz is not installed: apt-get install xz-utils")
	}
	cmd := exec.Command(path, append([]string{"-c", "-T1"}, args...)...)
	cmd.Stdin = bytes.NewReader(data)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("xz %v: %v", args, err)
	}
	return out
}

func TestDecode(t *testing.T) {
	var d unxz.Decoder
	for _, args := range [][]string{
		{"-6"}, {"-0"}, {"-9e"}, {"--check=none"}, {"--check=crc32"}, {"--check=sha256"}, {"--block-size=65536"},
		{"--lzma2=preset=6,lc=0,lp=4,pb=4"}, {"--lzma2=preset=6,lc=4,lp=0,pb=0"}, {"--lzma2=preset=6,lc=1,lp=3"}, {"--lzma2=dict=4KiB"},
		{"--x86", "--lzma2=preset=6"}, {"--x86", "--lzma2=preset=0", "--block-size=100000"},
	} {
		for _, n := range []int{0, 1, 5, 4096, 300000} {
			want := sample(n)
			got := make([]byte, n)
			m, err := d.Decode(got, compress(t, want, args...))
			if err != nil || m != n || !bytes.Equal(got, want) {
				t.Errorf("xz %v, %d bytes: %d bytes, %v", args, n, m, err)
			}
		}
	}
	noise := make([]byte, 1<<18)
	rand.NewChaCha8([32]byte{}).Read(noise)
	got := make([]byte, len(noise))
	if _, err := d.Decode(got, compress(t, noise)); err != nil || !bytes.Equal(got, noise) {
		t.Errorf("noise: %v", err)
	}
}

// TestRealCode decodes a program, which the branch filter changes in many places.
func TestRealCode(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	data = data[:min(len(data), 1<<20)]
	got := make([]byte, len(data))
	for _, args := range [][]string{{"-1"}, {"--x86", "--lzma2=preset=1"}} {
		var d unxz.Decoder
		if n, err := d.Decode(got, compress(t, data, args...)); err != nil || n != len(data) || !bytes.Equal(got, data) {
			t.Errorf("xz %v: %d of %d bytes, %v", args, n, len(data), err)
		}
	}
}

func TestRefuses(t *testing.T) {
	want := sample(60000)
	good := compress(t, want, "--check=crc32")
	var d unxz.Decoder
	out := make([]byte, len(want))
	if _, err := d.Decode(out[:len(want)-1], good); !errors.Is(err, unxz.ErrTooLong) {
		t.Errorf("no room for one byte: %v", err)
	}
	for name, data := range map[string][]byte{
		"nothing":        nil,
		"trailing bytes": append(bytes.Clone(good), 0, 0, 0, 0),
		"two streams":    append(bytes.Clone(good), good...),
	} {
		if _, err := d.Decode(out, data); !errors.Is(err, unxz.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for n := range good {
		if n%17 == 0 || n > len(good)-40 {
			if _, err := d.Decode(out, good[:n]); err == nil {
				t.Errorf("cut to %d of %d bytes, and accepted", n, len(good))
			}
		}
	}
	rng := rand.New(rand.NewPCG(7, 8))
	for range 300 {
		bad := bytes.Clone(good)
		bad[rng.IntN(len(bad))] ^= 1 << rng.IntN(8)
		if n, err := d.Decode(out, bad); err == nil {
			t.Errorf("a flipped bit went unnoticed, %d bytes", n)
		}
	}
	if _, err := d.Decode(out, compress(t, want, "--arm", "--lzma2=preset=6")); !errors.Is(err, unxz.ErrUnsupported) {
		t.Errorf("the ARM filter: %v", err)
	}
	if _, err := d.Decode(out, compress(t, nil, "--lzma2=dict=128MiB")); err != nil {
		t.Errorf("an empty stream has no block, so its dictionary is of no interest: %v", err)
	}
	if _, err := d.Decode(out, compress(t, want[:10], "--lzma2=dict=128MiB")); !errors.Is(err, unxz.ErrUnsupported) {
		t.Errorf("a dictionary of 128 MiB: %v", err)
	}
}

func TestNoAllocations(t *testing.T) {
	want := sample(1 << 20)
	data, out := compress(t, want), make([]byte, len(want))
	var d unxz.Decoder
	if n := testing.AllocsPerRun(3, func() { d.Decode(out, data) }); n > 16 { // a few more under the race detector; none for each of the thousands of packets
		t.Errorf("%v allocations for a stream", n)
	}
}

// seeds are small streams of every kind; testdata/seeds holds the same, so that fuzzing begins with them where there is no xz.
func seeds(f *testing.F) {
	files, err := filepath.Glob("testdata/seeds/*.xz")
	if err != nil || len(files) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, false)
		f.Add(data, true)
	}
}

// FuzzDecode compares with the general decoder: what is accepted here must be the same there. Mutations hardly ever have right checksums, so with
// fix the first block's header is given one. Run it with -fuzzminimizetime 100x: by default Go spends up to a minute on making each interesting
// input smaller, and counts no executions meanwhile.
func FuzzDecode(f *testing.F) {
	seeds(f)
	out := make([]byte, 1<<16)
	var d unxz.Decoder
	f.Fuzz(func(t *testing.T, data []byte, fix bool) {
		if fix && len(data) > 13 {
			data = bytes.Clone(data)
			copy(data, "\xfd7zXZ\x00\x00\x00\xff\x12\xd9\x41")
			if size := (int(data[12]) + 1) * 4; 12+size <= len(data) {
				sum := crc32.ChecksumIEEE(data[12 : 12+size-4])
				copy(data[12+size-4:], []byte{byte(sum), byte(sum >> 8), byte(sum >> 16), byte(sum >> 24)})
			}
		}
		n, err := d.Decode(out, data)
		if !cheap(data) {
			return
		}
		want, refErr := reference(data, len(out))
		if err == nil && (refErr != nil || !bytes.Equal(out[:n], want)) {
			t.Fatalf("%d bytes, and the reference says %d and %v", n, len(want), refErr)
		}
		if err != nil {
			// The reference takes the end of the data for the end of the stream, and does not mind what a chunk leaves unread: that it accepts
			// something says little. TestChunks compares what is refused with xz. What both gave before they stopped must be the same.
			if m := min(n, len(want)); !bytes.Equal(out[:m], want[:m]) {
				t.Fatalf("%d bytes and %v; the reference: %d and %v; they differ", n, err, len(want), refErr)
			}
		}
	})
}

// cheap reports whether the first block header is the simplest one with a dictionary of 256 KiB at most: it is memory in the reference.
func cheap(data []byte) bool {
	return len(data) < 17 || data[12] == 0 || data[13] == 0 && data[14] == 0x21 && data[15] == 1 && data[16] <= 12
}

func reference(data []byte, limit int) ([]byte, error) {
	src := bytes.NewReader(data)
	r, err := ref.ReaderConfig{SingleStream: true}.NewReader(src)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(r, int64(limit)+1))
	if err == nil && src.Len() > 0 {
		err = unxz.ErrCorrupt
	}
	return b, err
}

func BenchmarkDecode(b *testing.B) {
	exe, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	want, err := os.ReadFile(exe)
	if err != nil {
		b.Fatal(err)
	}
	want = want[:1<<20]
	data, out := compress(b, want), make([]byte, len(want))
	b.Run("unxz", func(b *testing.B) {
		var d unxz.Decoder
		b.SetBytes(int64(len(want)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := d.Decode(out, data); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("ulikunitz", func(b *testing.B) {
		b.SetBytes(int64(len(want)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := reference(data, len(out)); err != nil {
				b.Fatal(err)
			}
		}
	})
}
