package bsdiff

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

func texts() map[string][]byte {
	rng := rand.NewChaCha8([32]byte{1})
	random := make([]byte, 5000)
	rng.Read(random)
	few := bytes.Clone(random)
	for i := range few {
		few[i] %= 2
	}
	return map[string][]byte{
		"empty": {}, "one": {7}, "two": {1, 0}, "banana": []byte("banana"), "mississippi": []byte("mississippi"), "zeros": make([]byte, 3000),
		"random": random, "two letters": few, "rising": []byte("abcdefg"), "falling": []byte("gfedcba"), "fibonacci": []byte("abaababaabaababaababaabaababaabaab"),
		"period": bytes.Repeat([]byte("abcab"), 500),
	}
}

// apply carries out a patch, step by step.
func (p *Patch) apply(old []byte) ([]byte, error) {
	var out []byte
	diff, extra := p.Diff, p.Extra
	for _, s := range p.Steps {
		if s.Old < 0 || s.Add < 0 || s.Copy < 0 || s.Old+s.Add > len(old) || s.Add > len(diff) || s.Copy > len(extra) {
			return nil, fmt.Errorf("step %+v is outside", s)
		}
		for i := range s.Add {
			out = append(out, old[s.Old+i]+diff[i])
		}
		out = append(out, extra[:s.Copy]...)
		diff, extra = diff[s.Add:], extra[s.Copy:]
	}
	return out, nil
}

func TestDiffMakesTheNewData(t *testing.T) {
	for oldName, old := range texts() {
		for newName, data := range texts() {
			p := Diff(old, data)
			got, err := p.apply(old)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("from %s to %s: %v", oldName, newName, err)
			}
		}
	}
}

// An insertion, a deletion and a few changed bytes cost little.
func TestSmallChangesMakeSmallPatches(t *testing.T) {
	rng := rand.NewChaCha8([32]byte{2})
	old := make([]byte, 1<<17)
	rng.Read(old)
	data := slices.Concat(old[:30000], []byte("something new"), old[30000:70000], old[71000:])
	for i := 5000; i < 25000; i += 500 {
		data[i]++
	}
	p := Diff(old, data)
	if len(p.Extra) > 40 || len(p.Steps) > 5 {
		t.Errorf("%d steps and %d bytes as they are", len(p.Steps), len(p.Extra))
	}
	for _, encode := range []func() ([]byte, error){p.Classic, p.BSDF2} {
		data, err := encode()
		if err != nil || len(data) > 700 {
			t.Errorf("a patch of %d bytes, %v", len(data), err)
		}
	}
}

// FuzzDiff: whatever the two are, the patch makes the one of the other.
func FuzzDiff(f *testing.F) {
	f.Add([]byte("the old text, which is long enough"), []byte("the new text, which is long enough too"))
	f.Add([]byte{}, []byte("something"))
	f.Add(make([]byte, 300), bytes.Repeat([]byte{0, 0, 1}, 90))
	f.Add(bytes.Repeat([]byte("abcdefgh"), 20), bytes.Repeat([]byte("bcdefgha"), 21))
	f.Fuzz(func(t *testing.T, old, data []byte) {
		p := Diff(old, data)
		if got, err := p.apply(old); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("the patch makes something else: %v", err)
		}
		for name, encode := range map[string]func() ([]byte, error){"BSDIFF40": p.Classic, "BSDF2": p.BSDF2} {
			patch, err := encode()
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(data))
			if err := Apply(got, old, patch); err != nil || !bytes.Equal(got, data) {
				t.Fatalf("as %s, the patch makes something else: %v", name, err)
			}
		}
	})
}

func ExampleDiff() {
	old := []byte("The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy dog.")
	new := []byte("The quick brown fox jumps over the lazy cat. The quick brown fox jumps over the lazy dog.")
	patch, err := Diff(old, new).BSDF2()
	if err != nil {
		panic(err)
	}
	made := make([]byte, len(new))
	if err := Apply(made, old, patch); err != nil {
		panic(err)
	}
	fmt.Println(bytes.Equal(made, new))
	// Output: true
}

func BenchmarkDiff(b *testing.B) {
	rng := rand.New(rand.NewPCG(1, 2))
	old := make([]byte, 2<<20)
	for i := range old {
		old[i] = byte(rng.ExpFloat64() * 20)
	}
	data := bytes.Clone(old)
	for range 2000 {
		data[rng.IntN(len(data))]++
	}
	data = slices.Concat(data[:1<<20], []byte("inserted"), data[1<<20:])
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		Diff(old, data)
	}
}
