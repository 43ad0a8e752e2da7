package trust

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// The endorsement key is the one that a TPM's maker has put in at the factory and made a certificate for. It only decrypts, and so it proves nothing by itself; a
// server that knows the certificate encrypts a secret to it which the TPM gives out only if it holds the attestation key too (TPM2_ActivateCredential).

// What can be wrong with a TPM's endorsement.
var (
	// ErrNoEndorsement means that the TPM's maker has left no certificate in it.
	ErrNoEndorsement = errors.New("the TPM holds no certificate of its maker")
	// ErrEndorsementAuth means that the endorsement hierarchy has a password, which the daemon does not know.
	ErrEndorsementAuth = errors.New("the TPM's endorsement hierarchy has a password")
)

// Where a TPM keeps the authorities between its certificates and the maker's root, if it does.
const (
	chainFirst = tpm2.TPMHandle(0x01C00100)
	chainLast  = tpm2.TPMHandle(0x01C001FF)
)

// Bounds of what is read from a TPM and believed to be one from a host.
const (
	maxCertificates = 4
	maxChain        = 4
	maxCertificate  = 6 << 10
	maxProblem      = 400
)

// Endorsement is what a host shows of its TPM's origin.
type Endorsement struct {
	Certificates [][]byte `json:"certificates,omitempty"` // of endorsement keys, DER, as the TPM holds them
	Chain        [][]byte `json:"chain,omitempty"`        // authorities between those and the maker's root
	Answer       []byte   `json:"answer,omitempty"`       // to the server's challenge
	Problem      string   `json:"problem,omitempty"`      // why there is no answer, or what could not be read
}

// EndorsementRequest asks a server for a challenge that only the TPM can answer which holds both the endorsement key and the attestation key.
type EndorsementRequest struct {
	Schema string `json:"schema"`
	Key    []byte `json:"key"` // TPMT_PUBLIC of the attestation key
	Endorsement
}

// Challenge is a secret, encrypted to an endorsement key and to the name of an attestation key.
type Challenge struct {
	Schema      string `json:"schema"`
	Certificate int    `json:"certificate"` // which of the request's it is for
	Credential  []byte `json:"credential"`  // TPMS_ID_OBJECT
	Secret      []byte `json:"secret"`      // TPM2B_ENCRYPTED_SECRET, without its size
}

const (
	endorsementSchema = "flipside.endorsement/v1"
	challengeSchema   = "flipside.challenge/v1"
)

// Endorsement reads the certificates of the TPM's endorsement keys, for a server that wants to know whose TPM this is: those in a file, PEM or DER, if one is named, because not every
// maker leaves them in the TPM, and those in the TPM. One is enough: what keeps the others from being read is then the request's Problem. ErrNoEndorsement means that there are none.
func (t *TPM) Endorsement(file string) (EndorsementRequest, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	k, err := t.key(attestationHandle, true)
	if err != nil {
		return EndorsementRequest{}, fmt.Errorf("the TPM's endorsement: %w", err)
	}
	r := EndorsementRequest{Schema: endorsementSchema, Key: tpm2.Marshal(k.area)}
	var problems []error
	if file != "" {
		list, err := readCertificates(file)
		if err != nil {
			problems = append(problems, err)
		}
		for _, c := range list {
			if c.IsCA {
				r.Chain = append(r.Chain, c.Raw)
			} else {
				r.Certificates = append(r.Certificates, c.Raw)
			}
		}
	}
	held := false // the TPM holds, or may hold, something in place of a certificate
	for _, e := range endorsementKeys {
		cert, err := t.endorsementCertificate(e.index)
		if err != nil {
			problems, held = append(problems, err), true
		} else if cert != nil {
			r.Certificates = append(r.Certificates, cert)
		}
	}
	if len(r.Certificates) == 0 {
		if !held {
			problems = append(problems, fmt.Errorf("%w at any of the NV indices %s", ErrNoEndorsement, endorsementIndices()))
		}
		return r, fmt.Errorf("the TPM's endorsement: %w", inOneLine(problems))
	}
	chain, err := t.chain()
	if err != nil { // the server may know them
		problems = append(problems, err)
	}
	r.Chain = append(r.Chain, chain...)
	r.Certificates, r.Chain = r.Certificates[:min(len(r.Certificates), maxCertificates)], r.Chain[:min(len(r.Chain), maxChain)]
	if err := inOneLine(problems); err != nil {
		r.Problem = err.Error()
		r.Problem = r.Problem[:min(len(r.Problem), maxProblem)]
	}
	return r, nil
}

// inOneLine joins errors; nil if there are none.
func inOneLine(errs []error) (all error) {
	for _, err := range errs {
		if all == nil {
			all = err
		} else {
			all = fmt.Errorf("%w; %w", all, err)
		}
	}
	return all
}

// endorsementCertificate reads a certificate from an NV index; nil if the index is not there. ErrNoEndorsement means that it holds something else.
func (t *TPM) endorsementCertificate(h tpm2.TPMHandle) ([]byte, error) {
	data, err := t.readWhole(h)
	if err != nil || data == nil {
		return nil, err
	}
	cert, _ := nextDER(data)
	if cert == nil {
		return nil, fmt.Errorf("%w at NV index %#x, but %d other bytes", ErrNoEndorsement, uint32(h), len(data))
	}
	return cert, nil
}

// readWhole reads an NV index that anybody may read; nil if it is not there.
func (t *TPM) readWhole(h tpm2.TPMHandle) ([]byte, error) {
	doing := fmt.Sprintf("reading NV index %#x", uint32(h))
	rsp, err := tpm2.NVReadPublic{NVIndex: h}.Execute(t.t)
	if absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, explain(doing, err)
	}
	pub, err := rsp.NVPublic.Contents()
	if err != nil {
		return nil, explain(doing, err)
	}
	if !pub.Attributes.Written {
		return nil, nil
	}
	if pub.DataSize > maxCertificate {
		return nil, fmt.Errorf("%s: it has %d bytes, at most %d are read", doing, pub.DataSize, maxCertificate)
	}
	const atOnce = 512 // what every TPM gives out in one answer
	data := make([]byte, 0, pub.DataSize)
	for len(data) < int(pub.DataSize) {
		rsp, err := tpm2.NVRead{
			AuthHandle: plain(h, rsp.NVName), NVIndex: tpm2.NamedHandle{Handle: h, Name: rsp.NVName},
			Size: uint16(min(atOnce, int(pub.DataSize)-len(data))), Offset: uint16(len(data)),
		}.Execute(t.t)
		if err != nil {
			return nil, explain(doing, err)
		}
		if len(rsp.Data.Buffer) == 0 {
			return nil, fmt.Errorf("%s: %w: it gives out nothing", doing, ErrTPM)
		}
		data = append(data, rsp.Data.Buffer...)
	}
	return data, nil
}

// chain reads the authorities that a maker has left beside the certificates. They are written one after the other, over the borders of the indices.
func (t *TPM) chain() (list [][]byte, err error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(chainFirst), PropertyCount: 2 * maxChain}.Execute(t.t)
	if err != nil {
		return nil, explain("listing NV indices", err)
	}
	handles, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		return nil, explain("listing NV indices", err)
	}
	var data []byte
	for _, h := range handles.Handle {
		if h < chainFirst || h > chainLast {
			continue
		}
		part, err := t.readWhole(h)
		if err != nil {
			return nil, err
		}
		data = append(data, part...)
	}
	for len(list) < maxChain {
		var cert []byte
		if cert, data = nextDER(data); cert == nil {
			break
		}
		list = append(list, cert)
	}
	return list, nil
}

// nextDER splits off the first DER sequence. What follows a certificate in an NV index may be filling.
func nextDER(data []byte) (first, rest []byte) {
	var raw asn1.RawValue
	rest, err := asn1.Unmarshal(data, &raw)
	if err != nil || raw.Class != asn1.ClassUniversal || raw.Tag != asn1.TagSequence {
		return nil, nil
	}
	return raw.FullBytes, rest
}

// Answer answers a server's challenge to a request. It takes seconds on some TPMs, which make the endorsement key anew for it.
func (t *TPM) Answer(r EndorsementRequest, c Challenge) (Endorsement, error) {
	fail := func(err error) (Endorsement, error) {
		return Endorsement{}, fmt.Errorf("answering the challenge for the TPM's endorsement: %w", err)
	}
	if c.Certificate < 0 || c.Certificate >= len(r.Certificates) {
		return fail(fmt.Errorf("it is for certificate %d of %d", c.Certificate, len(r.Certificates)))
	}
	_, key, err := parseEndorsement(r.Certificates[c.Certificate])
	if err != nil {
		return fail(err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	k, err := t.key(attestationHandle, true)
	if err != nil {
		return fail(err)
	}
	made, e, err := t.endorsementKey(key)
	if err != nil {
		return fail(err)
	}
	defer tpm2.FlushContext{FlushHandle: made.Handle}.Execute(t.t)
	rsp, err := tpm2.ActivateCredential{
		ActivateHandle: plain(k.handle, k.name),
		KeyHandle:      tpm2.AuthHandle{Handle: made.Handle, Name: made.Name, Auth: e.auth()},
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: c.Credential}, Secret: tpm2.TPM2BEncryptedSecret{Buffer: c.Secret},
	}.Execute(t.t)
	if err != nil {
		return fail(explainEndorsement("reading the challenge", err))
	}
	answered := r.Endorsement
	answered.Answer = rsp.CertInfo.Buffer
	return answered, nil
}

// endorsementKey makes the TPM's endorsement key again that has this public half. It is for the caller to flush.
func (t *TPM) endorsementKey(key crypto.PublicKey) (tpm2.NamedHandle, endorsementKey, error) {
	if _, err := endorsementArea(key); err != nil {
		return tpm2.NamedHandle{}, endorsementKey{}, err
	}
	var refused error
	others := false
	for _, e := range endorsementKeys {
		area, ok := e.area(key)
		if !ok {
			continue
		}
		made, err := tpm2.CreatePrimary{
			PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)}, InPublic: tpm2.New2B(e.template),
		}.Execute(t.t)
		if err != nil { // a TPM need not know every kind
			refused = explainEndorsement("making the endorsement key", err)
			continue
		}
		if got, err := made.OutPublic.Contents(); err == nil && bytes.Equal(tpm2.Marshal(*got), tpm2.Marshal(area)) {
			return tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name}, e, nil
		}
		others = true
		if _, err := (tpm2.FlushContext{FlushHandle: made.ObjectHandle}).Execute(t.t); err != nil {
			return tpm2.NamedHandle{}, e, explain("making the endorsement key", err)
		}
	}
	if !others && refused != nil {
		return tpm2.NamedHandle{}, endorsementKey{}, refused
	}
	return tpm2.NamedHandle{}, endorsementKey{}, fmt.Errorf("%w: the certificate is for another key than the TPM's endorsement key", ErrForeign)
}

func explainEndorsement(doing string, err error) error {
	if err = explain(doing, err); errors.Is(err, ErrOwnerAuth) {
		return fmt.Errorf("%s: %w; without it the maker's certificate proves nothing to the server", doing, ErrEndorsementAuth)
	}
	return err
}

var (
	oidOAEP = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 7}
	oidSAN  = asn1.ObjectIdentifier{2, 5, 29, 17}
)

// parseEndorsement reads a certificate of an endorsement key. Some makers say that the key is for RSAES-OAEP, which the library leaves for others to read.
func parseEndorsement(der []byte) (*x509.Certificate, crypto.PublicKey, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, fmt.Errorf("reading the certificate of an endorsement key: %w", err)
	}
	if cert.PublicKey != nil {
		return cert, cert.PublicKey, nil
	}
	var info struct {
		Algorithm struct {
			Algorithm  asn1.ObjectIdentifier
			Parameters asn1.RawValue `asn1:"optional"`
		}
		Key asn1.BitString
	}
	if _, err := asn1.Unmarshal(cert.RawSubjectPublicKeyInfo, &info); err != nil || !info.Algorithm.Algorithm.Equal(oidOAEP) {
		return nil, nil, errors.New("reading the certificate of an endorsement key: its key is of a kind that is not understood")
	}
	key, err := x509.ParsePKCS1PublicKey(info.Key.RightAlign())
	if err != nil {
		return nil, nil, fmt.Errorf("reading the certificate of an endorsement key: %w", err)
	}
	return cert, key, nil
}

// DecodeChallenge reads a server's challenge.
func DecodeChallenge(data []byte) (Challenge, error) {
	var c Challenge
	if err := json.Unmarshal(data, &c); err != nil {
		return c, fmt.Errorf("the challenge cannot be read: %w", err)
	}
	if c.Schema != challengeSchema {
		return c, fmt.Errorf("the challenge has schema %q, want %q", c.Schema, challengeSchema)
	}
	return c, nil
}
