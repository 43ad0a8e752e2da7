package trust

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/flipside-linux/flipside/updater/trust/trusttest"
)

// Power lost before or after any command of what concerns keys: what was there stays what it was, and doing the same again does it.
func TestPowerLossForKeys(t *testing.T) {
	key := rsaKey(t)
	maker := trusttest.NewMaker(t, "Muster")
	m := makers(t, maker.Dir(maker.Root(), maker.Between()))
	zero, err := SignPCRs(key, map[uint][]byte{11: make([]byte, 32)}) // what an emulator has that has booted nothing
	if err != nil {
		t.Fatal(err)
	}
	keys := func(t *TPM) error { return t.ProvisionKeys(nil) }
	unseals := func(t *TPM, s Sealed) error {
		got, err := t.Unseal(s, zero)
		if err == nil && string(got) != "secret" {
			err = errors.New("another secret came out")
		}
		return err
	}
	for _, tt := range []struct {
		name    string
		prepare func(*TPM) error
		do      func(*TPM) error
		least   int // commands
	}{
		{"making the keys", nil, keys, 6},
		{"sealing", nil, func(t *TPM) error {
			s, err := t.Seal(nil, &key.PublicKey, []byte("secret"))
			if err != nil {
				return err
			}
			return unseals(t, s)
		}, 10},
		{"proving a boot", keys, func(t *TPM) error {
			p, err := t.Prove(Claim{Host: "abcd", Nonce: testNonce, Slot: "USR-B", Version: "2.0.0"})
			if err != nil {
				return err
			}
			_, err = p.Verify("abcd", testNonce)
			return err
		}, 4},
		{"showing whose TPM it is", keys, func(t *TPM) error {
			r, err := t.Endorsement("")
			if err != nil {
				return err
			}
			data, err := json.Marshal(r)
			if err != nil {
				return err
			}
			if data, err = m.Challenge(testNonce, data); err != nil {
				return err
			}
			c, err := DecodeChallenge(data)
			if err != nil {
				return err
			}
			_, err = t.Answer(r, c)
			return err
		}, 8},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := trusttest.Start(t)
			e.Store(trusttest.ECCCertificate, maker.Certify(e.EndorsementKey(trusttest.ECCCertificate), nil))
			blank := e.Save()
			n := 0
			for done := false; !done; {
				n++
				for _, after := range []bool{false, true} {
					e.Kill()
					e.Restore(blank)
					e.Power()
					tpm := openTPM(t, e)
					if tt.prepare != nil {
						if err := tt.prepare(tpm); err != nil {
							t.Fatal(err)
						}
					}
					c := &cutTPM{TPM: tpm, e: e, left: n, after: after}
					err := tt.do(NewTPM(c))
					if !c.failed {
						if err != nil {
							t.Fatal(err)
						}
						done = true
						break
					}
					// The answer to the last command, which puts something away, may be lost without anybody missing it.
					if err != nil && !errors.Is(err, ErrTPM) {
						t.Errorf("cut at command %d (after: %v): %v", n, after, err)
					}
					e.Power()
					if err := tt.do(tpm); err != nil {
						t.Errorf("cut at command %d (after: %v), and again: %v", n, after, err)
					}
				}
			}
			if n-1 < tt.least {
				t.Errorf("only %d commands", n-1)
			}
			t.Logf("%d commands", n-1)
		})
	}
}

// fill leaves no room in a TPM, neither for an index of 8 bytes nor for a key, and returns what fills it.
func fill(t *testing.T, tpm *TPM) (indices, keys []tpm2.TPMHandle) {
	t.Helper()
	made, err := tpm2.CreatePrimary{PrimaryHandle: owner(nil), InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(tpm.t)
	if err != nil {
		t.Fatal(err)
	}
	defer tpm2.FlushContext{FlushHandle: made.ObjectHandle}.Execute(tpm.t)
	until := func(h tpm2.TPMHandle, full *[]tpm2.TPMHandle, take func(tpm2.TPMHandle) error) {
		t.Helper()
		for ; ; h++ {
			if err := take(h); err != nil {
				if !errors.Is(err, ErrFull) {
					t.Fatal(err)
				}
				return
			}
			*full = append(*full, h)
		}
	}
	until(0x81010000, &keys, func(h tpm2.TPMHandle) error {
		_, err := tpm2.EvictControl{Auth: owner(nil), ObjectHandle: &tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name}, PersistentHandle: h}.Execute(tpm.t)
		return explain("keeping a key", err)
	})
	attr := tpm2.TPMANV{NT: tpm2.TPMNTOrdinary, OwnerRead: true, OwnerWrite: true}
	for i, size := range []int{2048, 256, 8} {
		until(tpm2.TPMHandle(0x01800000+i<<12), &indices, func(h tpm2.TPMHandle) error { return tpm.define(h, attr, size, nil) })
	}
	return indices, keys
}

// A full TPM takes no keys either and says so; with room again, what was begun is completed.
func TestFullTPMForKeys(t *testing.T) {
	tpm := openTPM(t, trusttest.Start(t))
	indices, keys := fill(t, tpm)
	t.Logf("%d indices and %d keys", len(indices), len(keys))
	key := rsaKey(t)
	type step struct {
		what string
		do   func() error
	}
	steps := []step{
		{"the floor", func() error { return tpm.Provision(nil, day) }},
		{"the keys", func() error { return tpm.ProvisionKeys(nil) }},
		{"a secret", func() error { _, err := tpm.Seal(nil, &key.PublicKey, []byte("x")); return err }},
	}
	for _, s := range steps {
		if err := s.do(); !errors.Is(err, ErrFull) {
			t.Errorf("%s: %v", s.what, err)
		}
	}
	// Room comes back a little at a time: for half of the floor, and for one of two keys.
	for len(steps) > 0 {
		steps = slices.DeleteFunc(steps, func(s step) bool {
			err := s.do()
			if err == nil {
				return true
			}
			if !errors.Is(err, ErrFull) {
				t.Fatalf("%s, with some room: %v", s.what, err)
			}
			if _, floor := tpm.Floor(); s.what == "the floor" && !errors.Is(floor, ErrNotPrepared) {
				t.Fatalf("half a floor counts: %v", floor)
			}
			return false
		})
		switch {
		case len(indices) > 0:
			h := indices[len(indices)-1]
			indices = indices[:len(indices)-1]
			pub, err := tpm2.NVReadPublic{NVIndex: h}.Execute(tpm.t)
			if err == nil {
				err = tpm.undefine(h, index{name: pub.NVName}, nil)
			}
			if err != nil {
				t.Fatal(err)
			}
		case len(keys) > 0:
			h := keys[len(keys)-1]
			keys = keys[:len(keys)-1]
			pub, err := tpm2.ReadPublic{ObjectHandle: h}.Execute(tpm.t)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := (tpm2.EvictControl{Auth: owner(nil), ObjectHandle: &tpm2.NamedHandle{Handle: h, Name: pub.Name}, PersistentHandle: h}).Execute(tpm.t); err != nil {
				t.Fatal(err)
			}
		default:
			t.Fatalf("an empty TPM has no room for %d of them", len(steps))
		}
	}
	wantFloor(t, tpm, day)
	prove(t, tpm)
}

// Somebody has typed wrong passwords until the TPM locked out. What a host does day by day goes on.
func TestLockedOutTPMForKeys(t *testing.T) {
	e := trusttest.Start(t)
	maker := trusttest.NewMaker(t, "Muster")
	e.Store(trusttest.ECCCertificate, maker.Certify(e.EndorsementKey(trusttest.ECCCertificate), nil))
	tpm := openTPM(t, e)
	key := rsaKey(t)
	if err := errors.Join(tpm.Provision(nil, 0), tpm.ProvisionKeys(nil)); err != nil {
		t.Fatal(err)
	}
	secret, err := tpm.Seal(nil, &key.PublicKey, []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	zero, err := SignPCRs(key, map[uint][]byte{11: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	lockOut(t, tpm)
	d, err := OpenDevice(e.Socket)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte("x"))
	if _, err := d.Sign(nil, sum[:], crypto.SHA256); err != nil {
		t.Errorf("signing: %v", err)
	}
	prove(t, tpm)
	if err := tpm.Raise(context.Background(), 4*day); err != nil {
		t.Errorf("raising: %v", err)
	}
	if got, err := tpm.Unseal(secret, zero); err != nil || string(got) != "secret" {
		t.Errorf("opening: %q, %v", got, err)
	}
	if _, err := enrol(t, tpm, makers(t, maker.Dir(maker.Root(), maker.Between()))); err != nil {
		t.Errorf("showing whose TPM it is: %v", err)
	}
}

// Where a key should be is another one: one that was made outside and brought in, or one that signs anything where a restricted one should be. It is neither used nor replaced.
func TestForeignKey(t *testing.T) {
	for _, tt := range []struct {
		name   string
		handle tpm2.TPMHandle
		change func(*tpm2.TPMTPublic)
	}{
		{"a device key that can be taken out", deviceHandle, func(a *tpm2.TPMTPublic) { a.ObjectAttributes.FixedTPM, a.ObjectAttributes.FixedParent = false, false }},
		{"an attestation key that signs anything", attestationHandle, func(a *tpm2.TPMTPublic) { a.ObjectAttributes.Restricted = false }},
		{"an attestation key with another hash", attestationHandle, func(a *tpm2.TPMTPublic) { a.NameAlg = tpm2.TPMAlgSHA384 }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := trusttest.Start(t)
			tpm := openTPM(t, e)
			area := keyTemplate(tt.handle == attestationHandle)
			tt.change(&area)
			// A primary key is fixed to its TPM; below a parent it need not be.
			parent, err := tpm.storage([]byte{})
			if err != nil {
				t.Fatal(err)
			}
			made, err := tpm2.Create{ParentHandle: plain(parent.handle, parent.name), InPublic: tpm2.New2B(area)}.Execute(tpm.t)
			if err != nil {
				t.Fatal(err)
			}
			object, err := tpm2.Load{ParentHandle: plain(parent.handle, parent.name), InPrivate: made.OutPrivate, InPublic: made.OutPublic}.Execute(tpm.t)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := (tpm2.EvictControl{
				Auth: owner(nil), ObjectHandle: &tpm2.NamedHandle{Handle: object.ObjectHandle, Name: object.Name}, PersistentHandle: tt.handle,
			}).Execute(tpm.t); err != nil {
				t.Fatal(err)
			}
			if _, err := (tpm2.FlushContext{FlushHandle: object.ObjectHandle}).Execute(tpm.t); err != nil {
				t.Fatal(err)
			}
			if err := tpm.ProvisionKeys(nil); !errors.Is(err, ErrForeign) {
				t.Errorf("provisioning: %v", err)
			}
			if tt.handle == deviceHandle {
				if _, err := OpenDevice(e.Socket); !errors.Is(err, ErrForeign) {
					t.Errorf("opening: %v", err)
				}
				return
			}
			if _, err := tpm.Prove(Claim{Host: "abcd", Nonce: testNonce, Slot: "USR-B", Version: "2.0.0"}); !errors.Is(err, ErrForeign) {
				t.Errorf("proving: %v", err)
			}
			if _, err := tpm.Endorsement(""); !errors.Is(err, ErrForeign) {
				t.Errorf("showing whose TPM it is: %v", err)
			}
		})
	}
}

// No TPM, and something else in its place.
func TestMissingTPM(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "tpmrm0")
	if _, err := OpenTPM(missing); !errors.Is(err, ErrNoTPM) {
		t.Error(err)
	}
	if _, err := OpenDevice(missing); !errors.Is(err, ErrNoTPM) {
		t.Error(err)
	}
	if _, err := Signer(KeyName, missing); !errors.Is(err, ErrNoTPM) {
		t.Error(err)
	}
	tpm, err := OpenTPM("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer tpm.Close()
	if _, err := tpm.Floor(); !errors.Is(err, ErrTPM) {
		t.Errorf("a device that answers nothing: %v", err)
	}
	key := rsaKey(t)
	at := readKernel(t, unified("2", nil)).At(DefaultPhase)
	sigs, err := SignPCRs(key, map[uint][]byte{11: at[:], 7: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	reads := func(pcrs []uint) (map[uint][]byte, error) {
		t, err := OpenTPM(missing)
		if err != nil {
			return nil, err
		}
		return t.PCRs(pcrs)
	}
	if err := (PCRKeys{Keys: []*rsa.PublicKey{&key.PublicKey}, Current: reads}).Check(bytes.NewReader(unified("2", sigs)), nil); !errors.Is(err, ErrUnpredictable) {
		t.Error(err)
	}
}
