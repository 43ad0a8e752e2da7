package trust

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// ErrProof means that a proof proves nothing.
var ErrProof = errors.New("the proof does not hold")

// Claim is what a proof says beside the PCRs, and what the quote is bound to.
type Claim struct {
	Host    string `json:"host"`  // machine id
	Nonce   []byte `json:"nonce"` // the server's, 16 to 64 bytes
	Slot    string `json:"slot"`
	Version string `json:"version"`
}

// Proof is the evidence of a boot: a quote of the PCRs by the attestation key, bound to the claim.
//
// That the slot and the version are those that were booted follows from the PCRs, and only for who knows the PCRs' values of a release; by
// themselves they are the host's word, which nobody between host and server can change.
type Proof struct {
	Schema    string          `json:"schema"`
	Claim     Claim           `json:"claim"`
	PCRs      map[uint][]byte `json:"pcrs"`      // SHA-256 bank
	Quote     []byte          `json:"quote"`     // TPMS_ATTEST
	Signature []byte          `json:"signature"` // ECDSA, ASN.1
	Key       []byte          `json:"key"`       // TPMT_PUBLIC of the attestation key
	// Endorsement shows whose TPM the key is in. The quote is not bound to it: it is bound to the key's name.
	Endorsement *Endorsement `json:"endorsement,omitempty"`
}

const (
	proofSchema = "flipside.proof/v1"
	// MaxProof bounds the size of an encoded proof.
	MaxProof = 64 << 10
)

// ProofPCRs are the PCRs that a proof quotes: firmware (0, 2), boot loader (4), Secure Boot (7), and what loaders measure of kernel and command line (8, 9, 11, 12).
// 5 is left out, because it holds the partition table and changes with each flip of a slot.
var ProofPCRs = []uint{0, 2, 4, 7, 8, 9, 11, 12}

// digest is what a quote signs of a claim: each field with its length, so that no two claims are the same bytes.
func (c Claim) digest() [32]byte {
	var b []byte
	for _, f := range [][]byte{[]byte(proofSchema), []byte(c.Host), c.Nonce, []byte(c.Slot), []byte(c.Version)} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(f)))
		b = append(b, f...)
	}
	return sha256.Sum256(b)
}

func (c Claim) check() error {
	if len(c.Nonce) < 16 || len(c.Nonce) > 64 {
		return fmt.Errorf("a nonce of %d bytes, want 16 to 64", len(c.Nonce))
	}
	for _, s := range []string{c.Host, c.Slot, c.Version} {
		if s == "" || len(s) > 128 {
			return fmt.Errorf("%q has %d bytes, want 1 to 128", s, len(s))
		}
	}
	return nil
}

// Prove makes the proof of a claim with the TPM's attestation key.
func (t *TPM) Prove(c Claim) (Proof, error) {
	if err := c.check(); err != nil {
		return Proof{}, fmt.Errorf("proving the boot: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	k, err := t.key(attestationHandle, true)
	if err != nil {
		return Proof{}, fmt.Errorf("proving the boot: %w", err)
	}
	if _, err := t.pcrs(ProofPCRs); err != nil { // a quote of a bank that is not there is one of nothing
		return Proof{}, fmt.Errorf("proving the boot: %w", err)
	}
	p := Proof{Schema: proofSchema, Claim: c, Key: tpm2.Marshal(k.area)}
	extra := c.digest()
	sel := tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(ProofPCRs...)}}}
	// The values are read beside the quote; if one changes in between they do not fit, and the next try will.
	for range 3 {
		rsp, err := tpm2.Quote{SignHandle: plain(k.handle, k.name), QualifyingData: tpm2.TPM2BData{Buffer: extra[:]}, InScheme: scheme(), PCRSelect: sel}.Execute(t.t)
		if err != nil {
			return Proof{}, explain("quoting the PCRs", err)
		}
		p.Quote = rsp.Quoted.Bytes()
		if p.Signature, err = encodeSignature(rsp.Signature); err != nil {
			return Proof{}, err
		}
		if p.PCRs, err = t.pcrs(ProofPCRs); err != nil {
			return Proof{}, err
		}
		if _, err = p.verify(); err == nil {
			return p, nil
		} else if !errors.Is(err, errPCRs) {
			return Proof{}, err
		}
	}
	return Proof{}, errors.New("proving the boot: the PCRs keep changing")
}

// pcrs reads PCRs of the SHA-256 bank, up to eight at a time, which is what a TPM returns at once.
func (t *TPM) pcrs(list []uint) (map[uint][]byte, error) {
	values := map[uint][]byte{}
	for part := range slices.Chunk(list, 8) {
		rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{
			PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(part...)}},
		}}.Execute(t.t)
		if errors.Is(err, tpm2.TPMRCHash) { // it does not know the hash at all
			return nil, ErrNoBank
		}
		if err != nil {
			return nil, explain("reading the PCRs", err)
		}
		if len(rsp.PCRValues.Digests) != len(part) {
			return nil, ErrNoBank
		}
		for i, n := range slices.Sorted(slices.Values(part)) {
			values[n] = rsp.PCRValues.Digests[i].Buffer
		}
	}
	return values, nil
}

// DecodeProof reads a proof that came over the network. It is not verified.
func DecodeProof(data []byte) (Proof, error) {
	if len(data) > MaxProof {
		return Proof{}, fmt.Errorf("%w: %d bytes, at most %d", ErrProof, len(data), MaxProof)
	}
	var p Proof
	if err := json.Unmarshal(data, &p); err != nil {
		return Proof{}, fmt.Errorf("%w: it cannot be read: %w", ErrProof, err)
	}
	if p.Schema != proofSchema {
		return Proof{}, fmt.Errorf("%w: it has schema %q, want %q", ErrProof, p.Schema, proofSchema)
	}
	return p, nil
}

// Verify checks that a proof answers the nonce for the host, and returns the fingerprint of the attestation key that it is by. Whether that key is the
// host's own is for the caller to know: from a list, or because it is the one that the host had the first time.
func (p Proof) Verify(host string, nonce []byte) (key string, err error) {
	if !bytes.Equal(p.Claim.Nonce, nonce) || len(nonce) == 0 {
		return "", fmt.Errorf("%w: it answers another nonce", ErrProof)
	}
	if p.Claim.Host != host {
		return "", fmt.Errorf("%w: it is of host %q, not of %q", ErrProof, p.Claim.Host, host)
	}
	pub, err := p.verify()
	if err != nil {
		return "", err
	}
	return Fingerprint(pub)
}

var errPCRs = errors.New("the PCRs are not those of the quote")

func (p Proof) verify() (*ecdsa.PublicKey, error) {
	if err := p.Claim.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProof, err)
	}
	area, err := tpm2.Unmarshal[tpm2.TPMTPublic](p.Key)
	if err != nil {
		return nil, fmt.Errorf("%w: its key cannot be read: %w", ErrProof, err)
	}
	pub, err := checkArea(*area, true)
	if err != nil {
		return nil, fmt.Errorf("%w: its key: %w", ErrProof, err)
	}
	sum := sha256.Sum256(p.Quote)
	if !ecdsa.VerifyASN1(pub, sum[:], p.Signature) {
		return nil, fmt.Errorf("%w: the quote is not signed by its key", ErrProof)
	}
	att, err := tpm2.Unmarshal[tpm2.TPMSAttest](p.Quote)
	if err != nil {
		return nil, fmt.Errorf("%w: the quote cannot be read: %w", ErrProof, err)
	}
	if att.Magic != tpm2.TPMGeneratedValue || att.Type != tpm2.TPMSTAttestQuote {
		return nil, fmt.Errorf("%w: it is not a quote", ErrProof)
	}
	extra := p.Claim.digest()
	if !bytes.Equal(att.ExtraData.Buffer, extra[:]) {
		return nil, fmt.Errorf("%w: the quote is bound to another claim", ErrProof)
	}
	info, err := att.Attested.Quote()
	if err != nil {
		return nil, fmt.Errorf("%w: the quote cannot be read: %w", ErrProof, err)
	}
	list := slices.Sorted(maps.Keys(p.PCRs))
	if len(list) == 0 || list[len(list)-1] > 23 {
		return nil, fmt.Errorf("%w: it names no PCRs, or such that do not exist", ErrProof)
	}
	if s := info.PCRSelect.PCRSelections; len(s) != 1 || s[0].Hash != tpm2.TPMAlgSHA256 || !bytes.Equal(s[0].PCRSelect, tpm2.PCClientCompatible.PCRs(list...)) {
		return nil, fmt.Errorf("%w: the quote is of other PCRs", ErrProof)
	}
	h := sha256.New()
	for _, n := range list {
		if len(p.PCRs[n]) != sha256.Size {
			return nil, fmt.Errorf("%w: PCR %d has %d bytes", ErrProof, n, len(p.PCRs[n]))
		}
		h.Write(p.PCRs[n])
	}
	if !bytes.Equal(h.Sum(nil), info.PCRDigest.Buffer) {
		return nil, fmt.Errorf("%w: %w", ErrProof, errPCRs)
	}
	return pub, nil
}

// CheckProof reads an encoded proof and verifies it; see [Proof.Verify].
func CheckProof(data []byte, host string, nonce []byte) (p Proof, key string, err error) {
	if p, err = DecodeProof(data); err != nil {
		return p, "", err
	}
	key, err = p.Verify(host, nonce)
	return p, key, err
}
