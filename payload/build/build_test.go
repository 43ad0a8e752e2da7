package build_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/build"
)

func newKey(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func full(t *testing.T, s build.Spec) ([]byte, build.Result) {
	t.Helper()
	s.TempDir = t.TempDir()
	var b bytes.Buffer
	res, err := build.Full(t.Context(), &b, s)
	if err != nil {
		t.Fatal(err)
	}
	if res.Size != int64(b.Len()) || res.SHA256 != sha256.Sum256(b.Bytes()) {
		t.Errorf("the result %+v is not that of the file", res)
	}
	return b.Bytes(), res
}

func image(size int) build.Image {
	data := bytes.Repeat([]byte("a line of text that comes again\n"), size/32)
	clear(data[size/2:])
	return build.Image{Name: "usr", Data: bytes.NewReader(data), Size: int64(size)}
}

func TestSameInputSameBytes(t *testing.T) {
	key := newKey(t)
	for _, how := range []build.Compression{build.Zstd, build.XZ, build.Bzip2, build.None} {
		spec := build.Spec{Images: []build.Image{image(5 << 20)}, Compression: how, Keys: []crypto.Signer{key}, MaxTimestamp: 7}
		spec.Workers = 1
		one, _ := full(t, spec)
		spec.Workers = 4
		two, _ := full(t, spec)
		if !bytes.Equal(one, two) {
			t.Errorf("%s: one worker and four make different payloads", how)
		}
	}
}

// What is made is what is read: partitions, sizes, hashes, timestamp, metadata size, and chunks of zeros that cost nothing.
func TestWhatIsMadeIsWhatIsRead(t *testing.T) {
	key := newKey(t)
	img := image(4 << 20)
	kernel := image(1 << 20)
	kernel.Name = "kernel"
	data, res := full(t, build.Spec{Images: []build.Image{img, kernel}, Keys: []crypto.Signer{key}, MaxTimestamp: 7})
	p, err := payload.Inspect(t.Context(), source(data))
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Partitions) != 2 || p.Partitions[1].Name != "kernel" || p.MaxTimestamp != 7 || p.MetadataSize != res.MetadataSize || p.Major != 2 || p.Delta() {
		t.Errorf("read back: %+v", p)
	}
	if n := p.Partitions[0].Counts()["ZERO"]; n != 1 {
		t.Errorf("%d chunks of zeros, want 1", n)
	}
	var want bytes.Buffer
	io.Copy(&want, io.NewSectionReader(img.Data, 0, img.Size))
	if p.Partitions[0].SHA256 != sha256.Sum256(want.Bytes()) {
		t.Error("the manifest names another image")
	}
}

func TestRefusals(t *testing.T) {
	key := newKey(t)
	for _, tt := range []struct {
		name string
		spec build.Spec
		want string
	}{
		{"no key", build.Spec{Images: []build.Image{image(4096)}}, "no key given"},
		{"no image", build.Spec{Keys: []crypto.Signer{key}}, "no image"},
		{"not whole blocks", build.Spec{Images: []build.Image{{Name: "usr", Data: bytes.NewReader(make([]byte, 100)), Size: 100}}, Keys: []crypto.Signer{key}}, "multiple of 4096"},
		{"empty", build.Spec{Images: []build.Image{{Name: "usr", Data: bytes.NewReader(nil)}}, Keys: []crypto.Signer{key}}, `image "usr" is empty`},
		{"no name", build.Spec{Images: []build.Image{{Data: bytes.NewReader(make([]byte, 4096)), Size: 4096}}, Keys: []crypto.Signer{key}}, `an image is called ""`},
		{"negative number", build.Spec{Images: []build.Image{image(4096)}, Keys: []crypto.Signer{key}, MaxTimestamp: -5}, "number of the release is -5"},
		{"unknown compression", build.Spec{Images: []build.Image{image(4096)}, Compression: "rar", Keys: []crypto.Signer{key}}, `"rar"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := build.Full(t.Context(), io.Discard, tt.spec); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error = %v, want one with %q", err, tt.want)
			}
		})
	}
	onEmpty := image(4096)
	onEmpty.Old = &build.Image{Name: "usr", Data: bytes.NewReader(nil)}
	if _, err := build.Create(t.Context(), io.Discard, build.Spec{Images: []build.Image{onEmpty}, Keys: []crypto.Signer{key}}); err == nil || !strings.Contains(err.Error(), `old image "usr" is empty`) {
		t.Errorf("a delta from an empty image: %v", err)
	}
	large := image(4096)
	large.Old = &build.Image{Name: "usr", Data: bytes.NewReader(nil), Size: 8<<30 + 4096}
	if _, err := build.Create(t.Context(), io.Discard, build.Spec{Images: []build.Image{large}, Major: 1, Keys: []crypto.Signer{key}}); err == nil || !strings.Contains(err.Error(), "make a full payload") {
		t.Errorf("a delta in place from more than readers take: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := build.Full(ctx, io.Discard, build.Spec{Images: []build.Image{image(8 << 20)}, Keys: []crypto.Signer{key}}); err == nil {
		t.Error("a cancelled build succeeded")
	}
}

type source []byte

func (s source) Size() int64 { return int64(len(s)) }
func (s source) Open(_ context.Context, off int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(s[off:])), nil
}

func ExampleFull() {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	usr := bytes.NewReader(make([]byte, 1<<20))
	var out bytes.Buffer
	if _, err := build.Full(context.Background(), &out, build.Spec{
		Images: []build.Image{{Name: "usr", Data: usr, Size: usr.Size()}},
		Keys:   []crypto.Signer{key},
	}); err != nil {
		panic(err)
	}

	keys := &payload.Keyring{}
	if err := keys.Add(key.Public()); err != nil {
		panic(err)
	}
	p, err := payload.Open(context.Background(), source(out.Bytes()), payload.Options{Keys: keys})
	if err != nil {
		panic(err)
	}
	for _, part := range p.Partitions {
		fmt.Println(part.Name, part.Size, part.Counts())
	}
	// Output: usr 1048576 map[ZERO:1]
}

// A delta carries what changed between two images. A host that has the old one makes the new one of it.
func ExampleCreate() {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	old := bytes.Repeat([]byte("a line of text that comes again\n"), 1<<15)
	new := bytes.Clone(old)
	copy(new[500000:], "another line")
	usr := build.Image{
		Name: "usr", Data: bytes.NewReader(new), Size: int64(len(new)),
		Old: &build.Image{Data: bytes.NewReader(old), Size: int64(len(old))},
	}
	var out bytes.Buffer
	res, err := build.Create(context.Background(), &out, build.Spec{Images: []build.Image{usr}, Keys: []crypto.Signer{key}})
	if err != nil {
		panic(err)
	}
	fmt.Println(res.Delta, res.Size < 2000)
	// Output: true true
}

// A release whose key is on a machine without a network: what is to be signed goes there, and the signatures come back.
func ExampleAttach() {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	ctx, usr := context.Background(), bytes.NewReader(make([]byte, 1<<20))
	var bare, out bytes.Buffer
	if _, err := build.Create(ctx, &bare, build.Spec{Images: []build.Image{{Name: "usr", Data: usr, Size: usr.Size()}}, Unsigned: true}); err != nil {
		panic(err)
	}
	src := bytes.NewReader(bare.Bytes())
	ofPayload, ofMetadata, err := build.Digests(ctx, src, src.Size(), []crypto.PublicKey{key.Public()})
	if err != nil {
		panic(err)
	}

	s := build.Signature{Key: key.Public()} // made elsewhere
	s.Payload, _ = rsa.SignPKCS1v15(nil, key, crypto.SHA256, ofPayload[:])
	s.Metadata, _ = rsa.SignPKCS1v15(nil, key, crypto.SHA256, ofMetadata[:])

	if _, err := build.Attach(ctx, &out, src, src.Size(), []build.Signature{s}); err != nil {
		panic(err)
	}
	keys := &payload.Keyring{}
	if err := keys.Add(key.Public()); err != nil {
		panic(err)
	}
	_, err = payload.Open(ctx, source(out.Bytes()), payload.Options{Keys: keys})
	fmt.Println(err)
	// Output: <nil>
}
