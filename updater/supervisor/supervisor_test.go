package supervisor

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/updater/wire"
)

// The test binary is a process of the daemon if processEnv says which; agentEnv is what an agent does.
const (
	processEnv = "FLIPSIDE_TEST_PROCESS"
	agentEnv   = "FLIPSIDE_TEST_AGENT"
)

func TestMain(m *testing.M) {
	which := os.Getenv(processEnv)
	if which == "" {
		os.Exit(m.Run())
	}
	err := process(which)
	var ended *EndedError
	if errors.As(err, &ended) {
		os.Exit(ended.Status)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func process(which string) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	start := func(p Part) *exec.Cmd { return self(p.String()) }
	switch which {
	case "main":
		told := make(chan os.Signal, 4)
		signal.Notify(told, syscall.SIGTERM, syscall.SIGHUP)
		agent := self("agent")
		agent.Stdout = os.Stdout
		return Run(agent, told, start, func(state string) { fmt.Printf("manager %q\n", state) }, log)
	case "agent":
		return anAgent(os.Getenv(agentEnv))
	}
	conn, err := Inherited()
	if err != nil {
		return err
	}
	if which == "spawner" {
		return spawn(conn, start, log)
	}
	// A part: it says what it is, and then again what it hears.
	if _, err := conn.Write([]byte(which)); err != nil {
		return err
	}
	_, err = io.Copy(conn, conn)
	return err
}

func self(which string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env, cmd.Stderr = append(os.Environ(), processEnv+"="+which), os.Stderr
	if which == "main" || which == "spawner" { // a test that is ended leaves nothing behind
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	}
	return cmd
}

func anAgent(what string) error {
	told := make(chan syscall.Signal, 4)
	c, err := Connect(func(sig syscall.Signal) { told <- sig })
	if err != nil {
		return err
	}
	switch what {
	case "status":
		os.Exit(133)
	case "rubbish":
		c.conn.Write([]byte{255})
		select {} // and does not care that its socket is at its end
	case "part":
		conn, err := c.Start(Writer)
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
				c.Tell("MAINPID=1\nFDSTORE=1\nREADY=1\nSTATUS=well")
			}
			if sig == syscall.SIGTERM {
				return nil
			}
		case <-c.Lost():
			return nil
		}
	}
}

// says reads as much as want has from conn.
func says(t *testing.T, conn net.Conn, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != want {
		t.Fatalf("it says %q, %v, want %q", got, err, want)
	}
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

// ended reports whether a process has ended, also where nobody has asked how.
func ended(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	f := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	return len(f) > 0 && string(f[0]) == "Z"
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for begun := time.Now(); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Since(begun) > time.Minute {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

// Each part that is asked for is a process of its own, with the socket to whoever asked. It ends with its socket, and not by what is sent to the service as a whole.
func TestParts(t *testing.T) {
	cmd := self("spawner")
	near, far, err := wire.Pair()
	if err != nil {
		t.Fatal(err)
	}
	cmd.ExtraFiles = []*os.File{far}
	err = cmd.Start()
	far.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); cmd.Process.Kill(); cmd.Wait() })
	c := newClient(near, nil, func(sig syscall.Signal) { t.Errorf("told %v", sig) })
	conns := map[Part]*net.UnixConn{}
	for _, p := range []Part{Writer, Errand} {
		conn, err := c.Start(p)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		says(t, conn, p.String())
		conns[p] = conn
	}
	spawner := cmd.Process.Pid
	list := children(spawner)
	if len(list) != 2 {
		t.Fatalf("two parts are %d processes", len(list))
	}
	for _, pid := range append(list, spawner) {
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
			if err := syscall.Kill(pid, sig); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, conn := range conns {
		conn.Write([]byte("still there?"))
		says(t, conn, "still there?")
	}
	conns[Errand].Close()
	until(t, "one part is left", func() bool { return len(children(spawner)) == 1 })
	if err := syscall.Kill(children(spawner)[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if n, err := conns[Writer].Read(make([]byte, 1)); err == nil {
		t.Errorf("a part that was killed says %d bytes", n)
	}
	until(t, "none is left", func() bool { return len(children(spawner)) == 0 })
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-c.Lost()
	if _, err := c.Start(Writer); err == nil || !strings.Contains(err.Error(), "asking for a process (writer)") {
		t.Errorf("nobody is there to start one: %v", err)
	}
}

// There are never more parts than there may be; one more gets a socket that is at its end, and another has its place when it has ended.
func TestTooManyParts(t *testing.T) {
	near, conn, err := wire.Ends()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		done <- spawn(conn, func(p Part) *exec.Cmd { return self(p.String()) }, slog.New(slog.DiscardHandler))
	}()
	c := newClient(near, nil, func(syscall.Signal) {})
	var conns []*net.UnixConn
	for range atOnce {
		conn, err := c.Start(Errand)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		says(t, conn, "errand")
		conns = append(conns, conn)
	}
	more, err := c.Start(Errand)
	if err != nil {
		t.Fatal(err)
	}
	defer more.Close()
	if _, err := more.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("one more than %d: %v", atOnce, err)
	}
	for _, conn := range conns {
		conn.Close()
	}
	until(t, "there is a place again", func() bool {
		again, err := c.Start(Writer)
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		n, _ := io.ReadFull(again, make([]byte, len("writer")))
		return n > 0
	})
	near.Close()
	if err := <-done; err != nil {
		t.Error(err)
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
		near, conn, err := wire.Ends()
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
		err = spawn(conn, func(Part) *exec.Cmd { t.Errorf("%s: something is started", tt.what); return exec.Command("true") }, slog.New(slog.DiscardHandler))
		if (err == nil) != (len(tt.bytes) == 0) {
			t.Errorf("%s: %v", tt.what, err)
		}
		near.Close()
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
	line := func(lines *bufio.Scanner, want string) (n int) {
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
	line(lines, "agent")
	for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGTERM} {
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if n := line(lines, "told"); n != int(sig) {
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
	agent := line(lines, "agent")
	if err := syscall.Kill(agent, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 137 {
		t.Errorf("its agent was killed, and it ended with %v", err)
	}
	for _, killed := range []string{"the first process", "the agent"} {
		cmd, lines = start("part")
		agent = line(lines, "agent")
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

// Nobody else is taken for the daemon's own part.
func TestNotInherited(t *testing.T) {
	var exit *exec.ExitError
	cmd := self(Writer.String())
	cmd.Stderr = nil
	if out, err := cmd.CombinedOutput(); !errors.As(err, &exit) || !bytes.Contains(out, []byte("not started by flipsided")) {
		t.Errorf("%v: %s", err, out)
	}
}
