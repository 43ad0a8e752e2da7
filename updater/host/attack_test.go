package host

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
	releases "github.com/flipside-linux/flipside/omaha/server"
	"github.com/flipside-linux/flipside/payload/build"
	"github.com/flipside-linux/flipside/payload/keytest"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/trust"
	"github.com/flipside-linux/flipside/updater/trust/trusttest"
	"github.com/flipside-linux/flipside/updater/writer"
)

// numbered makes a payload with a number and a product.
func (r *rig) numbered(version string, number int64, product string, keys ...crypto.Signer) []byte {
	r.t.Helper()
	img := r.image(version)
	var b bytes.Buffer
	_, err := build.Full(r.t.Context(), &b, build.Spec{
		Images: []build.Image{{Name: "usr", Data: bytes.NewReader(img), Size: int64(len(img))}}, Keys: keys, MaxTimestamp: number, Product: product, TempDir: r.dir,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return b.Bytes()
}

// update takes one release from the offer to the confirmed boot.
func (r *rig) update(version string, data []byte) {
	r.t.Helper()
	r.publish(version, data)
	slot, _ := r.boot()
	began := time.Now() // an error from before is that of another release
	if _, rebooted := r.run(slot, func(st updater.Status) bool { return settled(st) && st.LastError != "" && st.ErrorAt.After(began) }); !rebooted {
		r.t.Fatalf("release %s was not taken", version)
	}
	slot, booted := r.boot()
	if booted != version {
		r.t.Fatalf("booted %s, want %s", booted, version)
	}
	if st, _ := r.run(slot, settled); st.LastUpdate == nil || !st.LastUpdate.Good {
		r.t.Fatalf("release %s is not confirmed: %+v", version, st.LastUpdate)
	}
}

// refused offers a release and wants it refused before the first write, for a reason that names these.
func (r *rig) refused(version string, data []byte, words ...string) {
	r.t.Helper()
	before, err := os.ReadFile(r.disk)
	if err != nil {
		r.t.Fatal(err)
	}
	r.publish(version, data)
	slot, _ := r.boot()
	st, rebooted := r.run(slot, func(st updater.Status) bool { return strings.Contains(st.LastError, version) && !st.Asking })
	if rebooted {
		r.t.Fatalf("release %s was taken", version)
	}
	for _, w := range words {
		if !strings.Contains(st.LastError, w) {
			r.t.Errorf("refused because %q, want something with %q", st.LastError, w)
		}
	}
	after, err := os.ReadFile(r.disk)
	if err != nil {
		r.t.Fatal(err)
	}
	if !bytes.Equal(before, after) {
		r.t.Error("the disk was written before the payload was refused")
	}
}

const day = 24 * 60 * 60

// An old release, rightly signed, offered under a new version by whoever has the server, a mirror or the network.
func TestReplayIsRefused(t *testing.T) {
	r := newRig(t)
	old := r.numbered("1.9.0", 10*day, "", r.key)
	r.update("2.0.0", r.numbered("2.0.0", 20*day, "", r.key))
	r.refused("3.0.0", old, "its timestamp is 864000, the floor 1728000")
	r.refused("3.0.1", r.payload("3.0.1", r.image("3.0.1"), r.key), "its timestamp is 0, the floor 1728000") // without a number
	r.update("4.0.0", r.numbered("4.0.0", 20*day, "", r.key))                                                // as new is not older
}

// A release that never proves itself does not raise the floor: the way back stays open.
func TestFloorRisesOnlyAfterAGoodBoot(t *testing.T) {
	r := newRig(t)
	level := func() int64 {
		f, err := writer.Floor(r.config("USR-A"))
		if err != nil {
			t.Fatal(err)
		}
		l, err := f.Level()
		if err != nil {
			t.Fatal(err)
		}
		return l.Number
	}
	r.publish("2.0.0", r.numbered("2.0.0", 20*day, "", r.key))
	slot, _ := r.boot()
	if _, rebooted := r.run(slot, func(updater.Status) bool { return false }); !rebooted {
		t.Fatal("no reboot")
	}
	if n := level(); n != 0 {
		t.Errorf("armed, and the floor is %d", n)
	}
	r.boot() // spends the only try, and never comes up
	slot, version := r.boot()
	if version != "1.0.0" {
		t.Fatalf("booted %s", version)
	}
	r.run(slot, settled)
	if n := level(); n != 0 {
		t.Errorf("it never came up, and the floor is %d", n)
	}
	r.healthDir = filepath.Join(r.dir, "health.d")
	if err := errors.Join(os.Mkdir(r.healthDir, 0o755), os.WriteFile(filepath.Join(r.healthDir, "check"), []byte("#!/bin/sh\necho no; exit 1\n"), 0o755)); err != nil {
		t.Fatal(err)
	}
	r.publish("2.1.0", r.numbered("2.1.0", 21*day, "", r.key))
	slot, _ = r.boot()
	if _, rebooted := r.run(slot, func(updater.Status) bool { return false }); !rebooted {
		t.Fatal("no reboot")
	}
	if slot, version = r.boot(); version != "2.1.0" {
		t.Fatalf("booted %s", version)
	}
	if _, rebooted := r.run(slot, func(updater.Status) bool { return false }); !rebooted { // it goes back by itself
		t.Fatal("no reboot")
	}
	if slot, version = r.boot(); version != "1.0.0" {
		t.Fatalf("booted %s", version)
	}
	r.run(slot, settled)
	if n := level(); n != 0 {
		t.Errorf("its health checks failed, and the floor is %d", n)
	}
	r.healthDir = ""
	r.update("1.5.0", r.numbered("1.5.0", 15*day, "", r.key))
	if n := level(); n != 15*day {
		t.Errorf("confirmed, and the floor is %d", n)
	}
}

// With a TPM neither deleting the floor's file nor restoring the whole disk from a backup brings an old release in.
func TestDiskOfYesterdayWithATPM(t *testing.T) {
	e := trusttest.Start(t)
	r := newRig(t)
	r.conf = "[trust]\nfloor = \"tpm\"\ntpm = \"" + e.Socket + "\"\n"
	r.refused("1.1.0", r.numbered("1.1.0", 11*day, "", r.key), "not provisioned")
	slot, _ := r.boot()
	f, err := writer.Floor(r.config(slot))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Provision(context.Background(), nil, 0); err != nil {
		t.Fatal(err)
	}
	backup := map[string][]byte{}
	for _, name := range []string{"disk.img", "state/trust.json", "state/state.json"} {
		if backup[name], err = os.ReadFile(filepath.Join(r.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	old := r.numbered("1.9.0", 10*day, "", r.key)
	r.update("2.0.0", r.numbered("2.0.0", 20*day, "", r.key))

	if err := os.Remove(filepath.Join(r.dir, "state/trust.json")); err != nil {
		t.Fatal(err)
	}
	r.refused("3.0.0", old, "its timestamp is 864000, the floor 1728000")

	for name, data := range backup {
		if err := os.WriteFile(filepath.Join(r.dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, version := r.boot(); version != "1.0.0" {
		t.Fatalf("the backup boots %s", version)
	}
	r.refused("3.0.1", old, "its timestamp is 864000, the floor 1728000")

	e.Kill()
	r.refused("3.0.2", r.numbered("3.0.2", 30*day, "", r.key), "cannot be asked")
	e.Replace()
	r.refused("3.0.3", r.numbered("3.0.3", 30*day, "", r.key), "not provisioned")
}

// The TPM has no power at the moment of confirmation: the release is good all the same, and the TPM hears of it at the next start.
func TestTPMHearsLater(t *testing.T) {
	e := trusttest.Start(t)
	r := newRig(t)
	r.conf = "[trust]\ntpm = \"" + e.Socket + "\"\n"
	slot, _ := r.boot()
	f, err := writer.Floor(r.config(slot))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(r.dir, "state"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := f.Provision(context.Background(), nil, 0); err != nil {
		t.Fatal(err)
	}
	r.publish("2.0.0", r.numbered("2.0.0", 20*day, "", r.key))
	if _, rebooted := r.run(slot, func(updater.Status) bool { return false }); !rebooted {
		t.Fatal("no reboot")
	}
	e.Kill()
	slot, _ = r.boot()
	if st, _ := r.run(slot, settled); st.LastUpdate == nil || !st.LastUpdate.Good {
		t.Fatalf("not confirmed: %+v", st.LastUpdate)
	}
	e.Power()
	slot, _ = r.boot()
	r.run(slot, settled)
	tpm, err := trust.OpenTPM(e.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer tpm.Close()
	if n, err := tpm.Floor(); err != nil || n != 20*day {
		t.Errorf("the TPM's floor is %d, %v", n, err)
	}
}

// The same key signs two products; the server sends one host the other's.
func TestOtherProductIsRefused(t *testing.T) {
	r := newRig(t)
	r.conf = "[trust]\nproduct = \"edge\"\n"
	r.refused("2.0.0", r.numbered("2.0.0", 20*day, "core", r.key), "another product", `"core"`, `"edge"`)
	r.refused("2.0.1", r.numbered("2.0.1", 20*day, "", r.key), "another product")
	r.update("2.0.2", r.numbered("2.0.2", 20*day, "edge", r.key))
}

// Keys: one that was swapped, one that was revoked, one of two, and the way from an old one to a new one.
func TestKeysOnTheHost(t *testing.T) {
	pinned := func(r *rig) string { return filepath.Join(r.dir, "keys.d") }
	setup := func(t *testing.T) (*rig, crypto.Signer, crypto.Signer) {
		r := newRig(t)
		if err := os.Mkdir(pinned(r), 0o755); err != nil {
			t.Fatal(err)
		}
		a, b := r.newKey("a"), r.newKey("b")
		r.keysConf = pinned(r)
		return r, a, b
	}
	pin := func(r *rig, name string) {
		data, err := os.ReadFile(filepath.Join(r.dir, name+".pem"))
		if err != nil {
			t.Fatal(err)
		}
		r.write("keys.d/"+name+".pem", string(data))
	}
	t.Run("swapped", func(t *testing.T) {
		r, a, _ := setup(t)
		pin(r, "b")
		r.refused("2.0.0", r.numbered("2.0.0", day, "", a), "no signature is by a pinned key")
	})
	t.Run("revoked", func(t *testing.T) {
		r, a, b := setup(t)
		pin(r, "a")
		pin(r, "b")
		print, err := trust.Fingerprint(a.Public())
		if err != nil {
			t.Fatal(err)
		}
		r.write("keys.d/stolen.toml", "revoke = [\""+print+"\"]\n")
		r.refused("2.0.0", r.numbered("2.0.0", day, "", a), "no signature is by a pinned key")
		r.update("2.0.1", r.numbered("2.0.1", day, "", b))
	})
	t.Run("two of two", func(t *testing.T) {
		r, a, b := setup(t)
		pin(r, "a")
		pin(r, "b")
		r.conf = "[trust]\nsignatures = 2\n"
		r.refused("2.0.0", r.numbered("2.0.0", day, "", a), "1 of 2 pinned keys have signed, and 2 must")
		r.update("2.0.1", r.numbered("2.0.1", day, "", b, a))
	})
	t.Run("rotation", func(t *testing.T) {
		r, a, b := setup(t)
		pin(r, "a")
		r.refused("2.0.0", r.numbered("2.0.0", day, "", b), "no signature is by a pinned key")
		r.update("2.0.1", r.numbered("2.0.1", 2*day, "", a, b))
		pin(r, "b") // what the release of both brings in its /usr
		if err := os.Remove(filepath.Join(pinned(r), "a.pem")); err != nil {
			t.Fatal(err)
		}
		r.update("2.0.2", r.numbered("2.0.2", 3*day, "", b))
		r.refused("2.0.3", r.numbered("2.0.3", 4*day, "", a), "no signature is by a pinned key")
	})
}

// A slot whose boot would find its secrets shut is not armed, and the program hears what becomes of the slot.
func TestSecretsOfTheNextBoot(t *testing.T) {
	r := newRig(t)
	log := filepath.Join(r.dir, "asked")
	script := func(body string) {
		path := filepath.Join(r.dir, "unlock")
		if err := os.WriteFile(path, []byte("#!/bin/sh\necho \"$@ $VERSION\" >> "+log+"\n"+body), 0o755); err != nil {
			t.Fatal(err)
		}
		r.conf = "[trust]\nunlock = \"" + path + "\"\n"
	}
	script("[ $1 != arm ] || { echo PCR 11 is not predictable; exit 1; }\n")
	r.publish("2.0.0", r.numbered("2.0.0", 20*day, "", r.key))
	slot, _ := r.boot()
	st, rebooted := r.run(slot, func(st updater.Status) bool { return settled(st) && st.LastError != "" })
	if rebooted || !strings.Contains(st.LastError, "PCR 11 is not predictable") {
		t.Fatalf("rebooted: %v, %q", rebooted, st.LastError)
	}
	if s := r.slot("USR-B"); s.Bootable() {
		t.Errorf("%+v", s)
	}
	if _, ok := st.Quarantine["2.0.0"]; !ok {
		t.Error("the release is not quarantined")
	}
	script("exit 0\n")
	r.update("2.0.1", r.numbered("2.0.1", 20*day, "", r.key))
	got, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"arm USR-B 2.0.0\n", "arm USR-B 2.0.1\nconfirm USR-B 2.0.1\n"} {
		if !strings.Contains(string(got), want) {
			t.Errorf("the program heard %q, want %q", got, want)
		}
	}
}

// prover is what flipside serve verifies proofs with.
func prover(makers *trust.Makers) releases.Prover {
	return func(id string, nonce, proof []byte) (releases.Evidence, error) {
		p, key, err := trust.CheckProof(proof, id, nonce)
		ev := releases.Evidence{Slot: p.Claim.Slot, Version: p.Claim.Version, Key: key, PCRs: map[string]string{}}
		for n, v := range p.PCRs {
			ev.PCRs[fmt.Sprintf("%02d", n)] = hex.EncodeToString(v)
		}
		if err != nil || makers == nil {
			return ev, err
		}
		if m, err := makers.Check(p); err != nil {
			ev.Unendorsed = err.Error()
		} else {
			ev.TPM = &releases.TPM{Maker: m.Maker, Model: m.Model, Issuer: m.Issuer, Key: m.Key}
		}
		return ev, nil
	}
}

// provision gives a TPM the keys of a host.
func provision(t *testing.T, e *trusttest.Emulator) {
	t.Helper()
	tpm, err := trust.OpenTPM(e.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer tpm.Close()
	if err := tpm.ProvisionKeys(nil); err != nil {
		t.Fatal(err)
	}
}

// A host proves its boot to the release server; a host with a stolen identity, which is a machine id and nothing more, does not.
func TestProofOfABoot(t *testing.T) {
	e := trusttest.Start(t)
	provision(t, e)
	r := newRig(t)
	r.conf = "[trust]\ntpm = \"" + e.Socket + "\"\nproof = \"" + r.http.URL + "/v1/proof\"\n"
	var sent []byte // the last proof, with its nonce
	var path string
	r.wrap = func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Method == http.MethodPost && strings.HasPrefix(req.URL.Path, "/v1/proof/") {
				sent, _ = io.ReadAll(req.Body)
				path = req.URL.String()
				req.Body = io.NopCloser(bytes.NewReader(sent))
			}
			h.ServeHTTP(w, req)
		})
	}
	r.update("2.0.0", r.numbered("2.0.0", day, "", r.key))
	id := strings.Repeat("ab", 16)
	h, _ := r.server.Host(id)
	if h.Proof == nil || h.Proof.Version != "2.0.0" || h.Proof.Slot != "USR-B" || h.Proof.Key == "" || h.Proof.Refused != "" {
		t.Fatalf("the server knows %+v", h.Proof)
	}
	key := h.Proof.Key
	post := func(url string, body []byte) int {
		resp, err := http.Post(r.http.URL+url, "application/json", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	if code := post(path, sent); code != http.StatusForbidden { // a replay
		t.Errorf("a replayed proof gets %d", code)
	}
	if code := post("/v1/proof/"+id+"?nonce=AAAA", sent); code != http.StatusForbidden {
		t.Errorf("a proof with a nonce that nobody gave gets %d", code)
	}
	if code := post("/v1/proof/nobody?nonce=AAAA", sent); code != http.StatusNotFound {
		t.Errorf("a proof of an unknown host gets %d", code)
	}
	e.Replace() // another machine with this one's disk
	provision(t, e)
	r.update("3.0.0", r.numbered("3.0.0", 2*day, "", r.key))
	h, _ = r.server.Host(id)
	if h.Proof.Version != "2.0.0" || h.Proof.Key != key || !strings.Contains(h.Proof.Refused, "this host's is "+key) {
		t.Errorf("the server knows %+v", h.Proof)
	}
}

// A proof that the server did not get, because it was away, or that it did not believe, because nobody had accepted the key, comes again with a later check.
func TestProofIsSentAgain(t *testing.T) {
	e := trusttest.Start(t)
	provision(t, e)
	r := newRig(t)
	r.conf = "[trust]\ntpm = \"" + e.Socket + "\"\nproof = \"" + r.http.URL + "/v1/proof\"\n"
	var away atomic.Bool
	away.Store(true)
	r.wrap = func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if away.Load() && strings.HasPrefix(req.URL.Path, "/v1/proof/") {
				http.Error(w, "away", http.StatusServiceUnavailable)
				return
			}
			h.ServeHTTP(w, req)
		})
	}
	r.update("2.0.0", r.numbered("2.0.0", day, "", r.key))
	id := strings.Repeat("ab", 16)
	if h, _ := r.server.Host(id); h.Proof != nil {
		t.Fatalf("the server knows %+v", h.Proof)
	}
	away.Store(false)
	slot, _ := r.boot()
	r.run(slot, func(updater.Status) bool { h, _ := r.server.Host(id); return h.Proof != nil && !h.Proof.At.IsZero() })
	if h, _ := r.server.Host(id); h.Proof.Version != "2.0.0" || h.Proof.Refused != "" {
		t.Errorf("the server knows %+v", h.Proof)
	}
}

// A release server that knows the makers of TPMs: a key in software, or in a TPM of nobody it knows, is not believed; one in a TPM of a known maker is, and so is that TPM when it
// was cleared. What it measures is compared with what the release must measure.
func TestProofOfAGenuineTPM(t *testing.T) {
	e := trusttest.Start(t)
	maker := trusttest.NewMaker(t, "Muster")
	r := newRig(t)
	makers, err := trust.LoadMakers(maker.Dir(maker.Root(), maker.Between()))
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(r.dir, "releases")
	if err := r.server.Close(); err != nil {
		t.Fatal(err)
	}
	if r.server, err = releases.New(dir, releases.Options{Prover: prover(makers), Endorser: makers.Challenge}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.server.Close() })
	certified := func(cert []byte) {
		t.Helper()
		e.Store(trusttest.ECCCertificate, cert)
		provision(t, e)
	}
	r.conf = "[trust]\ntpm = \"" + e.Socket + "\"\nproof = \"" + r.http.URL + "/v1/proof\"\n"
	number := int64(0)
	update := func(version string) *releases.Proof {
		t.Helper()
		number += day
		r.update(version, r.numbered(version, number, "", r.key))
		h, _ := r.server.Host(strings.Repeat("ab", 16))
		if h.Proof == nil {
			t.Fatal("the server knows of no proof")
		}
		return h.Proof
	}
	provision(t, e)
	if p := update("2.0.0"); p.Key != "" || !strings.Contains(p.Refused, "no key is believed at first sight here") || !strings.Contains(p.Refused, "no certificate of its maker") {
		t.Fatalf("without a certificate: %+v", p)
	}
	stranger := trusttest.NewMaker(t, "Stranger")
	certified(stranger.Certify(e.EndorsementKey(trusttest.ECCCertificate), nil))
	if p := update("3.0.0"); p.Key != "" || !strings.Contains(p.Refused, "not shown to be in a TPM of a known maker") {
		t.Fatalf("with a stranger's: %+v", p)
	}
	certified(maker.Certify(e.EndorsementKey(trusttest.ECCCertificate), nil))
	p := update("4.0.0")
	if p.Key == "" || p.Refused != "" || p.TPM == nil || p.TPM.Maker != "IFX" || p.Version != "4.0.0" || p.Boot != "" {
		t.Fatalf("with its maker's: %+v", p)
	}
	// What it has measured is compared with what is said of its release.
	boots := func(version, pcr, want string) {
		t.Helper()
		if _, err := (&releases.Publisher{Dir: dir}).Measure(version, func(releases.PCRs) (releases.PCRs, error) { return releases.PCRs{"11": {pcr}}, nil }); err != nil {
			t.Fatal(err)
		}
		if err := r.server.Reload(); err != nil {
			t.Fatal(err)
		}
		if h, _ := r.server.Host(strings.Repeat("ab", 16)); h.Proof.Version != version || h.Proof.Words() != want {
			t.Errorf("%s: %+v", version, h.Proof)
		}
	}
	boots("4.0.0", p.PCRs["11"], "boots as released")
	old := p.Key
	tpm, err := linuxudstpm.Open(e.Socket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}).Execute(tpm); err != nil {
		t.Fatal(err)
	}
	certified(maker.Certify(e.EndorsementKey(trusttest.ECCCertificate), nil))
	if p := update("5.0.0"); p.Key == old || p.Refused != "" || p.Version != "5.0.0" {
		t.Errorf("cleared: %+v", p)
	}
	boots("5.0.0", strings.Repeat("ab", 32), "differs in PCR 11")
	e.Replace()
	certified(maker.Certify(e.EndorsementKey(trusttest.ECCCertificate), nil))
	if p := update("6.0.0"); p.Version != "5.0.0" || !strings.Contains(p.Refused, "this host's is") {
		t.Errorf("another TPM of the same maker: %+v", p)
	}
}

// A group whose policy is signed: a host goes down and comes back by the key in its TPM. Its disk in another machine, with etcd's credentials and the host's name,
// gets no slot and gives none back.
func TestClonedDiskGetsNoSlot(t *testing.T) {
	e := trusttest.Start(t)
	endpoint, stop, err := etcdtest.StartEmbedded(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	provision(t, e)
	r := newRig(t)
	owner := r.newKey("owner")
	op, err := etcd.New(etcd.Config{Endpoints: []string{endpoint}, Keeper: lock.Options{Owner: owner}})
	if err != nil {
		t.Fatal(err)
	}
	defer op.Close()
	if err := op.Sign(t.Context(), "default"); err != nil {
		t.Fatal(err)
	}
	r.conf = fmt.Sprintf("[trust]\ntpm = %q\n[lock]\nendpoints = [%q]\nsigner = \"tpm:device\"\nowners = [%q]\n", e.Socket, endpoint, filepath.Join(r.dir, "owner.pem"))
	slot, _ := r.boot()
	name, err := LockName(r.config(slot))
	if err != nil {
		t.Fatal(err)
	}
	r.publish("2.0.0", r.numbered("2.0.0", day, "", r.key))
	st, rebooted := r.run(slot, func(st updater.Status) bool {
		return st.Phase == updater.Armed && strings.Contains(st.Why, "not accepted")
	})
	if rebooted {
		t.Fatalf("it rebooted, and nobody has accepted its key: %+v", st)
	}
	keys, err := op.Keys(t.Context(), "default")
	if err != nil || len(keys) != 1 || keys[0].Host != name {
		t.Fatalf("%+v, %v", keys, err)
	}
	if _, err := op.Accept(t.Context(), "default", name, keys[0].Left); err != nil {
		t.Fatal(err)
	}
	if _, rebooted := r.run(slot, func(updater.Status) bool { return false }); !rebooted {
		t.Fatal("no reboot")
	}
	if s, err := op.State(t.Context(), "default"); err != nil || len(s.Holders) != 1 || s.Holders[0].Phase != lock.Rebooting || len(s.Tampered) > 0 {
		t.Fatalf("%+v, %v", s, err)
	}

	e.Replace() // another machine with this one's disk comes up in its place
	provision(t, e)
	slot, _ = r.boot()
	r.run(slot, func(st updater.Status) bool { return st.Verdict != nil && st.Verdict.Error != "" || settled(st) })
	if s, err := op.State(t.Context(), "default"); err != nil || len(s.Holders) != 1 || s.Holders[0].Host != name {
		t.Errorf("another machine has freed the slot: %+v, %v", s, err)
	}
	if keys, err := op.Keys(t.Context(), "default"); err != nil || keys[0].Problem != "" || keys[0].Says != "down" {
		t.Errorf("%+v, %v", keys, err)
	}

	// Nor does it get a slot when one is free.
	if err := op.Release(t.Context(), "default", name, lock.Verdict{Outcome: lock.Forced, By: "op", Reason: "the machine is gone"}); err != nil {
		t.Fatal(err)
	}
	r.publish("3.0.0", r.numbered("3.0.0", 2*day, "", r.key))
	slot, _ = r.boot()
	st, rebooted = r.run(slot, func(st updater.Status) bool {
		return st.Phase == updater.Armed && strings.Contains(st.Why, "the key that is accepted for this name is")
	})
	if rebooted {
		t.Fatalf("another machine with this one's disk got a slot: %+v", st)
	}
	if s, err := op.State(t.Context(), "default"); err != nil || len(s.Holders) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
}

// Keys for PCR policies that cannot be read are found out before the other slot is given up, and are nothing that a release has done.
func TestPCRKeysThatCannotBeRead(t *testing.T) {
	r := newRig(t)
	r.newKey("ecdsa")
	r.update("2.0.0", r.payload("2.0.0", r.image("2.0.0"), r.key))
	good, other := r.slot("USR-A"), r.read("USR-A")
	r.publish("3.0.0", r.payload("3.0.0", r.image("3.0.0"), r.key))
	for file, want := range map[string]string{"missing.pem": "no such file", "ecdsa.pem": "PCR policies are signed with RSA"} {
		path := filepath.Join(r.dir, file)
		r.conf = "[trust]\npcr_keys = [\"" + path + "\"]\n"
		slot, _ := r.boot()
		// The error of the round before is still there when this one begins.
		st, rebooted := r.run(slot, func(st updater.Status) bool { return strings.Contains(st.LastError, path) })
		if rebooted || !strings.Contains(st.LastError, want) {
			t.Errorf("%s: rebooted: %t, %q", file, rebooted, st.LastError)
		}
		if s := r.slot("USR-A"); s != good || !bytes.Equal(r.read("USR-A"), other) {
			t.Errorf("%s: the slot to go back to was changed: %+v, was %+v", file, s, good)
		}
	}
}

// The disk's key is sealed to signed PCR policies. A release whose kernel leads to PCRs that nobody has authorised is not armed, and the host stays where its disk
// opens; one that is authorised is, and so is the way back.
func TestNextSlotsPCRPolicy(t *testing.T) {
	r := newRig(t)
	r.bootDir()
	pcrKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	r.write("pcr.pem", string(keytest.Public(t, pcrKey)))
	r.conf = "[trust]\npcr_keys = [\"" + filepath.Join(r.dir, "pcr.pem") + "\"]\n"
	kernel := func(version, authorised string) []byte {
		sections := func(v string) []trusttest.Section {
			return []trusttest.Section{{Name: ".linux", Data: []byte("kernel " + v)}}
		}
		k, err := trust.ReadKernel(bytes.NewReader(trusttest.Kernel(sections(authorised)...)))
		if err != nil {
			t.Fatal(err)
		}
		at := k.At(trust.DefaultPhase)
		sigs, err := trust.SignPCRs(pcrKey, map[uint][]byte{11: at[:]})
		if err != nil {
			t.Fatal(err)
		}
		return trusttest.Kernel(append(sections(version), trusttest.Section{Name: ".pcrsig", Data: sigs})...)
	}
	r.write("boot/vmlinuz-a", string(kernel("1.0.0", "1.0.0")))
	release := func(version string, kernel []byte) []byte {
		img := r.image(version)
		if n := len(kernel) % 4096; n > 0 {
			kernel = append(kernel, make([]byte, 4096-n)...)
		}
		return r.bundle(build.Image{Name: "usr", Data: bytes.NewReader(img), Size: int64(len(img))}, kernel)
	}
	for _, tt := range []struct {
		version string
		kernel  []byte
		want    string
	}{
		{"2.0.0", kernel("2.0.0", "1.9.9"), "none of the 1 policies"},
		{"2.0.1", []byte("a kernel that is no unified image"), "cannot be predicted"},
		{"2.0.2", nil, "the release brings no kernel"},
	} {
		r.publish(tt.version, release(tt.version, tt.kernel))
		slot, _ := r.boot()
		st, rebooted := r.run(slot, func(st updater.Status) bool { return settled(st) && strings.Contains(st.LastError, tt.want) })
		if rebooted {
			t.Fatalf("release %s was taken", tt.version)
		}
		if s := r.slot("USR-B"); s.Bootable() {
			t.Errorf("release %s: %+v, %q", tt.version, s, st.LastError)
		}
	}
	r.update("3.0.0", release("3.0.0", kernel("3.0.0", "3.0.0")))

	// And back: only to a slot whose secrets open.
	slot, _ := r.boot()
	conf := r.config(slot)
	opens := func() error {
		g, err := writer.NewGuard(conf, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return g.Opens(t.Context(), "USR-A", map[string]string{writer.KernelPart: filepath.Join(r.dir, "boot", "vmlinuz-a")}, "VERSION=1.0.0")
	}
	if err := opens(); err != nil {
		t.Errorf("back to 1.0.0: %v", err)
	}
	r.write("boot/vmlinuz-a", string(kernel("1.0.0", "0.9.0")))
	if err := opens(); !errors.Is(err, writer.ErrSecrets) {
		t.Errorf("back to a kernel that nobody has authorised: %v", err)
	}
	conf.Trust.Unlock = "/bin/true" // judges what cannot be predicted, and overrules nothing
	if err := opens(); !errors.Is(err, writer.ErrSecrets) {
		t.Errorf("with a program that says yes: %v", err)
	}
	r.write("boot/vmlinuz-a", "no unified image")
	if err := opens(); err != nil {
		t.Errorf("what cannot be predicted, with a program that says yes: %v", err)
	}

	// A TPM that does not answer now says nothing about the release, and passes no question on.
	socket := filepath.Join(r.dir, "tpm.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	conf.Trust.TPM = socket
	sigs, err := trust.SignPCRs(pcrKey, map[uint][]byte{7: make([]byte, 32), 11: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	r.write("boot/vmlinuz-a", string(trusttest.Kernel(trusttest.Section{Name: ".linux", Data: []byte("kernel")}, trusttest.Section{Name: ".pcrsig", Data: sigs})))
	for _, unlock := range []string{"", "/bin/true"} {
		conf.Trust.Unlock = unlock
		if err := opens(); !errors.Is(err, writer.ErrGuard) || errors.Is(err, writer.ErrSecrets) {
			t.Errorf("a TPM that does not answer, trust.unlock = %q: %v", unlock, err)
		}
	}
}

// A TPM without a SHA-256 bank: a release whose policy would have to be compared with its PCRs is set aside once, with the reason, and not tried again for ever. That no boot is proven either
// is said where people look.
func TestNoSHA256Bank(t *testing.T) {
	e := trusttest.Start(t)
	e.WithoutSHA256()
	r := newRig(t)
	r.bootDir()
	pcrKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	r.write("pcr.pem", string(keytest.Public(t, pcrKey)))
	r.conf = fmt.Sprintf("[trust]\ntpm = %q\nproof = \"https://updates.example/v1/proof\"\npcr_keys = [%q]\n", e.Socket, filepath.Join(r.dir, "pcr.pem"))
	linux := trusttest.Section{Name: ".linux", Data: []byte("kernel")}
	k, err := trust.ReadKernel(bytes.NewReader(trusttest.Kernel(linux)))
	if err != nil {
		t.Fatal(err)
	}
	at := k.At(trust.DefaultPhase)
	sigs, err := trust.SignPCRs(pcrKey, map[uint][]byte{7: make([]byte, 32), 11: at[:]})
	if err != nil {
		t.Fatal(err)
	}
	kernel := trusttest.Kernel(linux, trusttest.Section{Name: ".pcrsig", Data: sigs})
	kernel = append(kernel, make([]byte, (4096-len(kernel)%4096)%4096)...)
	img := r.image("2.0.0")
	r.publish("2.0.0", r.bundle(build.Image{Name: "usr", Data: bytes.NewReader(img), Size: int64(len(img))}, kernel))
	slot, _ := r.boot()
	st, rebooted := r.run(slot, func(st updater.Status) bool { return settled(st) && strings.Contains(st.LastError, "no SHA-256 bank") })
	if rebooted {
		t.Fatal("the release was taken")
	}
	if !strings.Contains(st.LastError, writer.ErrSecrets.Error()) || r.slot("USR-B").Bootable() {
		t.Errorf("%q, %+v", st.LastError, r.slot("USR-B"))
	}
	if _, aside := st.Quarantine["2.0.0"]; !aside {
		t.Errorf("it is not set aside: %+v", st.Quarantine)
	}
	w := tpmWarnings(r.config(slot))
	if len(w) != 1 || !strings.Contains(w[0], "trust.proof and trust.pcr_keys cannot work here") || !strings.Contains(w[0], "no SHA-256 bank") {
		t.Errorf("%q", w)
	}
	e.Kill()
	if w := tpmWarnings(r.config(slot)); len(w) > 0 { // it may answer later
		t.Errorf("a TPM without power: %q", w)
	}
}
