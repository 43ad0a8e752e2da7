package trust

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"debug/pe"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2"
)

// What the question whether a slot's secrets will open may be answered with.
var (
	// ErrShut means that the secrets would stay shut.
	ErrShut = errors.New("the secrets that are sealed to PCRs would stay shut")
	// ErrUnpredictable means that nobody can tell beforehand.
	ErrUnpredictable = errors.New("the PCRs of the next boot cannot be predicted")
)

// kernelPCR is the one that systemd-stub measures a unified kernel image into, and systemd-pcrphase the phases of the boot.
const kernelPCR = 11

// DefaultPhase is where in the boot an encrypted disk is opened: in the initrd.
const DefaultPhase = "enter-initrd"

// measuredSections are the sections of a unified kernel image that systemd-stub measures, in its order. (UAPI group, specification 5; the signatures
// themselves are not measured.)
var measuredSections = []string{".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey"}

// otherSections make what is measured depend on the choice of a profile or on the hardware.
var otherSections = []string{".profile", ".dtbauto", ".hwids", ".efifw"}

// maxFill bounds how much longer a section may be in memory than in the file. Tools that make images round up, to a page at most.
const maxFill = 1 << 20

// maxSignatures bounds the JSON of a release's PCR signatures.
const maxSignatures = 1 << 20

// Kernel is a unified kernel image as far as it decides about PCRs.
type Kernel struct {
	PCR        [sha256.Size]byte // 11, before the first phase
	Signatures []byte            // .pcrsig, if there is one
}

// ReadKernel reads a unified kernel image and predicts its PCR 11. ErrUnpredictable means that the file is none, or one whose measurement depends on more.
func ReadKernel(r io.ReaderAt) (Kernel, error) {
	f, err := pe.NewFile(r)
	if err != nil {
		return Kernel{}, fmt.Errorf("%w: the kernel is not a PE file, and so no unified kernel image: %w", ErrUnpredictable, err)
	}
	defer f.Close()
	sections := map[string]*pe.Section{}
	for _, s := range f.Sections {
		if slices.Contains(otherSections, s.Name) {
			return Kernel{}, fmt.Errorf("%w: the kernel image has a section %s", ErrUnpredictable, s.Name)
		}
		if sections[s.Name] == nil {
			sections[s.Name] = s
		}
	}
	if sections[".linux"] == nil {
		return Kernel{}, fmt.Errorf("%w: the kernel is no unified kernel image: it has no section .linux", ErrUnpredictable)
	}
	var k Kernel
	for _, name := range measuredSections {
		s := sections[name]
		if s == nil {
			continue
		}
		k.PCR = extend(k.PCR, append([]byte(name), 0))
		if int64(s.VirtualSize) > int64(s.Size)+maxFill {
			return Kernel{}, fmt.Errorf("%w: section %s has %d bytes in the file and %d in memory", ErrUnpredictable, name, s.Size, s.VirtualSize)
		}
		h := sha256.New()
		// What is measured is the section in memory: cut to its size there, or filled up with zeros.
		n, err := io.Copy(h, io.LimitReader(s.Open(), int64(s.VirtualSize)))
		if err != nil {
			return Kernel{}, fmt.Errorf("reading section %s of the kernel image: %w", name, err)
		}
		if _, err := io.CopyN(h, zeros{}, int64(s.VirtualSize)-n); err != nil {
			return Kernel{}, err
		}
		k.PCR = extendBy(k.PCR, [sha256.Size]byte(h.Sum(nil)))
	}
	if s := sections[".pcrsig"]; s != nil {
		data, err := io.ReadAll(io.LimitReader(s.Open(), min(int64(s.VirtualSize), maxSignatures)))
		if err != nil {
			return Kernel{}, fmt.Errorf("reading section .pcrsig of the kernel image: %w", err)
		}
		k.Signatures = bytes.TrimRight(data, "\x00")
	}
	return k, nil
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func extend(pcr [sha256.Size]byte, data []byte) [sha256.Size]byte {
	return extendBy(pcr, sha256.Sum256(data))
}

func extendBy(pcr, digest [sha256.Size]byte) [sha256.Size]byte {
	return sha256.Sum256(append(pcr[:], digest[:]...))
}

// At is PCR 11 in a phase of the boot, such as "enter-initrd" or "enter-initrd:leave-initrd"; "" is before the first.
func (k Kernel) At(phase string) [sha256.Size]byte {
	pcr := k.PCR
	if phase == "" {
		return pcr
	}
	for p := range strings.SplitSeq(phase, ":") {
		pcr = extend(pcr, []byte(p))
	}
	return pcr
}

// PCRSignature is one policy that was authorised: that some PCRs have some values.
type PCRSignature struct {
	PCRs        []uint   `json:"pcrs"`
	Fingerprint hexBytes `json:"pkfp"` // SHA-256 of the key as PKCS #1 writes it, which is how systemd names it
	Policy      hexBytes `json:"pol"`  // digest of PolicyPCR for these values
	Signature   []byte   `json:"sig"`  // RSASSA-PKCS1-v1_5 with SHA-256, of the policy
}

// hexBytes are written in hexadecimal.
type hexBytes []byte

func (h hexBytes) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h)), nil }

func (h *hexBytes) UnmarshalText(text []byte) (err error) {
	*h, err = hex.DecodeString(string(text))
	return err
}

// signatureFile is the JSON of a section .pcrsig, as systemd-measure writes it.
type signatureFile struct {
	SHA256 []PCRSignature `json:"sha256"`
}

// ParsePCRSignatures reads the signatures for the SHA-256 bank.
func ParsePCRSignatures(data []byte) ([]PCRSignature, error) {
	if len(data) > maxSignatures {
		return nil, fmt.Errorf("PCR signatures of %d bytes, at most %d", len(data), maxSignatures)
	}
	var f signatureFile
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, fmt.Errorf("reading PCR signatures: %w", err)
	}
	for _, s := range f.SHA256 {
		for _, n := range s.PCRs {
			if n > 23 {
				return nil, fmt.Errorf("reading PCR signatures: there is no PCR %d", n)
			}
		}
	}
	return f.SHA256, nil
}

// SignPCRs authorises PCR values with a key: what systemd-measure sign does.
func SignPCRs(key crypto.Signer, values ...map[uint][]byte) ([]byte, error) {
	pub, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("signing PCRs: a key of type %T; TPM policies are signed with RSA", key.Public())
	}
	var err error
	f := signatureFile{SHA256: []PCRSignature{}}
	for _, v := range values {
		s := PCRSignature{Fingerprint: keyPrint(pub)}
		for n := range v {
			s.PCRs = append(s.PCRs, n)
		}
		slices.Sort(s.PCRs)
		if s.Policy, err = pcrPolicy(v); err != nil {
			return nil, err
		}
		sum := sha256.Sum256(s.Policy)
		if s.Signature, err = key.Sign(rand.Reader, sum[:], crypto.SHA256); err != nil {
			return nil, fmt.Errorf("signing PCRs: %w", err)
		}
		f.SHA256 = append(f.SHA256, s)
	}
	return json.Marshal(f)
}

func keyPrint(pub *rsa.PublicKey) []byte {
	sum := sha256.Sum256(x509.MarshalPKCS1PublicKey(pub))
	return sum[:]
}

// pcrPolicy is the digest of a policy session after PolicyPCR for these values (TPM 2.0 part 3, TPM2_PolicyPCR).
func pcrPolicy(values map[uint][]byte) ([]byte, error) {
	var list []uint
	for n := range values {
		list = append(list, n)
	}
	slices.Sort(list)
	h := sha256.New()
	for _, n := range list {
		if len(values[n]) != sha256.Size {
			return nil, fmt.Errorf("PCR %d has %d bytes, want %d", n, len(values[n]), sha256.Size)
		}
		h.Write(values[n])
	}
	p, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	if err := p.Update(tpm2.TPMCCPolicyPCR, pcrSelection(list), h.Sum(nil)); err != nil {
		return nil, err
	}
	return p.Hash().Digest, nil
}

func pcrSelection(list []uint) tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(list...)}}}
}

// valid returns the signatures that are by one of the keys.
func valid(sigs []PCRSignature, keys []*rsa.PublicKey) (list []PCRSignature) {
	for _, key := range keys {
		print := keyPrint(key)
		for _, s := range sigs {
			sum := sha256.Sum256(s.Policy)
			if bytes.Equal(s.Fingerprint, print) && len(s.PCRs) > 0 && rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], s.Signature) == nil {
				list = append(list, s)
			}
		}
	}
	return list
}

// PCRKeys are the keys that a host's secrets are sealed to, by way of TPM2_PolicyAuthorize.
type PCRKeys struct {
	Keys  []*rsa.PublicKey
	Phase string // of the boot, in which the secrets are needed; "" is DefaultPhase
	// Current reads PCRs other than 11, which are taken to stay as they are over the next boot.
	Current func(pcrs []uint) (map[uint][]byte, error)
}

// LoadPCRKeys reads RSA public keys from PEM files.
func LoadPCRKeys(files []string) ([]*rsa.PublicKey, error) {
	var list []*rsa.PublicKey
	for _, file := range files {
		keys, err := PublicKeys([]string{file})
		if err != nil {
			return nil, err
		}
		for _, k := range keys {
			r, ok := k.(*rsa.PublicKey)
			if !ok {
				return nil, fmt.Errorf("reading a public key: %s: it is of type %T, and PCR policies are signed with RSA", file, k)
			}
			list = append(list, r)
		}
	}
	return list, nil
}

// Check reports whether secrets that are sealed to the keys will open when a kernel image boots: nil, if one of the keys has authorised the PCR values that it
// will lead to. signatures are those that came beside the image, nil if none did; those inside count too. Otherwise the
// error is ErrShut or ErrUnpredictable; any other one, such as ErrTPM, says that the question could not be asked now and may be later.
func (p PCRKeys) Check(kernel io.ReaderAt, signatures []byte) error {
	k, err := ReadKernel(kernel)
	if err != nil {
		return err
	}
	var all []PCRSignature
	var bad error
	for _, data := range [][]byte{k.Signatures, signatures} {
		if len(data) == 0 {
			continue
		}
		list, err := ParsePCRSignatures(data)
		bad = errors.Join(bad, err)
		all = append(all, list...)
	}
	switch {
	case len(all) == 0 && bad != nil:
		return fmt.Errorf("%w: %w", ErrShut, bad)
	case len(all) == 0:
		return fmt.Errorf("%w: the release has no signed PCR policy (section .pcrsig)", ErrShut)
	}
	ours := valid(all, p.Keys)
	if len(ours) == 0 {
		return fmt.Errorf("%w: none of its %d PCR policies is signed by a key of this host", ErrShut, len(all))
	}
	phase := p.Phase
	if phase == "" {
		phase = DefaultPhase
	}
	at := k.At(phase)
	var unknown error
	for _, s := range ours {
		values := map[uint][]byte{}
		var others []uint
		for _, n := range s.PCRs {
			if n == kernelPCR {
				values[n] = at[:]
			} else {
				others = append(others, n)
			}
		}
		if len(others) > 0 {
			now, err := p.current(others)
			if err != nil {
				unknown = err
				continue
			}
			for n, v := range now {
				values[n] = v
			}
		}
		want, err := pcrPolicy(values)
		if err != nil {
			return err
		}
		if bytes.Equal(want, s.Policy) {
			return nil
		}
	}
	switch {
	case errors.Is(unknown, ErrNoTPM), errors.Is(unknown, ErrNoBank): // no later try will find another answer
		return fmt.Errorf("%w: %w", ErrUnpredictable, unknown)
	case unknown != nil:
		return fmt.Errorf("reading the PCRs that stay as they are: %w", unknown)
	}
	return fmt.Errorf("%w: none of the %d policies that are signed by this host's key is for what its kernel will measure (PCR 11 is %x in phase %s)", ErrShut, len(ours), at, phase)
}

func (p PCRKeys) current(list []uint) (map[uint][]byte, error) {
	if p.Current == nil {
		return nil, fmt.Errorf("%w to read PCRs %v from", ErrNoTPM, list)
	}
	return p.Current(list)
}

// PCRs reads PCRs of the SHA-256 bank.
func (t *TPM) PCRs(list []uint) (map[uint][]byte, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.pcrs(list)
}

// storageHandle is where the parent of sealed secrets is kept: a primary key that was made with the owner's password, and is used without one.
const storageHandle = tpm2.TPMHandle(0x8101F512)

// Sealed is a secret that the TPM gives out only when the PCRs have values that a key has authorised.
type Sealed struct {
	Schema  string `json:"schema"`
	Public  []byte `json:"public"`  // TPM2B_PUBLIC
	Private []byte `json:"private"` // TPM2B_PRIVATE
	Key     []byte `json:"key"`     // SubjectPublicKeyInfo of the key
}

const sealedSchema = "flipside.sealed/v1"

// maxSecret is what a TPM takes as data of a sealed object.
const maxSecret = 128

// policyKey is the public area under which the TPM loads a key that signs policies. Its name is part of the policy.
func policyKey(key *rsa.PublicKey) tpm2.TPMTPublic {
	exponent := uint32(key.E)
	if exponent == 65537 {
		exponent = 0 // the default, which is written so
	}
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{UserWithAuth: true, Decrypt: true, SignEncrypt: true},
		Parameters:       tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{KeyBits: tpm2.TPMKeyBits(key.N.BitLen()), Exponent: exponent}),
		Unique:           tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: key.N.Bytes()}),
	}
}

// authorised is the digest of a policy session after PolicyAuthorize by a key, for any policy (TPM 2.0 part 3, TPM2_PolicyAuthorize).
func authorised(name tpm2.TPM2BName) ([]byte, error) {
	p, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	if err := p.Update(tpm2.TPMCCPolicyAuthorize, name.Buffer); err != nil {
		return nil, err
	}
	if err := p.Update(); err != nil { // an empty policyRef
		return nil, err
	}
	return p.Hash().Digest, nil
}

func (t *TPM) storage(password []byte) (loadedStorage, error) {
	look := func() (loadedStorage, error) {
		rsp, err := tpm2.ReadPublic{ObjectHandle: storageHandle}.Execute(t.t)
		if err != nil {
			return loadedStorage{}, err
		}
		area, err := rsp.OutPublic.Contents()
		if err != nil {
			return loadedStorage{}, err
		}
		if area.Type != tpm2.ECCSRKTemplate.Type || area.ObjectAttributes != tpm2.ECCSRKTemplate.ObjectAttributes {
			return loadedStorage{}, fmt.Errorf("%w: the key at %#x is not a storage key", ErrForeign, uint32(storageHandle))
		}
		return loadedStorage{storageHandle, rsp.Name}, nil
	}
	s, err := look()
	if !absent(err) || password == nil {
		return s, explain("looking for the storage key", err)
	}
	made, err := tpm2.CreatePrimary{PrimaryHandle: owner(password), InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(t.t)
	if err != nil {
		return s, explain("making the storage key", err)
	}
	defer tpm2.FlushContext{FlushHandle: made.ObjectHandle}.Execute(t.t)
	_, err = tpm2.EvictControl{
		Auth: owner(password), ObjectHandle: &tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name}, PersistentHandle: storageHandle,
	}.Execute(t.t)
	if err != nil {
		return s, explain("keeping the storage key", err)
	}
	s, err = look()
	return s, explain("looking for the storage key", err)
}

type loadedStorage struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
}

// Seal makes a secret, of 128 bytes at most, that opens for any PCR values that key authorises. It takes the owner's password the first time, for the key that it
// lies under.
func (t *TPM) Seal(password []byte, key *rsa.PublicKey, secret []byte) (Sealed, error) {
	if len(secret) == 0 || len(secret) > maxSecret {
		return Sealed{}, fmt.Errorf("sealing a secret of %d bytes: want 1 to %d", len(secret), maxSecret)
	}
	if password == nil {
		password = []byte{}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	parent, err := t.storage(password)
	if err != nil {
		return Sealed{}, err
	}
	// What the TPM does not load now it would not load when the secret is needed.
	loaded, err := tpm2.LoadExternal{InPublic: tpm2.New2B(policyKey(key)), Hierarchy: tpm2.TPMRHOwner}.Execute(t.t)
	if err != nil {
		return Sealed{}, explain(fmt.Sprintf("loading an RSA key of %d bits, which many TPMs take with 2048 bits only", key.N.BitLen()), err)
	}
	if _, err := (tpm2.FlushContext{FlushHandle: loaded.ObjectHandle}).Execute(t.t); err != nil {
		return Sealed{}, explain("sealing a secret", err)
	}
	policy, err := authorised(loaded.Name)
	if err != nil {
		return Sealed{}, err
	}
	made, err := tpm2.Create{
		ParentHandle: plain(parent.handle, parent.name),
		InSensitive:  tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: secret})}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true},
			AuthPolicy:       tpm2.TPM2BDigest{Buffer: policy},
		}),
	}.Execute(t.t)
	if err != nil {
		return Sealed{}, explain("sealing a secret", err)
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return Sealed{}, err
	}
	return Sealed{Schema: sealedSchema, Public: tpm2.Marshal(made.OutPublic), Private: tpm2.Marshal(made.OutPrivate), Key: der}, nil
}

// Unseal opens a secret with the signatures that authorise the PCRs' present values. ErrShut means that none of them does.
func (t *TPM) Unseal(s Sealed, signatures []byte) ([]byte, error) {
	if s.Schema != sealedSchema {
		return nil, fmt.Errorf("opening a sealed secret: it has schema %q, want %q", s.Schema, sealedSchema)
	}
	fail := func(err error) ([]byte, error) { return nil, fmt.Errorf("opening a sealed secret: %w", err) }
	pub, err := x509.ParsePKIXPublicKey(s.Key)
	if err != nil {
		return fail(err)
	}
	key, ok := pub.(*rsa.PublicKey)
	if !ok {
		return fail(fmt.Errorf("a key of type %T", pub))
	}
	public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](s.Public)
	if err != nil {
		return fail(err)
	}
	private, err := tpm2.Unmarshal[tpm2.TPM2BPrivate](s.Private)
	if err != nil {
		return fail(err)
	}
	all, err := ParsePCRSignatures(signatures)
	if err != nil {
		return fail(err)
	}
	ours := valid(all, []*rsa.PublicKey{key})
	t.mu.Lock()
	defer t.mu.Unlock()
	parent, err := t.storage(nil)
	if err != nil {
		return fail(err)
	}
	object, err := tpm2.Load{ParentHandle: plain(parent.handle, parent.name), InPrivate: *private, InPublic: *public}.Execute(t.t)
	if err != nil {
		return fail(explain("loading it", err))
	}
	defer tpm2.FlushContext{FlushHandle: object.ObjectHandle}.Execute(t.t)
	for _, sig := range ours {
		values, err := t.pcrs(sig.PCRs)
		if err != nil {
			return fail(err)
		}
		if now, err := pcrPolicy(values); err != nil || !bytes.Equal(now, sig.Policy) {
			continue
		}
		return t.unseal(object, key, sig)
	}
	return fail(fmt.Errorf("%w: %d policies are signed by its key, and none is for what the PCRs are now", ErrShut, len(ours)))
}

func (t *TPM) unseal(object *tpm2.LoadResponse, key *rsa.PublicKey, sig PCRSignature) ([]byte, error) {
	signer, err := tpm2.LoadExternal{InPublic: tpm2.New2B(policyKey(key)), Hierarchy: tpm2.TPMRHOwner}.Execute(t.t)
	if err != nil {
		return nil, explain("loading the key of a PCR policy", err)
	}
	defer tpm2.FlushContext{FlushHandle: signer.ObjectHandle}.Execute(t.t)
	sum := sha256.Sum256(sig.Policy)
	ticket, err := tpm2.VerifySignature{
		KeyHandle: tpm2.NamedHandle{Handle: signer.ObjectHandle, Name: signer.Name}, Digest: tpm2.TPM2BDigest{Buffer: sum[:]},
		Signature: tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgRSASSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSASSA, &tpm2.TPMSSignatureRSA{Hash: tpm2.TPMAlgSHA256, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: sig.Signature}})},
	}.Execute(t.t)
	if err != nil {
		return nil, explain("verifying a PCR policy", err)
	}
	session, done, err := tpm2.PolicySession(t.t, tpm2.TPMAlgSHA256, 16)
	if err != nil {
		return nil, explain("opening a sealed secret", err)
	}
	defer done()
	if _, err := (tpm2.PolicyPCR{PolicySession: session.Handle(), Pcrs: pcrSelection(sig.PCRs)}).Execute(t.t); err != nil {
		return nil, explain("opening a sealed secret", err)
	}
	_, err = tpm2.PolicyAuthorize{
		PolicySession: session.Handle(), ApprovedPolicy: tpm2.TPM2BDigest{Buffer: sig.Policy}, KeySign: signer.Name, CheckTicket: ticket.Validation,
	}.Execute(t.t)
	if err != nil {
		return nil, explain("opening a sealed secret", err)
	}
	rsp, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: object.ObjectHandle, Name: object.Name, Auth: session}}.Execute(t.t)
	if err != nil {
		return nil, explain("opening a sealed secret", err)
	}
	return rsp.OutData.Buffer, nil
}
