package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/updater"
)

// daemon is an engine with nothing behind it.
type daemon struct {
	mu      sync.Mutex
	st      updater.Status
	changed chan struct{}
	did     []Command
	refuse  error

	starting bool          // it has not looked at the host yet
	looked   chan struct{} // told of each Status, if there is one
}

func (d *daemon) Status(context.Context) (updater.Status, <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.changed == nil {
		d.changed = make(chan struct{})
	}
	st := d.st
	if d.looked != nil {
		d.looked <- struct{}{}
	}
	if !d.starting {
		st.Schema = "flipside.status/v1"
	}
	return st, d.changed
}

func (d *daemon) Do(_ context.Context, by string, c Command) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.did = append(d.did, c)
	return d.refuse
}

func (d *daemon) Plan(_ context.Context, channel string) (updater.Plan, error) {
	return updater.Plan{Channel: channel}, nil
}

func (d *daemon) set(why string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.st.Why, d.starting = why, false
	if d.changed != nil {
		close(d.changed)
	}
	d.changed = make(chan struct{})
}

func serveTest(t *testing.T, d Daemon) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "run", "control.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, d, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve = %v after a stop", err)
		}
	})
	return path
}

func TestStatusCommandsAndPlan(t *testing.T) {
	d := &daemon{}
	d.set("up to date")
	path := serveTest(t, d)
	var got updater.Status
	keep := func(st updater.Status) bool { got = st; return true }
	if err := Call(t.Context(), path, Request{Method: "status"}, keep); err != nil || got.Why != "up to date" {
		t.Errorf("status: %v, %+v", err, got)
	}
	until := time.Date(2026, 11, 24, 18, 0, 0, 0, time.UTC)
	want := []Command{{Action: Check, Forgive: []string{"2.0.0"}}, {Action: Pause, Reason: "moving racks", Until: until}}
	for _, c := range want {
		if _, err := Do(t.Context(), path, c); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff(want, d.did); diff != "" {
		t.Errorf("what arrived differs (-want +got):\n%s", diff)
	}
	for _, sentinel := range []error{updater.ErrNothing, updater.ErrUnderWay, ErrBadCommand} {
		d.refuse = fmt.Errorf("%w: because", sentinel)
		if _, err := Do(t.Context(), path, Command{Action: Rollback}); !errors.Is(err, sentinel) || !strings.HasSuffix(err.Error(), ": because") {
			t.Errorf("error %v, want %v and its reason", err, sentinel)
		}
	}
	if p, err := Plan(t.Context(), path, "beta"); err != nil || p.Channel != "beta" {
		t.Errorf("plan: %v, %+v", err, p)
	}
	if err := Call(t.Context(), path, Request{Method: "dance"}, keep); err == nil || !strings.Contains(err.Error(), `unknown method "dance"`) {
		t.Errorf("error = %v", err)
	}
}

func TestWatchTellsOfChanges(t *testing.T) {
	d := &daemon{}
	d.set("one")
	path := serveTest(t, d)
	var seen []string
	err := Call(t.Context(), path, Request{Method: "watch"}, func(st updater.Status) bool {
		seen = append(seen, st.Why)
		if len(seen) == 1 {
			d.set("two")
		}
		return len(seen) < 2
	})
	if err != nil || len(seen) != 2 || seen[1] != "two" {
		t.Errorf("watch: %v, %q", err, seen)
	}
}

// Who gives an order and follows it hears also what the daemon ends with: the order may be what ends it.
func TestFollowTellsOfTheEnd(t *testing.T) {
	d := &daemon{}
	d.set("asking")
	path := filepath.Join(t.TempDir(), "control.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, d, slog.New(slog.DiscardHandler)) }()
	var last string
	err = Follow(t.Context(), path, Command{Action: Reboot}, func(st updater.Status) bool {
		if last == "" { // and before it has caught its breath
			d.set("rebooting")
			cancel()
		}
		last = st.Why
		return true
	})
	if err != nil || last != "rebooting" {
		t.Errorf("follow: %v; the last that was heard is %q", err, last)
	}
	if err := <-done; err != nil || len(d.did) != 1 {
		t.Errorf("%v, and done was %+v", err, d.did)
	}
}

func TestGarbageIsAnsweredAndDoesNoHarm(t *testing.T) {
	path := serveTest(t, &daemon{})
	for _, in := range []string{"not json\n", "[]\n", "\x00\n"} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, in)
		c.SetReadDeadline(time.Now().Add(time.Minute))
		out, _ := io.ReadAll(c)
		if !strings.Contains(string(out), `"error"`) {
			t.Errorf("%q was answered with %q", in, out)
		}
		c.Close()
	}
	// Far more clients than there are places, none of which says anything.
	for range 2 * maxClients {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
}

// Other users, who may look, leave root and the daemon's own user their places, and each other some.
func TestNobodyKeepsRootOut(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to be other users")
	}
	d := &daemon{}
	path := serveTest(t, d)
	for dir := filepath.Dir(path); dir != os.TempDir(); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const mallory, bob = 65534, 65533
	for range 2 * maxClients {
		dialAs(t, path, mallory, `{"method":"watch"}`) // and none of them hangs up
	}
	if line := dialAs(t, path, mallory, `{"method":"status"}`); !strings.Contains(line, `"kind":"busy"`) {
		t.Errorf("a user with many clients is answered with %q", line)
	}
	if line := dialAs(t, path, bob, `{"method":"status"}`); !strings.Contains(line, `"status"`) {
		t.Errorf("another user is answered with %q", line)
	}
	for range 2 * maxClients { // places are given back
		if _, err := Do(t.Context(), path, Command{Action: Check}); err != nil {
			t.Fatalf("root's order: %v", err)
		}
	}
	for uid := range uint32(maxOthers) {
		dialAs(t, path, 100000+uid, `{"method":"watch"}`)
	}
	if line := dialAs(t, path, bob, `{"method":"status"}`); !strings.Contains(line, `"kind":"busy"`) {
		t.Errorf("with many clients of many users the next is answered with %q", line)
	}
	if _, err := Do(t.Context(), path, Command{Action: Check}); err != nil {
		t.Errorf("root's order: %v", err)
	}
}

// dialAs sends a request as another user and returns the first line of the answer. The connection stays until the test ends.
func dialAs(t *testing.T, path string, uid uint32, request string) string {
	t.Helper()
	type dialled struct {
		c   net.Conn
		err error
	}
	done := make(chan dialled)
	go func() {
		runtime.LockOSThread() // and it ends with its thread, whose user it changes
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
			done <- dialled{nil, errno}
			return
		}
		c, err := net.Dial("unix", path)
		done <- dialled{c, err}
	}()
	got := <-done
	if got.err != nil {
		t.Fatal(got.err)
	}
	t.Cleanup(func() { got.c.Close() })
	fmt.Fprintln(got.c, request)
	got.c.SetReadDeadline(time.Now().Add(time.Minute))
	line, _ := bufio.NewReader(got.c).ReadString('\n')
	return line
}

// A daemon that has no place for somebody says so also to one who has not yet sent the request.
func TestBusyIsHeardInTime(t *testing.T) {
	path := serveTest(t, &daemon{})
	for range maxClients {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	for range 20 {
		if _, err := Do(t.Context(), path, Command{Action: Check}); !errors.Is(err, ErrBusy) {
			t.Fatalf("error = %v, want ErrBusy", err)
		}
	}
}

func TestNobodyListens(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control.sock")
	if err := Call(t.Context(), path, Request{Method: "status"}, nil); !errors.Is(err, ErrNotRunning) {
		t.Errorf("error = %v, want ErrNotRunning", err)
	}
	// A socket that a dead daemon left behind is taken over, that of a living one is not.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path); err == nil {
		t.Error("took the socket of a living daemon")
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	l2, err := Listen(path)
	if err != nil {
		t.Errorf("did not take over a dead socket: %v", err)
	} else {
		l2.Close()
	}
}

// While a daemon reads its configuration again nobody answers for a moment: who asks then waits, and is answered by the next engine.
func TestWhileTheDaemonReloads(t *testing.T) {
	l, err := Listen(filepath.Join(t.TempDir(), "control.sock"))
	if err != nil {
		t.Fatal(err)
	}
	for i, why := range []string{"before the reload", "after it"} {
		asked := make(chan error, 1)
		got := ""
		call := func() {
			asked <- Call(t.Context(), l.Path(), Request{Method: "status"}, func(st updater.Status) bool { got = st.Why; return true })
		}
		c, err := net.Dial("unix", l.Path()) // the socket takes calls, though nobody serves it
		if err != nil {
			t.Fatalf("call %d: %v", i, err)
		}
		c.Close()
		go call()
		// An engine that is stopped before it has looked at the host, by the next reload, leaves the answer to the one after it.
		short := &daemon{starting: true, looked: make(chan struct{}, 10)}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- Serve(ctx, l, short, slog.New(slog.DiscardHandler)) }()
		<-short.looked
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		d := &daemon{starting: true}
		ctx, cancel = context.WithCancel(t.Context())
		go func() { done <- Serve(ctx, l, d, slog.New(slog.DiscardHandler)) }()
		time.AfterFunc(10*time.Millisecond, func() { d.set(why) }) // it looks at the host first
		if err := <-asked; err != nil || got != why {
			t.Errorf("call %d = %q, %v; want %q", i, got, err, why)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := Call(t.Context(), l.Path(), Request{Method: "status"}, nil); !errors.Is(err, ErrNotRunning) {
		t.Errorf("error = %v after the socket was closed, want ErrNotRunning", err)
	}
}

// What cannot be encoded is said, and does not look as if the daemon had ended.
func TestAnswerThatIsNoJSON(t *testing.T) {
	path := serveTest(t, &daemon{st: updater.Status{Since: time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)}})
	for _, req := range []Request{{Method: "status"}, {Method: "watch"}, {Method: "do", Do: &Command{}}, {Method: "do", Do: &Command{}, Follow: true}} {
		err := Call(t.Context(), path, req, func(updater.Status) bool { return true })
		var refusal *Refusal
		if !errors.As(err, &refusal) || !strings.Contains(err.Error(), "cannot write as JSON") {
			t.Errorf("%s (follow %v): error = %v, want a failure that the daemon tells", req.Method, req.Follow, err)
		}
	}
}
