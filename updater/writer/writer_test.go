package writer

import (
	"bytes"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/gptimage"
	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/build"
	"github.com/flipside-linux/flipside/payload/keytest"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/trust"
	"github.com/flipside-linux/flipside/updater/wire"
)

const (
	slotSize  = 256 << 10
	imageSize = 96 << 10
)

// rig is a host on a disk image.
type rig struct {
	t     testing.TB
	dir   string
	disk  string
	parts []gptimage.Partition
	fresh []byte // the disk at the beginning
	key   crypto.Signer
	conf  config.Config
	text  string // of conf
	image []byte
}

func newRig(t testing.TB) *rig { return newRigOf(t, slotSize) }

// newRigOf is a host with slots of size bytes.
func newRigOf(t testing.TB, size int64) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), image: noise("2.0.0", imageSize)}
	r.disk = filepath.Join(r.dir, "disk.img")
	r.key = r.newKey("release")
	r.parts = []gptimage.Partition{
		{Label: "EFI-SYSTEM", Type: gptimage.TypeEFI, UUID: "11111111-1111-4111-8111-111111111111", Size: slotSize},
		{Label: "USR-A", Type: gptimage.TypeUSR, UUID: "7130c94a-213a-4e5a-8e26-6cce9662f132", Size: slotSize, Attributes: gptimage.Attributes(1, 0, true)},
		{Label: "USR-B", Type: gptimage.TypeUSR, UUID: "e03dd35c-7c2d-4a47-b3fe-27f15780a57c", Size: size},
		{Label: "STATE", Type: gptimage.TypeLinux, UUID: "33333333-3333-4333-8333-333333333333", Size: slotSize},
	}
	f, err := os.Create(r.disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	layout := gptimage.Layout{Sector: 512, UUID: "22222222-2222-4222-8222-222222222222", Align: 4096, Parts: r.parts}
	total, err := layout.Size()
	if err == nil {
		err = errors.Join(f.Truncate(total), layout.Write(f))
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.parts {
		if _, err := f.WriteAt(noise(p.Label, slotSize), p.Start); err != nil {
			t.Fatal(err)
		}
	}
	if r.fresh, err = os.ReadFile(r.disk); err != nil {
		t.Fatal(err)
	}
	r.write("os-release", "VERSION_ID=1.0.0\n")
	for _, dir := range []string{"state", "boot"} {
		if err := os.Mkdir(filepath.Join(r.dir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	r.conf = r.config("")
	return r
}

func (r *rig) config(more string) config.Config {
	r.t.Helper()
	r.text = fmt.Sprintf(`
[update]
server = "http://127.0.0.1:1/"
keys = [%q]
[slots]
disk = %q
running = "USR-A"
kernels = %q
[host]
os_release = %q
[paths]
state = %q
run = %q
%s`, r.dir+"/release.pem", r.disk, r.dir+"/boot", r.dir+"/os-release", r.dir+"/state", r.dir+"/run", more)
	c, err := config.Parse("test.toml", []byte(r.text))
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

func noise(seed string, n int) []byte {
	b := make([]byte, n)
	var s [32]byte
	copy(s[:], seed)
	mathrand.NewChaCha8(s).Read(b)
	return b
}

func (r *rig) write(name, text string) {
	r.t.Helper()
	if err := os.WriteFile(filepath.Join(r.dir, name), []byte(text), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// newKey makes a key and its file; that of the release is pinned.
func (r *rig) newKey(name string) crypto.Signer {
	r.t.Helper()
	return keytest.Pinned(r.t, filepath.Join(r.dir, name+".pem"))
}

// source is a payload in memory.
type source []byte

func (s source) Size() int64 { return int64(len(s)) }

func (s source) Open(_ context.Context, off int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(s[off:])), nil
}

// payload makes a payload of the release's image, with a kernel.
func (r *rig) payload(key crypto.Signer, change func(*build.Spec)) source {
	r.t.Helper()
	kernel := noise("kernel", 8192)
	spec := build.Spec{
		Images: []build.Image{
			{Name: "usr", Data: bytes.NewReader(r.image), Size: int64(len(r.image))}, {Name: "kernel", Data: bytes.NewReader(kernel), Size: int64(len(kernel))},
		},
		Keys: []crypto.Signer{key}, TempDir: r.dir,
	}
	if change != nil {
		change(&spec)
	}
	var b bytes.Buffer
	if _, err := build.Full(context.Background(), &b, spec); err != nil {
		r.t.Fatal(err)
	}
	return b.Bytes()
}

// open is what an agent knows of a payload. It believes r's key, whoever signed it: liars do not check.
func (r *rig) open(data source) *payload.Payload {
	r.t.Helper()
	p, err := payload.Inspect(context.Background(), data)
	if err != nil {
		r.t.Fatal(err)
	}
	return p
}

// start starts a writer in this process.
func (r *rig) start() *Client {
	r.t.Helper()
	c, err := InProcess(func() (config.Config, error) { return r.conf, nil }, slog.New(slog.DiscardHandler))(context.Background())
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

func (r *rig) release(data source) Release {
	r.t.Helper()
	return Release{Slot: "USR-B", Version: "2.0.0", Size: data.Size(), Metadata: r.open(data).Metadata()}
}

// apply does what an honest agent does, up to the last byte.
func (r *rig) apply(c *Client, data source) {
	r.t.Helper()
	ctx := context.Background()
	keys, err := payload.LoadKeys(filepath.Join(r.dir, "release.pem"))
	if err != nil {
		r.t.Fatal(err)
	}
	p, err := payload.Open(ctx, data, payload.Options{Keys: keys})
	if err != nil {
		r.t.Fatal(err)
	}
	if err := c.Begin(ctx, r.release(data)); err != nil {
		r.t.Fatal(err)
	}
	if err := p.Apply(ctx, payload.ApplyOptions{Targets: c.Targets(p, "usr")}); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) slot(label string) partition.Slot {
	r.t.Helper()
	d, err := OpenDisk(r.conf, r.disk, true)
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

// read returns what a partition holds, and what it held at the beginning.
func (r *rig) read(label string) (now, old []byte) {
	r.t.Helper()
	b, err := os.ReadFile(r.disk)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, p := range r.parts {
		if p.Label == label {
			return b[p.Start : p.Start+p.Size], r.fresh[p.Start : p.Start+p.Size]
		}
	}
	r.t.Fatalf("no partition %s", label)
	return nil, nil
}

// unharmed makes sure of what holds whatever an agent does: nothing outside the other slot was written, and that one boots only if it is the release.
func (r *rig) unharmed() {
	r.t.Helper()
	for _, label := range []string{"EFI-SYSTEM", "USR-A", "STATE"} {
		if now, old := r.read(label); !bytes.Equal(now, old) {
			r.t.Errorf("%s was written to", label)
		}
	}
	if s := r.slot("USR-A"); !s.Successful || s.Priority == 0 {
		r.t.Errorf("the running slot: %+v", s)
	}
	other, _ := r.read("USR-B")
	if s := r.slot("USR-B"); s.Bootable() && !bytes.Equal(other[:imageSize], r.image) {
		r.t.Errorf("USR-B is bootable and is not the release: %+v", s)
	}
}

func TestAnUpdate(t *testing.T) {
	r := newRig(t)
	data := r.payload(r.key, nil)
	c := r.start()
	r.apply(c, data)
	if err := c.Finish(t.Context(), func(string) {}); err != nil {
		t.Fatal(err)
	}
	if r.slot("USR-B").Bootable() {
		t.Error("it is bootable, and nobody has armed it")
	}
	if err := errors.Join(c.Prepare(t.Context()), c.Arm(t.Context())); err != nil {
		t.Fatal(err)
	}
	if s := r.slot("USR-B"); s.Tries != 1 || s.Priority != 2 {
		t.Errorf("%+v", s)
	}
	if now, _ := r.read("USR-B"); !bytes.Equal(now[:imageSize], r.image) {
		t.Error("the slot does not hold the release")
	}
	if got, err := os.ReadFile(filepath.Join(r.dir, "boot", "vmlinuz-b")); err != nil || !bytes.Equal(got, noise("kernel", 8192)) {
		t.Errorf("the kernel: %d bytes, %v", len(got), err)
	}
	if err := c.Arm(t.Context()); !errors.Is(err, ErrOrder) {
		t.Errorf("armed twice: %v", err)
	}
	r.unharmed()
}

// An agent that lies gets nothing, whatever it says.
func TestLiars(t *testing.T) {
	ctx := context.Background()
	begun := func(r *rig, c *Client) map[string]payload.Target {
		data := r.payload(r.key, nil)
		if err := c.Begin(ctx, r.release(data)); err != nil {
			r.t.Fatal(err)
		}
		return c.Targets(r.open(data), "usr")
	}
	writeAt := func(part uint8, off int64, n int) func(*rig, *Client) error {
		return func(r *rig, c *Client) error {
			begun(r, c)
			if _, err := (target{c, part}).WriteAt(make([]byte, n), off); err != nil {
				return err
			}
			return target{c, 0}.Flush()
		}
	}
	for _, tt := range []struct {
		name string
		lie  func(r *rig, c *Client) error
		want error
	}{
		{"the running slot", func(r *rig, c *Client) error {
			rel := r.release(r.payload(r.key, nil))
			rel.Slot = "USR-A"
			return c.Begin(ctx, rel)
		}, partition.ErrRunning},
		{"a partition that is no slot", func(r *rig, c *Client) error {
			rel := r.release(r.payload(r.key, nil))
			rel.Slot = "STATE"
			return c.Begin(ctx, rel)
		}, partition.ErrNoSlot},
		{"a signature by another key", func(r *rig, c *Client) error { return c.Begin(ctx, r.release(r.payload(r.newKey("stranger"), nil))) }, payload.ErrSignature},
		{"a manifest with another hash", func(r *rig, c *Client) error {
			rel := r.release(r.payload(r.key, nil))
			p := r.open(r.payload(r.key, nil))
			at := bytes.Index(rel.Metadata, p.Partitions[0].SHA256[:])
			if at < 0 {
				r.t.Fatal("the manifest does not name the hash")
			}
			rel.Metadata[at] ^= 1
			return c.Begin(ctx, rel)
		}, payload.ErrSignature},
		{"half a manifest", func(r *rig, c *Client) error {
			rel := r.release(r.payload(r.key, nil))
			rel.Metadata = rel.Metadata[:100]
			return c.Begin(ctx, rel)
		}, payload.ErrSource},
		{"a size that the manifest does not have", func(r *rig, c *Client) error {
			rel := r.release(r.payload(r.key, nil))
			rel.Size += 4096
			return c.Begin(ctx, rel)
		}, payload.ErrMalformed},
		{"a detached signature that is none", func(r *rig, c *Client) error {
			rel := r.release(r.payload(r.key, nil))
			rel.MetadataSignature = make([]byte, 256)
			return c.Begin(ctx, rel)
		}, payload.ErrSignature},
		{"below the floor", func(r *rig, c *Client) error {
			f, err := Floor(r.conf)
			if err != nil {
				return err
			}
			if err := errors.Join(f.Propose(trust.Pending{Number: 100, Slot: "USR-A", Version: "1.0.0"}), second(f.Confirm(ctx, "USR-A", "1.0.0"))); err != nil {
				return err
			}
			return c.Begin(ctx, r.release(r.payload(r.key, func(s *build.Spec) { s.MaxTimestamp = 99 })))
		}, payload.ErrRollback},
		{"of another product", func(r *rig, c *Client) error {
			r.conf.Trust.Product = "toaster"
			return c.Begin(ctx, r.release(r.payload(r.key, func(s *build.Spec) { s.Product = "kettle" })))
		}, payload.ErrProduct},
		{"a version that is none", func(r *rig, c *Client) error {
			rel := r.release(r.payload(r.key, nil))
			rel.Version = "2.0.0\nSHELL=/bin/sh"
			return c.Begin(ctx, rel)
		}, payload.ErrMalformed},
		{"no release at all", func(r *rig, c *Client) error { return c.call(ctx, call{Do: doBegin}) }, ErrOrder},
		{"data before a release", func(r *rig, c *Client) error {
			if _, err := (target{c, 0}).WriteAt(r.image, 0); err != nil {
				return err
			}
			return target{c, 0}.Flush()
		}, ErrOrder},
		{"data after the image", writeAt(0, imageSize, 1), ErrOrder},
		{"data across the end of the image", writeAt(0, imageSize-10, 8192), ErrOrder},
		{"data before the slot", writeAt(0, -4096, 4096), ErrOrder},
		{"data at the end of all numbers", writeAt(0, 1<<63-1, 4096), ErrOrder},
		{"data after the kernel", writeAt(1, 1<<40, 1), ErrOrder},
		{"data for a part that is not there", writeAt(2, 0, 1), ErrOrder},
		{"settling what does not settle", func(r *rig, c *Client) error {
			begun(r, c)
			return slotTarget{target{c, 1}}.Settle(4096)
		}, ErrOrder},
		{"settling more than there is", func(r *rig, c *Client) error {
			begun(r, c)
			err := slotTarget{target{c, 0}}.Settle(1 << 40)
			if err == nil {
				return nil
			}
			return fmt.Errorf("%w: %w", ErrOrder, err)
		}, ErrOrder},
		{"writing what is settled", func(r *rig, c *Client) error {
			t := begun(r, c)["usr"]
			if _, err := t.WriteAt(r.image[:8192], 0); err != nil {
				return err
			}
			if err := t.(payload.Settler).Settle(8192); err != nil {
				return err
			}
			if _, err := t.WriteAt(r.image[:4096], 4096); err != nil {
				return err
			}
			return t.Flush()
		}, partition.ErrSettled},
		{"finishing what was not written", func(r *rig, c *Client) error {
			begun(r, c)
			return c.Finish(ctx, func(string) {})
		}, partition.ErrMismatch},
		{"finishing something else", func(r *rig, c *Client) error {
			t := begun(r, c)["usr"]
			if _, err := t.WriteAt(append(bytes.Clone(r.image[:imageSize-1]), ^r.image[imageSize-1]), 0); err != nil {
				return err
			}
			return c.Finish(ctx, func(string) {})
		}, partition.ErrMismatch},
		{"arming at once", func(r *rig, c *Client) error { return c.Arm(ctx) }, ErrOrder},
		{"arming what was begun", func(r *rig, c *Client) error {
			begun(r, c)
			return c.Arm(ctx)
		}, ErrOrder},
		{"arming what did not finish well", func(r *rig, c *Client) error {
			begun(r, c)
			if err := c.Finish(ctx, func(string) {}); err == nil {
				return nil
			}
			if err := c.Prepare(ctx); err == nil {
				return nil
			}
			return c.Arm(ctx)
		}, ErrOrder},
		{"arming what is not prepared", func(r *rig, c *Client) error {
			r.apply(c, r.payload(r.key, nil))
			if err := c.Finish(ctx, func(string) {}); err != nil {
				return err
			}
			return c.Arm(ctx)
		}, ErrOrder},
		{"arming what is not finished after it was written", func(r *rig, c *Client) error {
			r.apply(c, r.payload(r.key, nil))
			return c.Arm(ctx)
		}, ErrOrder},
		{"writing after the end", func(r *rig, c *Client) error {
			r.apply(c, r.payload(r.key, nil))
			if err := c.Finish(ctx, func(string) {}); err != nil {
				return err
			}
			if _, err := (target{c, 0}).WriteAt([]byte("evil"), 0); err != nil {
				return err
			}
			return errors.Join(c.Prepare(ctx), c.Arm(ctx))
		}, ErrOrder},
		{"another release in the middle", func(r *rig, c *Client) error {
			begun(r, c)
			return c.Begin(ctx, r.release(r.payload(r.key, nil)))
		}, ErrOrder},
		{"another change in the middle", func(r *rig, c *Client) error {
			begun(r, c)
			return c.Disarm(ctx, "USR-B")
		}, ErrOrder},
		{"no slot left to boot", func(r *rig, c *Client) error { return c.Disarm(ctx, "USR-A") }, partition.ErrLast},
		{"back to what was never good", func(r *rig, c *Client) error { return c.GoBack(ctx, Back{Slot: "USR-B", BelowFloor: true}) }, partition.ErrNotProven},
		{"back to what runs", func(r *rig, c *Client) error { return c.GoBack(ctx, Back{Slot: "USR-A"}) }, partition.ErrRunning},
		{"back below the floor", func(r *rig, c *Client) error {
			f, err := Floor(r.conf)
			if err != nil {
				return err
			}
			if err := errors.Join(f.Propose(trust.Pending{Number: 100, Slot: "USR-A", Version: "1.0.0"}), second(f.Confirm(ctx, "USR-A", "1.0.0"))); err != nil {
				return err
			}
			return c.GoBack(ctx, Back{Slot: "USR-B"})
		}, ErrBelowFloor},
		{"something else", func(r *rig, c *Client) error { return c.call(ctx, call{Do: "exec"}) }, ErrOrder},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			c := r.start()
			if err := tt.lie(r, c); !errors.Is(err, tt.want) {
				t.Errorf("the writer says %v, want %v", err, tt.want)
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			r.unharmed()
			if r.slot("USR-B").Bootable() {
				t.Error("USR-B is bootable")
			}
		})
	}
}

func second(_ bool, err error) error { return err }

// A file of keys that cannot be read says nothing about the release: it is tried again when somebody has put that right.
func TestKeysThatCannotBeRead(t *testing.T) {
	r := newRig(t)
	release := r.release(r.payload(r.key, nil))
	r.write("release.pem", "half a key")
	if err := r.start().Begin(t.Context(), release); !errors.Is(err, ErrGuard) {
		t.Errorf("%v, want ErrGuard", err)
	}
	r.unharmed()
}

// Two may settle at a time, one flushing while the other reads back; not more.
func TestTwoSettle(t *testing.T) {
	for taken, want := range []error{nil, nil, ErrOrder} {
		r := newRig(t)
		near, conn, err := wire.Ends()
		if err != nil {
			t.Fatal(err)
		}
		c := NewClient(near)
		w, err := New(r.conf, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		s := &session{conn: conn, writer: w, turns: make(chan struct{}, 2)}
		if err := w.Begin(t.Context(), r.release(r.payload(r.key, nil)), func(string) {}); err != nil {
			t.Fatal(err)
		}
		for range taken {
			s.turns <- struct{}{}
		}
		answer := make(chan error, 1)
		go func() { answer <- slotTarget{target{c, 0}}.Settle(4096) }()
		h, err := wire.ReadHead(conn, maxBody)
		if err != nil {
			t.Fatal(err)
		}
		body := make([]byte, h.Size)
		if _, err := io.ReadFull(conn, body); err != nil {
			t.Fatal(err)
		}
		if err := s.do(t.Context(), frame{h, body}); err != nil {
			t.Fatal(err)
		}
		if err := <-answer; !errors.Is(err, want) {
			t.Errorf("while %d settle: %v, want %v", taken, err, want)
		}
		s.settling.Wait()
		w.Close(false)
		conn.Close()
		c.Close()
	}
}

// What is no frame ends the writer, without having reserved what it claims to be.
func TestGarbage(t *testing.T) {
	for name, data := range map[string][]byte{
		"text":              []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
		"zeros":             make([]byte, 100),
		"a huge length":     wire.Head{Kind: aData, Size: 1<<32 - 1}.Append(nil),
		"a reply":           wire.Head{Kind: aReply}.Append(nil),
		"a step":            wire.Head{Kind: aStep}.Append(nil),
		"no JSON":           append(wire.Head{Kind: aCall, Size: 3}.Append(nil), "abc"...),
		"other JSON":        append(wire.Head{Kind: aCall, Size: 2}.Append(nil), "[]"...),
		"JSON with more":    append(wire.Head{Kind: aCall, Size: 31}.Append(nil), `{"do": "arm", "wherever": "all"}`...),
		"two JSON":          append(wire.Head{Kind: aCall, Size: 28}.Append(nil), `{"do":"arm"} {"do":"arm"}   `...),
		"half a frame":      append(wire.Head{Kind: aData, Size: 1000}.Append(nil), "abc"...),
		"too much metadata": bytes.Repeat(append(wire.Head{Kind: aMetadata, Size: maxBody}.Append(nil), make([]byte, maxBody)...), maxMetadata/maxBody+1),
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			if err := r.serve(data); err == nil {
				t.Error("it is accepted")
			}
			if got, err := os.ReadFile(r.disk); err != nil || !bytes.Equal(got, r.fresh) {
				t.Errorf("the disk was changed (%v)", err)
			}
		})
	}
}

// serve lets a writer read data, and the end of the socket after it.
func (r *rig) serve(data []byte) error {
	near, conn, err := wire.Ends()
	if err != nil {
		r.t.Fatal(err)
	}
	defer near.Close()
	go io.Copy(io.Discard, near)
	go func() {
		near.Write(data)
		near.CloseWrite()
	}()
	return Serve(context.Background(), conn, func() (config.Config, error) { return r.conf, nil }, slog.New(slog.DiscardHandler))
}

// When the agent ends, what was under way is given up: nothing is armed, and another writer can begin.
func TestTheAgentDies(t *testing.T) {
	r := newRig(t)
	data := r.payload(r.key, nil)
	for _, upTo := range []string{"begin", "write", "finish", "prepare"} {
		c := r.start()
		if upTo == "begin" {
			if err := c.Begin(t.Context(), r.release(data)); err != nil {
				t.Fatalf("%s: %v", upTo, err)
			}
		} else {
			r.apply(c, data)
		}
		if upTo == "finish" || upTo == "prepare" {
			if err := c.Finish(t.Context(), func(string) {}); err != nil {
				t.Fatal(err)
			}
		}
		if upTo == "prepare" {
			if err := c.Prepare(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if r.slot("USR-B").Bootable() {
			t.Errorf("after %s and the end of the agent USR-B is bootable", upTo)
		}
	}
}

// waits returns once the program runs that somebody waits for: it has made the file started. On done the end of the waiting would come.
func waits(t *testing.T, started string, done <-chan error) {
	t.Helper()
	for {
		if _, err := os.Stat(started); err == nil {
			return
		}
		select {
		case err := <-done:
			t.Fatalf("it did not wait: %v", err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// A post-install program, a flush, whatever takes long, is given up with the agent.
func TestTheAgentDiesWhileItWaits(t *testing.T) {
	r := newRig(t)
	started := filepath.Join(r.dir, "started")
	r.conf.Trust.Unlock = script(t, "touch "+started+"\nexec sleep 600\n")
	c := r.start()
	r.apply(c, r.payload(r.key, nil))
	if err := c.Finish(t.Context(), func(string) {}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Prepare(ctx) }()
	waits(t, started, done)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if err := c.Close(); err != nil { // it waits for the writer's end, and would wait for the program
		t.Error(err)
	}
	if r.slot("USR-B").Bootable() {
		t.Error("USR-B is bootable")
	}
}

// A program for secrets that hangs keeps no slot bootable, and is not waited for for long.
func TestDisarmDoesNotWaitForSecrets(t *testing.T) {
	r := newRig(t)
	started := filepath.Join(r.dir, "started")
	r.conf.Trust.Unlock = script(t, "[ $1 = disarm ] || exit 0\ntouch "+started+"\nexec sleep 600\n")
	c := r.start()
	r.apply(c, r.payload(r.key, nil))
	if err := c.Finish(t.Context(), func(string) {}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(c.Prepare(t.Context()), c.Arm(t.Context()), c.Close()); err != nil {
		t.Fatal(err)
	}
	if !r.slot("USR-B").Bootable() {
		t.Fatal("USR-B is not armed")
	}
	w, err := New(r.conf, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	w.patience = time.Hour
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- w.Disarm(ctx, "USR-B") }()
	waits(t, started, done)
	if r.slot("USR-B").Bootable() {
		t.Error("USR-B is bootable while the program for its secrets runs")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	w.patience = 50 * time.Millisecond
	if err := w.Disarm(t.Context(), "USR-B"); err != nil {
		t.Error(err)
	}
}

// When the writer ends, everything that the agent asks is an error that says so.
func TestTheWriterDies(t *testing.T) {
	near, far, err := wire.Pair()
	if err != nil {
		t.Fatal(err)
	}
	c := NewClient(near)
	answer := make(chan error, 1)
	go func() { answer <- c.Arm(t.Context()) }()
	if _, err := wire.ReadHead(far, maxBody); err != nil { // it has asked
		t.Fatal(err)
	}
	far.Close()
	if err := <-answer; !errors.Is(err, ErrGone) {
		t.Errorf("what was asked: %v", err)
	}
	if err := c.Finish(t.Context(), func(string) {}); !errors.Is(err, ErrGone) {
		t.Errorf("what is asked now: %v", err)
	}
	for range 100 { // until the kernel says so
		if _, err = (target{c, 0}).WriteAt(make([]byte, 4096), 0); err != nil {
			break
		}
	}
	if !errors.Is(err, ErrGone) {
		t.Errorf("what is written now: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// A writer is believed as little as it has to be: its replies are bounded, too.
func TestAWriterThatTalksNonsense(t *testing.T) {
	for name, data := range map[string][]byte{
		"a huge length":             wire.Head{Kind: aReply, ID: 1, Size: 1<<32 - 1}.Append(nil),
		"a reply to nothing":        append(wire.Head{Kind: aReply, ID: 77, Size: 2}.Append(nil), "{}"...),
		"a reply that is no answer": append(wire.Head{Kind: aReply, ID: 1, Size: 2}.Append(nil), "[]"...),
		"a call":                    wire.Head{Kind: aCall, ID: 1}.Append(nil),
	} {
		near, conn, err := wire.Ends()
		if err != nil {
			t.Fatal(err)
		}
		c := NewClient(near)
		go func() {
			wire.ReadHead(conn, maxBody)
			conn.Write(data)
			io.Copy(io.Discard, conn)
			conn.Close()
		}()
		if err := c.Arm(t.Context()); !errors.Is(err, ErrGone) {
			t.Errorf("%s: %v", name, err)
		}
		c.Close()
	}
}

// Errors keep their meaning on the way, and only theirs.
func TestErrorsCross(t *testing.T) {
	for _, k := range kinds() {
		data, err := json.Marshal(answerOf(fmt.Errorf("slot %q: %w", "USR-B", k.err)))
		if err != nil {
			t.Fatal(err)
		}
		var a answer
		if err := wire.Decode(data, &a); err != nil {
			t.Fatal(err)
		}
		got := a.err()
		if !errors.Is(got, k.err) || got.Error() != fmt.Sprintf("slot %q: %s", "USR-B", k.err) {
			t.Errorf("%s: %v", k.name, got)
		}
		for _, other := range kinds() {
			if other.name != k.name && errors.Is(got, other.err) {
				t.Errorf("%s arrives as %s, too", k.name, other.name)
			}
		}
	}
	if err := answerOf(nil).err(); err != nil {
		t.Error(err)
	}
	if a := answerOf(errors.New(strings.Repeat("x", 1<<20))); len(a.Text) > maxText {
		t.Errorf("%d bytes of text", len(a.Text))
	}
}

// recorded is what an honest agent sends for a whole update.
func (r *rig) recorded() []byte {
	var b bytes.Buffer
	put := func(h wire.Head, body []byte) {
		h.Size = uint32(len(body))
		b.Write(h.Append(nil))
		b.Write(body)
	}
	ask := func(id uint32, c call) {
		body, err := json.Marshal(c)
		if err != nil {
			r.t.Fatal(err)
		}
		put(wire.Head{Kind: aCall, ID: id}, body)
	}
	data := r.payload(r.key, nil)
	rel := r.release(data)
	put(wire.Head{Kind: aMetadata}, rel.Metadata)
	ask(1, call{Do: doBegin, Release: &rel})
	for i, q := range r.open(data).Partitions {
		body := r.image
		if q.Name == "kernel" {
			body = noise("kernel", 8192)
		}
		put(wire.Head{Kind: aData, Part: uint8(i)}, body)
		ask(uint32(2+i), call{Do: doFlush, Part: i})
	}
	ask(4, call{Do: doSettle, Upto: 4096})
	ask(5, call{Do: doFinish})
	ask(6, call{Do: doPrepare})
	ask(7, call{Do: doArm})
	ask(8, call{Do: doClose})
	return b.Bytes()
}

// Whatever comes over the socket: nothing outside the other slot is written, and that one boots only if it holds what a pinned key has signed.
func FuzzServe(f *testing.F) {
	r := newRig(f)
	good := r.recorded()
	f.Add(good)
	f.Add(good[:len(good)/2])
	for _, c := range []call{{Do: doDisarm, Slot: "USR-B"}, {Do: doStay, Slot: "USR-B"}, {Do: doBack, Back: &Back{Slot: "USR-B"}}, {Do: doConfirm, Version: "1.0.0"}, {Do: doArm}} {
		body, err := json.Marshal(c)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(append(wire.Head{Kind: aCall, ID: 1, Size: uint32(len(body))}.Append(nil), body...))
	}
	if err := r.serve(good); err != nil || !r.slot("USR-B").Bootable() {
		f.Fatalf("the seed is no update: %v, %+v", err, r.slot("USR-B"))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r.t = t
		if err := os.WriteFile(r.disk, r.fresh, 0o600); err != nil {
			t.Fatal(err)
		}
		r.serve(data)
		r.unharmed()
	})
}

// The floor rises to the release that runs once its slot is good, not before and not for another one; whoever asks says neither which nor how far.
func TestRaise(t *testing.T) {
	r := newRig(t)
	r.conf = r.config("")
	f, err := Floor(r.conf)
	if err != nil {
		t.Fatal(err)
	}
	c := r.start()
	defer c.Close()
	level := func(want int64) {
		t.Helper()
		if l, err := f.Level(); err != nil || l.Number != want {
			t.Errorf("the floor is %+v, %v, want %d", l, err, want)
		}
	}
	for _, p := range []trust.Pending{{Number: 300, Slot: "USR-A", Version: "9.0.0"}, {Number: 300, Slot: "USR-B", Version: "1.0.0"}} { // neither runs
		if err := f.Propose(p); err != nil {
			t.Fatal(err)
		}
		if rose, err := c.Raise(t.Context()); rose || err != nil {
			t.Errorf("it rose for %+v: %v, %v", p, rose, err)
		}
		level(0)
	}
	if err := f.Propose(trust.Pending{Number: 200, Slot: "USR-A", Version: "1.0.0"}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []bool{true, false} {
		if rose, err := c.Raise(t.Context()); rose != want || err != nil {
			t.Errorf("rose %v, %v, want %v", rose, err, want)
		}
		level(200)
	}
}
