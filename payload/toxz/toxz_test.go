package toxz_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"

	"github.com/ulikunitz/xz"

	"github.com/flipside-linux/flipside/payload/toxz"
	"github.com/flipside-linux/flipside/payload/unxz"
)

func noise(n int, seed byte) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(p)
	return p
}

// prose has words that come again, numbers in between, and passages that come again with a letter changed.
func prose(n int) []byte {
	rng := rand.New(rand.NewPCG(3, 4))
	var b []byte
	for len(b) < n {
		switch {
		case len(b) > 300 && rng.IntN(20) == 0:
			at := rng.IntN(len(b) - 200)
			b = append(b, b[at:at+20+rng.IntN(180)]...)
			b[len(b)-10] ^= 1
		default:
			b = fmt.Appendf(b, "%s %d, ", []string{"slot", "payload", "the other side", "priority", "tries"}[rng.IntN(5)], rng.IntN(1000))
		}
	}
	return b[:n]
}

// program is the beginning of this test's own machine code.
func program(t testing.TB, n int) []byte {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(exe)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, n)
	if _, err := io.ReadFull(f, p); err != nil {
		t.Fatal(err)
	}
	return p
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// haveXZ reports whether xz(1) is there.
func haveXZ() bool { _, err := exec.LookPath("xz"); return err == nil }

func tool(t testing.TB, data []byte, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("xz", args...)
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stderr = bytes.NewReader(data), &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("xz %v: %v: %s", args, err, stderr.String())
	}
	return out
}

// check has every reader read a stream.
func check(t *testing.T, e *toxz.Encoder, name string, src []byte) {
	t.Helper()
	data := e.Append([]byte("before"), src)
	if string(data[:6]) != "before" {
		t.Fatalf("%s: what was in the buffer is gone", name)
	}
	data = data[6:]
	if len(src) < 1<<20 {
		if fresh := new(toxz.Encoder).Append(nil, src); !bytes.Equal(data, fresh) {
			t.Errorf("%s: an encoder that was used before gives other bytes", name)
		}
	}
	got := make([]byte, len(src))
	if n, err := new(unxz.Decoder).Decode(got, data); err != nil || n != len(src) || !bytes.Equal(got, src) {
		t.Fatalf("%s, %d bytes: unxz gives %d bytes, %v", name, len(src), n, err)
	}
	if haveXZ() {
		if got := tool(t, data, "-dc"); !bytes.Equal(got, src) {
			t.Fatalf("%s, %d bytes: xz gives %d others", name, len(src), len(got))
		}
	}
	if limit := len(src) + len(src)/10000 + 200; len(data) > limit {
		t.Errorf("%s: %d bytes became %d", name, len(src), len(data))
	}
}

func TestRoundTrip(t *testing.T) {
	var e toxz.Encoder
	for _, n := range []int{0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 63, 64, 65} {
		check(t, &e, "prose", prose(n))
		check(t, &e, "noise", noise(n, 1))
		check(t, &e, "zeros", make([]byte, n))
	}
	for _, c := range []struct {
		name string
		src  []byte
	}{
		{"prose", prose(300_000)},
		{"noise", noise(300_000, 2)},
		{"zeros", make([]byte, 5<<20)}, // more than a chunk may hold
		{"noise, then prose", join(noise(150_000, 3), prose(150_000))},
		{"prose, then noise, then prose", join(prose(100_000), noise(200_000, 4), prose(100_000), noise(70_000, 5))},
		{"noise twice", join(noise(100_000, 6), noise(100_000, 6))},
		{"a pattern", bytes.Repeat([]byte("abcdefghijk"), 30_000)},
		{"every byte", bytes.Repeat(join(noise(256, 7), []byte{0xe8, 1, 2, 3, 0}), 2000)},
		{"a program", program(t, 1<<20)},
	} {
		check(t, &e, c.name, c.src)
	}
}

// TestSeveralBlocks has more in it than one block holds.
func TestSeveralBlocks(t *testing.T) {
	check(t, new(toxz.Encoder), "blocks", join(bytes.Repeat(prose(4099), 16<<20/4099+1), noise(5000, 8)))
}

// TestOtherLibrary has the library that packages elsewhere use read what is written. It knows no branch filter, so there is no machine code here.
func TestOtherLibrary(t *testing.T) {
	for _, src := range [][]byte{{}, prose(200_000), join(prose(5000), noise(100_000, 9), prose(5000)), noise(100_000, 10)} {
		r, err := xz.NewReader(bytes.NewReader(new(toxz.Encoder).Append(nil, src)))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, src) {
			t.Errorf("%d of %d bytes, %v", len(got), len(src), err)
		}
	}
}

// TestSize compares with what xz -6 makes, and with the branch filter of machine code.
func TestSize(t *testing.T) {
	if !haveXZ() {
		t.Skip("there is no xz(1) to compare with")
	}
	for _, c := range []struct {
		name string
		src  []byte
		args []string
	}{
		{"prose", prose(500_000), []string{"-6"}},
		{"program", program(t, 2<<20), []string{"--x86", "--lzma2=preset=6"}},
	} {
		want := len(tool(t, c.src, append(c.args, "-c", "--check=crc32")...))
		if got := len(new(toxz.Encoder).Append(nil, c.src)); got > want+want/100 {
			t.Errorf("%s: %d bytes, xz %v makes %d", c.name, got, c.args, want)
		} else {
			t.Logf("%s: %d bytes, xz %v makes %d", c.name, got, c.args, want)
		}
	}
}

func FuzzAppend(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(prose(3000))
	f.Add(join(noise(70_000, 11), prose(2000)))
	f.Add(bytes.Repeat([]byte{0xe8, 0, 1, 0, 0, 7, 0xe9, 9, 8, 0xff, 0xff}, 300))
	var e toxz.Encoder
	var d unxz.Decoder
	f.Fuzz(func(t *testing.T, src []byte) {
		data := e.Append(nil, src)
		got := make([]byte, len(src))
		if n, err := d.Decode(got, data); err != nil || n != len(src) || !bytes.Equal(got, src) {
			t.Fatalf("%d of %d bytes, %v", n, len(src), err)
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	src := program(b, 2<<20)
	run := func(name string, do func() int) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(src)))
			n := 0
			for b.Loop() {
				n = do()
			}
			b.ReportMetric(float64(n)/float64(len(src)), "of-its-size")
		})
	}
	var e toxz.Encoder
	run("toxz", func() int { return len(e.Append(nil, src)) })
	run("ulikunitz", func() int {
		var out bytes.Buffer
		w, err := xz.WriterConfig{DictCap: len(src), CheckSum: xz.CRC32}.NewWriter(&out)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := w.Write(src); err != nil {
			b.Fatal(err)
		}
		if err := w.Close(); err != nil {
			b.Fatal(err)
		}
		return out.Len()
	})
	if haveXZ() {
		run("xz", func() int { return len(tool(b, src, "-6", "-T1", "-c", "--check=crc32")) })
		run("xz-x86", func() int { return len(tool(b, src, "--x86", "--lzma2=preset=6", "-T1", "-c", "--check=crc32")) })
	}
}
