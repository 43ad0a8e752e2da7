package trusttest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
)

// Maker stands for a maker of TPMs: a root, an authority below it, and certificates of endorsement keys by that authority.
type Maker struct {
	t             testing.TB
	root, between *x509.Certificate
	rootKey, key  *ecdsa.PrivateKey
}

// NewMaker makes a maker's authorities.
func NewMaker(t testing.TB, name string) *Maker {
	t.Helper()
	m := &Maker{t: t}
	authority := func(cn string, parent *x509.Certificate, by *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: cn}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(30, 0, 0),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
		if parent == nil {
			parent, by = c, key
		}
		return m.sign(c, parent, key.Public(), by), key
	}
	m.root, m.rootKey = authority(name+" root", nil, nil)
	m.between, m.key = authority(name+" authority", m.root, m.rootKey)
	return m
}

func (m *Maker) sign(c, parent *x509.Certificate, pub crypto.PublicKey, by crypto.Signer) *x509.Certificate {
	m.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, by)
	if err != nil {
		m.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		m.t.Fatal(err)
	}
	return cert
}

// Root is the maker's root certificate, DER; Between that of the authority below it.
func (m *Maker) Root() []byte { return m.root.Raw }

// Between is the certificate of the authority below the root, DER.
func (m *Maker) Between() []byte { return m.between.Raw }

// Dir is a new directory with certificates, PEM.
func (m *Maker) Dir(certs ...[]byte) string {
	m.t.Helper()
	dir := m.t.TempDir()
	var data []byte
	for _, c := range certs {
		data = append(data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c})...)
	}
	if err := os.WriteFile(filepath.Join(dir, "maker.pem"), data, 0o644); err != nil {
		m.t.Fatal(err)
	}
	return dir
}

// Certify makes a certificate of an endorsement key, as the TCG's profile has it: maker and model in a critical name of the directory kind. edit may change it before it
// is signed.
func (m *Maker) Certify(key crypto.PublicKey, edit func(*x509.Certificate)) []byte {
	m.t.Helper()
	type attribute struct {
		Type  asn1.ObjectIdentifier
		Value string `asn1:"utf8"`
	}
	type relativeSET []attribute
	name, err := asn1.Marshal([]relativeSET{
		{{asn1.ObjectIdentifier{2, 23, 133, 2, 1}, "id:49465800"}}, {{asn1.ObjectIdentifier{2, 23, 133, 2, 2}, "SLB9670"}}, {{asn1.ObjectIdentifier{2, 23, 133, 2, 3}, "id:0D0B"}},
	})
	if err != nil {
		m.t.Fatal(err)
	}
	names, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: name}})
	if err != nil {
		m.t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(7), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(30, 0, 0), BasicConstraintsValid: true,
		ExtraExtensions:    []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: names}},
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}},
	}
	if edit != nil {
		edit(c)
	}
	return m.sign(c, m.between, key, m.key).Raw
}

// The NV indices of certificates of endorsement keys, and of the first authority above them.
const (
	ECCCertificate = 0x01C0000A
	RSACertificate = 0x01C00002
	FirstAuthority = 0x01C00100
)

// EndorsementKey is the key that belongs to a certificate at an index.
func (e *Emulator) EndorsementKey(index uint32) crypto.PublicKey {
	e.t.Helper()
	t, err := linuxudstpm.Open(e.Socket)
	if err != nil {
		e.t.Fatal(err)
	}
	template := tpm2.ECCEKTemplate
	if index == RSACertificate {
		template = tpm2.RSAEKTemplate
	}
	made, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(template)}.Execute(t)
	if err != nil {
		e.t.Fatal(err)
	}
	defer tpm2.FlushContext{FlushHandle: made.ObjectHandle}.Execute(t)
	area, err := made.OutPublic.Contents()
	if err != nil {
		e.t.Fatal(err)
	}
	key, err := tpm2.Pub(*area)
	if err != nil {
		e.t.Fatal(err)
	}
	return key
}

// Store writes an NV index that everybody may read, as a TPM's maker does. What is there is replaced.
func (e *Emulator) Store(index uint32, data []byte) {
	e.t.Helper()
	t, err := linuxudstpm.Open(e.Socket)
	if err != nil {
		e.t.Fatal(err)
	}
	h := tpm2.TPMHandle(index)
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	name := func() (tpm2.TPM2BName, bool) {
		rsp, err := tpm2.NVReadPublic{NVIndex: h}.Execute(t)
		if err != nil {
			return tpm2.TPM2BName{}, false
		}
		return rsp.NVName, true
	}
	if n, ok := name(); ok {
		if _, err := (tpm2.NVUndefineSpace{AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: h, Name: n}}).Execute(t); err != nil {
			e.t.Fatal(err)
		}
	}
	if _, err := (tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
		NVIndex: h, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(data)),
		Attributes: tpm2.TPMANV{NT: tpm2.TPMNTOrdinary, AuthRead: true, OwnerRead: true, OwnerWrite: true, NoDA: true},
	})}).Execute(t); err != nil {
		e.t.Fatal(err)
	}
	for at := 0; at < len(data); at += 512 {
		n, _ := name()
		if _, err := (tpm2.NVWrite{
			AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: h, Name: n}, Offset: uint16(at), Data: tpm2.TPM2BMaxNVBuffer{Buffer: data[at:min(at+512, len(data))]},
		}).Execute(t); err != nil {
			e.t.Fatal(err)
		}
	}
}
