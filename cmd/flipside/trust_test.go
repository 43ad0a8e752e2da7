package main

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/updater/trust"
	"github.com/flipside-linux/flipside/updater/trust/trusttest"
)

// A secret is sealed, and opens where the key has authorised what is measured: here nothing, because nobody has booted the kernel.
func TestTrustSeal(t *testing.T) {
	e := trusttest.Start(t)
	dir := t.TempDir()
	file := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	conf := file("flipside.toml", fmt.Sprintf("[update]\nserver = \"https://updates.example/\"\n[trust]\ntpm = %q\n", e.Socket))
	run := func(want int, stdin string, args ...string) string {
		t.Helper()
		var out, errs bytes.Buffer
		a := &app{stdin: strings.NewReader(stdin), stdout: &out, stderr: &errs}
		if code := a.run(t.Context(), append([]string{"--config", conf}, args...)); code != want {
			t.Fatalf("flipside %s: status %d, want %d\n%s%s", strings.Join(args, " "), code, want, out.String(), errs.String())
		}
		return out.String() + errs.String()
	}
	key := filepath.Join(dir, "pcr")
	run(exitOK, "", "payload", "keygen", "--type", "rsa2048", key)
	kernel := file("kernel.efi", string(trusttest.Kernel(trusttest.Section{Name: ".linux", Data: []byte("linux")})))
	sealed := filepath.Join(dir, "sealed.json")
	run(exitOK, "secret", "trust", "seal", key+".pub", "-o", sealed)
	run(exitVerify, "", "trust", "unseal", sealed)
	sigs := file("sigs.json", run(exitOK, "", "trust", "pcrs", kernel, "--key", key))
	run(exitVerify, "", "trust", "unseal", sealed, "--signature", sigs)
	run(exitVerify, "", "trust", "pcrs", sealed)
	if out := run(exitOK, "", "trust", "pcrs", kernel, "--phase", "enter-initrd,enter-initrd:leave-initrd"); strings.Count(out, "11:sha256=") != 2 {
		t.Error(out)
	}
	// A policy for the PCR as it is in an emulator that has booted nothing.
	signer, err := loadSigner(key)
	if err != nil {
		t.Fatal(err)
	}
	now, err := trust.SignPCRs(signer, map[uint][]byte{11: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	if out := run(exitOK, "", "trust", "unseal", sealed, "--signature", sigs+","+file("now.json", string(now))); out != "secret" {
		t.Errorf("%q", out)
	}
}

// What a TPM cannot do is said by "trust status".
func TestTrustStatusWithoutSHA256(t *testing.T) {
	e := trusttest.Start(t)
	e.WithoutSHA256()
	conf := filepath.Join(t.TempDir(), "flipside.toml")
	if err := os.WriteFile(conf, []byte(fmt.Sprintf("[update]\nserver = \"https://updates.example/\"\n[trust]\ntpm = %q\n", e.Socket)), 0o600); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}
	a.run(t.Context(), []string{"--config", conf, "trust", "status"})
	if !strings.Contains(out.String(), "no SHA-256 bank of PCRs; the firmware's settings switch it on") {
		t.Errorf("%s%s", &out, &errs)
	}
}

func TestTrustCommand(t *testing.T) {
	e := trusttest.Start(t)
	dir := t.TempDir()
	conf := filepath.Join(dir, "flipside.toml")
	file := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	run := func(want int, args ...string) string {
		t.Helper()
		var out, errs bytes.Buffer
		a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}
		if code := a.run(t.Context(), append([]string{"--config", conf}, args...)); code != want {
			t.Fatalf("flipside %s: status %d, want %d\n%s%s", strings.Join(args, " "), code, want, out.String(), errs.String())
		}
		return out.String() + errs.String()
	}
	file("os-release", "VERSION_ID=1.0.0\nFLIPSIDE_TIMESTAMP=1717200000\n")
	file("flipside.toml", fmt.Sprintf("[update]\nserver = \"https://updates.example/\"\nkeys = [%q]\n[host]\nos_release = %q\n[paths]\nstate = %q\n[trust]\ntpm = %q\n",
		filepath.Join(dir, "key.pub.pem"), filepath.Join(dir, "os-release"), filepath.Join(dir, "state"), e.Socket))
	if out := run(exitVerify, "trust", "status"); !strings.Contains(out, "no key is pinned") {
		t.Error(out)
	}
	run(exitOK, "payload", "keygen", filepath.Join(dir, "key"))
	if pubs, _ := filepath.Glob(filepath.Join(dir, "key*pub*")); len(pubs) == 1 {
		os.Rename(pubs[0], filepath.Join(dir, "key.pub.pem"))
	}
	if out := run(exitOK, "trust", "status"); !strings.Contains(out, "floor       1717200000 (2024-06-01T00:00:00Z)") || !strings.Contains(out, "in a file") {
		t.Error(out)
	}
	run(exitFailed, "trust", "request", "node-7")
	if out := run(exitOK, "trust", "provision"); !strings.Contains(out, "in the TPM") || !strings.Contains(out, "owner password is empty") {
		t.Error(out)
	}
	block, _ := pem.Decode([]byte(run(exitOK, "trust", "request", "node-7", "--dns", "node-7.example")))
	if csr, err := x509.ParseCertificateRequest(block.Bytes); err != nil || csr.CheckSignature() != nil || csr.DNSNames[0] != "node-7.example" {
		t.Error(csr, err)
	}
	wrong := file("wrong", "wrong\n")
	if out := run(exitPermitted, "trust", "reset", "--to", "5", "--owner-password-file", wrong); !strings.Contains(out, "password is wrong") || !strings.Contains(out, "hint: ") {
		t.Error(out)
	}
	run(exitUsage, "trust", "reset")
	var st struct {
		Floor  struct{ Number, TPM, File int64 }
		Device string `json:"device_key"`
	}
	if err := json.Unmarshal([]byte(run(exitOK, "trust", "reset", "--to", "1800000000", "--json")), &st); err != nil || st.Floor.TPM != 1800000000 || st.Device == "" {
		t.Error(st, err)
	}
}

// Payloads are verified by the rules of a host's directory of keys.
func TestVerifyWithKeyDirectory(t *testing.T) {
	dir := t.TempDir()
	file, pub := signedPayload(t, dir, "p.bin", 1)
	key, err := os.ReadFile(pub)
	if err != nil {
		t.Fatal(err)
	}
	public, err := trust.PublicKeys([]string{pub})
	if err != nil {
		t.Fatal(err)
	}
	print, err := trust.Fingerprint(public[0])
	if err != nil {
		t.Fatal(err)
	}
	keys := filepath.Join(dir, "keys.d")
	if err := os.Mkdir(keys, 0o755); err != nil {
		t.Fatal(err)
	}
	put := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(keys, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	verify := func(want int, args ...string) {
		t.Helper()
		args = append([]string{"payload", "verify", file, "--keys", keys}, args...)
		var out, errs bytes.Buffer
		a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}
		if code := a.run(t.Context(), args); code != want {
			t.Fatalf("flipside %s: status %d, want %d\n%s%s", strings.Join(args, " "), code, want, out.String(), errs.String())
		}
		if len(args) > 5 {
			return
		}
		// A release server and a mirror take what a host would take.
		check, err := verifier([]string{keys})
		if err == nil {
			err = check(t.Context(), file, nil)
		}
		if (err == nil) != (want == exitOK) {
			t.Errorf("the verifier of releases: %v, want status %d", err, want)
		}
	}
	put("a.toml", "role = \"development\"\npublic_key = \"\"\"\n"+string(key)+"\"\"\"\n")
	verify(exitVerify)
	verify(exitOK, "--development")
	put("a.toml", "public_key = \"\"\"\n"+string(key)+"\"\"\"\n")
	verify(exitVerify, "--signatures", "2")
	verify(exitOK)
	put("b.toml", "revoke = [\""+print+"\"]\n")
	verify(exitVerify)
}
