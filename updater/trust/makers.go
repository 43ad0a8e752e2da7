package trust

import (
	"bytes"
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// ErrUnknownMaker means that a key is not shown to be in a TPM of a maker that is known.
var ErrUnknownMaker = errors.New("the key is not shown to be in a TPM of a known maker")

// Makers are the certificate authorities of the makers of TPMs that a server believes. It remembers no challenge: the secret in each follows from what it is for and
// a key of this process.
type Makers struct {
	roots, between *x509.CertPool
	key            [sha256.Size]byte
	now            func() time.Time
}

// Maker says whose TPM holds an attestation key.
type Maker struct {
	Maker  string // such as "IFX"; "" if the certificate does not say
	Model  string
	Issuer string // of the certificate
	Key    string // fingerprint of the endorsement key: it stays when the TPM is cleared
}

// LoadMakers reads the certificates of makers in a directory, PEM or DER. Those that a maker has signed itself are believed; others may lie between.
func LoadMakers(dir string) (*Makers, error) {
	m := &Makers{roots: x509.NewCertPool(), between: x509.NewCertPool(), now: time.Now}
	rand.Read(m.key[:])
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("reading the TPM makers' certificates: %w", err)
	}
	roots := 0
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		info, err := os.Stat(path)
		if err == nil && (!info.Mode().IsRegular() || strings.HasPrefix(e.Name(), ".")) {
			continue
		}
		var list []*x509.Certificate
		if err == nil {
			list, err = readCertificates(path)
		}
		if err != nil {
			return nil, fmt.Errorf("reading the TPM makers' certificates: %w", err)
		}
		for _, c := range list {
			if !bytes.Equal(c.RawSubject, c.RawIssuer) {
				m.between.AddCert(c)
				continue
			}
			m.roots.AddCert(c)
			roots++
		}
	}
	if roots == 0 {
		return nil, fmt.Errorf("reading the TPM makers' certificates: %s holds none that is signed by itself, and so none to begin with", dir)
	}
	return m, nil
}

func readCertificates(path string) (list []*x509.Certificate, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(data, []byte{0x30}) {
		list, err = x509.ParseCertificates(data)
	} else {
		for {
			var block *pem.Block
			if block, data = pem.Decode(data); block == nil {
				break
			}
			if block.Type != "CERTIFICATE" {
				continue
			}
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
			list = append(list, c)
		}
	}
	if err == nil && len(list) == 0 {
		err = errors.New("it holds no certificate")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return list, nil
}

// endorsed is a certificate of a known maker.
type endorsed struct {
	index int
	cert  *x509.Certificate
	key   crypto.PublicKey
}

// maxAuthority is the size of the largest RSA key, in bits, of an authority that a host may send.
const maxAuthority = 4096

// choose finds the first certificate that a known maker has given out.
func (m *Makers) choose(e Endorsement) (endorsed, error) {
	if len(e.Certificates) == 0 || len(e.Certificates) > maxCertificates || len(e.Chain) > maxChain {
		return endorsed{}, fmt.Errorf("%w: it comes with %d certificates and %d authorities", ErrUnknownMaker, len(e.Certificates), len(e.Chain))
	}
	between := m.between.Clone()
	for _, der := range e.Chain {
		if len(der) > maxCertificate {
			continue
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			continue
		}
		if key, ok := c.PublicKey.(*rsa.PublicKey); ok && key.N.BitLen() > maxAuthority {
			continue // whoever sends one wants to see the server count
		}
		between.AddCert(c)
	}
	var all []string
	for i, der := range e.Certificates {
		cert, key, err := m.verify(der, between)
		if err == nil {
			return endorsed{i, cert, key}, nil
		}
		all = append(all, err.Error())
	}
	return endorsed{}, fmt.Errorf("%w: %s", ErrUnknownMaker, strings.Join(all, "; "))
}

// The names that the TCG EK Credential Profile gives things.
var (
	oidEKCertificate = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
	oidManufacturer  = asn1.ObjectIdentifier{2, 23, 133, 2, 1}
	oidModel         = asn1.ObjectIdentifier{2, 23, 133, 2, 2}
)

func (m *Makers) verify(der []byte, between *x509.CertPool) (*x509.Certificate, crypto.PublicKey, error) {
	if len(der) > maxCertificate {
		return nil, nil, fmt.Errorf("a certificate of %d bytes", len(der))
	}
	cert, key, err := parseEndorsement(der)
	if err != nil {
		return nil, nil, err
	}
	if _, err := endorsementArea(key); err != nil {
		return nil, nil, err
	}
	// Maker and model stand in a name of the directory kind, which the library does not look at and so refuses when it is critical. Nothing here goes by that name.
	cert.UnhandledCriticalExtensions = slices.DeleteFunc(cert.UnhandledCriticalExtensions, oidSAN.Equal)
	_, err = cert.Verify(x509.VerifyOptions{Roots: m.roots, Intermediates: between, CurrentTime: m.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	switch {
	case err != nil:
		return nil, nil, fmt.Errorf("the certificate of %s: %w", cert.Issuer, err)
	case cert.IsCA:
		return nil, nil, fmt.Errorf("the certificate of %s is an authority's", cert.Issuer)
	case len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) > 0 && !slices.ContainsFunc(cert.UnknownExtKeyUsage, oidEKCertificate.Equal):
		return nil, nil, fmt.Errorf("the certificate of %s is not for an endorsement key", cert.Issuer)
	}
	return cert, key, nil
}

// secret is what the TPM gives out of a challenge: it follows from the nonce, which is the host's and good for some minutes, and from the two keys.
func (m *Makers) secret(nonce []byte, name tpm2.TPM2BName, cert *x509.Certificate) []byte {
	mac := hmac.New(sha256.New, m.key[:])
	for _, f := range [][]byte{[]byte(challengeSchema), nonce, name.Buffer, cert.Raw} {
		mac.Write(binary.BigEndian.AppendUint32(nil, uint32(len(f))))
		mac.Write(f)
	}
	return mac.Sum(nil)
}

// attestationName reads the public area of an attestation key and says its name, which depends on each of its attributes.
func attestationName(key []byte) (tpm2.TPM2BName, error) {
	area, err := tpm2.Unmarshal[tpm2.TPMTPublic](key)
	if err != nil {
		return tpm2.TPM2BName{}, fmt.Errorf("its key cannot be read: %w", err)
	}
	if _, err := checkArea(*area, true); err != nil {
		return tpm2.TPM2BName{}, fmt.Errorf("its key: %w", err)
	}
	name, err := tpm2.ObjectName(area)
	if err != nil {
		return tpm2.TPM2BName{}, err
	}
	return *name, nil
}

// Challenge answers an [EndorsementRequest] with a [Challenge], both as JSON. The nonce is the one that the host's proof of its boot will answer.
func (m *Makers) Challenge(nonce, request []byte) ([]byte, error) {
	fail := func(err error) ([]byte, error) { return nil, fmt.Errorf("challenging a TPM: %w", err) }
	var r EndorsementRequest
	if err := json.Unmarshal(request, &r); err != nil {
		return fail(fmt.Errorf("the request cannot be read: %w", err))
	}
	if r.Schema != endorsementSchema {
		return fail(fmt.Errorf("the request has schema %q, want %q", r.Schema, endorsementSchema))
	}
	name, err := attestationName(r.Key)
	if err != nil {
		return fail(err)
	}
	e, err := m.choose(r.Endorsement)
	if err != nil && r.Problem != "" {
		err = fmt.Errorf("%w; the host says %q", err, r.Problem[:min(len(r.Problem), maxProblem)])
	}
	if err != nil {
		return fail(err)
	}
	area, err := endorsementArea(e.key)
	if err != nil {
		return fail(err)
	}
	to, err := tpm2.ImportEncapsulationKey(&area)
	if err != nil {
		return fail(err)
	}
	c := Challenge{Schema: challengeSchema, Certificate: e.index}
	if c.Credential, c.Secret, err = tpm2.CreateCredential(rand.Reader, to, name.Buffer, m.secret(nonce, name, e.cert)); err != nil {
		return fail(err)
	}
	return json.Marshal(c)
}

// Check reports whose TPM holds the key that a proof is by. The proof must hold already; see [Proof.Verify]. The error is ErrUnknownMaker.
func (m *Makers) Check(p Proof) (Maker, error) {
	e := p.Endorsement
	switch {
	case e == nil:
		return Maker{}, fmt.Errorf("%w: the host says nothing about its TPM", ErrUnknownMaker)
	case len(e.Answer) == 0:
		return Maker{}, fmt.Errorf("%w: the host says %q", ErrUnknownMaker, e.Problem)
	}
	name, err := attestationName(p.Key)
	if err != nil {
		return Maker{}, fmt.Errorf("%w: %w", ErrUnknownMaker, err)
	}
	chosen, err := m.choose(*e)
	if err != nil {
		return Maker{}, err
	}
	if !hmac.Equal(e.Answer, m.secret(p.Claim.Nonce, name, chosen.cert)) {
		return Maker{}, fmt.Errorf("%w: its answer to the challenge is wrong", ErrUnknownMaker)
	}
	who := Maker{Issuer: chosen.cert.Issuer.CommonName}
	if who.Issuer == "" {
		who.Issuer = chosen.cert.Issuer.String()
	}
	if who.Key, err = Fingerprint(chosen.key); err != nil {
		return Maker{}, err
	}
	who.Maker, who.Model = madeBy(chosen.cert)
	return who, nil
}

// madeBy reads maker and model from the name of the directory kind in a certificate.
func madeBy(cert *x509.Certificate) (maker, model string) {
	i := slices.IndexFunc(cert.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidSAN) })
	if i < 0 {
		return "", ""
	}
	var names []asn1.RawValue
	if _, err := asn1.Unmarshal(cert.Extensions[i].Value, &names); err != nil {
		return "", ""
	}
	for _, n := range names {
		var rdn pkix.RDNSequence
		if n.Class != asn1.ClassContextSpecific || n.Tag != 4 {
			continue
		}
		if _, err := asn1.Unmarshal(n.Bytes, &rdn); err != nil {
			continue
		}
		for _, set := range rdn {
			for _, a := range set {
				text, _ := a.Value.(string)
				switch {
				case a.Type.Equal(oidManufacturer):
					maker = vendor(text)
				case a.Type.Equal(oidModel):
					model = text
				}
			}
		}
	}
	return maker, model
}

// vendor turns "id:49465800" into "IFX".
func vendor(id string) string {
	if raw, err := hex.DecodeString(strings.TrimPrefix(id, "id:")); err == nil && len(raw) == 4 {
		return strings.TrimRight(string(raw), "\x00 ")
	}
	return id
}
