package bsdiff_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/andybalholm/brotli"
	"github.com/dsnet/compress/bzip2"

	"github.com/flipside-linux/flipside/payload/bsdiff"
)

func number(n int64) []byte {
	v := uint64(n)
	if n < 0 {
		v = uint64(-n) | 1<<63
	}
	return binary.LittleEndian.AppendUint64(nil, v)
}

func compress(t testing.TB, how byte, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	switch how {
	case 0:
		return data
	case 1:
		w, err := bzip2.NewWriter(&buf, nil)
		if err != nil {
			t.Fatal(err)
		}
		w.Write(data)
		w.Close()
	case 2:
		w := brotli.NewWriter(&buf)
		w.Write(data)
		w.Close()
	}
	return buf.Bytes()
}

// patch makes a patch of triples, as they are, right or wrong.
func patch(t testing.TB, how [3]byte, newSize int64, diff, extra []byte, triples ...int64) []byte {
	t.Helper()
	var control []byte
	for _, n := range triples {
		control = append(control, number(n)...)
	}
	c, d, e := compress(t, how[0], control), compress(t, how[1], diff), compress(t, how[2], extra)
	out := append([]byte("BSDF2"), how[:]...)
	if how == [3]byte{1, 1, 1} {
		out = []byte("BSDIFF40")
	}
	for _, n := range []int64{int64(len(c)), int64(len(d)), newSize} {
		out = append(out, number(n)...)
	}
	return append(append(append(out, c...), d...), e...)
}

func TestPatch(t *testing.T) {
	old := []byte("the quick brown fox jumps over the lazy dog")
	for _, how := range [][3]byte{{1, 1, 1}, {2, 2, 2}, {2, 1, 2}, {1, 2, 0}, {0, 0, 0}} {
		// "dog" comes first, then text of its own, then "quick" as QUICK.
		p := patch(t, how, 11, append(make([]byte, 3), bytes.Repeat([]byte{256 - 32}, 5)...), []byte(" - "), 3, 3, -39, 5, 0, 0)
		p2 := patch(t, how, 11, append(make([]byte, 3), bytes.Repeat([]byte{256 - 32}, 5)...), []byte(" - "), 0, 0, 40, 3, 3, -39, 5, 0, 0)
		got := make([]byte, 11)
		if err := bsdiff.Apply(got, old, p2); err != nil || string(got) != "dog - QUICK" {
			t.Errorf("%v: %q, %v", how, got, err)
		}
		if err := bsdiff.Apply(got, old, p); !errors.Is(err, bsdiff.ErrCorrupt) {
			t.Errorf("%v: it reads before the beginning: %v", how, err)
		}
	}
	if err := bsdiff.Apply(nil, nil, patch(t, [3]byte{1, 1, 1}, 0, nil, nil)); err != nil {
		t.Errorf("a patch of nothing: %v", err)
	}
}

func TestRefuses(t *testing.T) {
	old, bz := make([]byte, 100), [3]byte{1, 1, 1}
	diff := make([]byte, 10)
	good := patch(t, bz, 10, diff, nil, 10, 0, 0)
	with := func(off int, n int64) []byte {
		b := bytes.Clone(good)
		copy(b[off:], number(n))
		return b
	}
	for name, p := range map[string][]byte{
		"nothing":                      nil,
		"another magic":                append([]byte("BSDIFF41"), good[8:]...),
		"a compressor that is unknown": patch(t, [3]byte{0, 0, 9}, 10, diff, nil, 10, 0, 0),
		"more than there is room for":  with(24, 11),
		"less":                         with(24, 9),
		"a negative size":              with(24, -10),
		"a huge size":                  with(24, 1<<62),
		"control beyond the patch":     with(8, int64(len(good))),
		"negative control":             with(8, -1),
		"differences beyond the patch": with(16, 1<<62),
		"a huge addition":              patch(t, bz, 10, diff, nil, 1<<62, 0, 0),
		"a negative addition":          patch(t, bz, 10, diff, nil, -1, 11, 0),
		"a huge insertion":             patch(t, bz, 10, diff, nil, 0, 1<<62, 0),
		"sums that overflow":           patch(t, bz, 10, diff, nil, 1<<62, 1<<62, 0),
		"old bytes before the first":   patch(t, bz, 10, diff, nil, 5, 0, -6, 5, 0, 0),
		"old bytes beyond the last":    patch(t, bz, 10, diff, nil, 5, 0, 91, 5, 0, 0),
		"a seek that overflows":        patch(t, bz, 10, diff, nil, 0, 0, 1<<62, 0, 0, 1<<62, 10, 0, 0),
		"control that ends too soon":   patch(t, bz, 10, diff, nil, 5, 0, 0),
		"differences that end":         patch(t, bz, 10, diff[:9], nil, 10, 0, 0),
		"extra bytes that end":         patch(t, bz, 10, nil, diff[:9], 0, 10, 0),
		"control that is left over":    patch(t, bz, 10, diff, nil, 10, 0, 0, 0, 0, 0),
		"differences left over":        patch(t, bz, 10, make([]byte, 11), nil, 10, 0, 0),
		"extra bytes left over":        patch(t, bz, 10, diff, []byte("x"), 10, 0, 0),
		"triples that make nothing":    patch(t, bz, 10, diff, nil, append(make([]int64, 3*1000), 10, 0, 0)...),
	} {
		if err := bsdiff.Apply(make([]byte, 10), old, p); !errors.Is(err, bsdiff.ErrCorrupt) && !errors.Is(err, bsdiff.ErrUnsupported) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := bsdiff.Apply(make([]byte, 10), old, good); err != nil {
		t.Errorf("the good one: %v", err)
	}
	for n := range good {
		if h, err := bsdiff.ReadHeader(good[:n]); err == nil && h.Extra == 0 {
			continue // no stream at all is one of nothing
		}
		if err := bsdiff.Apply(make([]byte, 10), old, good[:n]); err == nil {
			t.Errorf("cut to %d bytes, and accepted", n)
		}
	}
}

// TestOfBsdiff applies what the classic program makes.
func TestOfBsdiff(t *testing.T) {
	prog, err := exec.LookPath("bsdiff")
	if err != nil {
		t.Skip("bsdiff is not installed: apt-get install bsdiff")
	}
	dir := t.TempDir()
	old := []byte(strings.Repeat("a line of the old file\n", 3000))
	want := bytes.ReplaceAll(append([]byte("new\n"), old...), []byte("old file\na"), []byte("new file\nA"))
	for name, data := range map[string][]byte{"old": old, "new": want} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command(prog, filepath.Join(dir, "old"), filepath.Join(dir, "new"), filepath.Join(dir, "patch")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p, err := os.ReadFile(filepath.Join(dir, "patch"))
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if err := bsdiff.Apply(got, old, p); err != nil || !bytes.Equal(got, want) {
		t.Errorf("another file than it should be, %v", err)
	}
}

// FuzzPatch applies anything at all: it must end, and a patch that is accepted has filled every byte.
func FuzzPatch(f *testing.F) {
	old := []byte("the quick brown fox jumps over the lazy dog")
	for _, how := range [][3]byte{{1, 1, 1}, {2, 2, 2}, {0, 0, 0}, {2, 1, 0}} {
		f.Add(old, patch(f, how, 11, append(make([]byte, 3), bytes.Repeat([]byte{256 - 32}, 5)...), []byte(" - "), 0, 0, 40, 3, 3, -39, 5, 0, 0))
		f.Add(old, patch(f, how, 10, make([]byte, 10), nil, 5, 0, -6, 5, 0, 0))
	}
	var p bsdiff.Patcher
	f.Fuzz(func(t *testing.T, old, data []byte) {
		h, err := bsdiff.ReadHeader(data)
		if err != nil {
			if err := p.Apply(make([]byte, 10), old, data); err == nil {
				t.Error("a patch without a header was applied")
			}
			return
		}
		if h.NewSize > 1<<20 {
			return
		}
		one, two := make([]byte, h.NewSize), bytes.Repeat([]byte{0xff}, int(h.NewSize))
		err1, err2 := p.Apply(one, old, data), p.Apply(two, old, data)
		if (err1 == nil) != (err2 == nil) {
			t.Fatalf("once %v, and once %v", err1, err2)
		}
		if err1 == nil && !bytes.Equal(one, two) {
			t.Error("what comes out depends on what was there before")
		}
	})
}
