package trust

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// endorsementKey is one kind of endorsement key, by the TCG EK Credential Profile: where a TPM keeps its certificate, and the template that it is made by again.
type endorsementKey struct {
	name     string // in the profile
	index    tpm2.TPMHandle
	template tpm2.TPMTPublic
	// byPolicy: the key is used by the policy that the endorsement hierarchy's password is known. Those of the high range have an empty password of their own as well.
	byPolicy bool
}

// endorsementKeys are the kinds that are understood. A TPM makes a key on a curve in no time, and takes seconds for the others. The profile knows further ones of the high
// range (P-521, SM2, RSA 4096), which no TPM was seen with that has none of these.
var endorsementKeys = []endorsementKey{
	{"L-2", 0x01C0000A, tpm2.ECCEKTemplate, true},
	{"H-2", 0x01C00014, highRange(tpm2.TPMAlgECC, tpm2.TPMAlgSHA256, uint16(tpm2.TPMECCNistP256)), false},
	{"H-3", 0x01C00016, highRange(tpm2.TPMAlgECC, tpm2.TPMAlgSHA384, uint16(tpm2.TPMECCNistP384)), false},
	{"L-1", 0x01C00002, tpm2.RSAEKTemplate, true},
	{"H-1", 0x01C00012, highRange(tpm2.TPMAlgRSA, tpm2.TPMAlgSHA256, 2048), false},
	{"H-6", 0x01C0001C, highRange(tpm2.TPMAlgRSA, tpm2.TPMAlgSHA384, 3072), false},
}

// The policy of keys of the high range (PolicyB of the profile): that the password of the endorsement hierarchy is known, or one that its owner has put into an NV index.
const (
	policyB256 = "ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0"
	policyB384 = "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12"
)

// highRange is a template of the high range, for a curve or for RSA of so many bits. They have more than the others only in their policy, their own password, and nothing in the
// place of the public key.
func highRange(alg tpm2.TPMAlgID, name tpm2.TPMIAlgHash, size uint16) tpm2.TPMTPublic {
	policy, bits := policyB256, tpm2.TPMKeyBits(128)
	if name == tpm2.TPMAlgSHA384 {
		policy, bits = policyB384, 256
	}
	digest, err := hex.DecodeString(policy)
	if err != nil {
		digest = nil // cannot be: it is a constant above
	}
	symmetric := tpm2.TPMTSymDefObject{
		Algorithm: tpm2.TPMAlgAES, KeyBits: tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, bits), Mode: tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
	}
	area := tpm2.TPMTPublic{
		Type: alg, NameAlg: name, ObjectAttributes: tpm2.ECCEKTemplate.ObjectAttributes, AuthPolicy: tpm2.TPM2BDigest{Buffer: digest},
		Parameters: tpm2.NewTPMUPublicParms(alg, &tpm2.TPMSECCParms{Symmetric: symmetric, CurveID: tpm2.TPMECCCurve(size)}),
		Unique:     tpm2.NewTPMUPublicID(alg, &tpm2.TPMSECCPoint{}),
	}
	if alg == tpm2.TPMAlgRSA {
		area.Parameters = tpm2.NewTPMUPublicParms(alg, &tpm2.TPMSRSAParms{Symmetric: symmetric, KeyBits: tpm2.TPMKeyBits(size)})
		area.Unique = tpm2.NewTPMUPublicID(alg, &tpm2.TPM2BPublicKeyRSA{})
	}
	area.ObjectAttributes.UserWithAuth = true
	return area
}

// auth is what the key is used by.
func (e endorsementKey) auth() tpm2.Session {
	if !e.byPolicy {
		return tpm2.PasswordAuth(nil)
	}
	return tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(tpm transport.TPM, session tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
		_, err := tpm2.PolicySecret{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)}, PolicySession: session, NonceTPM: nonce,
		}.Execute(tpm)
		return err
	})
}

// area is the public area that a TPM has for a key of this kind; false if the key is not of this kind.
func (e endorsementKey) area(key crypto.PublicKey) (tpm2.TPMTPublic, bool) {
	area := e.template
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		parms, err := area.Parameters.ECCDetail()
		if err != nil || key.Curve != map[tpm2.TPMECCCurve]elliptic.Curve{tpm2.TPMECCNistP256: elliptic.P256(), tpm2.TPMECCNistP384: elliptic.P384()}[parms.CurveID] {
			return area, false
		}
		raw, err := key.Bytes()
		if err != nil {
			return area, false
		}
		n := (len(raw) - 1) / 2
		area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: raw[1 : 1+n]}, Y: tpm2.TPM2BECCParameter{Buffer: raw[1+n:]}})
		return area, true
	case *rsa.PublicKey:
		parms, err := area.Parameters.RSADetail()
		if err != nil || key.N.BitLen() != int(parms.KeyBits) || key.E != 65537 {
			return area, false
		}
		area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: key.N.Bytes()})
		return area, true
	}
	return area, false
}

// endorsementArea is a public area that a TPM has for an endorsement key. Where there are two kinds for such a key, what is encrypted to one can be read by the other.
func endorsementArea(key crypto.PublicKey) (tpm2.TPMTPublic, error) {
	for _, e := range endorsementKeys {
		if area, ok := e.area(key); ok {
			return area, nil
		}
	}
	what := fmt.Sprintf("of type %T", key)
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		what = "on " + key.Curve.Params().Name
	case *rsa.PublicKey:
		what = fmt.Sprintf("of RSA with %d bits and exponent %d", key.N.BitLen(), key.E)
	}
	return tpm2.TPMTPublic{}, fmt.Errorf("an endorsement key %s; understood are P-256, P-384, and RSA of 2048 or 3072 bits with exponent 65537", what)
}

// endorsementIndices are the places of certificates, in words.
func endorsementIndices() string {
	var list []string
	for _, e := range endorsementKeys {
		list = append(list, fmt.Sprintf("%#x", uint32(e.index)))
	}
	return strings.Join(list, ", ")
}
