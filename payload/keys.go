package payload

import (
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
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload/metadata"
)

// Keyring holds the public keys whose signatures are believed. The zero Keyring believes nobody.
type Keyring struct{ keys []crypto.PublicKey }

// Len returns the number of keys.
func (k *Keyring) Len() int {
	if k == nil {
		return 0
	}
	return len(k.keys)
}

// Add pins a key: RSA of at least 2048 bits, or ECDSA on P-256.
func (k *Keyring) Add(key crypto.PublicKey) error {
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
	k.keys = append(k.keys, key)
	return nil
}

// AddPEM pins every public key in PEM data, of which there must be one at least.
func (k *Keyring) AddPEM(data []byte) error {
	n := 0
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			break
		}
		data = rest
		if block.Type != "PUBLIC KEY" {
			return fmt.Errorf("a PEM block of type %q is not a public key", block.Type)
		}
		key, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return err
		}
		if err := k.Add(key); err != nil {
			return err
		}
		n++
	}
	if n == 0 {
		return errors.New("no PEM block of a public key")
	}
	return nil
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
	if k.Len() == 0 {
		return nil, fmt.Errorf("%w: looked in %s", ErrNoKey, strings.Join(paths, ", "))
	}
	return k, nil
}

// maxSignatures bounds the signatures in one message, and with the number of keys the work of checking them.
const maxSignatures = 16

// verify checks a Signatures message over a SHA-256: one signature by one pinned key is enough, so that keys can rotate.
func (k *Keyring) verify(message []byte, digest [32]byte) error {
	if k.Len() == 0 {
		return ErrNoKey
	}
	var sigs metadata.Signatures
	if err := proto.Unmarshal(message, &sigs); err != nil {
		return fmt.Errorf("%w: the signatures cannot be read: %w", ErrMalformed, err)
	}
	if n := len(sigs.Signatures); n == 0 {
		return ErrUnsigned
	} else if n > maxSignatures {
		return fmt.Errorf("%w: %d signatures, at most %d", ErrMalformed, n, maxSignatures)
	}
	for _, s := range sigs.Signatures {
		data := s.Data
		if s.UnpaddedSignatureSize != nil {
			if int64(*s.UnpaddedSignatureSize) > int64(len(data)) {
				return fmt.Errorf("%w: a signature of %d bytes says that it has %d", ErrMalformed, len(data), *s.UnpaddedSignatureSize)
			}
			data = data[:*s.UnpaddedSignatureSize]
		}
		if k.verifyOne(data, digest) {
			return nil
		}
	}
	return fmt.Errorf("%w: %d signatures, %d pinned keys", ErrSignature, len(sigs.Signatures), k.Len())
}

// verifyOne checks a raw signature.
func (k *Keyring) verifyOne(sig []byte, digest [32]byte) bool {
	for _, key := range k.keys {
		switch key := key.(type) {
		case *rsa.PublicKey:
			if rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], sig) == nil {
				return true
			}
		case *ecdsa.PublicKey:
			if ecdsa.VerifyASN1(key, digest[:], sig) {
				return true
			}
		}
	}
	return false
}
