// Package keytest makes keys for tests that sign releases, and the files in which others pin them.
package keytest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"testing"
)

// Pinned makes a key to sign with, and leaves its public half in the file at path.
func Pinned(t testing.TB, path string) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, Public(t, key), 0o644); err != nil {
		t.Fatal(err)
	}
	return key
}

// Public is what a file holds that pins a key.
func Public(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}
