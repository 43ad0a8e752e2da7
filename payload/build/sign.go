package build

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload/metadata"
)

// Signature is one that was made elsewhere: with an HSM, or on a machine without a network.
type Signature struct {
	Key      crypto.PublicKey // of whoever signed: RSA, or ECDSA on P-256
	Payload  []byte           // over the payload's digest: RSA PKCS #1 v1.5 with SHA-256, or ECDSA on P-256 as DER
	Metadata []byte           // over the metadata's digest; of no use in major 1
}

// ErrSignature is a signature that is not by the key that it is said to be by.
var ErrSignature = errors.New("the signature is not by this key")

// sizeP256 is the longest form of a signature on P-256. One by an RSA key is as long as the modulus.
const sizeP256 = 72

type part int

const (
	ofMetadata part = iota
	ofPayload
)

type toSign struct {
	part part
	sum  [32]byte
}

// slot is the place for one signature.
type slot struct {
	size int
	sign func(toSign) ([]byte, error)
	err  error
}

// newSlot is the place for a signature by a key.
func newSlot(major int, key crypto.PublicKey, sign func(toSign) ([]byte, error)) slot {
	s := slot{sign: sign}
	switch pub := key.(type) {
	case *rsa.PublicKey:
		s.size = pub.Size()
	case *ecdsa.PublicKey:
		s.size = sizeP256
		if name := pub.Curve.Params().Name; name != "P-256" {
			s.err = fmt.Errorf("signing with an ECDSA key on %s, want P-256", name)
		} else if major == 1 {
			s.err = errors.New("signing with an ECDSA key in major version 1, whose readers know RSA only")
		}
	default:
		s.err = fmt.Errorf("signing with a key of type %T, want RSA or ECDSA", pub)
	}
	return s
}

// keySlots are the places for the signatures of keys.
func keySlots(major int, keys []crypto.Signer) []slot {
	var slots []slot
	for _, key := range keys {
		slots = append(slots, newSlot(major, key.Public(), func(d toSign) ([]byte, error) { return key.Sign(rand.Reader, d.sum[:], crypto.SHA256) }))
	}
	return slots
}

// signedBy reports whether a signature is by a key.
func signedBy(key crypto.PublicKey, sum [32]byte, sig []byte) bool {
	switch key := key.(type) {
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], sig) == nil
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(key, sum[:], sig)
	}
	return false
}

// message makes the Signatures message over a digest, or one of the same size for no digest. Without slots it is empty.
func message(major int, slots []slot, digest *toSign) ([]byte, error) {
	if major == 1 && len(slots) > 3 {
		return nil, fmt.Errorf("%d signatures in major version 1, which numbers three at most", len(slots))
	}
	var m metadata.Signatures
	for i, s := range slots {
		if s.err != nil {
			return nil, s.err
		}
		data := make([]byte, s.size)
		n := s.size
		if digest != nil {
			sig, err := s.sign(*digest)
			if err != nil {
				return nil, fmt.Errorf("signing: %w", err)
			}
			if len(sig) > s.size {
				return nil, fmt.Errorf("a signature of %d bytes in a place for %d", len(sig), s.size)
			}
			n = copy(data, sig)
		}
		sig := &metadata.Signatures_Signature{Data: data, UnpaddedSignatureSize: proto.Uint32(uint32(n))}
		if major == 1 {
			// Readers of major 1 look at version 2 only, which is the last.
			sig = &metadata.Signatures_Signature{Version: proto.Uint32(uint32(3 - len(slots) + i)), Data: data}
		}
		m.Signatures = append(m.Signatures, sig)
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(&m)
}

// Sign writes the payload src, of size bytes, to w, with signatures by these keys instead of those that it may have.
func Sign(ctx context.Context, w io.Writer, src io.ReaderAt, size int64, keys []crypto.Signer) (Result, error) {
	if len(keys) == 0 {
		return Result{}, errors.New("signing a payload: no key given")
	}
	c, err := openContainer(src, size)
	if err != nil {
		return Result{}, fmt.Errorf("signing a payload: %w", err)
	}
	return c.write(ctx, w, keySlots(c.major, keys))
}

// Digests returns the SHA-256 digests that these keys are to sign. The payload may be signed already; those signatures have no
// influence, but which keys will sign does, and their order. Major 1 has no signature of the metadata.
func Digests(ctx context.Context, src io.ReaderAt, size int64, keys []crypto.PublicKey) (payload, metadata [32]byte, err error) {
	if len(keys) == 0 {
		return payload, metadata, errors.New("hashing a payload: no key given")
	}
	c, err := openContainer(src, size)
	if err != nil {
		return payload, metadata, fmt.Errorf("hashing a payload: %w", err)
	}
	var slots []slot
	for _, key := range keys {
		slots = append(slots, newSlot(c.major, key, nil))
	}
	blank, err := message(c.major, slots, nil)
	if err != nil {
		return payload, metadata, fmt.Errorf("hashing a payload: %w", err)
	}
	meta, err := c.metadata(len(blank))
	if err != nil {
		return payload, metadata, err
	}
	h := sha256.New()
	h.Write(meta)
	if _, err := io.Copy(&counter{w: h, ctx: ctx}, io.NewSectionReader(c.data, 0, c.data.Size())); err != nil {
		return payload, metadata, fmt.Errorf("hashing a payload: %w", err)
	}
	return [32]byte(h.Sum(nil)), sha256.Sum256(meta), nil
}

// Attach writes the payload src to w with signatures that were made elsewhere over what [Digests] returned for the same keys. One that is not by
// its key is ErrSignature; what was written to w until then is of no use.
func Attach(ctx context.Context, w io.Writer, src io.ReaderAt, size int64, signatures []Signature) (Result, error) {
	if len(signatures) == 0 {
		return Result{}, errors.New("attaching signatures: none given")
	}
	c, err := openContainer(src, size)
	if err != nil {
		return Result{}, fmt.Errorf("attaching signatures: %w", err)
	}
	var slots []slot
	for i, s := range signatures {
		slots = append(slots, newSlot(c.major, s.Key, func(d toSign) ([]byte, error) {
			sig, what := s.Payload, "payload"
			if d.part == ofMetadata {
				sig, what = s.Metadata, "metadata"
			}
			if !signedBy(s.Key, d.sum, sig) {
				return nil, fmt.Errorf("%w: signature %d, of the %s, whose digest is %x", ErrSignature, i+1, what, d.sum)
			}
			return sig, nil
		}))
	}
	return c.write(ctx, w, slots)
}

// Properties reads a payload, signed or not, and returns its sizes and hashes.
func Properties(ctx context.Context, src io.ReaderAt, size int64) (Result, error) {
	c, err := openContainer(src, size)
	if err != nil {
		return Result{}, err
	}
	res := Result{Size: size, MetadataSize: c.metadataSize, Delta: c.delta()}
	meta, all := sha256.New(), sha256.New()
	if _, err := io.Copy(&counter{w: meta, ctx: ctx}, io.NewSectionReader(src, 0, c.metadataSize)); err != nil {
		return Result{}, err
	}
	if _, err := io.Copy(&counter{w: all, ctx: ctx}, io.NewSectionReader(src, 0, size)); err != nil {
		return Result{}, err
	}
	res.MetadataSHA256, res.SHA256 = [32]byte(meta.Sum(nil)), [32]byte(all.Sum(nil))
	return res, nil
}
