package payload_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/build"
	"github.com/flipside-linux/flipside/payload/metadata"
)

func signer(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func small(t *testing.T, number int64, product string, keys ...crypto.Signer) []byte {
	t.Helper()
	var b bytes.Buffer
	img := bytes.Repeat([]byte("flipside"), 512)
	_, err := build.Full(t.Context(), &b, build.Spec{
		Images: []build.Image{{Name: "usr", Data: bytes.NewReader(img), Size: int64(len(img))}}, MaxTimestamp: number, Product: product, Keys: keys, TempDir: t.TempDir(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestWhoseSignaturesCount(t *testing.T) {
	a, b, c, stranger := signer(t), signer(t), signer(t), signer(t)
	ring := func(need int, keys ...payload.Key) *payload.Keyring {
		k := &payload.Keyring{Need: need}
		for _, key := range keys {
			if err := k.Pin(key); err != nil {
				t.Fatal(err)
			}
		}
		return k
	}
	open := func(s crypto.Signer) payload.Key { return payload.Key{Public: s.Public(), Name: "open"} }
	until := func(s crypto.Signer, from, to int64) payload.Key {
		return payload.Key{Public: s.Public(), Name: "bounded", NotBefore: from, NotAfter: to}
	}
	for _, tt := range []struct {
		name   string
		keys   *payload.Keyring
		number int64
		floor  int64
		by     []crypto.Signer
		want   error
	}{
		{"one of one", ring(0, open(a)), 0, 0, []crypto.Signer{a}, nil},
		{"a stranger", ring(0, open(a)), 0, 0, []crypto.Signer{stranger}, payload.ErrSignature},
		{"a stranger beside", ring(0, open(a)), 0, 0, []crypto.Signer{stranger, a}, nil},
		{"rotation: old and new, a host with the old", ring(0, open(a)), 0, 0, []crypto.Signer{b, a}, nil},
		{"rotation: old and new, a host with the new", ring(0, open(b)), 0, 0, []crypto.Signer{b, a}, nil},
		{"two of three", ring(2, open(a), open(b), open(c)), 0, 0, []crypto.Signer{c, a}, nil},
		{"one of three, two needed", ring(2, open(a), open(b), open(c)), 0, 0, []crypto.Signer{c}, payload.ErrSignature},
		{"one key twice is one", ring(2, open(a), open(b)), 0, 0, []crypto.Signer{a, a}, payload.ErrSignature},
		{"one key pinned twice is one", ring(2, open(a), open(a)), 0, 0, []crypto.Signer{a, a}, payload.ErrSignature},
		{"in its time", ring(0, until(a, 100, 200)), 150, 0, []crypto.Signer{a}, nil},
		{"at its end", ring(0, until(a, 100, 200)), 200, 0, []crypto.Signer{a}, nil},
		{"after its end", ring(0, until(a, 100, 200)), 201, 0, []crypto.Signer{a}, payload.ErrSignature},
		{"before its beginning", ring(0, until(a, 100, 200)), 99, 0, []crypto.Signer{a}, payload.ErrSignature},
		{"backdated by a key that has ended, below the floor", ring(0, until(a, 0, 200)), 150, 300, []crypto.Signer{a}, payload.ErrRollback},
		{"no number, and the key ended below the floor", ring(0, until(a, 0, 200)), 0, 300, []crypto.Signer{a}, payload.ErrSignature},
		{"no number, no floor, a bounded key", ring(0, until(a, 100, 200)), 0, 0, []crypto.Signer{a}, nil},
		{"two needed, one has ended", ring(2, until(a, 0, 200), open(b)), 250, 0, []crypto.Signer{a, b}, payload.ErrSignature},
		{"asleep for years: the new key alone", ring(0, until(a, 0, 200), until(b, 150, 900)), 800, 100, []crypto.Signer{b}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			data := small(t, tt.number, "", tt.by...)
			p, err := payload.Open(t.Context(), &memory{data: data, limit: -1}, payload.Options{Keys: tt.keys, MinTimestamp: tt.floor})
			if !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) {
				t.Fatalf("%v, want %v", err, tt.want)
			}
			if err != nil {
				return
			}
			d := &disk{data: make([]byte, 4096), durable: make([]byte, 4096)}
			if err := p.Apply(t.Context(), payload.ApplyOptions{Targets: map[string]payload.Target{"usr": d}}); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A signature over the metadata alone is one signature. Where two are needed it does not help.
func TestDetachedSignatureIsOne(t *testing.T) {
	a, b := signer(t), signer(t)
	keys := &payload.Keyring{Need: 2}
	for _, k := range []crypto.Signer{a, b} {
		if err := keys.Add(k.Public()); err != nil {
			t.Fatal(err)
		}
	}
	data := small(t, 0, "", a)
	p, err := payload.Inspect(t.Context(), &memory{data: data, limit: -1})
	if err != nil {
		t.Fatal(err)
	}
	sig, err := b.Sign(rand.Reader, p.ManifestSHA256[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := payload.Open(t.Context(), &memory{data: data, limit: -1}, payload.Options{Keys: keys, MetadataSignature: sig}); !errors.Is(err, payload.ErrSignature) {
		t.Fatal(err)
	}
}

func TestProduct(t *testing.T) {
	a := signer(t)
	keys := &payload.Keyring{}
	if err := keys.Add(a.Public()); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		is, want string
		err      error
	}{{"edge", "edge", nil}, {"edge", "", nil}, {"", "", nil}, {"core", "edge", payload.ErrProduct}, {"", "edge", payload.ErrProduct}} {
		_, err := payload.Open(t.Context(), &memory{data: small(t, 0, tt.is, a), limit: -1}, payload.Options{Keys: keys, Product: tt.want})
		if !errors.Is(err, tt.err) || (err == nil) != (tt.err == nil) {
			t.Errorf("a payload for %q on %q: %v", tt.is, tt.want, err)
		}
	}
}

// Major 1 carries the number in the same field. It counts before the first write, although only the signature at the end proves it.
func TestMajorOneNumber(t *testing.T) {
	hash := make([]byte, 32)
	m := &metadata.ManifestV1{
		PartitionOperations: []*metadata.InstallOperation{{
			Type: proto.Int32(0), DataOffset: proto.Uint64(0), DataLength: proto.Uint64(4096), DataSha256Hash: hash,
			DstExtents: []*metadata.Extent{{StartBlock: proto.Uint64(0), NumBlocks: proto.Uint64(1)}},
		}},
		NewPartitionInfo: &metadata.PartitionInfo{Size: proto.Uint64(4096), Hash: hash},
		SignaturesOffset: proto.Uint64(4096), SignaturesSize: proto.Uint64(8),
		MaxTimestamp: proto.Int64(1000), NewImageInfo: &metadata.ImageInfo{Board: proto.String("edge")},
	}
	man, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	data := append([]byte("CrAU\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00"), byte(len(man)))
	data = append(append(data, man...), make([]byte, 4096+8)...)
	keys := &payload.Keyring{}
	if err := keys.Add(signer(t).Public()); err != nil {
		t.Fatal(err)
	}
	p, err := payload.Open(t.Context(), &memory{data: data, limit: -1}, payload.Options{Keys: keys, MinTimestamp: 1000, Product: "edge"})
	if err != nil || p.Major != 1 || p.MaxTimestamp != 1000 {
		t.Fatal(p, err)
	}
	if _, err := payload.Open(t.Context(), &memory{data: data, limit: -1}, payload.Options{Keys: keys, MinTimestamp: 1001}); !errors.Is(err, payload.ErrRollback) {
		t.Fatal(err)
	}
	if _, err := payload.Open(t.Context(), &memory{data: data, limit: -1}, payload.Options{Keys: keys, Product: "core"}); !errors.Is(err, payload.ErrProduct) {
		t.Fatal(err)
	}
}
