package payload

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload/metadata"
)

// Keyring holds the public keys whose signatures are believed. The zero Keyring believes nobody.
type Keyring struct {
	// Need is how many different keys must have signed a payload; 0 is 1.
	Need int
	keys []Key
}

// Key is a pinned key.
type Key struct {
	Public crypto.PublicKey
	Name   string // for people
	// NotBefore and NotAfter bound the max_timestamp of the payloads that the key may sign; 0 is no bound. A payload is judged by the number that it
	// is signed with, and not by a clock. One without a number is too late for a key that ended below the floor.
	NotBefore, NotAfter int64
}

func (k *Keyring) need() int { return max(1, k.Need) }

// Len returns the number of keys.
func (k *Keyring) Len() int {
	if k == nil {
		return 0
	}
	return len(k.keys)
}

// Add pins a key without bounds: RSA of at least 2048 bits, or ECDSA on P-256.
func (k *Keyring) Add(key crypto.PublicKey) error { return k.Pin(Key{Public: key}) }

// Pin pins a key. A key that is pinned already is not pinned again: its name and bounds stay those of the first time.
func (k *Keyring) Pin(key Key) error {
	if err := CheckKey(key.Public); err != nil {
		return err
	}
	for _, old := range k.keys {
		if same, ok := old.Public.(interface{ Equal(crypto.PublicKey) bool }); ok && same.Equal(key.Public) {
			return nil
		}
	}
	if len(k.keys) == maxKeys {
		return fmt.Errorf("more than %d keys", maxKeys)
	}
	k.keys = append(k.keys, key)
	return nil
}

// maxKeys bounds, with maxSignatures, the work of checking a payload.
const maxKeys = 64

// CheckKey reports whether a public key is one that can be pinned.
func CheckKey(key crypto.PublicKey) error {
	switch key := key.(type) {
	case *rsa.PublicKey:
		if n := key.N.BitLen(); n < 2048 || n > 8192 {
			return fmt.Errorf("an RSA key of %d bits is not accepted, want 2048 to 8192", n)
		}
	case *ecdsa.PublicKey:
		if key.Curve.Params().Name != "P-256" {
			return fmt.Errorf("an ECDSA key on %s is not accepted, want P-256", key.Curve.Params().Name)
		}
	default:
		return fmt.Errorf("a key of type %T is not accepted, want RSA or ECDSA", key)
	}
	return nil
}

// AddPEM pins every public key in PEM data, of which there must be one at least.
func (k *Keyring) AddPEM(data []byte) error {
	keys, err := ParsePEM(data)
	if err != nil {
		return err
	}
	for _, key := range keys {
		if err := k.Add(key); err != nil {
			return err
		}
	}
	return nil
}

// ParsePEM reads every public key in PEM data, of which there must be one at least, and each of a kind that can be pinned.
func ParsePEM(data []byte) ([]crypto.PublicKey, error) {
	var keys []crypto.PublicKey
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			break
		}
		data = rest
		if block.Type != "PUBLIC KEY" {
			return nil, fmt.Errorf("a PEM block of type %q is not a public key", block.Type)
		}
		key, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, err
		}
		if err := CheckKey(key); err != nil {
			return nil, err
		}
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return nil, errors.New("no PEM block of a public key")
	}
	return keys, nil
}

// LoadKeys pins the keys in PEM files, and in the files of directories whose names end in .pem. Paths that are not there are left out; with no
// key at all it returns ErrNoKey.
func LoadKeys(paths ...string) (*Keyring, error) {
	k := &Keyring{}
	for _, path := range paths {
		info, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading keys: %w", err)
		}
		files := []string{path}
		if info.IsDir() {
			entries, err := os.ReadDir(path)
			if err != nil {
				return nil, fmt.Errorf("reading keys: %w", err)
			}
			files = nil
			for _, e := range entries {
				if strings.HasSuffix(e.Name(), ".pem") {
					files = append(files, filepath.Join(path, e.Name()))
				}
			}
		}
		for _, f := range files {
			data, err := os.ReadFile(f)
			if err != nil {
				return nil, fmt.Errorf("reading keys: %w", err)
			}
			if err := k.AddPEM(data); err != nil {
				return nil, fmt.Errorf("reading key %s: %w", f, err)
			}
		}
	}
	if len(paths) == 0 {
		return nil, fmt.Errorf("%w: none was named", ErrNoKey)
	}
	if k.Len() == 0 {
		return nil, fmt.Errorf("%w: looked in %s", ErrNoKey, strings.Join(paths, ", "))
	}
	return k, nil
}

// maxSignatures bounds the signatures in one message, and with the number of keys the work of checking them.
const maxSignatures = 16

// verify checks a Signatures message over a SHA-256 and returns which keys have signed, of which there are as many as are needed. One signature by one
// pinned key is enough if nothing else was asked for, so that keys can rotate; others may be by anyone.
func (k *Keyring) verify(message []byte, digest [32]byte) ([]int, error) {
	if k.Len() == 0 {
		return nil, ErrNoKey
	}
	var sigs metadata.Signatures
	if err := proto.Unmarshal(message, &sigs); err != nil {
		return nil, fmt.Errorf("%w: the signatures cannot be read: %w", ErrMalformed, err)
	}
	if n := len(sigs.Signatures); n == 0 {
		return nil, ErrUnsigned
	} else if n > maxSignatures {
		return nil, fmt.Errorf("%w: %d signatures, at most %d", ErrMalformed, n, maxSignatures)
	}
	if len(sigs.ProtoReflect().GetUnknown()) > 0 {
		return nil, fmt.Errorf("%w: the signatures hold a field that nothing knows", ErrMalformed)
	}
	var signers []int
	for _, s := range sigs.Signatures {
		data := s.Data
		if len(s.ProtoReflect().GetUnknown()) > 0 { // no signature covers the signatures: what is not understood there may be anything
			return nil, fmt.Errorf("%w: a signature holds a field that nothing knows", ErrMalformed)
		}
		if s.UnpaddedSignatureSize != nil {
			if int64(*s.UnpaddedSignatureSize) > int64(len(data)) {
				return nil, fmt.Errorf("%w: a signature of %d bytes says that it has %d", ErrMalformed, len(data), *s.UnpaddedSignatureSize)
			}
			if len(bytes.TrimLeft(data[*s.UnpaddedSignatureSize:], "\x00")) > 0 {
				return nil, fmt.Errorf("%w: a signature is padded with more than zeros", ErrMalformed)
			}
			data = data[:*s.UnpaddedSignatureSize]
		}
		if i, ok := k.verifyOne(data, digest); ok && !slices.Contains(signers, i) {
			signers = append(signers, i)
		}
	}
	if len(signers) == 0 {
		return nil, fmt.Errorf("%w: %d signatures, %d pinned keys", ErrSignature, len(sigs.Signatures), k.Len())
	}
	return signers, k.enough(signers, "")
}

func (k *Keyring) enough(signers []int, why string) error {
	if len(signers) >= k.need() {
		return nil
	}
	return fmt.Errorf("%w: %d of %d pinned keys have signed, and %d must%s", ErrSignature, len(signers), k.Len(), k.need(), why)
}

// judge checks that enough of the signers were in their time when they signed a payload with this number.
func (k *Keyring) judge(signers []int, number, floor int64) error {
	var in []int
	why := ""
	for _, i := range signers {
		key, when := k.keys[i], number
		if number == 0 {
			when = floor
		}
		switch {
		case key.NotAfter != 0 && when > key.NotAfter:
			why += fmt.Sprintf("; key %q ended at %d, and the payload's number is %d", key.Name, key.NotAfter, number)
		case key.NotBefore != 0 && number != 0 && number < key.NotBefore:
			why += fmt.Sprintf("; key %q begins at %d, and the payload's number is %d", key.Name, key.NotBefore, number)
		default:
			in = append(in, i)
		}
	}
	return k.enough(in, why)
}

// verifyOne checks a raw signature and returns whose it is.
func (k *Keyring) verifyOne(sig []byte, digest [32]byte) (int, bool) {
	for i, key := range k.keys {
		switch key := key.Public.(type) {
		case *rsa.PublicKey:
			if rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], sig) == nil {
				return i, true
			}
		case *ecdsa.PublicKey:
			if ecdsa.VerifyASN1(key, digest[:], sig) {
				return i, true
			}
		}
	}
	return 0, false
}
