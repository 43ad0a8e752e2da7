package trust

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/flipside-linux/flipside/updater/trust/trusttest"
)

func rsaKey(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// unified makes a unified kernel image of a release. What it measures is another thing for each.
func unified(release string, signatures []byte) []byte {
	s := []trusttest.Section{
		{Name: ".osrel", Data: []byte("VERSION_ID=" + release + "\n")}, {Name: ".linux", Data: bytes.Repeat([]byte(release), 1000)},
		{Name: ".cmdline", Data: []byte("root=/dev/x")}, {Name: ".initrd", Data: bytes.Repeat([]byte{7}, 5000)},
	}
	if signatures != nil {
		s = append(s, trusttest.Section{Name: ".pcrsig", Data: signatures})
	}
	return trusttest.Kernel(s...)
}

func readKernel(t testing.TB, data []byte) Kernel {
	t.Helper()
	k, err := ReadKernel(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// signed authorises what a release measures when an encrypted disk is opened.
func signed(t testing.TB, key *rsa.PrivateKey, release string) []byte {
	t.Helper()
	at := readKernel(t, unified(release, nil)).At(DefaultPhase)
	data, err := SignPCRs(key, map[uint][]byte{11: at[:]})
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// boot measures as systemd-stub and systemd-pcrphase do, into an emulator that has just got power.
func boot(t testing.TB, tpm *TPM, kernel Kernel, sections [][]byte) {
	t.Helper()
	for _, data := range sections {
		sum := sha256.Sum256(data)
		_, err := tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(11), Auth: tpm2.PasswordAuth(nil)},
			Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: sum[:]}}},
		}.Execute(tpm.t)
		if err != nil {
			t.Fatal(err)
		}
	}
	now, err := tpm.PCRs([]uint{11})
	if err != nil {
		t.Fatal(err)
	}
	if at := kernel.At(DefaultPhase); !bytes.Equal(now[11], at[:]) {
		t.Fatalf("PCR 11 is %x, predicted %x", now[11], at)
	}
}

// measured is what systemd-stub measures of unified(release, …), in its order, and the first phase.
func measured(release string) [][]byte {
	return [][]byte{
		[]byte(".linux\x00"), bytes.Repeat([]byte(release), 1000), []byte(".osrel\x00"), []byte("VERSION_ID=" + release + "\n"),
		[]byte(".cmdline\x00"), []byte("root=/dev/x"), []byte(".initrd\x00"), bytes.Repeat([]byte{7}, 5000), []byte("enter-initrd"),
	}
}

// A disk key that is sealed to a key for policies opens in the slots that this key has authorised, before and after an update and after going back, and in no other.
func TestSealedToSignedPolicy(t *testing.T) {
	e := trusttest.Start(t)
	tpm := openTPM(t, e)
	key, other := rsaKey(t), rsaKey(t)
	secret := []byte("the disk's key")
	sealed, err := tpm.Seal(nil, &key.PublicKey, secret)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name       string
		release    string
		signatures []byte
		opens      bool
	}{
		{"the running slot", "1", signed(t, key, "1"), true},
		{"the next slot", "2", signed(t, key, "2"), true},
		{"back in the old slot", "1", signed(t, key, "1"), true},
		{"a slot whose policy is another release's", "3", signed(t, key, "2"), false},
		{"a slot whose policy is signed by somebody else", "3", signed(t, other, "3"), false},
		{"a slot without a policy", "3", []byte(`{}`), false},
	} {
		e.Kill()
		e.Power()
		boot(t, tpm, readKernel(t, unified(tt.release, nil)), measured(tt.release))
		got, err := tpm.Unseal(sealed, tt.signatures)
		if tt.opens && (err != nil || !bytes.Equal(got, secret)) {
			t.Errorf("%s: %q, %v", tt.name, got, err)
		}
		if !tt.opens && !errors.Is(err, ErrShut) {
			t.Errorf("%s: %q, %v", tt.name, got, err)
		}
		// The host has said the same beforehand.
		err = PCRKeys{Keys: []*rsa.PublicKey{&key.PublicKey}}.Check(bytes.NewReader(unified(tt.release, tt.signatures)), nil)
		if tt.opens && err != nil || !tt.opens && !errors.Is(err, ErrShut) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	// The TPM itself refuses what this program does not ask for: a policy for PCRs that are not so.
	e.Kill()
	e.Power()
	sigs, err := ParsePCRSignatures(signed(t, key, "2"))
	if err != nil {
		t.Fatal(err)
	}
	parent, err := tpm.storage(nil)
	if err != nil {
		t.Fatal(err)
	}
	private, _ := tpm2.Unmarshal[tpm2.TPM2BPrivate](sealed.Private)
	public, _ := tpm2.Unmarshal[tpm2.TPM2BPublic](sealed.Public)
	object, err := tpm2.Load{ParentHandle: plain(parent.handle, parent.name), InPrivate: *private, InPublic: *public}.Execute(tpm.t)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := tpm.unseal(object, &key.PublicKey, sigs[0]); err == nil {
		t.Errorf("the TPM gives %q out under PCRs that nobody has authorised", got)
	}
	if _, err := (tpm2.Unseal{ItemHandle: plain(object.ObjectHandle, object.Name)}).Execute(tpm.t); err == nil {
		t.Error("the secret opens with an empty password")
	}
}

func TestCheckPCRPolicy(t *testing.T) {
	key := rsaKey(t)
	keys := PCRKeys{Keys: []*rsa.PublicKey{&key.PublicKey}}
	at := readKernel(t, unified("2", nil)).At(DefaultPhase)
	later := readKernel(t, unified("2", nil)).At("enter-initrd:leave-initrd")
	seven := bytes.Repeat([]byte{7}, 32)
	sign := func(values ...map[uint][]byte) []byte {
		t.Helper()
		data, err := SignPCRs(key, values...)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	with7 := sign(map[uint][]byte{11: at[:], 7: seven})
	reads := func(value []byte) func([]uint) (map[uint][]byte, error) {
		return func([]uint) (map[uint][]byte, error) { return map[uint][]byte{7: value}, nil }
	}
	busy := func([]uint) (map[uint][]byte, error) { return nil, explain("reading the PCRs", tpm2.TPMRCRetry) }
	for _, tt := range []struct {
		name       string
		kernel     []byte
		signatures []byte
		keys       PCRKeys
		want       error
	}{
		{"beside the kernel", unified("2", nil), sign(map[uint][]byte{11: at[:]}), keys, nil},
		{"inside the kernel", unified("2", sign(map[uint][]byte{11: at[:]})), nil, keys, nil},
		{"for several phases", unified("2", sign(map[uint][]byte{11: later[:]}, map[uint][]byte{11: at[:]})), nil, keys, nil},
		{"only for a phase that comes too late", unified("2", sign(map[uint][]byte{11: later[:]})), nil, keys, ErrShut},
		{"for the phase in which it is needed", unified("2", sign(map[uint][]byte{11: later[:]})), nil, PCRKeys{Keys: keys.Keys, Phase: "enter-initrd:leave-initrd"}, nil},
		{"none", unified("2", nil), nil, keys, ErrShut},
		{"rubbish", unified("2", []byte("rubbish")), nil, keys, ErrShut},
		{"with a PCR that stays as it is", unified("2", with7), nil, PCRKeys{Keys: keys.Keys, Current: reads(seven)}, nil},
		{"with a PCR that is another", unified("2", with7), nil, PCRKeys{Keys: keys.Keys, Current: reads(bytes.Repeat([]byte{8}, 32))}, ErrShut},
		{"with a PCR and no TPM", unified("2", with7), nil, keys, ErrUnpredictable},
		{"with a PCR and a TPM that is busy", unified("2", with7), nil, PCRKeys{Keys: keys.Keys, Current: busy}, ErrTPM},
		{"with a busy TPM that is not needed", unified("2", sign(map[uint][]byte{11: at[:], 7: seven}, map[uint][]byte{11: at[:]})), nil, PCRKeys{Keys: keys.Keys, Current: busy}, nil},
		{"not a unified kernel", []byte("bzImage"), nil, keys, ErrUnpredictable},
		{"a PE file without a kernel", trusttest.Kernel(trusttest.Section{Name: ".text", Data: []byte("x")}), nil, keys, ErrUnpredictable},
		{"profiles", trusttest.Kernel(trusttest.Section{Name: ".linux", Data: []byte("x")}, trusttest.Section{Name: ".profile", Data: []byte("x")}), nil, keys, ErrUnpredictable},
	} {
		if err := tt.keys.Check(bytes.NewReader(tt.kernel), tt.signatures); !errors.Is(err, tt.want) || tt.want == ErrTPM && errors.Is(err, ErrUnpredictable) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
}

// The owner's password is asked for once, and the storage key is ours.
func TestSealAsksTheOwner(t *testing.T) {
	tpm := openTPM(t, trusttest.Start(t))
	setOwner(t, tpm, nil, []byte("secret"))
	key := rsaKey(t)
	if _, err := tpm.Seal([]byte("wrong"), &key.PublicKey, []byte("x")); !errors.Is(err, ErrOwnerAuth) {
		t.Error(err)
	}
	for _, password := range []string{"secret", "not needed any more"} {
		if _, err := tpm.Seal([]byte(password), &key.PublicKey, []byte("x")); err != nil {
			t.Error(err)
		}
	}
	if _, err := tpm.Seal(nil, &key.PublicKey, make([]byte, 200)); err == nil {
		t.Error("a secret of 200 bytes")
	}
}

// systemd-measure predicts the same, and what it signs is taken.
func TestAgainstSystemdMeasure(t *testing.T) {
	const measure = "/usr/lib/systemd/systemd-measure"
	if _, err := exec.LookPath(measure); err != nil {
		t.Skip("systemd-measure is not installed (apt-get install systemd)")
	}
	dir := t.TempDir()
	file := func(name string, data []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	key := rsaKey(t)
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	public := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	sections := []trusttest.Section{
		{Name: ".pcrpkey", Data: public}, {Name: ".linux", Data: bytes.Repeat([]byte("kernel"), 999)}, {Name: ".osrel", Data: []byte("ID=x\n")},
		{Name: ".initrd", Data: []byte("initrd")}, {Name: ".cmdline", Data: []byte("quiet")}, {Name: ".splash", Data: []byte("BM")}, {Name: ".dtb", Data: []byte("dtb")},
	}
	args := []string{"--bank=sha256", "--phase=enter-initrd", "--phase=enter-initrd:leave-initrd:sysinit:ready"}
	for _, s := range sections {
		args = append(args, "--"+s.Name[1:]+"="+file(s.Name[1:], s.Data))
	}
	out, err := exec.Command(measure, append([]string{"calculate"}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	k := readKernel(t, trusttest.Kernel(sections...))
	for _, phase := range []string{"enter-initrd", "enter-initrd:leave-initrd:sysinit:ready"} {
		at := k.At(phase)
		if !strings.Contains(string(out), "11:sha256="+hex.EncodeToString(at[:])+"\n") {
			t.Errorf("phase %s: predicted %x, systemd-measure says\n%s", phase, at, out)
		}
	}
	private := file("private.pem", pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
	e := trusttest.Start(t)
	cmd := exec.Command(measure, append([]string{"sign", "--tpm2-device=swtpm:path=" + e.Socket, "--private-key=" + private, "--public-key=" + filepath.Join(dir, "pcrpkey")}, args...)...)
	var said strings.Builder
	cmd.Stderr = &said
	sigs, err := cmd.Output()
	if err != nil {
		if found, _ := filepath.Glob("/usr/lib/*/libtss2-tcti-swtpm.so*"); len(found) == 0 {
			t.Skip("systemd-measure signs with a TPM, and finds no way to swtpm (apt-get install libtss2-tcti-swtpm0)")
		}
		t.Fatalf("systemd-measure sign: %v\n%s", err, said.String())
	}
	if err := (PCRKeys{Keys: []*rsa.PublicKey{&key.PublicKey}}).Check(bytes.NewReader(trusttest.Kernel(sections...)), sigs); err != nil {
		t.Errorf("what systemd-measure signed: %v\n%s", err, sigs)
	}
	// And the other way round: what is signed here is what it signs, policy for policy, and so the bytes of one are good where those of the other are.
	theirs, err := ParsePCRSignatures(sigs)
	if err != nil {
		t.Fatal(err)
	}
	var values []map[uint][]byte
	for _, phase := range []string{"enter-initrd", "enter-initrd:leave-initrd:sysinit:ready"} {
		at := k.At(phase)
		values = append(values, map[uint][]byte{11: at[:]})
	}
	data, err := SignPCRs(key, values...)
	if err != nil {
		t.Fatal(err)
	}
	ours, err := ParsePCRSignatures(data)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(ours, theirs) { // RSASSA-PKCS1-v1_5 has no chance in it
		t.Errorf("signed here:\n%s\nby systemd-measure:\n%s", data, sigs)
	}
}

func FuzzKernel(f *testing.F) {
	key := rsaKey(f)
	f.Add(unified("1", signed(f, key, "1")))
	f.Add([]byte("MZ"))
	f.Fuzz(func(t *testing.T, data []byte) {
		k, err := ReadKernel(bytes.NewReader(data))
		if err != nil {
			return
		}
		if _, err := ParsePCRSignatures(k.Signatures); err == nil && len(k.Signatures) == 0 {
			t.Fatal("no signatures are read as some")
		}
	})
}
