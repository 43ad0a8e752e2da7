package trust

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"math/big"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/flipside-linux/flipside/updater/trust/trusttest"
)

func TestDeviceKey(t *testing.T) {
	e := trusttest.Start(t)
	if _, err := OpenDevice(e.Socket); !errors.Is(err, ErrNoDeviceKey) {
		t.Fatalf("an empty TPM has a device key: %v", err)
	}
	tpm := openTPM(t, e)
	setOwner(t, tpm, nil, []byte("secret"))
	if err := tpm.ProvisionKeys([]byte("wrong")); !errors.Is(err, ErrOwnerAuth) {
		t.Fatalf("with a wrong password: %v", err)
	}
	if err := tpm.ProvisionKeys([]byte("secret")); err != nil {
		t.Fatal(err)
	}
	d, err := OpenDevice(e.Socket)
	if err != nil {
		t.Fatal(err)
	}
	e.Kill()
	sum := sha256.Sum256([]byte("x"))
	if _, err := d.Sign(nil, sum[:], crypto.SHA256); !errors.Is(err, ErrTPM) {
		t.Fatalf("it signs without power: %v", err)
	}
	e.Power()
	if err := tpm.ProvisionKeys(nil); err != nil { // there already: takes no password
		t.Fatal(err)
	}
	sig, err := d.Sign(nil, sum[:], crypto.SHA256)
	if err != nil || !ecdsa.VerifyASN1(d.Public().(*ecdsa.PublicKey), sum[:], sig) {
		t.Fatal(err)
	}
	if _, err := d.Sign(nil, sum[:20], crypto.SHA1); err == nil {
		t.Error("it signs SHA-1")
	}
	der, err := d.Request("node-7", []string{"node-7.example"})
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil || csr.CheckSignature() != nil || csr.Subject.CommonName != "node-7" {
		t.Fatal(csr, err)
	}
	e.Replace()
	if err := openTPM(t, e).ProvisionKeys(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Sign(nil, sum[:], crypto.SHA256); !errors.Is(err, ErrForeign) {
		t.Errorf("the key of another TPM signs for this one: %v", err)
	}
}

// Neither key can be taken out of the TPM, and the attestation key signs nothing that did not come from the TPM.
func TestKeysStayInTheTPM(t *testing.T) {
	tpm := openTPM(t, trusttest.Start(t))
	if err := tpm.ProvisionKeys(nil); err != nil {
		t.Fatal(err)
	}
	for _, h := range []tpm2.TPMHandle{deviceHandle, attestationHandle} {
		k, err := tpm.key(h, h == attestationHandle)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := (tpm2.Duplicate{
			ObjectHandle: plain(h, k.name), NewParentHandle: tpm2.TPMRHNull, Symmetric: tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull},
		}).Execute(tpm.t); err == nil {
			t.Errorf("the key at %#x can be duplicated", uint32(h))
		}
		if h != attestationHandle {
			continue
		}
		sum := sha256.Sum256([]byte("a quote, honestly"))
		if _, err := (tpm2.Sign{
			KeyHandle: plain(h, k.name), Digest: tpm2.TPM2BDigest{Buffer: sum[:]}, InScheme: scheme(),
			Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
		}).Execute(tpm.t); err == nil {
			t.Error("the attestation key signs anything")
		}
	}
}

// TLS with a client certificate whose key is in the TPM.
func TestDeviceKeyForTLS(t *testing.T) {
	e := trusttest.Start(t)
	if err := openTPM(t, e).ProvisionKeys(nil); err != nil {
		t.Fatal(err)
	}
	d, err := OpenDevice(e.Socket)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	authority := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, authority, authority, ca.Public(), ca)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	leaf, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "node-7"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, root, d.Public(), ca)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write([]byte(r.TLS.PeerCertificates[0].Subject.CommonName))
	}))
	srv.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	srv.StartTLS()
	defer srv.Close()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		client := srv.Client()
		conf := client.Transport.(*http.Transport).TLSClientConfig.Clone()
		conf.Certificates, conf.MinVersion, conf.MaxVersion = []tls.Certificate{{Certificate: [][]byte{leaf}, PrivateKey: d}}, version, version
		resp, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: conf}}).Get(srv.URL)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
	}
	if resp, err := srv.Client().Get(srv.URL); err == nil {
		resp.Body.Close()
		t.Error("the server takes a client without the key")
	}
}

func TestProof(t *testing.T) {
	e := trusttest.Start(t)
	tpm := openTPM(t, e)
	nonce := []byte("0123456789abcdef")
	claim := Claim{Host: "abcd", Nonce: nonce, Slot: "USR-B", Version: "2.0.0"}
	if _, err := tpm.Prove(claim); !errors.Is(err, ErrNoDeviceKey) {
		t.Fatalf("a proof without a key: %v", err)
	}
	if err := tpm.ProvisionKeys(nil); err != nil {
		t.Fatal(err)
	}
	p, err := tpm.Prove(claim)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	if p, err = DecodeProof(data); err != nil {
		t.Fatal(err)
	}
	key, err := p.Verify("abcd", nonce)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Verify("abcd", []byte("another nonce…….")); !errors.Is(err, ErrProof) {
		t.Errorf("a replayed proof: %v", err)
	}
	if _, err := p.Verify("other", nonce); !errors.Is(err, ErrProof) {
		t.Errorf("another host's proof: %v", err)
	}
	for name, change := range map[string]func(*Proof){
		"the version":        func(p *Proof) { p.Claim.Version = "3.0.0" },
		"the slot":           func(p *Proof) { p.Claim.Slot = "USR-A" },
		"slot and version":   func(p *Proof) { p.Claim.Slot, p.Claim.Version = "USR-B2", ".0.0" },
		"a PCR":              func(p *Proof) { p.PCRs[7][0] ^= 1 },
		"a PCR less":         func(p *Proof) { delete(p.PCRs, 7) },
		"a PCR more":         func(p *Proof) { p.PCRs[15] = make([]byte, 32) },
		"a PCR out of space": func(p *Proof) { p.PCRs[1<<30] = make([]byte, 32) },
		"no PCRs":            func(p *Proof) { p.PCRs = nil },
		"the quote":          func(p *Proof) { p.Quote[len(p.Quote)-1] ^= 1 },
		"the signature":      func(p *Proof) { p.Signature[9] ^= 1 },
		"the key":            func(p *Proof) { p.Key[len(p.Key)-1] ^= 1 },
		"the key's freedom":  func(p *Proof) { p.Key = deviceArea(t, tpm) },
		"a forged quote":     func(p *Proof) { forge(t, p) },
	} {
		q, err := DecodeProof(data)
		if err != nil {
			t.Fatal(err)
		}
		change(&q)
		if _, err := q.Verify("abcd", nonce); !errors.Is(err, ErrProof) {
			// A forged quote by a key outside a TPM has another fingerprint; that is all that shows it.
			if got, _ := q.Verify("abcd", nonce); name != "a forged quote" || err != nil || got == key {
				t.Errorf("%s changed: %v", name, err)
			}
		}
	}
	// The same TPM has the same key after power loss and another one after a clear.
	e.Kill()
	e.Power()
	if p, err = tpm.Prove(claim); err != nil {
		t.Fatal(err)
	}
	if again, err := p.Verify("abcd", nonce); err != nil || again != key {
		t.Error(again, err)
	}
	if _, err := (tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: 11, Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}},
	}).Execute(tpm.t); err != nil {
		t.Fatal(err)
	}
	q, err := tpm.Prove(claim)
	if err != nil || string(q.PCRs[11]) == string(p.PCRs[11]) {
		t.Errorf("another boot has the same PCRs: %v", err)
	}
}

func deviceArea(t *testing.T, tpm *TPM) []byte {
	t.Helper()
	k, err := tpm.key(deviceHandle, false)
	if err != nil {
		t.Fatal(err)
	}
	return tpm2.Marshal(k.area)
}

// forge signs the quote with a key that was made outside a TPM and claims to be inside.
func forge(t *testing.T, p *Proof) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	area := keyTemplate(true)
	x, y := make([]byte, 32), make([]byte, 32)
	raw, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	copy(x, raw[1:33])
	copy(y, raw[33:])
	area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: x}, Y: tpm2.TPM2BECCParameter{Buffer: y}})
	p.Key = tpm2.Marshal(area)
	sum := sha256.Sum256(p.Quote)
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	if p.Signature, err = asn1.Marshal(struct{ R, S *big.Int }{r, s}); err != nil {
		t.Fatal(err)
	}
}

func FuzzProof(f *testing.F) {
	f.Add([]byte(`{"schema":"flipside.proof/v1","claim":{"host":"a","nonce":"MDEyMzQ1Njc4OWFiY2RlZg==","slot":"USR-A","version":"1"},"pcrs":{"0":""},"quote":"","signature":"","key":"ACM="}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := DecodeProof(data)
		if err != nil {
			return
		}
		if _, err := p.Verify(p.Claim.Host, p.Claim.Nonce); err == nil && len(p.PCRs) == 0 {
			t.Fatal("a proof of nothing holds")
		}
	})
}

// A TPM whose SHA-256 bank is off proves nothing and says so for good, also where a policy names a PCR that would have to be read.
func TestNoSHA256Bank(t *testing.T) {
	e := trusttest.Start(t)
	e.WithoutSHA256()
	tpm := openTPM(t, e)
	if err := tpm.ProvisionKeys(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := tpm.PCRs(ProofPCRs); !errors.Is(err, ErrNoBank) || errors.Is(err, ErrTPM) {
		t.Errorf("reading: %v", err)
	}
	if _, err := tpm.Prove(Claim{Host: "a", Nonce: make([]byte, 16), Slot: "USR-A", Version: "1"}); !errors.Is(err, ErrNoBank) {
		t.Errorf("proving: %v", err)
	}
	key := rsaKey(t)
	at := readKernel(t, unified("2", nil)).At(DefaultPhase)
	sigs, err := SignPCRs(key, map[uint][]byte{11: at[:], 7: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	keys := PCRKeys{Keys: []*rsa.PublicKey{&key.PublicKey}, Current: tpm.PCRs}
	if err := keys.Check(bytes.NewReader(unified("2", sigs)), nil); !errors.Is(err, ErrUnpredictable) || !errors.Is(err, ErrNoBank) {
		t.Errorf("judging a policy: %v", err)
	}
	// The floor needs no PCRs.
	if err := tpm.Provision(nil, 3*day); err != nil {
		t.Error(err)
	}
	wantFloor(t, tpm, 3*day)
}
