package writer

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/flipside-linux/flipside/partition/install"
	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/build"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/wire"
)

// configEnv makes the test binary be a writer, with that configuration.
const configEnv = "FLIPSIDE_TEST_CONFIG"

func TestMain(m *testing.M) {
	path := os.Getenv(configEnv)
	if path == "" {
		os.Exit(m.Run())
	}
	if err := aWriter(path); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func aWriter(path string) error {
	conn, err := wire.Conn(os.NewFile(3, "socket"))
	if err != nil {
		return err
	}
	return Serve(context.Background(), conn, func() (config.Config, error) { return config.Load(path) }, slog.New(slog.NewTextHandler(os.Stderr, nil)))
}

// process starts a writer that is a process, for r's host.
func (r *rig) process() (*Client, *exec.Cmd) {
	r.t.Helper()
	r.write("flipside.toml", r.text)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env, cmd.Stderr = append(os.Environ(), configEnv+"="+filepath.Join(r.dir, "flipside.toml")), os.Stderr
	c, err := Over(func() (*net.UnixConn, error) {
		near, far, err := wire.Pair()
		if err != nil {
			return nil, err
		}
		cmd.ExtraFiles = []*os.File{far}
		err = cmd.Start()
		far.Close()
		return near, err
	})(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close(); cmd.Process.Kill(); cmd.Wait() })
	return c, cmd
}

// The same update, with processes. Each ends well with its client.
func TestProcesses(t *testing.T) {
	r := newRig(t)
	data := r.payload(r.key, nil)
	for range 2 { // one after the other
		c, cmd := r.process()
		r.apply(c, data)
		if err := errors.Join(c.Finish(t.Context(), func(string) {}), c.Prepare(t.Context()), c.Close(), cmd.Wait()); err != nil {
			t.Fatal(err)
		}
	}
	c, cmd := r.process()
	r.apply(c, data)
	if err := errors.Join(c.Finish(t.Context(), func(string) {}), c.Prepare(t.Context()), c.Arm(t.Context()), c.Close(), cmd.Wait()); err != nil {
		t.Fatal(err)
	}
	if !r.slot("USR-B").Bootable() {
		t.Error("USR-B is not armed")
	}
	r.unharmed()
}

// A writer that is killed is an error, and the next one goes on. One that cannot be had is the same error.
func TestKilledProcesses(t *testing.T) {
	r := newRig(t)
	data := r.payload(r.key, nil)
	c, cmd := r.process()
	r.apply(c, data)
	if err := c.Finish(t.Context(), func(string) {}); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := c.Prepare(t.Context()); !errors.Is(err, ErrGone) {
		t.Errorf("a writer that was killed: %v", err)
	}
	c.Close()
	cmd.Wait() // with it its locks on the disk end
	if r.slot("USR-B").Bootable() {
		t.Error("USR-B is bootable")
	}
	c, _ = r.process()
	r.apply(c, data)
	if err := errors.Join(c.Finish(t.Context(), func(string) {}), c.Prepare(t.Context()), c.Arm(t.Context()), c.Close()); err != nil {
		t.Fatal(err)
	}
	r.unharmed()
	if _, err := Over(func() (*net.UnixConn, error) { return nil, net.ErrClosed })(t.Context()); !errors.Is(err, ErrGone) || !errors.Is(err, net.ErrClosed) {
		t.Errorf("a writer that cannot be had: %v", err)
	}
}

// A writer that nobody can begin is an error of the first call.
func TestAWriterThatCannotBegin(t *testing.T) {
	r := newRig(t)
	r.text = "[oops]\n"
	c, _ := r.process()
	if err := c.Confirm(t.Context(), "1.0.0"); !errors.Is(err, ErrGuard) {
		t.Errorf("a configuration that cannot be read: %v", err)
	}
}

// BenchmarkApply writes and reads back a release of 256 MiB, once with the disk in this process, and once through a writer's.
func BenchmarkApply(b *testing.B) {
	const size = 256 << 20
	r := newRigOf(b, size)
	r.image = make([]byte, size)
	for at := 0; at < size; at += 1 << 20 { // half of it compresses
		copy(r.image[at:], noise(fmt.Sprint(at), 512<<10))
	}
	var buf bytes.Buffer
	if _, err := build.Full(b.Context(), &buf, build.Spec{
		Images: []build.Image{{Name: "usr", Data: bytes.NewReader(r.image), Size: size}}, Keys: []crypto.Signer{r.key}, TempDir: r.dir,
	}); err != nil {
		b.Fatal(err)
	}
	data := source(buf.Bytes())
	ctx := b.Context()
	keys, err := payload.LoadKeys(filepath.Join(r.dir, "release.pem"))
	if err != nil {
		b.Fatal(err)
	}
	p, err := payload.Open(ctx, data, payload.Options{Keys: keys})
	if err != nil {
		b.Fatal(err)
	}
	checkpoint := func(payload.Checkpoint) error { return nil }
	b.Run("one process", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			d, err := OpenDisk(r.conf, r.disk, false)
			if err != nil {
				b.Fatal(err)
			}
			run, err := d.RunningFromLabel("USR-A")
			if err != nil {
				b.Fatal(err)
			}
			tx, err := install.Begin(d, run, "USR-B", install.Options{})
			if err != nil {
				b.Fatal(err)
			}
			if err := p.Apply(ctx, payload.ApplyOptions{Targets: map[string]payload.Target{"usr": tx.Slot()}, Checkpoint: checkpoint}); err != nil {
				b.Fatal(err)
			}
			if _, err := tx.Finish(ctx, install.Image{Size: size, SHA256: p.Partitions[0].SHA256}, nil); err != nil {
				b.Fatal(err)
			}
			if err := errors.Join(tx.Close(), d.Close()); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("a writer", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			c, cmd := r.process()
			if err := c.Begin(ctx, r.release(data)); err != nil {
				b.Fatal(err)
			}
			if err := p.Apply(ctx, payload.ApplyOptions{Targets: c.Targets(p, "usr"), Checkpoint: checkpoint}); err != nil {
				b.Fatal(err)
			}
			if err := errors.Join(c.Finish(ctx, func(string) {}), c.Close(), cmd.Wait()); err != nil {
				b.Fatal(err)
			}
		}
	})
}
