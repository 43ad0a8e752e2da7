package writer

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/partition/install"
	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/build"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/wire"
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
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if which == "main" {
		told := make(chan os.Signal, 4)
		signal.Notify(told, syscall.SIGTERM, syscall.SIGHUP)
		agent := self("agent")
		agent.Stdout = os.Stdout
		err := Supervise(agent, told, func(Part) *exec.Cmd { return self("writer") }, func(state string) { fmt.Printf("manager %q\n", state) }, log)
		var ended *EndedError
		if errors.As(err, &ended) {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(ended.Status)
		}
		return err
	}
	conn, err := Inherited()
	if err != nil {
		return err
	}
	switch which {
	case "spawner":
		return Spawn(conn, func(Part) *exec.Cmd { return self("writer") }, log)
	case "agent":
		return anAgent(conn)
	}
	return Serve(context.Background(), conn, func() (config.Config, error) { return config.Load(os.Getenv(configEnv)) }, log)
}

func self(part string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env, cmd.Stderr = append(os.Environ(), partEnv+"="+part), os.Stderr
	if part == "main" || part == "spawner" { // a test that is ended leaves nothing behind
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	}
	return cmd
}

// spawner is a process that starts writers for this one.
type spawner struct {
	*Spawner
	cmd *exec.Cmd
}

// spawner starts a spawner for r's host.
func (r *rig) spawner() spawner {
	r.t.Helper()
	r.write("flipside.toml", r.text)
	cmd := self("spawner")
	cmd.Env = append(cmd.Env, configEnv+"="+filepath.Join(r.dir, "flipside.toml"))
	near, far, err := wire.Pair()
	if err != nil {
		r.t.Fatal(err)
	}
	cmd.ExtraFiles = []*os.File{far}
	err = cmd.Start()
	far.Close()
	if err != nil {
		r.t.Fatal(err)
	}
	s := spawner{NewSpawner(near, func(syscall.Signal) {}), cmd}
	r.t.Cleanup(func() { s.Close(); cmd.Wait() })
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

// Whoever asks for a part that there is not, or sends more than one socket, is served no longer.
func TestAskedForRubbish(t *testing.T) {
	for _, tt := range []struct {
		what  string
		bytes []byte
		files int
	}{
		{"a part that there is not", []byte{byte(parts)}, 1},
		{"no part", nil, 1},
		{"no socket", []byte{0}, 0},
		{"two sockets", []byte{0}, 2},
	} {
		near, far, err := wire.Pair()
		if err != nil {
			t.Fatal(err)
		}
		conn, err := wire.Conn(far)
		if err != nil {
			t.Fatal(err)
		}
		var rights []byte
		if tt.files > 0 {
			f, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			var fds []int
			for range tt.files {
				fds = append(fds, int(f.Fd()))
			}
			rights = unix.UnixRights(fds...)
		}
		if len(tt.bytes) == 0 {
			near.CloseWrite() // a stream has no empty message: that is its end
		} else if _, _, err := near.WriteMsgUnix(tt.bytes, rights, nil); err != nil {
			t.Fatal(err)
		}
		err = Spawn(conn, func(Part) *exec.Cmd { t.Errorf("%s: something is started", tt.what); return exec.Command("true") }, slog.New(slog.DiscardHandler))
		if (err == nil) != (len(tt.bytes) == 0) {
			t.Errorf("%s: %v", tt.what, err)
		}
		near.Close()
	}
}

// agentEnv is what the agent of [TestSupervised] does.
const agentEnv = "FLIPSIDE_TEST_AGENT"

func anAgent(conn *net.UnixConn) error {
	what := os.Getenv(agentEnv)
	told := make(chan syscall.Signal, 4)
	s := NewSpawner(conn, func(sig syscall.Signal) { told <- sig })
	switch what {
	case "status":
		os.Exit(133)
	case "rubbish":
		conn.Write([]byte{255})
		select {} // and does not care that its socket is at its end
	}
	manager, err := TellManager()
	if err != nil {
		return err
	}
	if what == "part" {
		conn, err := s.Connect(TheWriter)
		if err != nil {
			return err
		}
		defer conn.Close()
	}
	fmt.Println("agent", os.Getpid())
	for {
		select {
		case sig := <-told:
			fmt.Println("told", int(sig))
			if sig == syscall.SIGHUP {
				manager("MAINPID=1\nFDSTORE=1\nREADY=1\nSTATUS=well")
			}
			if sig == syscall.SIGTERM {
				return nil
			}
		case <-s.Lost():
			return nil
		}
	}
}

// The agent's end is the end of the process that started it, with its status; and the other way round.
func TestSupervised(t *testing.T) {
	start := func(what string) (*exec.Cmd, *bufio.Scanner) {
		t.Helper()
		cmd := self("main")
		cmd.Env, cmd.Stderr = append(cmd.Env, agentEnv+"="+what), nil
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		return cmd, bufio.NewScanner(out)
	}
	says := func(lines *bufio.Scanner, want string) (n int) {
		t.Helper()
		if !lines.Scan() {
			t.Fatalf("it ended, and %q was waited for", want)
		}
		if _, err := fmt.Sscanf(lines.Text(), want+" %d", &n); err != nil {
			t.Fatalf("it says %q, want %q", lines.Text(), want)
		}
		return n
	}
	for what, want := range map[string]int{"status": 133, "rubbish": 1} {
		cmd, _ := start(what)
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != want {
			t.Errorf("%s: it ended with %v, want status %d", what, err, want)
		}
	}
	cmd, lines := start("")
	says(lines, "agent")
	for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGTERM} {
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if n := says(lines, "told"); n != int(sig) {
			t.Errorf("told of %d, want %d", n, sig)
		}
		if sig == syscall.SIGHUP {
			if want := `manager "READY=1\nSTATUS=well"`; !lines.Scan() || lines.Text() != want {
				t.Errorf("the manager is told %s, want %s", lines.Text(), want)
			}
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("told to end, it ended with %v", err)
	}
	cmd, lines = start("")
	agent := says(lines, "agent")
	if err := syscall.Kill(agent, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 137 {
		t.Errorf("its agent was killed, and it ended with %v", err)
	}
	for _, killed := range []string{"the first process", "the agent"} {
		cmd, lines = start("part")
		agent = says(lines, "agent")
		var all []int
		until(t, "a writer is there", func() bool { all = children(cmd.Process.Pid); return len(all) == 2 })
		pid := cmd.Process.Pid
		if killed == "the agent" {
			pid = agent
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for _, pid := range all {
			until(t, killed+" was killed, and all end", func() bool { return ended(pid) })
		}
		cmd.Wait()
	}
}

// ended reports whether a process has ended, also where nobody has asked how.
func ended(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	f := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	return len(f) > 0 && string(f[0]) == "Z"
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
