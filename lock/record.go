package lock

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// ownerRecord is the name of the record that an owner signs: the policy, and the keys of the hosts. No host can have it.
const ownerRecord = "/owner"

const recordSchema = "flipside.lock-record/v1"

// maxRecord bounds what is read of one record: the owner's names every host of the group.
const maxRecord = 4 << 20

// maxModulus bounds an RSA key, in bits. A record brings its own, and the work to verify by one grows with the square of its size and more.
const maxModulus = 8192

// saying is what a host says of itself.
type saying string

const (
	hello saying = "hello" // the first record under a name. It proves nothing, because whoever deletes a record could put it back
	up    saying = "up"    // the host is not down by a slot of the group
	down  saying = "down"  // the host goes down, or has, and nobody has judged it yet
	wants saying = "wants" // beside a place in the queue
)

// statement is the signed part of a record.
type statement struct {
	Schema  string    `json:"schema"`
	Place   string    `json:"place,omitempty"` // the store
	Group   string    `json:"group"`
	Name    string    `json:"name"`
	Born    int64     `json:"born,omitempty"`
	Version int64     `json:"version,omitempty"`
	At      time.Time `json:"at"`

	// Of a host.
	Says    saying  `json:"says,omitempty"`
	Token   int64   `json:"token,omitempty"` // of the grant that it is about
	Claim   *Claim  `json:"claim,omitempty"`
	Outcome Outcome `json:"outcome,omitempty"`

	// Of an owner.
	Policy *Policy           `json:"policy,omitempty"`
	Keys   map[string]string `json:"keys,omitempty"` // fingerprints by host
}

// envelope is a record's data.
type envelope struct {
	Statement []byte `json:"statement"` // JSON, as it was signed
	Key       []byte `json:"key"`       // SubjectPublicKeyInfo
	Signature []byte `json:"signature"`
}

// signed is what the signature is made of: nothing else that such a key signs begins like it.
func (e envelope) signed() []byte { return append([]byte(recordSchema+"\n"), e.Statement...) }

// sign makes a record's data. ECDSA and RSA keys sign the SHA-256 digest, Ed25519 keys the bytes.
func sign(key crypto.Signer, s statement) ([]byte, error) {
	s.Schema = recordSchema
	var e envelope
	var err error
	if e.Statement, err = json.Marshal(s); err != nil {
		return nil, err
	}
	if e.Key, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
		return nil, fmt.Errorf("signing for the semaphore: %w", err)
	}
	if _, ok := key.Public().(ed25519.PublicKey); ok {
		e.Signature, err = key.Sign(rand.Reader, e.signed(), crypto.Hash(0))
	} else {
		sum := sha256.Sum256(e.signed())
		e.Signature, err = key.Sign(rand.Reader, sum[:], crypto.SHA256)
	}
	if err != nil {
		return nil, fmt.Errorf("signing for the semaphore: %w", err)
	}
	return json.Marshal(e)
}

// open verifies a record's data by the key that it brings, and returns that key's fingerprint. Whose key that is, and whether the record is the last
// one, is for the caller to know.
func open(data []byte) (statement, string, error) {
	fail := func(format string, args ...any) (statement, string, error) {
		return statement{}, "", fmt.Errorf("%w: "+format, append([]any{ErrUnsigned}, args...)...)
	}
	if len(data) > maxRecord {
		return fail("it has %d bytes, at most %d", len(data), maxRecord)
	}
	var e envelope
	if err := json.Unmarshal(data, &e); err != nil {
		return fail("it cannot be read: %w", err)
	}
	key, err := x509.ParsePKIXPublicKey(e.Key)
	if err != nil {
		return fail("its key cannot be read: %w", err)
	}
	sum := sha256.Sum256(e.signed())
	ok := false
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(k, sum[:], e.Signature)
	case ed25519.PublicKey:
		ok = ed25519.Verify(k, e.signed(), e.Signature)
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits < 2048 || bits > maxModulus {
			return fail("its RSA key has %d bits, from 2048 to %d are taken", bits, maxModulus)
		}
		ok = rsa.VerifyPKCS1v15(k, crypto.SHA256, sum[:], e.Signature) == nil
	default:
		return fail("a key of type %T", key)
	}
	if !ok {
		return fail("its signature is wrong")
	}
	var s statement
	if err := json.Unmarshal(e.Statement, &s); err != nil {
		return fail("what was signed cannot be read: %w", err)
	}
	if s.Schema != recordSchema {
		return fail("it has schema %q, want %q", s.Schema, recordSchema)
	}
	print, err := Fingerprint(key)
	if err != nil {
		return fail("%w", err)
	}
	return s, print, nil
}

// last opens a record and checks that it is what was written last under its name.
func (r Record) last(group string) (statement, string, error) {
	if r.Version == 0 {
		return statement{}, "", fmt.Errorf("%w: there is no record of it", ErrUnsigned)
	}
	s, print, err := open(r.Data)
	switch {
	case err != nil:
		return statement{}, "", err
	case s.Group != group || s.Name != r.Name:
		return statement{}, "", fmt.Errorf("%w: it is of %q in group %q", ErrUnsigned, s.Name, s.Group)
	case s.Place != r.Place:
		return statement{}, "", fmt.Errorf("%w: it was signed for the store %q, and this is %q", ErrUnsigned, s.Place, r.Place)
	case r.Born == 0 || s.Born != r.Born || s.Version != r.Version:
		return statement{}, "", fmt.Errorf("%w: it is an older record that somebody has put back, or the first of its name", ErrUnsigned)
	}
	return s, print, nil
}

// Fingerprint is what a public key is called: "sha256:" and the SHA-256 of its SubjectPublicKeyInfo in hexadecimal.
func Fingerprint(key crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return "sha256:" + hex.EncodeToString(sum[:]), nil
}

// checkFingerprint reports whether a text is a fingerprint.
func checkFingerprint(s string) error {
	h, ok := strings.CutPrefix(s, "sha256:")
	if raw, err := hex.DecodeString(h); !ok || err != nil || len(raw) != sha256.Size || h != strings.ToLower(h) {
		return fmt.Errorf("%w fingerprint %q: want one such as sha256:0123…, in lower case", ErrInvalid, s)
	}
	return nil
}

// equalPolicy compares what two policies say, with the fields that this version does not know.
func equalPolicy(a, b Policy) bool {
	x, err := json.Marshal(a)
	if err != nil {
		return false
	}
	y, err := json.Marshal(b)
	return err == nil && bytes.Equal(x, y)
}
