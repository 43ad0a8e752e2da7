package trust

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/flipside-linux/flipside/updater/trust/trusttest"
)

var testNonce = bytes.Repeat([]byte{7}, 32)

func makers(t *testing.T, dir string) *Makers {
	t.Helper()
	m, err := LoadMakers(dir)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// enrol goes through the exchange of a host and a server: request, challenge, answer, proof, as they travel.
func enrol(t *testing.T, tpm *TPM, m *Makers) (Maker, error) {
	t.Helper()
	return enrolFrom(t, tpm, m, "")
}

func enrolFrom(t *testing.T, tpm *TPM, m *Makers, file string) (Maker, error) {
	t.Helper()
	r, err := tpm.Endorsement(file)
	if err != nil {
		return Maker{}, err
	}
	data, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if data, err = m.Challenge(testNonce, data); err != nil {
		return Maker{}, err
	}
	c, err := DecodeChallenge(data)
	if err != nil {
		t.Fatal(err)
	}
	e, err := tpm.Answer(r, c)
	if err != nil {
		return Maker{}, err
	}
	p := prove(t, tpm)
	p.Endorsement = &e
	if data, err = json.Marshal(p); err != nil {
		t.Fatal(err)
	}
	p, _, err = CheckProof(data, "abcd", testNonce)
	if err != nil {
		t.Fatal(err)
	}
	return m.Check(p)
}

func prove(t *testing.T, tpm *TPM) Proof {
	t.Helper()
	p, err := tpm.Prove(Claim{Host: "abcd", Nonce: testNonce, Slot: "USR-B", Version: "2.0.0"})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// keyed is an emulator with an attestation key.
func keyed(t *testing.T) (*trusttest.Emulator, *TPM) {
	t.Helper()
	e := trusttest.Start(t)
	tpm := openTPM(t, e)
	if err := tpm.ProvisionKeys(nil); err != nil {
		t.Fatal(err)
	}
	return e, tpm
}

// What cannot be read hides nothing that can: an index whose reading has a password, one that holds something else, a file that is gone.
func TestEndorsementWhereSomeCannotBeRead(t *testing.T) {
	maker := trusttest.NewMaker(t, "Muster")
	known := makers(t, maker.Dir(maker.Root(), maker.Between()))
	e, tpm := keyed(t)
	good := maker.Certify(e.EndorsementKey(trusttest.RSACertificate), nil)
	gone := filepath.Join(t.TempDir(), "ek.pem")
	shut := func(h tpm2.TPMHandle) {
		t.Helper()
		e.Store(uint32(h), []byte("what nobody sees"))
		pub, err := tpm2.NVReadPublic{NVIndex: h}.Execute(tpm.t)
		if err == nil {
			err = tpm.undefine(h, index{name: pub.NVName}, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		attr := tpm2.TPMANV{NT: tpm2.TPMNTOrdinary, AuthRead: true, OwnerWrite: true, NoDA: true}
		public := tpm2.New2B(tpm2.TPMSNVPublic{NVIndex: h, NameAlg: tpm2.TPMAlgSHA256, Attributes: attr, DataSize: 8})
		if _, err := (tpm2.NVDefineSpace{AuthHandle: owner(nil), Auth: tpm2.TPM2BAuth{Buffer: []byte("secret")}, PublicInfo: public}).Execute(tpm.t); err != nil {
			t.Fatal(err)
		}
		if pub, err = (tpm2.NVReadPublic{NVIndex: h}).Execute(tpm.t); err != nil {
			t.Fatal(err)
		}
		if _, err := (tpm2.NVWrite{AuthHandle: owner(nil), NVIndex: tpm2.NamedHandle{Handle: h, Name: pub.NVName}, Data: tpm2.TPM2BMaxNVBuffer{Buffer: make([]byte, 8)}}).Execute(tpm.t); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name string
		ecc  func()
		says string
	}{
		{"a password", func() { shut(trusttest.ECCCertificate) }, "reading NV index 0x1c0000a"},
		{"something else", func() { e.Store(trusttest.ECCCertificate, []byte("none")) }, "at NV index 0x1c0000a, but 4 other bytes"},
	} {
		tt.ecc()
		e.Store(trusttest.RSACertificate, []byte("none either"))
		r, err := tpm.Endorsement(gone)
		if err == nil || len(r.Certificates) != 0 {
			t.Fatalf("%s, and no other: %d certificates, %v", tt.name, len(r.Certificates), err)
		}
		for _, want := range []string{gone, tt.says, "at NV index 0x1c00002, but 11 other bytes"} {
			if !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%s, and no other: %q does not say %q in one line", tt.name, err, want)
			}
		}
		e.Store(trusttest.RSACertificate, good)
		r, err = tpm.Endorsement(gone)
		if err != nil || len(r.Certificates) != 1 || !bytes.Equal(r.Certificates[0], good) {
			t.Fatalf("%s: %d certificates, %v", tt.name, len(r.Certificates), err)
		}
		for _, want := range []string{gone, tt.says} {
			if !strings.Contains(r.Problem, want) {
				t.Errorf("%s: %q does not say %q", tt.name, r.Problem, want)
			}
		}
		if who, err := enrolFrom(t, tpm, known, gone); err != nil || who.Issuer == "" {
			t.Errorf("%s: %+v, %v", tt.name, who, err)
		}
		// A server that knows another maker says what the host could not read, too.
		stranger := trusttest.NewMaker(t, "Fremd")
		if _, err := enrolFrom(t, tpm, makers(t, stranger.Dir(stranger.Root())), gone); !errors.Is(err, ErrUnknownMaker) || !strings.Contains(err.Error(), "the host says") {
			t.Errorf("%s, and an unknown maker: %v", tt.name, err)
		}
	}
}

// A TPM of a known maker is known by its certificate, wherever the authorities between are, and stays the same one when its owner's keys are new.
func TestEndorsement(t *testing.T) {
	maker := trusttest.NewMaker(t, "Muster")
	for _, tt := range []struct {
		name  string
		index uint32
		chain bool
		dir   string
	}{
		{"a key on a curve", trusttest.ECCCertificate, false, maker.Dir(maker.Root(), maker.Between())},
		{"an RSA key", trusttest.RSACertificate, false, maker.Dir(maker.Between(), maker.Root())},
		{"an authority in the TPM", trusttest.ECCCertificate, true, maker.Dir(maker.Root())},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, tpm := keyed(t)
			if _, err := tpm.Endorsement(""); !errors.Is(err, ErrNoEndorsement) {
				t.Fatalf("a TPM without a certificate: %v", err)
			}
			key := e.EndorsementKey(tt.index)
			e.Store(tt.index, append(maker.Certify(key, nil), make([]byte, 600)...)) // filled up, as some are
			if tt.chain {
				half := len(maker.Between()) / 2
				e.Store(trusttest.FirstAuthority, maker.Between()[:half])
				e.Store(trusttest.FirstAuthority+1, maker.Between()[half:])
			}
			print, err := Fingerprint(key)
			if err != nil {
				t.Fatal(err)
			}
			want := Maker{Maker: "IFX", Model: "SLB9670", Issuer: "Muster authority", Key: print}
			if got, err := enrol(t, tpm, makers(t, tt.dir)); err != nil || got != want {
				t.Fatalf("%+v, %v; want %+v", got, err, want)
			}
			old, err := tpm.AttestationKey()
			if err != nil {
				t.Fatal(err)
			}
			// Cleared: the owner's keys are new, the maker's stays. The NV indices that a maker defines stay too; these here are the owner's.
			if _, err := (tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}).Execute(tpm.t); err != nil {
				t.Fatal(err)
			}
			if err := tpm.ProvisionKeys(nil); err != nil {
				t.Fatal(err)
			}
			e.Store(tt.index, maker.Certify(key, nil))
			if tt.chain {
				e.Store(trusttest.FirstAuthority, maker.Between())
			}
			if now, err := tpm.AttestationKey(); err != nil || now == old {
				t.Errorf("a cleared TPM has its old key: %v", err)
			}
			if got, err := enrol(t, tpm, makers(t, tt.dir)); err != nil || got != want {
				t.Errorf("cleared: %+v, %v; want %+v", got, err, want)
			}
		})
	}
}

// A TPM whose maker gives the certificate out over the network: it comes from a file, with the authorities between.
func TestEndorsementFromAFile(t *testing.T) {
	maker := trusttest.NewMaker(t, "Muster")
	e, tpm := keyed(t)
	m := makers(t, maker.Dir(maker.Root()))
	cert := maker.Certify(e.EndorsementKey(trusttest.RSACertificate), nil)
	file := filepath.Join(maker.Dir(cert, maker.Between()), "maker.pem")
	if who, err := enrolFrom(t, tpm, m, file); err != nil || who.Issuer != "Muster authority" {
		t.Errorf("%+v, %v", who, err)
	}
	der := filepath.Join(t.TempDir(), "ek.der")
	if err := os.WriteFile(der, cert, 0o644); err != nil {
		t.Fatal(err)
	}
	e.Store(trusttest.FirstAuthority, maker.Between())
	if who, err := enrolFrom(t, tpm, m, der); err != nil || who.Issuer != "Muster authority" {
		t.Errorf("the certificate from a file, the authority from the TPM: %+v, %v", who, err)
	}
	if _, err := enrolFrom(t, tpm, m, der+".missing"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}

// What shows nothing about a TPM's maker.
func TestEndorsementIsRefused(t *testing.T) {
	maker, stranger := trusttest.NewMaker(t, "Muster"), trusttest.NewMaker(t, "Stranger")
	known := maker.Dir(maker.Root(), maker.Between())
	e, tpm := keyed(t)
	key := e.EndorsementKey(trusttest.ECCCertificate)
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	big, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		cert []byte
		want error
		says string
	}{
		{"a maker that nobody knows", stranger.Certify(key, nil), ErrUnknownMaker, "unknown authority"},
		{"the certificate of another TPM", maker.Certify(other.Public(), nil), ErrForeign, "for another key"},
		{"a certificate that has ended", maker.Certify(key, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), ErrUnknownMaker, "expired"},
		{"a certificate for something else", maker.Certify(key, func(c *x509.Certificate) {
			c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{2, 23, 133, 8, 2}}
		}), ErrUnknownMaker, "not for an endorsement key"},
		{"an authority's certificate", maker.Certify(key, func(c *x509.Certificate) { c.IsCA = true }), ErrUnknownMaker, "authority's"},
		{"an extension that nobody understands", maker.Certify(key, func(c *x509.Certificate) {
			x := c.ExtraExtensions[0]
			x.Id = asn1.ObjectIdentifier{2, 5, 29, 99}
			c.ExtraExtensions = append(c.ExtraExtensions, x)
		}), ErrUnknownMaker, "unhandled critical extension"},
		{"a key of another kind", maker.Certify(big.Public(), nil), ErrUnknownMaker, "P-521"},
		{"no certificate", []byte("\x00\x01\x02"), ErrNoEndorsement, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e.Store(trusttest.ECCCertificate, tt.cert)
			if who, err := enrol(t, tpm, makers(t, known)); !errors.Is(err, tt.want) || !strings.Contains(fmt.Sprint(err), tt.says) {
				t.Errorf("%+v, %v; want %v: %s", who, err, tt.want, tt.says)
			}
		})
	}

	e.Store(trusttest.ECCCertificate, maker.Certify(key, nil))
	m := makers(t, known)
	r, err := tpm.Endorsement("")
	if err != nil {
		t.Fatal(err)
	}
	challenge := func(nonce []byte, r EndorsementRequest) Challenge {
		t.Helper()
		data, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if data, err = m.Challenge(nonce, data); err != nil {
			t.Fatal(err)
		}
		c, err := DecodeChallenge(data)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	good, err := tpm.Answer(r, challenge(testNonce, r))
	if err != nil {
		t.Fatal(err)
	}
	late, err := tpm.Answer(r, challenge(bytes.Repeat([]byte{8}, 32), r))
	if err != nil {
		t.Fatal(err)
	}
	// A key outside, for which a genuine TPM is to vouch: the TPM gives the secret out for a key that it holds and for no other.
	outside := prove(t, tpm)
	forge(t, &outside)
	theirs := r
	theirs.Key = outside.Key
	if _, err := tpm.Answer(theirs, challenge(testNonce, theirs)); err == nil {
		t.Error("a genuine TPM vouches for a key outside of it")
	}
	device := r
	device.Key = deviceArea(t, tpm)
	if data, err := json.Marshal(device); err != nil {
		t.Fatal(err)
	} else if _, err := m.Challenge(testNonce, data); err == nil {
		t.Error("a challenge for a key that signs anything")
	}
	for name, tt := range map[string]struct {
		p Proof
		e *Endorsement
	}{
		"nothing":                          {prove(t, tpm), nil},
		"a problem":                        {prove(t, tpm), &Endorsement{Problem: "no TPM"}},
		"no answer":                        {prove(t, tpm), &Endorsement{Certificates: good.Certificates}},
		"the answer to another nonce":      {prove(t, tpm), &late},
		"another TPM's answer, a software": {outside, &good},
		"an answer with another certificate": {prove(t, tpm), &Endorsement{
			Certificates: [][]byte{maker.Certify(other.Public(), nil)}, Answer: good.Answer}},
		"a stranger's certificate": {prove(t, tpm), &Endorsement{Certificates: [][]byte{stranger.Certify(key, nil)}, Answer: good.Answer}},
		"too many certificates": {prove(t, tpm), &Endorsement{
			Certificates: [][]byte{good.Certificates[0], {1}, {2}, {3}, {4}}, Answer: good.Answer}},
	} {
		tt.p.Endorsement = tt.e
		if who, err := m.Check(tt.p); !errors.Is(err, ErrUnknownMaker) {
			t.Errorf("%s: %+v, %v", name, who, err)
		}
	}
	p := prove(t, tpm)
	p.Endorsement = &good
	if _, err := m.Check(p); err != nil {
		t.Errorf("and the right one: %v", err)
	}
	if _, err := makers(t, known).Check(p); !errors.Is(err, ErrUnknownMaker) {
		t.Errorf("another server takes it too: %v", err)
	}

	// A password for the endorsement hierarchy: there is nothing to be done without it.
	if _, err := (tpm2.HierarchyChangeAuth{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)}, NewAuth: tpm2.TPM2BAuth{Buffer: []byte("secret")},
	}).Execute(tpm.t); err != nil {
		t.Fatal(err)
	}
	if _, err := enrol(t, tpm, m); !errors.Is(err, ErrEndorsementAuth) {
		t.Errorf("with a password: %v", err)
	}
}

// Makers that cannot be read are an error, with the file's name.
func TestLoadMakers(t *testing.T) {
	maker := trusttest.NewMaker(t, "Muster")
	for name, tt := range map[string]struct{ file, data, want string }{
		"DER":               {"root.cer", string(maker.Root()), ""},
		"rubbish":           {"root.pem", "hello", "root.pem: it holds no certificate"},
		"bad DER":           {"root.der", "\x30\x03\x01\x01", "root.der"},
		"an authority only": {"a.der", string(maker.Between()), "none that is signed by itself"},
		"a hidden file":     {".root.cer", string(maker.Root()), "none that is signed by itself"},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, tt.file), []byte(tt.data), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadMakers(dir); (tt.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
	if _, err := LoadMakers(filepath.Join(t.TempDir(), "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// Keys of all kinds that are understood, each of which the TPM makes anew from its template.
func TestEndorsementKeysOfAllKinds(t *testing.T) {
	maker := trusttest.NewMaker(t, "Muster")
	known := makers(t, maker.Dir(maker.Root(), maker.Between()))
	for _, kind := range endorsementKeys {
		t.Run(kind.name, func(t *testing.T) {
			e, tpm := keyed(t)
			made, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(kind.template)}.Execute(tpm.t)
			if err != nil {
				t.Fatal(err)
			}
			area, err := made.OutPublic.Contents()
			if err != nil {
				t.Fatal(err)
			}
			key, err := tpm2.Pub(*area)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := (tpm2.FlushContext{FlushHandle: made.ObjectHandle}).Execute(tpm.t); err != nil {
				t.Fatal(err)
			}
			cert := maker.Certify(key, nil)
			e.Store(uint32(kind.index), cert)
			if r, err := tpm.Endorsement(""); err != nil || len(r.Certificates) != 1 || !bytes.Equal(r.Certificates[0], cert) || r.Problem != "" {
				t.Fatalf("%+v, %v", r, err)
			}
			if who, err := enrol(t, tpm, known); err != nil || who.Maker != "IFX" {
				t.Errorf("%+v, %v", who, err)
			}
		})
	}
}

// What the profile calls PolicyB, from its parts: TPM2_PolicyOR of TPM2_PolicySecret and TPM2_PolicyAuthorizeNV.
func TestPolicyOfTheHighRange(t *testing.T) {
	const policyC = "3767e2edd43ff45a3a7e1eaefcef78643dca964632e7aad82c673a30d8633fde"
	c, err := hex.DecodeString(policyC)
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.New()
	h.Write(make([]byte, sha256.Size))
	h.Write([]byte{0, 0, 0x01, 0x71}) // TPM_CC_PolicyOR
	h.Write(tpm2.ECCEKTemplate.AuthPolicy.Buffer)
	h.Write(c)
	if got := hex.EncodeToString(h.Sum(nil)); got != policyB256 {
		t.Errorf("%s, want %s", got, policyB256)
	}
}

// Certificates that swtpm's own authority makes and puts where a maker does, in indices of the platform: with keys of 2048 bits and on P-384, and with those of 3072 bits.
func TestEndorsementBySwtpm(t *testing.T) {
	for _, tt := range []struct{ bits, indices string }{{"2048", "0x1c00016 0x1c00002"}, {"3072", "0x1c00016 0x1c0001c"}} {
		t.Run(tt.bits, func(t *testing.T) { endorsementBySwtpm(t, tt.bits, tt.indices) })
	}
}

func endorsementBySwtpm(t *testing.T, bits, indices string) {
	for _, tool := range []string{"swtpm_setup", "swtpm_localca"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed (apt-get install swtpm-tools)", tool)
		}
	}
	e := trusttest.Start(t)
	dir := t.TempDir()
	ca, err := exec.LookPath("swtpm_localca")
	if err != nil {
		t.Fatal(err)
	}
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	conf := file("setup.conf", fmt.Sprintf("create_certs_tool=%s\ncreate_certs_tool_config=%s\ncreate_certs_tool_options=%s\n", ca,
		file("localca.conf", fmt.Sprintf("statedir=%s\nsigningkey=%[1]s/key.pem\nissuercert=%[1]s/issuer.pem\ncertserial=%[1]s/serial\n", dir)),
		file("localca.options", "--platform-manufacturer Muster\n--platform-version 1\n--platform-model M\n")))
	if bits == "3072" {
		if help, err := exec.Command("swtpm_setup", "--help").Output(); err != nil || !bytes.Contains(help, []byte("--rsa-keysize")) {
			t.Skip("this swtpm_setup makes no keys of 3072 bits")
		}
		e.Setup("--config", conf, "--create-ek-cert", "--rsa-keysize", bits)
	} else {
		e.Setup("--config", conf, "--create-ek-cert")
	}
	tpm := openTPM(t, e)
	if err := tpm.ProvisionKeys(nil); err != nil {
		t.Fatal(err)
	}
	roots := t.TempDir()
	for _, name := range []string{"issuer.pem", "swtpm-localca-rootca-cert.pem"} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(roots, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var there []string
	for _, kind := range endorsementKeys {
		cert, err := tpm.endorsementCertificate(kind.index)
		if err != nil {
			t.Fatal(err)
		}
		if cert == nil {
			continue
		}
		there = append(there, fmt.Sprintf("%#x", uint32(kind.index)))
		path := filepath.Join(t.TempDir(), "ek.der")
		if err := os.WriteFile(path, cert, 0o600); err != nil {
			t.Fatal(err)
		}
		who, err := enrolFrom(t, tpm, makers(t, roots), path) // that of a file is the first that is chosen
		if err != nil || who.Model != "swtpm" || who.Issuer != "swtpm-localca" {
			t.Errorf("index %#x: %+v, %v", uint32(kind.index), who, err)
		}
		_, key, err := parseEndorsement(cert)
		if err != nil {
			t.Fatal(err)
		}
		if print, err := Fingerprint(key); err != nil || who.Key != print {
			t.Errorf("index %#x: it is shown for %s, and its key is %s (%v)", uint32(kind.index), who.Key, print, err)
		}
	}
	if got := strings.Join(there, " "); got != indices {
		t.Errorf("certificates at %s, want %s", got, indices)
	}
}

func FuzzEndorsement(f *testing.F) {
	maker := trusttest.NewMaker(f, "Muster")
	m, err := LoadMakers(maker.Dir(maker.Root()))
	if err != nil {
		f.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(maker.Certify(key.Public(), nil), maker.Between())
	f.Add([]byte{0x30, 0}, []byte{})
	f.Fuzz(func(t *testing.T, cert, between []byte) {
		e := Endorsement{Certificates: [][]byte{cert}, Chain: [][]byte{between}}
		if c, err := m.choose(e); err == nil {
			if _, err := endorsementArea(c.key); err != nil {
				t.Fatal("a key that no TPM has was chosen")
			}
			madeBy(c.cert)
		}
		nextDER(cert)
	})
}
