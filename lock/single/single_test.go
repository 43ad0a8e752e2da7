package single_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/locktest"
	"github.com/flipside-linux/flipside/lock/single"
)

func open(t *testing.T, dir string) *single.Store {
	t.Helper()
	s, err := single.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// lend runs the server side of a store and returns when it can be dialled.
func lend(t *testing.T, s *single.Store, dir string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, dir) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Millisecond) {
		if l, err := single.Dial(t.Context(), dir); err == nil {
			l.Close()
			return
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// shortDir is a directory whose name leaves room for that of a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sem")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestConformance(t *testing.T) {
	t.Run("file", func(t *testing.T) {
		s := open(t, t.TempDir())
		locktest.Run(t, func(*testing.T) locktest.Backend {
			return locktest.Backend{Open: func(_ *testing.T, opt lock.Options) *lock.Keeper { return lock.On(s, opt) }}
		})
	})
	t.Run("lent", func(t *testing.T) {
		dir := shortDir(t)
		lend(t, open(t, dir), dir)
		locktest.Run(t, func(*testing.T) locktest.Backend {
			return locktest.Backend{Open: func(t *testing.T, opt lock.Options) *lock.Keeper {
				l, err := single.Attach(t.Context(), dir)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { l.Close() })
				return lock.On(l, opt)
			}}
		})
	})
}

func TestAttach(t *testing.T) {
	dir := shortDir(t)
	if _, err := single.Attach(t.Context(), dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("nothing is there: %v", err)
	}
	s := open(t, dir)
	if _, err := single.Attach(t.Context(), dir); !errors.Is(err, single.ErrBusy) {
		t.Errorf("a process has it and lends it to nobody: %v", err)
	}
	s.Close()
	a, err := single.Attach(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
}

// What was granted and who waits is still known after the file was closed and opened; tokens go on growing.
func TestReopen(t *testing.T) {
	dir := t.TempDir()
	ctx := t.Context()
	s := open(t, dir)
	k := lock.On(s, lock.Options{})
	claim := func(host string) lock.Claim { return lock.Claim{Group: "g", Host: host, To: "2"} }
	first, err := k.Request(ctx, claim("a"))
	if err != nil || !first.Granted {
		t.Fatalf("%+v, %v", first, err)
	}
	if st, err := k.Request(ctx, claim("b")); err != nil || st.Position != 1 {
		t.Fatalf("%+v, %v", st, err)
	}
	s.Close()
	if _, err := k.Request(ctx, claim("a")); !errors.Is(err, lock.ErrUnavailable) {
		t.Errorf("a closed store: %v", err)
	}
	k = lock.On(open(t, dir), lock.Options{})
	if st, err := k.Request(ctx, claim("a")); err != nil || st.Token != first.Token {
		t.Errorf("after it was opened again: %+v, %v, want token %d", st, err, first.Token)
	}
	if err := k.Release(ctx, "g", "a", lock.Verdict{Outcome: lock.Healthy}); err != nil {
		t.Fatal(err)
	}
	if st, err := k.Request(ctx, claim("b")); err != nil || !st.Granted || st.Token <= first.Token {
		t.Errorf("b: %+v, %v", st, err)
	}
}

const killedEnv = "FLIPSIDE_TEST_SINGLE"

func TestMain(m *testing.M) {
	if dir := os.Getenv(killedEnv); dir != "" {
		fmt.Fprintln(os.Stderr, takeTurns(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// takeTurns passes a slot from host to host for ever, and says what has been promised.
func takeTurns(dir string) error {
	s, err := single.Open(dir)
	if err != nil {
		return err
	}
	ctx := context.Background()
	k := lock.On(s, lock.Options{})
	for i := 0; ; i++ {
		c := lock.Claim{Group: "g", Host: fmt.Sprintf("host-%d", i), To: "2"}
		st, err := k.Request(ctx, c)
		if err != nil || !st.Granted {
			return fmt.Errorf("%+v, %w", st, err)
		}
		fmt.Println("granted", c.Host, st.Token)
		if err := k.Release(ctx, c.Group, c.Host, lock.Verdict{Outcome: lock.Healthy}); err != nil {
			return err
		}
		fmt.Println("released", c.Host, st.Token)
	}
}

// The process is killed in the middle; what it had answered is in the file.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir) // so that the first grant has a token of its own
	s.Close()
	for round := range 5 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), killedEnv+"="+dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var said strings.Builder
		buf := make([]byte, 4096)
		for strings.Count(said.String(), "\n") < 7+round { // an odd and an even number of answers
			n, err := out.Read(buf)
			if err != nil {
				t.Fatalf("it ended by itself: %v", err)
			}
			said.Write(buf[:n])
		}
		cmd.Process.Kill()
		for {
			n, err := out.Read(buf)
			said.Write(buf[:n])
			if err != nil {
				break
			}
		}
		cmd.Wait()
		text := said.String()
		lines := strings.Split(text[:strings.LastIndexByte(text, '\n')], "\n")
		var what, host string
		var token int64
		if _, err := fmt.Sscan(lines[len(lines)-1], &what, &host, &token); err != nil {
			t.Fatal(err)
		}
		s, err := single.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		k := lock.On(s, lock.Options{})
		st, err := k.State(t.Context(), "g")
		if err != nil {
			t.Fatal(err)
		}
		h, held := st.Holder(host)
		switch {
		case what == "granted" && held && h.Token != token:
			t.Errorf("%s holds token %d, it was told %d", host, h.Token, token)
		case what == "released" && held:
			t.Errorf("%s still holds the slot that it gave back", host)
		case len(st.Holders) > 1:
			t.Errorf("%d holders", len(st.Holders))
		}
		for _, q := range st.Queue { // it was killed when it had asked and was not yet served
			if err := k.Release(t.Context(), "g", q.Host, lock.Verdict{Outcome: lock.Cancelled}); err != nil {
				t.Fatal(err)
			}
		}
		for _, h := range st.Holders {
			if err := k.Release(t.Context(), "g", h.Host, lock.Verdict{Outcome: lock.Cancelled}); err != nil {
				t.Fatal(err)
			}
		}
		if entries, err := k.History(t.Context(), "g"); err != nil || len(entries) == 0 {
			t.Errorf("history: %v, %v", entries, err)
		}
		s.Close()
	}
}

// The names of groups are for those to choose who ask: what they can make of that on the disk is bounded. The groups that are there go on.
func TestGroupsAreBounded(t *testing.T) {
	s := open(t, t.TempDir())
	err := error(nil)
	n := 0
	for ; err == nil && n <= 256; n++ {
		_, err = s.Enqueue(t.Context(), fmt.Sprint("g", n), "h", nil)
	}
	if !errors.Is(err, lock.ErrInvalid) || errors.Is(err, lock.ErrUnavailable) {
		t.Errorf("after %d groups: %v, want ErrInvalid", n, err)
	}
	if _, err := s.Enqueue(t.Context(), "g7", "h2", nil); err != nil {
		t.Errorf("a group that was there: %v", err)
	}
}
