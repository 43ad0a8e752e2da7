package host

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	releases "github.com/flipside-linux/flipside/omaha/server"
	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/partition/bootsim"
	"github.com/flipside-linux/flipside/partition/gptimage"
	"github.com/flipside-linux/flipside/payload/build"
	"github.com/flipside-linux/flipside/payload/keytest"
	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/control"
	"github.com/flipside-linux/flipside/updater/writer"
)

const (
	slotSize  = 4 << 20
	imageSize = 3 << 20
)

// rig is one host on a real disk image, with a real release server.
type rig struct {
	t          *testing.T
	dir        string
	disk       string
	slots      map[string]int64 // where each begins
	key        crypto.Signer
	server     *releases.Server
	http       *httptest.Server
	conf       string // further lines of configuration
	rebootConf string // and of its table reboot
	keysConf   string // where keys are pinned; "": release.pem
	slotsConf  string // and of its slots
	healthDir  string // of its health checks
	entries    string // directory of systemd-boot's entries; "": the boot bits are in the partition table
	images     map[string][]byte
	wrap       func(http.Handler) http.Handler

	lastConfig string // what config parsed last
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), images: map[string][]byte{}, slots: map[string]int64{}}
	r.disk = filepath.Join(r.dir, "disk.img")
	r.key = r.newKey("release")
	parts := []gptimage.Partition{
		{Label: "EFI-SYSTEM", Type: gptimage.TypeEFI, UUID: "11111111-1111-4111-8111-111111111111", Size: 1 << 20},
		{Label: "USR-A", Type: gptimage.TypeUSR, UUID: "7130c94a-213a-4e5a-8e26-6cce9662f132", Size: slotSize, Attributes: gptimage.Attributes(1, 0, true)},
		{Label: "USR-B", Type: gptimage.TypeUSR, UUID: "e03dd35c-7c2d-4a47-b3fe-27f15780a57c", Size: slotSize},
	}
	if err := gptimage.Create(r.disk, 512, "22222222-2222-4222-8222-222222222222", parts); err != nil {
		t.Fatal(err)
	}
	for _, p := range parts {
		r.slots[p.Label] = p.Start
	}
	r.write("machine-id", strings.Repeat("ab", 16)+"\n")
	f, err := os.OpenFile(r.disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(r.image("1.0.0"), r.slots["USR-A"]); err != nil {
		t.Fatal(err)
	}
	if r.server, err = releases.New(filepath.Join(r.dir, "releases"), releases.Options{Prover: prover(nil)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.server.Close() })
	r.http = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		h := http.Handler(r.server)
		if r.wrap != nil {
			h = r.wrap(h)
		}
		h.ServeHTTP(w, req)
	}))
	t.Cleanup(r.http.Close)
	return r
}

func (r *rig) write(name, body string) {
	r.t.Helper()
	if err := os.WriteFile(filepath.Join(r.dir, name), []byte(body), 0o644); err != nil {
		r.t.Fatal(err)
	}
}

// newKey makes a key and, if it is the release key, pins it.
func (r *rig) newKey(name string) crypto.Signer {
	r.t.Helper()
	return keytest.Pinned(r.t, filepath.Join(r.dir, name+".pem"))
}

// image is the /usr of a version: noise that does not compress, so that there is something to download, and its name.
func (r *rig) image(version string) []byte {
	if img, ok := r.images[version]; ok {
		return img
	}
	seed := sha256.Sum256([]byte(version))
	img := make([]byte, imageSize)
	mathrand.NewChaCha8(seed).Read(img)
	copy(img, version)
	r.images[version] = img
	return img
}

func (r *rig) payload(version string, image []byte, key crypto.Signer) []byte {
	r.t.Helper()
	var b bytes.Buffer
	_, err := build.Full(r.t.Context(), &b, build.Spec{
		Images: []build.Image{{Name: "usr", Data: bytes.NewReader(image), Size: int64(len(image))}}, Keys: []crypto.Signer{key}, TempDir: r.dir,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return b.Bytes()
}

func (r *rig) publish(version string, data []byte) {
	r.t.Helper()
	path := filepath.Join(r.dir, version+".payload")
	if err := os.WriteFile(path, data, 0o644); err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.server.Publish(r.t.Context(), "stable", version, path); err != nil {
		r.t.Fatal(err)
	}
}

// boot does what the boot loader does and returns the version that runs, with its configuration written.
func (r *rig) boot() (slot, version string) {
	r.t.Helper()
	var label string
	if r.entries != "" {
		e, err := bootsim.SystemdBoot(atomicfile.OS(r.entries), nil)
		if err != nil {
			r.t.Fatal(err)
		}
		label = "USR-" + strings.ToUpper(e.Program[len(e.Program)-1:])
	} else {
		s, err := bootsim.BootFile(r.disk)
		if err != nil {
			r.t.Fatal(err)
		}
		label = s.Label
	}
	head := r.read(label)[:16]
	version, _, _ = strings.Cut(string(head), "\x00")
	for v, img := range r.images {
		if bytes.HasPrefix(img, head) {
			version = v
		}
	}
	r.write("os-release", "VERSION_ID="+version+"\n")
	r.write("boot_id", fmt.Sprintf("%x\n", mathrand.Uint64()))
	return label, version
}

func (r *rig) read(slot string) []byte {
	r.t.Helper()
	f, err := os.Open(r.disk)
	if err != nil {
		r.t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, imageSize)
	if _, err := f.ReadAt(b, r.slots[slot]); err != nil {
		r.t.Fatal(err)
	}
	return b
}

func (r *rig) config(running string) config.Config {
	r.t.Helper()
	text := fmt.Sprintf(`
[update]
server = %q
app = "test"
keys = [%q]
first_check = "1ms"
interval = "1h"
retry = "20ms"
[slots]
disk = %q
running = %q
%s[reboot]
%smethod = "exit"
inhibit_dir = ""
[health]
dir = %q
soak = "0s"
units = []
watchdog = ""
[host]
os_release = %q
machine_id = %q
boot_id = %q
[paths]
state = %q
run = %q
`, r.http.URL+"/v1/update/", cmp.Or(r.keysConf, r.dir+"/release.pem"), r.disk, running, r.slotsConf, r.rebootConf, r.healthDir, r.dir+"/os-release", r.dir+"/machine-id", r.dir+"/boot_id", r.dir+"/state", r.dir+"/run")
	r.lastConfig = text + r.conf
	c, err := config.Parse("test.toml", []byte(r.lastConfig))
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

// run boots the host and runs its daemon until ok is true or it wants to reboot, and returns the last status.
func (r *rig) run(running string, ok func(updater.Status) bool) (st updater.Status, rebooted bool) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 2*time.Minute)
	defer cancel()
	c := r.config(running)
	done := make(chan error, 1)
	go func() { done <- Run(ctx, c, slog.New(slog.DiscardHandler)) }()
	watch, stop := context.WithCancel(ctx)
	reached := make(chan updater.Status, 1)
	var watching sync.WaitGroup
	watching.Go(func() {
		for seen := false; !seen && watch.Err() == nil; {
			control.Call(watch, c.Socket(), control.Request{Method: "watch"}, func(s updater.Status) bool {
				if seen = ok(s); seen {
					reached <- s
				}
				return !seen
			})
			select {
			case <-watch.Done():
			case <-time.After(5 * time.Millisecond):
			}
		}
	})
	defer watching.Wait() // ok writes the variables of the test
	defer stop()
	select {
	case st = <-reached:
		cancel()
		<-done
		return st, false
	case err := <-done:
		var exit *reboot.ExitError
		if !errors.As(err, &exit) {
			r.t.Fatalf("the daemon ended: %v", err)
		}
		return st, true
	case <-ctx.Done():
		r.t.Fatal("nothing happened for two minutes")
	}
	return st, false
}

func (r *rig) slot(label string) partition.Slot {
	r.t.Helper()
	d, err := writer.OpenDisk(r.config("auto"), r.disk, true)
	if err != nil {
		r.t.Fatal(err)
	}
	defer d.Close()
	s, err := d.Slot(label)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

// settled means that the host has nothing under way after a check.
func settled(st updater.Status) bool {
	return st.Phase == updater.Idle && !st.Asking && !st.LastCheck.IsZero()
}

func TestHostTakesAnUpdate(t *testing.T) {
	r := newRig(t)
	r.publish("2.0.0", r.payload("2.0.0", r.image("2.0.0"), r.key))
	slot, version := r.boot()
	if slot != "USR-A" || version != "1.0.0" {
		t.Fatalf("booted %s from %s", version, slot)
	}
	if _, rebooted := r.run(slot, func(updater.Status) bool { return false }); !rebooted {
		t.Fatal("no reboot")
	}
	if s := r.slot("USR-B"); s.Priority != 2 || s.Tries != 1 || s.Successful {
		t.Errorf("USR-B before the reboot: %+v", s)
	}
	if !bytes.Equal(r.read("USR-B"), r.image("2.0.0")) || !bytes.Equal(r.read("USR-A"), r.image("1.0.0")) {
		t.Error("the slots do not hold their releases")
	}
	if slot, version = r.boot(); slot != "USR-B" || version != "2.0.0" {
		t.Fatalf("booted %s from %s", version, slot)
	}
	st, _ := r.run(slot, settled)
	if s := r.slot("USR-B"); s.Tries != 0 || !s.Successful || st.LastUpdate == nil || !st.LastUpdate.Good {
		t.Errorf("after the trial: %+v, %+v", s, st.LastUpdate)
	}
	h, ok := r.server.Host(strings.Repeat("ab", 16))
	if !ok || h.Version != "2.0.0" || h.State != "complete" {
		t.Errorf("the server believes: %+v", h)
	}
}

// Whatever a server sends, the running slot stays as it is, the other one never becomes bootable, and the host says what is wrong.
func TestHostRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		make func(r *rig) []byte
		want string
		// touched says that the fault can only be found after the slot was given up.
		touched bool
	}{
		{"a payload by another key", func(r *rig) []byte { return r.payload("2.0.0", r.image("2.0.0"), r.newKey("stranger")) }, "no signature is by a pinned key", false},
		{"a flipped bit in the manifest", func(r *rig) []byte {
			b := r.payload("2.0.0", r.image("2.0.0"), r.key)
			b[40] ^= 1
			return b
		}, "signature", false},
		{"a flipped bit in the data", func(r *rig) []byte {
			b := r.payload("2.0.0", r.image("2.0.0"), r.key)
			b[len(b)/2] ^= 1
			return b
		}, "wrong hash", true},
		{"a flipped bit in the signature at the end", func(r *rig) []byte {
			b := r.payload("2.0.0", r.image("2.0.0"), r.key)
			b[len(b)-40] ^= 1
			return b
		}, "signature", true},
		{"an image that does not fit", func(r *rig) []byte {
			return r.payload("2.0.0", make([]byte, slotSize+4096), r.key)
		}, "does not fit", false},
		{"a truncated payload", func(r *rig) []byte {
			b := r.payload("2.0.0", r.image("2.0.0"), r.key)
			return b[:len(b)-4096]
		}, "malformed", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			// The other slot holds a good old release: a payload that is refused at once must not cost it.
			setBits(t, r, "USR-B", 1)
			r.publish("2.0.0", tt.make(r))
			slot, _ := r.boot()
			st, rebooted := r.run(slot, func(st updater.Status) bool { return settled(st) && st.LastError != "" })
			if rebooted {
				t.Fatal("it rebooted")
			}
			if !strings.Contains(st.Why, tt.want) || !strings.Contains(st.Why, "2.0.0") {
				t.Errorf("why = %q, want something with %q", st.Why, tt.want)
			}
			if _, ok := st.Quarantine["2.0.0"]; !ok {
				t.Error("the release is not quarantined: it would be fetched again and again")
			}
			if !bytes.Equal(r.read("USR-A"), r.image("1.0.0")) {
				t.Error("the running slot was changed")
			}
			if b := r.slot("USR-B"); b.Bootable() == tt.touched {
				t.Errorf("USR-B is bootable: %v, given up: %v", b.Bootable(), tt.touched)
			}
			if slot, _ := r.boot(); slot != "USR-A" {
				t.Errorf("boots %s", slot)
			}
		})
	}
}

// setBits marks a slot successful with a priority, as an older update left it.
func setBits(t *testing.T, r *rig, label string, priority uint8) {
	t.Helper()
	d, err := partition.OpenDisk(r.disk, partition.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	run, err := d.RunningFromLabel(label)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.MarkSuccessful(run); err != nil {
		t.Fatal(err)
	}
	if s := r.slot(label); s.Priority != priority || !s.Successful {
		t.Fatalf("%+v", s)
	}
}

func TestHostWithoutKeysTakesNothing(t *testing.T) {
	r := newRig(t)
	r.publish("2.0.0", r.payload("2.0.0", r.image("2.0.0"), r.key))
	if err := os.Remove(filepath.Join(r.dir, "release.pem")); err != nil {
		t.Fatal(err)
	}
	slot, _ := r.boot()
	st, _ := r.run(slot, func(st updater.Status) bool { return st.LastError != "" })
	if !strings.Contains(st.LastError, "no key is pinned") {
		t.Errorf("last error = %q", st.LastError)
	}
	if len(st.Quarantine) > 0 {
		t.Error("the release is quarantined, and it is this host that lacks a key")
	}
	if b := r.read("USR-B"); !bytes.Equal(b, make([]byte, imageSize)) {
		t.Error("something was written")
	}
}

func TestHostWithADamagedTableCopy(t *testing.T) {
	r := newRig(t)
	r.publish("2.0.0", r.payload("2.0.0", r.image("2.0.0"), r.key))
	slot, _ := r.boot()
	f, err := os.OpenFile(r.disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	info, _ := f.Stat()
	if _, err := f.WriteAt([]byte("garbage"), info.Size()-512); err != nil { // the backup header
		t.Fatal(err)
	}
	f.Close()
	if _, rebooted := r.run(slot, func(updater.Status) bool { return false }); !rebooted {
		t.Fatal("no reboot")
	}
	if slot, version := r.boot(); version != "2.0.0" {
		t.Errorf("booted %s from %s", version, slot)
	}
}

func TestHostWhoseServerIsAway(t *testing.T) {
	r := newRig(t)
	slot, _ := r.boot()
	r.http.Close()
	st, _ := r.run(slot, func(st updater.Status) bool { return settled(st) && st.LastError != "" })
	if !strings.Contains(st.Why, "checking for an update") || !strings.Contains(st.Why, "127.0.0.1") {
		t.Errorf("why = %q, want what was tried and where", st.Why)
	}
}

// A semaphore that cannot be asked stops the reboot, and nothing else.
func TestHostWhoseSemaphoreIsAway(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close() // nobody is there
	r := newRig(t)
	r.conf = fmt.Sprintf("[lock]\nendpoints = [\"http://%s\"]\ntimeout = \"300ms\"\n", address)
	r.publish("2.0.0", r.payload("2.0.0", r.image("2.0.0"), r.key))
	slot, _ := r.boot()
	st, rebooted := r.run(slot, func(st updater.Status) bool {
		return st.Phase == updater.Armed && st.Verdict != nil && st.Verdict.Error != ""
	})
	if rebooted {
		t.Fatal("it rebooted although nobody could be asked")
	}
	if !strings.Contains(st.Why, "semaphore") {
		t.Errorf("why = %q", st.Why)
	}
	if s := r.slot("USR-B"); !s.Bootable() {
		t.Error("the release is not in place")
	}
}

// The connection breaks again and again: every attempt goes on where the last one was, and the host ends up with the whole release.
func TestHostResumesABrokenDownload(t *testing.T) {
	r := newRig(t)
	data := r.payload("2.0.0", r.image("2.0.0"), r.key)
	r.publish("2.0.0", data)
	var served int64
	r.wrap = func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if !strings.Contains(req.URL.Path, "/payloads/") {
				h.ServeHTTP(w, req)
				return
			}
			c := &cutWriter{ResponseWriter: w, left: 500_000}
			defer func() { served += 500_000 - int64(c.left) }()
			h.ServeHTTP(c, req)
			if c.left <= 0 {
				panic(http.ErrAbortHandler)
			}
		})
	}
	slot, _ := r.boot()
	if _, rebooted := r.run(slot, func(updater.Status) bool { return false }); !rebooted {
		t.Fatal("no reboot")
	}
	if !bytes.Equal(r.read("USR-B"), r.image("2.0.0")) {
		t.Error("USR-B does not hold the release")
	}
	if served > int64(len(data))*3/2 {
		t.Errorf("%d bytes were served for a payload of %d", served, len(data))
	}
}

type cutWriter struct {
	http.ResponseWriter
	left int
}

func (c *cutWriter) Write(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, errors.New("cut")
	}
	n, err := c.ResponseWriter.Write(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

func TestAnUnreadableStateIsPutAside(t *testing.T) {
	r := newRig(t)
	if err := os.MkdirAll(filepath.Join(r.dir, "state"), 0o700); err != nil {
		t.Fatal(err)
	}
	r.write("state/state.json", "\x00\x00\x00")
	slot, _ := r.boot()
	if st, _ := r.run(slot, settled); st.Version != "1.0.0" {
		t.Errorf("status = %+v", st)
	}
	if _, err := os.Stat(filepath.Join(r.dir, "state", "state.json.unreadable")); err != nil {
		t.Error(err)
	}
}

func TestTheServiceManagerIsTold(t *testing.T) {
	r := newRig(t)
	slot, _ := r.boot()
	path := filepath.Join(r.dir, "notify.sock")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	r.run(slot, settled)
	b := make([]byte, 4096)
	c.SetReadDeadline(time.Now().Add(time.Minute))
	n, err := c.Read(b)
	if err != nil || string(b[:n]) != "READY=1" {
		t.Errorf("first told %q, %v", b[:n], err)
	}
	if n, err = c.Read(b); err != nil || !strings.HasPrefix(string(b[:n]), "STATUS=idle: ") {
		t.Errorf("then told %q, %v", b[:n], err)
	}
}

// A daemon that cannot see its disk never says that it is ready.
func TestTheServiceManagerIsNotToldTooEarly(t *testing.T) {
	r := newRig(t)
	slot, _ := r.boot()
	conf := r.config(slot)
	path := filepath.Join(r.dir, "notify.sock")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	if err := os.Truncate(r.disk, 512); err != nil {
		t.Fatal(err)
	}
	if err := Run(t.Context(), conf, slog.New(slog.DiscardHandler)); err == nil {
		t.Fatal("it ran without a disk")
	}
	b := make([]byte, 4096)
	c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := c.Read(b); err == nil {
		t.Errorf("told %q", b[:n])
	}
}

// A mirror that serves something else costs its own turn, not the release.
func TestHostTakesTheNextMirror(t *testing.T) {
	r := newRig(t)
	good := r.payload("2.0.0", r.image("2.0.0"), r.key)
	bad := bytes.Clone(good)
	bad[len(bad)/2] ^= 1
	var urls []string
	for _, data := range [][]byte{bad, good} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(data))
		}))
		t.Cleanup(s.Close)
		urls = append(urls, s.URL+"/2.0.0.payload")
	}
	slot, _ := r.boot()
	h, err := omaha.NewHTTP(omaha.HTTPOptions{})
	if err != nil {
		t.Fatal(err)
	}
	conf := r.config(slot)
	start := writer.InProcess(func() (config.Config, error) { return conf, nil }, slog.New(slog.DiscardHandler))
	g, err := newGuard(conf, h, start, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	in := &installer{conf: conf, http: h, log: slog.New(slog.DiscardHandler), guard: g, start: start}
	if in.where, err = writer.Locate(conf, os.DirFS("/")); err != nil {
		t.Fatal(err)
	}
	u := updater.Update{Offer: omaha.Offer{Version: "2.0.0", Size: int64(len(good)), SHA256: sha256.Sum256(good), URLs: urls}, FromSlot: "USR-A", ToSlot: "USR-B"}
	if err := in.Apply(t.Context(), u, func(json.RawMessage) {}, func(updater.Progress) {}); err != nil {
		t.Fatal(err)
	}
	in.forget()
	if !bytes.Equal(r.read("USR-B"), r.image("2.0.0")) {
		t.Error("USR-B does not hold the release")
	}
}

// An engine that ends between writing a release and arming it leaves no writer behind, which would hold the slot.
func TestNoWriterIsLeftBehind(t *testing.T) {
	r := newRig(t)
	data := r.payload("2.0.0", r.image("2.0.0"), r.key)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(data))
	}))
	t.Cleanup(s.Close)
	slot, _ := r.boot()
	conf, log := r.config(slot), slog.New(slog.DiscardHandler)
	start := writer.InProcess(func() (config.Config, error) { return conf, nil }, log)
	u := updater.Update{
		Offer:    omaha.Offer{Version: "2.0.0", Size: int64(len(data)), SHA256: sha256.Sum256(data), URLs: []string{s.URL + "/2.0.0.payload"}},
		FromSlot: "USR-A", ToSlot: "USR-B",
	}
	for range 2 {
		e, _, closer, err := assemble(conf, Options{Start: start}, log)
		if err != nil {
			t.Fatal(err)
		}
		err = e.Installer.Apply(t.Context(), u, func(json.RawMessage) {}, func(updater.Progress) {})
		if err := errors.Join(err, closer()); err != nil {
			t.Fatal(err)
		}
	}
}
