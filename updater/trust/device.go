package trust

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"strings"

	"github.com/google/go-tpm/tpm2"
)

// The two keys of a host, at fixed persistent handles in the owner's range. Both were made by the TPM, on the curve P-256, and cannot leave it. The
// device key signs any SHA-256 digest, for TLS and for records; because of that it proves nothing about the TPM's own state. The attestation key
// is restricted: it signs only what the TPM itself has made, so that a quote cannot be forged by who has the host.
const (
	deviceHandle      = tpm2.TPMHandle(0x8101F510)
	attestationHandle = tpm2.TPMHandle(0x8101F511)
)

// KeyName is how a configuration names the device key where it would name a key file.
const KeyName = "tpm:device"

// IsKeyName reports whether the name of a key file is that of a key in the TPM.
func IsKeyName(name string) bool { return strings.HasPrefix(name, "tpm:") }

// ErrNoDeviceKey means that no device key was made.
var ErrNoDeviceKey = errors.New("the TPM has no device key")

func keyTemplate(restricted bool) tpm2.TPMTPublic {
	label := "flipside device"
	if restricted {
		label = "flipside attestation"
	}
	x := make([]byte, 32)
	copy(x, label) // primaries of one seed differ by their templates: this makes them ours
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, SignEncrypt: true, Restricted: restricted,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			CurveID: tpm2.TPMECCNistP256,
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: x}, Y: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)}}),
	}
}

// ProvisionKeys makes the device key and the attestation key. It takes the owner's password. Keys that are there stay as they are; the same TPM, until
// it is cleared, makes the same keys again.
func (t *TPM) ProvisionKeys(password []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, k := range []struct {
		handle     tpm2.TPMHandle
		restricted bool
	}{{deviceHandle, false}, {attestationHandle, true}} {
		if _, err := t.key(k.handle, k.restricted); err == nil || !errors.Is(err, ErrNoDeviceKey) {
			if err != nil {
				return err
			}
			continue
		}
		if err := t.makeKey(k.handle, k.restricted, password); err != nil {
			return err
		}
	}
	return nil
}

func (t *TPM) makeKey(handle tpm2.TPMHandle, restricted bool, password []byte) error {
	made, err := tpm2.CreatePrimary{PrimaryHandle: owner(password), InPublic: tpm2.New2B(keyTemplate(restricted))}.Execute(t.t)
	if err != nil {
		return explain("making a key", err)
	}
	defer tpm2.FlushContext{FlushHandle: made.ObjectHandle}.Execute(t.t)
	_, err = tpm2.EvictControl{
		Auth: owner(password), ObjectHandle: &tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name}, PersistentHandle: handle,
	}.Execute(t.t)
	return explain(fmt.Sprintf("keeping a key at %#x", uint32(handle)), err)
}

// loaded is a key of the TPM.
type loaded struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	area   tpm2.TPMTPublic
	public *ecdsa.PublicKey
}

// key finds a key and checks that it is what it should be: somebody may have put one there that is known outside.
func (t *TPM) key(handle tpm2.TPMHandle, restricted bool) (loaded, error) {
	rsp, err := tpm2.ReadPublic{ObjectHandle: handle}.Execute(t.t)
	if absent(err) {
		return loaded{}, fmt.Errorf("%w at %#x; flipside trust provision makes it", ErrNoDeviceKey, uint32(handle))
	}
	if err != nil {
		return loaded{}, explain("looking for the device key", err)
	}
	area, err := rsp.OutPublic.Contents()
	if err != nil {
		return loaded{}, explain("looking for the device key", err)
	}
	pub, err := checkArea(*area, restricted)
	if err != nil {
		return loaded{}, fmt.Errorf("%w: the key at %#x: %w", ErrForeign, uint32(handle), err)
	}
	return loaded{handle, rsp.Name, *area, pub}, nil
}

// checkArea checks a public area against the template and returns its key.
func checkArea(area tpm2.TPMTPublic, restricted bool) (*ecdsa.PublicKey, error) {
	want := keyTemplate(restricted)
	if area.Type != want.Type || area.NameAlg != want.NameAlg || area.ObjectAttributes != want.ObjectAttributes || len(area.AuthPolicy.Buffer) != 0 {
		return nil, errors.New("its attributes are not those of a key that cannot leave the TPM")
	}
	parms, err := area.Parameters.ECCDetail()
	if err != nil {
		return nil, err
	}
	if parms.CurveID != tpm2.TPMECCNistP256 || parms.Scheme.Scheme != tpm2.TPMAlgECDSA {
		return nil, errors.New("it is not an ECDSA key on P-256")
	}
	point, err := area.Unique.ECC()
	if err != nil {
		return nil, err
	}
	pub, err := tpm2.ECDSAPub(parms, point)
	if err != nil {
		return nil, err
	}
	if _, err := pub.ECDH(); err != nil { // is the point on the curve?
		return nil, err
	}
	return pub, nil
}

// Device is the device key as a crypto.Signer. It opens the TPM for each signature, so that a daemon holds nothing open.
type Device struct {
	path   string
	public *ecdsa.PublicKey
}

var _ crypto.Signer = (*Device)(nil)

// OpenDevice finds the device key of the TPM at a path ("" is [DefaultDevice]). ErrNoDeviceKey means that there is none.
func OpenDevice(path string) (*Device, error) {
	t, err := OpenTPM(path)
	if err != nil {
		return nil, fmt.Errorf("the device key: %w", err)
	}
	defer t.Close()
	t.mu.Lock()
	defer t.mu.Unlock()
	k, err := t.key(deviceHandle, false)
	if err != nil {
		return nil, err
	}
	return &Device{path: path, public: k.public}, nil
}

// AttestationKey is the fingerprint of the key that proves boots.
func (t *TPM) AttestationKey() (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	k, err := t.key(attestationHandle, true)
	if err != nil {
		return "", err
	}
	return Fingerprint(k.public)
}

// Public returns the key's public half, an *ecdsa.PublicKey on P-256.
func (d *Device) Public() crypto.PublicKey { return d.public }

// Sign signs a SHA-256 digest and returns an ASN.1 signature. The randomness is the TPM's own. If the TPM holds another key by now, that
// is an error.
func (d *Device) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 || len(digest) != 32 {
		return nil, errors.New("the device key signs SHA-256 digests only")
	}
	t, err := OpenTPM(d.path)
	if err != nil {
		return nil, fmt.Errorf("the device key: %w", err)
	}
	defer t.Close()
	t.mu.Lock()
	defer t.mu.Unlock()
	k, err := t.key(deviceHandle, false)
	if err != nil {
		return nil, err
	}
	if !k.public.Equal(d.public) {
		return nil, fmt.Errorf("%w: the device key is another one than at the start", ErrForeign)
	}
	rsp, err := tpm2.Sign{
		KeyHandle: plain(k.handle, k.name), Digest: tpm2.TPM2BDigest{Buffer: digest}, InScheme: scheme(),
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
	}.Execute(t.t)
	if err != nil {
		return nil, explain("signing with the device key", err)
	}
	return encodeSignature(rsp.Signature)
}

func scheme() tpm2.TPMTSigScheme {
	return tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA256})}
}

func encodeSignature(s tpm2.TPMTSignature) ([]byte, error) {
	ec, err := s.Signature.ECDSA()
	if err != nil {
		return nil, explain("reading a signature", err)
	}
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(ec.SignatureR.Buffer), new(big.Int).SetBytes(ec.SignatureS.Buffer)})
}

// Request makes a certificate signing request (DER) for the device key.
func (d *Device) Request(name string, dns []string) ([]byte, error) {
	if name == "" {
		return nil, errors.New("a certificate request needs a name")
	}
	csr, err := x509.CreateCertificateRequest(nil, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: name}, DNSNames: dns, SignatureAlgorithm: x509.ECDSAWithSHA256,
	}, d)
	if err != nil {
		return nil, fmt.Errorf("making a certificate request: %w", err)
	}
	return csr, nil
}
