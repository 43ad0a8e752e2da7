package writer

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/partition/install"
	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/build"
	"github.com/flipside-linux/flipside/updater/config"
)

// partEnv makes the test binary be a part of the daemon, with the configuration in configEnv.
const (
	partEnv   = "FLIPSIDE_TEST_PART"
	configEnv = "FLIPSIDE_TEST_CONFIG"
)

func TestMain(m *testing.M) {
	which := os.Getenv(partEnv)
	if which == "" {
		os.Exit(m.Run())
	}
	if err := part(which); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func part(which string) error {
	conn, err := Inherited()
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if which == "spawner" {
		return Spawn(conn, func() *exec.Cmd { return self("writer") }, log)
	}
	return Serve(context.Background(), conn, func() (config.Config, error) { return config.Load(os.Getenv(configEnv)) }, log)
}

func self(part string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env, cmd.Stderr = append(os.Environ(), partEnv+"="+part), os.Stderr
	return cmd
}

// spawner starts a spawner for r's host.
func (r *rig) spawner() *Spawner {
	r.t.Helper()
	r.write("flipside.toml", r.text)
	cmd := self("spawner")
	cmd.Env = append(cmd.Env, configEnv+"="+filepath.Join(r.dir, "flipside.toml"))
	s, err := StartSpawner(cmd)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { s.Close() })
	return s
}

// children are the processes that a process has started.
func children(pid int) []int {
	var list []int
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		data, _ := os.ReadFile(path)
		f := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
		if len(f) > 1 && string(f[1]) == strconv.Itoa(pid) && string(f[0]) != "Z" {
			child, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			list = append(list, child)
		}
	}
	return list
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for begun := time.Now(); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Since(begun) > time.Minute {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

// The same update, with processes.
func TestProcesses(t *testing.T) {
	r := newRig(t)
	s := r.spawner()
	data := r.payload(r.key, nil)
	for range 2 { // one after the other
		c, err := s.Start(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		r.apply(c, data)
		until(t, "one writer is there", func() bool { return len(children(s.cmd.Process.Pid)) == 1 })
		if err := errors.Join(c.Finish(t.Context(), func(string) {}), c.Prepare(t.Context())); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	c, err := s.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r.apply(c, data)
	if err := errors.Join(c.Finish(t.Context(), func(string) {}), c.Prepare(t.Context()), c.Arm(t.Context()), c.Close()); err != nil {
		t.Fatal(err)
	}
	if !r.slot("USR-B").Bootable() {
		t.Error("USR-B is not armed")
	}
	r.unharmed()
	until(t, "no writer is left", func() bool { return len(children(s.cmd.Process.Pid)) == 0 })
}

// A writer that is killed is an error, the next one goes on; a spawner that is killed is known at once.
func TestKilledProcesses(t *testing.T) {
	r := newRig(t)
	s := r.spawner()
	data := r.payload(r.key, nil)
	c, err := s.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r.apply(c, data)
	list := children(s.cmd.Process.Pid)
	if len(list) != 1 {
		t.Fatalf("%d writers", len(list))
	}
	// What the service manager sends to all of a service is not for it.
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		if err := errors.Join(syscall.Kill(list[0], sig), syscall.Kill(s.cmd.Process.Pid, sig)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Finish(t.Context(), func(string) {}); err != nil {
		t.Fatalf("after the signals: %v", err)
	}
	if err := syscall.Kill(list[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := c.Prepare(t.Context()); !errors.Is(err, ErrGone) {
		t.Errorf("a writer that was killed: %v", err)
	}
	c.Close()
	if r.slot("USR-B").Bootable() {
		t.Error("USR-B is bootable")
	}
	if c, err = s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.apply(c, data)
	if err := errors.Join(c.Finish(t.Context(), func(string) {}), c.Prepare(t.Context()), c.Arm(t.Context()), c.Close()); err != nil {
		t.Fatal(err)
	}
	r.unharmed()
	if err := s.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-s.Lost()
	if _, err := s.Start(t.Context()); !errors.Is(err, ErrGone) {
		t.Errorf("a spawner that was killed: %v", err)
	}
}

// A writer that nobody can begin is an error of the first call.
func TestAWriterThatCannotBegin(t *testing.T) {
	r := newRig(t)
	s := r.spawner()
	r.write("flipside.toml", "[oops]\n")
	c, err := s.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Confirm(t.Context(), "1.0.0"); !errors.Is(err, ErrGuard) {
		t.Errorf("a configuration that cannot be read: %v", err)
	}
}

// Nobody else is taken for the daemon's own part.
func TestNotInherited(t *testing.T) {
	var exit *exec.ExitError
	cmd := self("writer")
	cmd.Stderr = nil
	if out, err := cmd.CombinedOutput(); !errors.As(err, &exit) || !bytes.Contains(out, []byte("not started by flipsided")) {
		t.Errorf("%v: %s", err, out)
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
	s := r.spawner()
	b.Run("a writer", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			c, err := s.Start(ctx)
			if err != nil {
				b.Fatal(err)
			}
			if err := c.Begin(ctx, r.release(data)); err != nil {
				b.Fatal(err)
			}
			if err := p.Apply(ctx, payload.ApplyOptions{Targets: c.Targets(p, "usr"), Checkpoint: checkpoint}); err != nil {
				b.Fatal(err)
			}
			if err := errors.Join(c.Finish(ctx, func(string) {}), c.Close()); err != nil {
				b.Fatal(err)
			}
		}
	})
}
