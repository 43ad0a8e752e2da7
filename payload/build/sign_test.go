package build_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/build"
)

func ring(t testing.TB, keys ...crypto.Signer) *payload.Keyring {
	t.Helper()
	r := &payload.Keyring{}
	for _, k := range keys {
		if err := r.Add(k.Public()); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

type disk struct{ b []byte }

func (d *disk) WriteAt(p []byte, off int64) (int, error) { return copy(d.b[off:], p), nil }
func (d *disk) Flush() error                             { return nil }

// accepted applies a payload with a key pinned.
func accepted(t testing.TB, data []byte, key crypto.Signer) error {
	p, err := payload.Open(t.Context(), source(data), payload.Options{Keys: ring(t, key)})
	if err != nil {
		return err
	}
	targets := map[string]payload.Target{}
	for _, q := range p.Partitions {
		targets[q.Name] = &disk{make([]byte, q.Size+1<<20)}
	}
	return p.Apply(t.Context(), payload.ApplyOptions{Targets: targets})
}

// TestSigningElsewhere: an unsigned payload, hashed, signed by somebody else and put together, is byte for byte the one that was signed at once.
func TestSigningElsewhere(t *testing.T) {
	one, two := newKey(t), newKey(t)
	for _, major := range []int{1, 2} {
		spec := build.Spec{Images: []build.Image{image(3 << 20)}, Major: major, Keys: []crypto.Signer{one, two}}
		want, _ := create(t, spec)
		spec.Keys, spec.Unsigned = nil, true
		bare, _ := create(t, spec)
		src := bytes.NewReader(bare)
		pubs := []crypto.PublicKey{one.Public(), two.Public()}
		pay, meta, err := build.Digests(t.Context(), src, src.Size(), pubs)
		if err != nil {
			t.Fatal(err)
		}
		var sigs []build.Signature
		for _, key := range []*rsa.PrivateKey{one, two} {
			s := build.Signature{Key: key.Public()}
			if s.Payload, err = rsa.SignPKCS1v15(nil, key, crypto.SHA256, pay[:]); err != nil {
				t.Fatal(err)
			}
			if s.Metadata, err = rsa.SignPKCS1v15(nil, key, crypto.SHA256, meta[:]); err != nil {
				t.Fatal(err)
			}
			sigs = append(sigs, s)
		}
		var out bytes.Buffer
		if _, err := build.Attach(t.Context(), &out, src, src.Size(), sigs); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Bytes(), want) {
			t.Errorf("major %d: signed elsewhere it is another file than signed at once", major)
		}
		for _, key := range []crypto.Signer{one, two} {
			if err := accepted(t, out.Bytes(), key); err != nil {
				t.Errorf("major %d: %v", major, err)
			}
		}
		// The digests do not depend on signatures that are there already, and signing again makes the same file.
		src = bytes.NewReader(want)
		if again, _, err := build.Digests(t.Context(), src, src.Size(), pubs); err != nil || again != pay {
			t.Errorf("major %d: the signed payload has another digest, %v", major, err)
		}
		out.Reset()
		if _, err := build.Sign(t.Context(), &out, src, src.Size(), []crypto.Signer{one, two}); err != nil || !bytes.Equal(out.Bytes(), want) {
			t.Errorf("major %d: signing again changes it, %v", major, err)
		}
	}
}

// A payload signed again is accepted by those who pin the new key, and no longer by the others.
func TestSigningAgain(t *testing.T) {
	old := newKey(t)
	new, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	data, _ := create(t, build.Spec{Images: []build.Image{image(1 << 20)}, Keys: []crypto.Signer{old}})
	src := bytes.NewReader(data)
	var out bytes.Buffer
	if _, err := build.Sign(t.Context(), &out, src, src.Size(), []crypto.Signer{new}); err != nil {
		t.Fatal(err)
	}
	if err := accepted(t, out.Bytes(), new); err != nil {
		t.Error(err)
	}
	if accepted(t, out.Bytes(), old) == nil {
		t.Error("the old key is still accepted")
	}
}

func TestSigningRefuses(t *testing.T) {
	key := newKey(t)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good, _ := create(t, build.Spec{Images: []build.Image{image(1 << 20)}, Keys: []crypto.Signer{key}})
	v1, _ := create(t, build.Spec{Images: []build.Image{image(1 << 20)}, Keys: []crypto.Signer{key}, Major: 1})
	for _, tt := range []struct {
		name string
		data []byte
		keys []crypto.Signer
		want string
	}{
		{"no key", good, nil, "no key"},
		{"another curve", good, []crypto.Signer{p384}, "P-384"},
		{"ECDSA in major 1", v1, []crypto.Signer{p256}, "RSA only"},
		{"too many in major 1", v1, []crypto.Signer{key, key, key, key}, "three at most"},
		{"no payload", []byte("this is not a payload at all"), []crypto.Signer{key}, "no payload"},
		{"cut off", good[:50], []crypto.Signer{key}, "in a file of 50"},
		{"empty", nil, []crypto.Signer{key}, "header"},
	} {
		var out bytes.Buffer
		_, err := build.Sign(t.Context(), &out, bytes.NewReader(tt.data), int64(len(tt.data)), tt.keys)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error = %v, want one with %q", tt.name, err, tt.want)
		}
	}
	src := bytes.NewReader(good)
	for name, s := range map[string]build.Signature{
		"too long": {Key: key.Public(), Payload: make([]byte, 257), Metadata: make([]byte, 257)},
		"none":     {Key: key.Public()},
		"zeros":    {Key: key.Public(), Payload: make([]byte, 256), Metadata: make([]byte, 256)},
	} {
		if _, err := build.Attach(t.Context(), &bytes.Buffer{}, src, src.Size(), []build.Signature{s}); !errors.Is(err, build.ErrSignature) {
			t.Errorf("a signature that is %s: %v", name, err)
		}
	}
}
