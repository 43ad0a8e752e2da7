package build_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"io"
	mathrand "math/rand/v2"
	"testing"

	"pgregory.net/rapid"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/build"
)

// drawImages draws an old image and a new one that was made of it: blocks moved, changed, shifted by some bytes, cleared, added, taken away.
func drawImages(t *rapid.T) (old, new []byte) {
	rng := mathrand.New(mathrand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1))
	old = make([]byte, 4096*rapid.IntRange(1, 40).Draw(t, "blocks"))
	for i := range old {
		old[i] = byte(rng.IntN(1 + i/4096%7*30))
	}
	new = bytes.Clone(old)
	for range rapid.IntRange(0, 12).Draw(t, "changes") {
		at := rng.IntN(len(new))
		n := rng.IntN(min(len(new)-at, 20*4096)) + 1
		switch rapid.IntRange(0, 6).Draw(t, "change") {
		case 0:
			clear(new[at : at+n])
		case 1:
			for range 1 + n/100 {
				new[at+rng.IntN(n)]++
			}
		case 2: // bytes inserted: what follows is shifted
			copy(new[min(at+rng.IntN(50), len(new)):], bytes.Clone(new[at:]))
		case 3: // blocks moved
			a, b := at/4096*4096, rng.IntN(len(new))/4096*4096
			k := min(n/4096*4096, len(new)-a, len(new)-b)
			copy(new[b:b+k], bytes.Clone(new[a:a+k]))
		case 4:
			for i := range n {
				new[at+i] = byte(rng.Uint32())
			}
		case 5:
			new = append(new, bytes.Repeat([]byte{byte(at)}, 4096*(1+rng.IntN(20)))...)
		case 6:
			new = new[:max(4096, len(new)/2/4096*4096)]
		}
	}
	return old, new
}

// applied applies a delta of usr as a host does.
func applied(ctx context.Context, data []byte, key crypto.Signer, old []byte, size int) ([]byte, error) {
	keys := &payload.Keyring{}
	if err := keys.Add(key.Public()); err != nil {
		return nil, err
	}
	p, err := payload.Open(ctx, source(data), payload.Options{Keys: keys})
	if err != nil {
		return nil, err
	}
	d := &disk{b: make([]byte, max(size, len(old))+1<<20)}
	err = p.Apply(ctx, payload.ApplyOptions{Targets: map[string]payload.Target{"usr": d}, Sources: map[string]io.ReaderAt{"usr": bytes.NewReader(old)}})
	return d.b[:size], err
}

// TestDeltaMakesTheNewImage: whatever the images are, applying their delta to the old one gives the new one.
func TestDeltaMakesTheNewImage(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa := newKey(t)
	rapid.Check(t, func(rt *rapid.T) {
		old, new := drawImages(rt)
		spec := build.Spec{
			Images:      []build.Image{{Name: "usr", Data: bytes.NewReader(new), Size: int64(len(new)), Old: &build.Image{Data: bytes.NewReader(old), Size: int64(len(old))}}},
			Compression: rapid.SampledFrom([]build.Compression{build.Bzip2, build.None}).Draw(rt, "compression"),
			Keys:        []crypto.Signer{key}, IgnoreFiles: true, Workers: 1,
		}
		if spec.Major = rapid.IntRange(1, 2).Draw(rt, "major"); spec.Major == 1 {
			spec.Keys = []crypto.Signer{rsa}
		}
		within := rapid.SampledFrom([]int{0, 10, 40, 100}).Draw(rt, "messages")
		data, _ := create(t, build.Within(spec, within))
		got, err := obey(data, map[string][]byte{"usr": old})
		if err != nil {
			rt.Fatal(err)
		}
		if !bytes.Equal(got["usr"], new) {
			rt.Fatal("another image came out")
		}
		if got, err := applied(rt.Context(), data, spec.Keys[0], old, len(new)); err != nil {
			rt.Fatalf("applying it: %v", err)
		} else if !bytes.Equal(got, new) {
			rt.Fatal("package payload makes another image of it")
		}
		spec.Images[0].Old = nil
		if full, _ := create(t, spec); within == 0 && len(data) > len(full)+300 { // room for the hashes of the old image and of the sources
			rt.Fatalf("the delta has %d bytes, the full payload %d", len(data), len(full))
		}
	})
}
