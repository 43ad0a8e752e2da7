package unbzip2_test

import (
	"bytes"
	stdbzip2 "compress/bzip2"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"testing/iotest"

	"github.com/dsnet/compress/bzip2"

	"github.com/flipside-linux/flipside/payload/unbzip2"
)

func sample(n int) []byte {
	b := make([]byte, 0, n+400)
	rng := rand.New(rand.NewPCG(1, uint64(n)))
	for len(b) < n {
		switch rng.IntN(4) {
		case 0:
			b = fmt.Appendf(b, "/usr/lib/%d/lib%d.so.%d\n", rng.IntN(20), rng.IntN(300), rng.IntN(4))
		case 1:
			b = append(b, bytes.Repeat([]byte{byte(rng.IntN(3))}, rng.IntN(700))...)
		case 2:
			for range rng.IntN(64) {
				b = append(b, byte(rng.Uint32()))
			}
		case 3:
			if len(b) > 0 {
				at := rng.IntN(len(b))
				b = append(b, b[at:min(len(b), at+rng.IntN(400))]...)
			}
		}
	}
	return b[:n]
}

func compress(t testing.TB, data []byte, level int) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := bzip2.NewWriter(&buf, &bzip2.WriterConfig{Level: level})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestDecode(t *testing.T) {
	noise := make([]byte, 150_000)
	rand.NewChaCha8([32]byte{}).Read(noise)
	cases := map[string][]byte{
		"nothing": nil, "noise": noise, "zeros": make([]byte, 1<<20), "one byte": {7}, "a period": bytes.Repeat([]byte("ab"), 5000), "four": []byte("aaaa"), "five": []byte("aaaaa"),
		"a long run": bytes.Repeat([]byte("x"), 259*3+1), "two blocks": sample(1 << 20),
	}
	for _, n := range []int{2, 3, 100, 4096, 99_999, 100_000, 250_000} {
		cases[fmt.Sprint(n, " bytes")] = sample(n)
	}
	var d unbzip2.Decoder
	for name, want := range cases {
		for _, level := range []int{1, 9} {
			got := make([]byte, len(want))
			n, err := d.Decode(got, compress(t, want, level))
			if err != nil || n != len(want) || !bytes.Equal(got, want) {
				t.Errorf("%s at level %d: %d of %d bytes, %v", name, level, n, len(want), err)
			}
		}
	}
}

func TestReader(t *testing.T) {
	var d unbzip2.Decoder
	for _, want := range [][]byte{nil, sample(300_000), make([]byte, 1<<20), bytes.Repeat([]byte("x"), 259*3+1), []byte("aaaa")} {
		data := compress(t, want, 1)
		got, err := io.ReadAll(iotest.HalfReader(d.NewReader(data)))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d of %d bytes, %v", len(got), len(want), err)
		}
		for _, bad := range [][]byte{data[:len(data)-1], append(bytes.Clone(data), 0)} {
			if _, err := io.ReadAll(d.NewReader(bad)); !errors.Is(err, unbzip2.ErrCorrupt) {
				t.Errorf("a stream that is too short or too long: %v", err)
			}
		}
	}
}

func TestRefuses(t *testing.T) {
	want := sample(30_000)
	good := compress(t, want, 9)
	var d unbzip2.Decoder
	out := make([]byte, len(want))
	if _, err := d.Decode(out[:len(want)-1], good); !errors.Is(err, unbzip2.ErrTooLong) {
		t.Errorf("no room for one byte: %v", err)
	}
	for name, data := range map[string][]byte{"nothing": nil, "a trailing byte": append(bytes.Clone(good), 0), "two streams": append(bytes.Clone(good), good...)} {
		if _, err := d.Decode(out, data); !errors.Is(err, unbzip2.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for n := 0; n < len(good); n += 1 + n/20 {
		if _, err := d.Decode(out, good[:n]); err == nil {
			t.Errorf("cut to %d of %d bytes, and accepted", n, len(good))
		}
	}
	rng := rand.New(rand.NewPCG(7, 8))
	for range 300 {
		bad := bytes.Clone(good)
		bad[rng.IntN(len(bad))] ^= 1 << rng.IntN(8)
		if _, err := d.Decode(out, bad); err == nil && !bytes.Equal(out, want) {
			t.Error("a flipped bit changed the text, and went unnoticed")
		}
	}
}

func TestNoAllocations(t *testing.T) {
	want := sample(100_000)
	data, out := compress(t, want, 9), make([]byte, len(want))
	var d unbzip2.Decoder
	if n := testing.AllocsPerRun(3, func() { d.Decode(out, data) }); n > 2 {
		t.Errorf("%v allocations for a stream", n)
	}
}

// FuzzDecode compares with the standard library. A mutation hardly ever has the right checksum; what both gave before they stopped is compared too.
func FuzzDecode(f *testing.F) {
	files, err := filepath.Glob("testdata/seeds/*.bz2")
	if err != nil || len(files) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	out := make([]byte, 1<<20)
	var d unbzip2.Decoder
	f.Fuzz(func(t *testing.T, data []byte) {
		n, err := d.Decode(out, data)
		want, refErr := io.ReadAll(io.LimitReader(stdbzip2.NewReader(bytes.NewReader(data)), int64(len(out))+1))
		switch {
		case err == nil && (refErr != nil || !bytes.Equal(out[:n], want)):
			t.Fatalf("%d bytes; the reference: %d bytes, %v", n, len(want), refErr)
		case err != nil && refErr == nil && !errors.Is(err, unbzip2.ErrTooLong):
			// The standard library reads several streams, randomised blocks, and does not mind a bad end.
			if !bytes.HasPrefix(want, out[:n]) {
				t.Fatalf("the reference reads %d bytes; here: %d and %v", len(want), n, err)
			}
		}
	})
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
	data, out := compress(b, want, 9), make([]byte, len(want))
	b.Run("unbzip2", func(b *testing.B) {
		var d unbzip2.Decoder
		b.SetBytes(int64(len(want)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := d.Decode(out, data); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("standard-library", func(b *testing.B) {
		b.SetBytes(int64(len(want)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := io.Copy(io.Discard, stdbzip2.NewReader(bytes.NewReader(data))); err != nil {
				b.Fatal(err)
			}
		}
	})
}
