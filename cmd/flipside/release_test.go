package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/payload/build"
)

// signedPayload makes a small signed payload of one image, and a file with the key that checks it.
func signedPayload(t *testing.T, dir, name string, fill byte) (path, pub string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	pub, path = filepath.Join(dir, name+".pub"), filepath.Join(dir, name)
	if err := os.WriteFile(pub, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o644); err != nil {
		t.Fatal(err)
	}
	image := bytes.Repeat([]byte{fill}, 64<<10)
	rand.Read(image[:32<<10])
	var out bytes.Buffer
	if _, err := build.Full(t.Context(), &out, build.Spec{Images: []build.Image{{Name: "usr", Data: bytes.NewReader(image), Size: int64(len(image))}}, Keys: []crypto.Signer{key}}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path, pub
}

// TestReleaseAndServe runs a release server and steers it from the command line, as an operator would.
func TestReleaseAndServe(t *testing.T) {
	work := t.TempDir()
	dir := filepath.Join(work, "releases")
	run := func(want int, contains string, args ...string) string {
		t.Helper()
		var out, errs bytes.Buffer
		a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}
		if code := a.run(t.Context(), args); code != want || !strings.Contains(out.String()+errs.String(), contains) {
			t.Fatalf("flipside %s ended with %d, want %d and %q; it printed\n%s%s", strings.Join(args, " "), code, want, contains, &out, &errs)
		}
		return out.String()
	}
	one, key := signedPayload(t, work, "one", 1)
	two, other := signedPayload(t, work, "two", 2)
	publish := func(want int, contains, version, file string, more ...string) {
		t.Helper()
		run(want, contains, append([]string{"release", "publish", "--dir", dir, "--channel", "stable", "--version", version, file}, more...)...)
	}
	run(exitFailed, "publish into it first", "release", "list", "--dir", dir)
	publish(exitVerify, "signature", "1.1.0", one, "--key", other)
	publish(0, "channel stable: 1.1.0, all hosts", "1.1.0", one, "--key", key)
	publish(exitUsage, "no key to check", "1.1.0", one)
	publish(exitUsage, "contradict", "1.1.0", one, "--key", key, "--unverified")
	publish(0, "1.1.0", "1.1.0", one, "--unverified")
	if err := os.MkdirAll(filepath.Join(dir, "keys"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, from := range map[string]string{"one.pem": key, "two.pem": other} { // from now on no --key is needed
		data, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "keys", name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	publish(exitFailed, "publish 1.1.0: ", "1.1.0", two)
	publish(exitFailed, "choose a new version number", "1.1.0", two)
	publish(exitVerify, "payload create", "1.3.0", key)
	publish(exitUsage, "three numbers", "one", one)
	run(exitUsage, "plain name", "release", "publish", "--dir", dir, "--channel", "a b", "--version", "1.5.0", "--unverified", one)
	run(exitUsage, "plain name", "release", "pause", "--dir", dir, "../x")
	run(exitUsage, "--version is missing", "release", "publish", "--dir", dir, one)
	run(exitUsage, "FILE", "release", "publish", "--dir", dir)

	// The server starts, and later changes reach it without a word.
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	tokens := filepath.Join(work, "tokens")
	if err := os.WriteFile(tokens, []byte("# who may\nalice abcdefghijklmnop\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	short := filepath.Join(work, "short")
	if err := os.WriteFile(short, []byte("alice abc\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	in, out := io.Pipe()
	ended := make(chan int, 1)
	go func() {
		a := &app{stdin: strings.NewReader(""), stdout: out, stderr: io.Discard}
		ended <- a.run(ctx, []string{"serve", dir, "--listen", "127.0.0.1:0", "--json", "--admin-token-file", tokens})
		out.Close()
	}()
	var up struct{ Schema, Listen, Update, Status string }
	if err := json.NewDecoder(in).Decode(&up); err != nil || up.Schema != "flipside.serve/v1" {
		t.Fatalf("%+v, %v", up, err)
	}
	go io.Copy(io.Discard, in)
	server := "http://" + up.Listen
	run(exitBusy, "another server", "serve", dir, "--listen", "127.0.0.1:0")
	run(exitUsage, "--tls-key", "serve", dir, "--tls-cert", key)
	run(exitUsage, "--tls-client-ca", "serve", dir, "--admin-cert", "ops")
	run(exitUsage, "--upstream-app-id", "serve", dir, "--upstream", server+"/v1/update/")
	run(exitFailed, "at least 16", "serve", dir, "--admin-token-file", short)

	h, err := omaha.NewHTTP(omaha.HTTPOptions{Proxy: "direct"})
	if err != nil {
		t.Fatal(err)
	}
	defer h.CloseIdle()
	c := &omaha.Client{URL: up.Update, AppID: "org.example.os", Version: "1.0.0", Track: "stable", MachineID: "m1", MachineAlias: "web\x1b[31m", HTTP: h}
	wants := func(version, words string) {
		t.Helper()
		var a omaha.Answer
		for range 100 { // the server looks at its directory once a second
			var err error
			if a, err = c.Check(t.Context(), omaha.CheckRequest{}); err != nil {
				t.Fatal(err)
			}
			if a.Offer != nil && a.Offer.Version == version || a.Offer == nil && version == "" && strings.Contains(a.Reason.Text, words) {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
		t.Fatalf("the host got %+v, want %q %q", a, version, words)
	}
	wants("1.1.0", "")
	publish(0, "1.2.0", "1.2.0", two)
	wants("1.2.0", "")
	run(0, "paused", "release", "pause", "--dir", dir, "stable")
	wants("", "paused")
	run(0, "1.2.0, all hosts", "release", "resume", "--dir", dir, "stable")
	wants("1.2.0", "")
	run(0, "1.1.0", "release", "rollback", "--dir", dir, "stable")
	wants("1.1.0", "")
	run(0, "channel beta: 1.1.0", "release", "promote", "--dir", dir, "beta", "--from", "stable")
	run(0, "channel beta: 1.2.0", "release", "promote", "--dir", dir, "beta", "--version", "1.2.0")
	run(exitFailed, "not known", "release", "promote", "--dir", dir, "beta", "--version", "7.0.0")
	run(exitUsage, "either", "release", "promote", "--dir", dir, "beta")
	run(exitFailed, "not known", "release", "pause", "--dir", dir, "nightly")
	run(0, "10 % of the hosts, Mon-Fri 09:00-17:00 Europe/Berlin, stops after 3 failures, stops when 5 % fail", "release", "set", "--dir", dir, "beta",
		"--percent", "10", "--stop-after-failures", "3", "--stop-failure-percent", "5", "--hours", "Mon-Fri 09:00-17:00", "--time-zone", "Europe/Berlin")
	run(0, "no host, Mon-Fri", "release", "set", "--dir", dir, "beta", "--percent", "0")
	run(0, "all hosts, Mon-Fri", "release", "set", "--dir", dir, "beta", "--percent", "100")
	run(exitUsage, "nothing to set", "release", "set", "--dir", dir, "beta")
	run(exitUsage, "nobody, to 100", "release", "set", "--dir", dir, "beta", "--percent", "101")
	run(0, "withdrawn: 1.2.0", "release", "withdraw", "--dir", dir, "beta", "1.2.0")
	run(exitUsage, "three numbers", "release", "withdraw", "--dir", dir, "beta", "garbage")
	run(0, "not published here", "release", "withdraw", "--dir", dir, "beta", "8.0.0")
	run(0, "withdrawn: 1.2.0", "release", "withdraw", "--dir", dir, "beta", "8.0.0", "--undo")
	run(0, "withdrawn: -", "release", "withdraw", "--dir", dir, "beta", "1.2.0", "--undo")
	copied := filepath.Join(work, "state.copy")
	run(exitBusy, "--token-file", "release", "backup", "--dir", dir, copied)
	run(exitPermitted, "token", "release", "backup", "--server", server, "--token-file", short, copied)
	run(0, "KiB", "release", "backup", "--server", server, "--token-file", tokens, copied)
	run(0, "beta", "release", "list", "--dir", dir)
	bootKey := "sha256:" + strings.Repeat("0a", 32)
	run(exitUsage, "--key", "release", "hosts", "accept-key", "m1", "--server", server, "--token-file", tokens)
	run(exitPermitted, "token", "release", "hosts", "accept-key", "m1", "--key", bootKey, "--server", server, "--token-file", short)
	run(exitFailed, "not known", "release", "hosts", "accept-key", "m2", "--key", bootKey, "--server", server, "--token-file", tokens)
	run(0, bootKey, "release", "hosts", "accept-key", "m1", "--key", bootKey, "--server", server, "--token-file", tokens)
	run(0, "none yet", "release", "hosts", "--server", server)
	if page := run(0, "granted", "release", "hosts", "--server", server); strings.Contains(page, "\x1b") {
		t.Errorf("a host's name reaches the terminal as it is: %q", page)
	}
	run(0, "seen", "release", "events", "--server", server)
	value := strings.Repeat("ab", 32)
	values := filepath.Join(work, "values")
	if err := os.WriteFile(values, []byte("# PCR[11] Phase <ready>\n11:sha1=00\n11:sha256="+value+"\n4:sha256="+strings.Repeat("cd", 32)+" other words\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	pcrs := func(want int, contains string, args ...string) string {
		t.Helper()
		return run(want, contains, append([]string{"release", "pcrs", "--dir", dir}, args...)...)
	}
	pcrs(0, "nothing is said", "1.1.0")
	pcrs(exitFailed, "flipside release list", "7.0.0", "--file", values)
	pcrs(exitFailed, "not like 11:sha256", "1.1.0", "--file", key)
	pcrs(exitFailed, "there are those of 04, 11", "1.1.0", "--file", values, "--only", "7")
	pcrs(exitFailed, "nothing yet", "1.1.0", "--from-host", "m1", "--server", server)
	pcrs(exitFailed, "404", "1.1.0", "--from-host", "m2", "--server", server)
	pcrs(exitUsage, "exclude each other", "1.1.0", "--file", values, "--none")
	pcrs(exitUsage, "need --file", "1.1.0", "--add")
	if out := pcrs(0, "11:sha256="+value, "1.1.0", "--file", values, "--only", "11"); strings.Contains(out, "4:sha") {
		t.Errorf("more than was asked for: %s", out)
	}
	pcrs(0, "4:sha256=cdcd", "1.1.0", "--file", values, "--add")
	run(0, value, "release", "list", "--dir", dir, "--json")
	pcrs(0, "nothing is said", "1.1.0", "--none")
	run(0, "stops after 2 boots that differ", "release", "set", "--dir", dir, "beta", "--stop-after-differing-boots", "2")
	run(exitFailed, "reading the TPM makers' certificates", "serve", dir, "--tpm-makers", filepath.Join(work, "missing"))
	for _, args := range [][]string{{"release", "list", "--dir", dir}, {"release", "hosts", "--server", server}, {"release", "events", "--server", server}} {
		var doc map[string]any
		if err := json.Unmarshal([]byte(run(0, "flipside.", append(args, "--json")...)), &doc); err != nil {
			t.Errorf("%v: %v", args, err)
		}
	}
	resp, err := http.Get(server + "/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("the page: %s", resp.Status)
	}

	stray := filepath.Join(dir, "releases", "9.9.9.toml") // one without a payload
	if err := os.WriteFile(stray, []byte("version = \"9.9.9\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run(exitFailed, "9.9.9", "release", "list", "--dir", dir)
	run(exitFailed, "9.9.9", "release", "list", "--dir", dir, "--json")
	if err := os.Remove(stray); err != nil {
		t.Fatal(err)
	}

	// Over the network to another directory, and over the air gap to a third.
	second, third := filepath.Join(work, "second"), filepath.Join(work, "third")
	mirror := []string{"release", "mirror", "--dir", second, "--proxy", "direct", "--app-id", "org.example.os", "--track", "stable", "--key"}
	run(exitVerify, "signature", append(mirror, other, up.Update)...)
	run(0, "channel stable: 1.1.0", append(mirror, key, up.Update)...)
	bundle := filepath.Join(work, "bundle.tar")
	run(0, "1 channels, sha256", "release", "export", "--dir", second, "--channel", "stable", bundle)
	run(exitUsage, "no key", "release", "import", "--dir", third, bundle)
	run(0, "release 1.1.0", "release", "import", "--dir", third, "--key", key, bundle)
	run(0, "1.1.0", "release", "list", "--dir", third)

	stop()
	if code := <-ended; code != 0 {
		t.Errorf("the server ended with %d", code)
	}
	run(exitFailed, "is the server running?", "release", "hosts", "--server", server)
	run(0, "KiB", "release", "backup", "--dir", dir, copied)
}

// A delta is published after its whole payload, only if it makes the same.
func TestReleasePublishDelta(t *testing.T) {
	work := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	pub := filepath.Join(work, "key.pem")
	if err := os.WriteFile(pub, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o644); err != nil {
		t.Fatal(err)
	}
	image := func(seed byte) build.Image {
		data := make([]byte, 1<<20)
		mathrand.NewChaCha8([32]byte{1}).Read(data)
		data[5000] = seed
		return build.Image{Name: "usr", Data: bytes.NewReader(data), Size: int64(len(data))}
	}
	create := func(name string, new build.Image, old *build.Image, number int64) string {
		new.Old = old
		var b bytes.Buffer
		if _, err := build.Create(t.Context(), &b, build.Spec{Images: []build.Image{new}, Keys: []crypto.Signer{key}, MaxTimestamp: number, TempDir: work}); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(work, name)
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	one, two, three := image(1), image(2), image(3)
	whole, delta := create("whole", two, nil, 7), create("delta", two, &one, 7)
	dir := filepath.Join(work, "releases")
	publish := func(want int, contains string, args ...string) {
		t.Helper()
		var out, errs bytes.Buffer
		a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}
		args = append([]string{"release", "publish", "--dir", dir, "--key", pub, "--version", "2.0.0"}, args...)
		if code := a.run(t.Context(), args); code != want || !strings.Contains(out.String()+errs.String(), contains) {
			t.Fatalf("flipside %s ended with %d, want %d and %q; it printed\n%s%s", strings.Join(args, " "), code, want, contains, &out, &errs)
		}
	}
	publish(exitFailed, "publish the whole payload first", delta, "--from", "1.0.0")
	publish(exitUsage, "helps only hosts that run the release", delta)
	publish(0, "release 2.0.0: ", whole, "--channel", "stable")
	publish(exitUsage, "it is no delta", whole, "--from", "1.0.0")
	publish(exitVerify, `does not make the image of partition "usr"`, create("other", three, &one, 7), "--from", "1.0.0")
	publish(exitVerify, "its number is 6", create("older", two, &one, 6), "--from", "1.0.0")
	publish(0, "release 2.0.0 for hosts that run 1.0.0: ", delta, "--from", "1.0.0")
	publish(0, "release 1.9.0: ", create("nine", three, nil, 5), "--version", "1.9.0")
	publish(exitVerify, "another image of partition \"usr\" than the release has", delta, "--from", "1.9.0")
	var out bytes.Buffer
	if code := (&app{stdout: &out, stderr: &out}).run(t.Context(), []string{"release", "list", "--dir", dir}); code != 0 || !strings.Contains(out.String(), "  from 1.0.0 ") {
		t.Errorf("%d\n%s", code, &out)
	}
}
