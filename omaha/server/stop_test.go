package server

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/omaha"
)

// fails lets a host take what it is offered and come back with the old version. It says whether the host got an offer.
func (l *lab) fails(n int) bool {
	l.t.Helper()
	c := l.client(n, "1.0.0")
	if l.check(c).Offer == nil {
		return false
	}
	l.report(c, omaha.Failed(omaha.CodeRollback))
	return true
}

// stands checks what people and programs are told about the channel: why it is stopped, or "".
func (l *lab) stands(want string) {
	l.t.Helper()
	halted := want
	if want != "" {
		halted = "stopped: " + want
	}
	_, list := l.get("/v1/channels")
	_, one := l.get("/v1/channels/stable")
	_, page := l.get("/")
	_, metrics := l.get("/metrics")
	if got := l.Status().Channels["stable"].Halted(); got != halted {
		l.t.Errorf("the status says %q, want %q", got, halted)
	}
	metric := `flipside_channel_halted{channel="stable",version="1.1.0"} `
	if want == "" {
		if strings.Contains(list+one, "stopped") || strings.Contains(page, `class="halt"`) || !strings.Contains(metrics, metric+"0") {
			l.t.Errorf("it is shown as stopped:\n%s\n%s", list, one)
		}
		return
	}
	for _, doc := range []string{list, one, page} {
		if !strings.Contains(doc, want) {
			l.t.Errorf("%q is not in:\n%s", want, doc)
		}
	}
	if !strings.Contains(metrics, metric+"1") {
		l.t.Error("the metric says that the channel is not halted")
	}
}

// file checks what a reader of the directory is told.
func (l *lab) file(want string) {
	l.t.Helper()
	ch, err := (&Publisher{Dir: l.dir}).Channel("stable")
	if err != nil || ch.Stopped != want {
		l.t.Errorf("the directory says %q, %v, want %q", ch.Stopped, err, want)
	}
	s, err := New(l.dir, Options{ReadOnly: true})
	if err != nil {
		l.t.Fatal(err)
	}
	if got := s.Status().Channels["stable"].Stopped; got != want {
		l.t.Errorf("a server that only reads says %q, want %q", got, want)
	}
}

const bad = "2 hosts failed with 1.1.0"

// stoppedLab is a server that has stopped a rollout.
func stoppedLab(t *testing.T) *lab {
	t.Helper()
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.change(func(c *Channel) { c.StopFailures = 2 })
	l.clock.Add(time.Minute)
	if !l.fails(1) || !l.fails(2) || l.fails(3) {
		t.Fatal("the rollout did not stop after two failures")
	}
	return l
}

// A rollout that went wrong goes to no further host, also where nothing can be written: not the channel, not the state, not the audit log.
func TestStopNeedsNoDisk(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.change(func(c *Channel) { c.StopFailures = 2 })
	for _, name := range []string{".lock", "audit.jsonl", "stopped.toml"} { // nothing replaces a folder that is not empty, or writes to it
		os.Remove(filepath.Join(l.dir, name))
		if err := os.MkdirAll(filepath.Join(l.dir, name, "x"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if !l.fails(1) || !l.fails(2) {
		t.Fatal("the first hosts got no release")
	}
	for n := 3; n < 6; n++ {
		if l.fails(n) {
			t.Errorf("host %d got the release that two hosts have failed with", n)
		}
	}
	l.stands(bad)
	l.commit(true)
	said := strings.Join(l.Status().Problems, "\n")
	_, page := l.get("/")
	_, metrics := l.get("/metrics")
	if !strings.Contains(said, "stopped.toml") || !strings.Contains(said, "audit.jsonl") || !strings.Contains(page, "stopped.toml") || strings.Contains(metrics, "flipside_problems 0") {
		t.Errorf("the problems are %q", said)
	}
	l.clock.Add(time.Minute)
	l.Close()
	l.start() // nobody else knew, but the state
	l.wants(l.client(6, "1.0.0"), "", bad)
	for _, name := range []string{".lock", "audit.jsonl", "stopped.toml"} {
		if err := os.RemoveAll(filepath.Join(l.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	l.change(func(c *Channel) { c.Percent = new(50) }) // what has nothing to do with it
	l.stands(bad)
	l.commit(true)
	l.file(bad)
	if problems := l.Status().Problems; len(problems) != 0 {
		t.Errorf("problems that are gone: %q", problems)
	}

	l.change(func(c *Channel) { c.Percent = nil; c.resume(l.clock.Now()) })
	if !l.fails(10) {
		t.Fatal("a rollout that was resumed goes on")
	}
	l.store.db.Close() // no state any more, either
	if code, _ := l.post(string(failure(l.client(11, "1.0.0")))); code != http.StatusServiceUnavailable {
		t.Errorf("without a state the server answers %d", code)
	}
}

// failure is the request in which a host tells that a release that it was granted did not come up.
func failure(c *omaha.Client) []byte {
	return fmt.Appendf(nil, `<request protocol="3.0"><app appid="%s" version="1.0.0" track="stable" machineid="%s"><updatecheck/><event eventtype="3" eventresult="0" errorcode="44"/></app></request>`, testApp, c.MachineID)
}

// What a stop survives, and what lifts it.
func TestStop(t *testing.T) {
	restart := func(l *lab, between func()) {
		l.t.Helper()
		if err := l.Close(); err != nil {
			l.t.Fatal(err)
		}
		l.clock.Add(time.Hour)
		between()
		l.start()
	}
	publisher := func(l *lab) *Publisher { return &Publisher{Dir: l.dir, Now: l.clock.Now} }
	resume := func(l *lab) {
		l.t.Helper()
		ch, err := publisher(l).Pause("stable", false)
		if err != nil || ch.Halted() != "" {
			l.t.Fatalf("resume: %+v, %v", ch, err)
		}
		l.file("") // a running server has not seen it yet
	}
	goesOn := func(l *lab, n int) {
		l.t.Helper()
		l.clock.Add(2 * time.Second)
		l.stands("")
		if !l.fails(n) || !l.fails(n+1) {
			l.t.Error("the failures do not count from zero again")
		}
		l.wants(l.client(n+2, "1.0.0"), "", bad)
		l.stands(bad)
		l.file(bad)
	}
	t.Run("is told", func(t *testing.T) {
		l := stoppedLab(t)
		l.stands(bad)
		l.file(bad)
		text, err := os.ReadFile(filepath.Join(l.dir, "channels", "stable.toml"))
		if err != nil || strings.Contains(string(text), "stopped") {
			t.Errorf("the operator's file: %v\n%s", err, text)
		}
		entries, err := l.audits(context.Background(), 1)
		if err != nil || entries[0].Who != "server" || auditWords(entries[0]) != "stable: 1.1.0 goes no further: "+bad {
			t.Errorf("audit %+v, %v", entries, err)
		}
		ch, err := publisher(l).Change("stable", func(c *Channel) error { c.MaxConcurrent = 5; return nil })
		if err != nil || ch.Halted() != "stopped: "+bad {
			t.Errorf("a change of something else is answered with %+v, %v", ch, err)
		}
	})
	t.Run("resumed", func(t *testing.T) {
		l := stoppedLab(t)
		resume(l)
		goesOn(l, 10)
		resume(l)
		goesOn(l, 20)
	})
	t.Run("resumed while no server ran", func(t *testing.T) {
		l := stoppedLab(t)
		restart(l, func() {})
		l.stands(bad)
		l.wants(l.client(4, "1.0.0"), "", bad)
		restart(l, func() { resume(l) })
		goesOn(l, 10)
	})
	t.Run("resumed, and a failure is the first that comes", func(t *testing.T) {
		l := stoppedLab(t)
		c := l.client(5, "1.0.0")
		resume(l)
		l.clock.Add(2 * time.Second)
		l.wants(c, "1.1.0", "")
		resume(l)
		l.clock.Add(2 * time.Second)
		l.report(c, omaha.Failed(omaha.CodeRollback))
		l.stands("")
	})
	t.Run("resumed with a clock that was set back", func(t *testing.T) {
		l := stoppedLab(t)
		resume(l)
		goesOn(l, 10)
		p := publisher(l)
		p.Now = func() time.Time { return l.clock.Now().Add(-time.Hour) }
		if _, err := p.Pause("stable", false); err != nil {
			t.Fatal(err)
		}
		l.file("")
		goesOn(l, 20)
	})
	t.Run("a pause in between", func(t *testing.T) {
		l := newLab(t)
		l.publishVersion("1.1.0", 1)
		l.change(func(c *Channel) { c.StopFailures = 2 })
		l.fails(1)
		for _, pause := range []bool{true, false} {
			if _, err := publisher(l).Pause("stable", pause); err != nil {
				t.Fatal(err)
			}
			l.clock.Add(2 * time.Second)
			l.check(l.client(4, "1.0.0"))
		}
		l.fails(2) // what was only paused goes on counting
		l.wants(l.client(3, "1.0.0"), "", bad)
	})
	t.Run("published again", func(t *testing.T) {
		l := stoppedLab(t)
		if _, err := l.Publish(context.Background(), "stable", "1.1.0", fakePayload(t, 1, 300_000)); err != nil {
			t.Fatal(err)
		}
		l.clock.Add(2 * time.Second)
		l.wants(l.client(4, "1.0.0"), "", bad)
	})
	t.Run("moved away and back while no server ran", func(t *testing.T) {
		l := stoppedLab(t)
		restart(l, func() {
			p := publisher(l)
			if _, err := p.Add(context.Background(), "1.2.0", fakePayload(t, 2, 1000)); err != nil {
				t.Fatal(err)
			}
			for _, version := range []string{"1.2.0", "1.1.0"} {
				if _, err := p.Move("stable", version); err != nil {
					t.Fatal(err)
				}
			}
		})
		goesOn(l, 10)
	})
	t.Run("an older file put back", func(t *testing.T) {
		path := func(l *lab) string { return filepath.Join(l.dir, "channels", "stable.toml") }
		l := stoppedLab(t)
		if err := os.WriteFile(path(l), []byte("version = \"1.1.0\"\nstop_after_failures = 2\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		l.clock.Add(2 * time.Second)
		l.wants(l.client(4, "1.0.0"), "", bad)
		os.Remove(path(l))
		l.clock.Add(2 * time.Second)
		l.wants(l.client(4, "1.0.0"), "", "does not know")
		if err := os.WriteFile(path(l), []byte("version = \"1.1.0\"\nstop_after_failures = 2\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		l.clock.Add(2 * time.Second)
		l.wants(l.client(4, "1.0.0"), "", bad)
		resume(l)
		goesOn(l, 10)
	})
	t.Run("the state is lost", func(t *testing.T) {
		l := stoppedLab(t)
		restart(l, func() { os.Remove(filepath.Join(l.dir, "state.db")) })
		l.stands(bad)
		l.wants(l.client(4, "1.0.0"), "", bad)
		resume(l)
		goesOn(l, 10)
	})
	t.Run("by an older server", func(t *testing.T) { // which kept it in the channel's file
		l := newLab(t)
		l.publishVersion("1.1.0", 1)
		restart(l, func() {
			put(t, l.dir, map[string]map[string]string{"rollouts": {"stable": `{"version":"1.1.0","failures":{"a":true,"b":true},"stopped":true}`}})
			text := fmt.Sprintf("version = \"1.1.0\"\nstop_after_failures = 2\nstopped = %q\n", bad)
			if err := os.WriteFile(filepath.Join(l.dir, "channels", "stable.toml"), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			l.file(bad)
		})
		l.stands(bad)
		l.wants(l.client(4, "1.0.0"), "", bad)
		l.file(bad)
		resume(l)
		goesOn(l, 10)
	})
}

// A program that holds the directory's lock and does not end holds up neither the hosts nor a stop, and others that publish only for a while.
func TestLockIsHeld(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.change(func(c *Channel) { c.StopFailures = 2 })
	lock, err := os.Open(filepath.Join(l.dir, ".lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for n := range 2 {
		c := l.client(n, "1.0.0")
		if a, err := c.Check(ctx, omaha.CheckRequest{}); err != nil || a.Offer == nil {
			t.Fatalf("%+v, %v", a, err)
		}
		if err := c.Report(ctx, omaha.Failed(omaha.CodeRollback)); err != nil {
			t.Fatalf("a host cannot report that it failed: %v", err)
		}
	}
	if a, err := l.client(3, "1.0.0").Check(ctx, omaha.CheckRequest{}); err != nil || a.Offer != nil || !strings.Contains(a.Reason.Text, bad) {
		t.Fatalf("%+v, %v", a, err)
	}
	l.publish.patience = 100 * time.Millisecond
	if _, err := l.publish.Pause("stable", true); !errors.Is(err, ErrLocked) {
		t.Errorf("a change while the lock is held: %v", err)
	}
	lock.Close()
	if _, err := l.publish.Pause("stable", true); err != nil {
		t.Errorf("a change when the lock is free: %v", err)
	}
}

// The lock can be taken by those who may write to the directory, and by nobody else.
func TestLockMode(t *testing.T) {
	for dirMode, want := range map[os.FileMode][2]os.FileMode{0o755: {0o600, 0o644}, 0o700: {0o600, 0o644}, 0o775: {0o660, 0o664}} {
		dir := t.TempDir()
		if err := os.Chmod(dir, dirMode); err != nil {
			t.Fatal(err)
		}
		p := &Publisher{Dir: dir}
		unlock, err := p.lock()
		if err != nil {
			t.Fatal(err)
		}
		unlock()
		if err := p.audit("test", nil); err != nil {
			t.Fatal(err)
		}
		for i, name := range []string{".lock", "audit.jsonl"} {
			if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != want[i] {
				t.Errorf("in a directory of mode %o %s has %v, %v", dirMode, name, info.Mode(), err)
			}
		}
	}
}

// nobody is a user that owns nothing.
const nobody = 65534

// A server that runs as a user of its own, on a directory that root publishes into: it stops a bad rollout, whatever root has left there.
func TestServerIsNotThePublisher(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be two users")
	}
	for name, before := range map[string][]string{"new directory": nil, "files of root": {".lock", "audit.jsonl"}} {
		t.Run(name, func(t *testing.T) {
			top, err := os.MkdirTemp("", "flipside-server")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(top) })
			dir, program := filepath.Join(top, "releases"), filepath.Join(top, "program")
			self, err := os.ReadFile(os.Args[0])
			if err == nil {
				err = errors.Join(os.WriteFile(program, self, 0o755), os.Mkdir(dir, 0o755), os.Chmod(top, 0o755), os.Chown(dir, nobody, nobody))
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range before { // as earlier versions made them
				if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			p := &Publisher{Dir: dir}
			for i, version := range []string{"1.0.0", "1.1.0"} {
				if _, err := p.Add(t.Context(), version, fakePayload(t, byte(i), 1000)); err != nil {
					t.Fatal(err)
				}
				if _, err := p.Move("stable", version); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := p.Change("stable", func(c *Channel) error { c.StopFailures = 2; return nil }); err != nil {
				t.Fatal(err)
			}
			if before == nil {
				err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
					if err != nil {
						return err
					}
					info, err := d.Info()
					if err == nil && info.Sys().(*syscall.Stat_t).Uid != nobody {
						t.Errorf("%s belongs to root, in a directory of another user", path)
					}
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
			}

			cmd := exec.Command(program)
			cmd.Dir = "/"
			cmd.Env = append(os.Environ(), "FLIPSIDE_TEST_SERVER="+dir)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
			cmd.Stderr = os.Stderr
			out, err := cmd.StdoutPipe()
			if err == nil {
				err = cmd.Start()
			}
			if err != nil {
				t.Fatal(err)
			}
			defer func() { cmd.Process.Kill(); cmd.Wait() }()
			line, err := bufio.NewReader(out).ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			url := strings.TrimSpace(line)
			h, err := omaha.NewHTTP(omaha.HTTPOptions{Proxy: "direct"})
			if err != nil {
				t.Fatal(err)
			}
			defer h.CloseIdle()
			granted := 0
			for n := range 6 {
				c := &omaha.Client{URL: url + "/v1/update/", AppID: testApp, Version: "1.0.0", Track: "stable", MachineID: fmt.Sprintf("%032x", n), HTTP: h}
				a, err := c.Check(t.Context(), omaha.CheckRequest{})
				if err != nil {
					t.Fatal(err)
				}
				if a.Offer != nil {
					granted++
					if err := c.Report(t.Context(), omaha.Failed(10)); err != nil {
						t.Fatal(err)
					}
				}
			}
			if granted != 2 {
				t.Errorf("%d hosts were granted a release that may fail twice", granted)
			}
			if ch, err := p.Channel("stable"); err != nil || ch.Stopped != bad {
				t.Errorf("root reads %+v, %v", ch, err)
			}
			var st Status
			resp, err := http.Get(url + "/v1/status")
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if err := json.NewDecoder(resp.Body).Decode(&st); err != nil || st.Channels["stable"].Stopped != bad {
				t.Errorf("the status says %q, %v", st.Channels["stable"].Stopped, err)
			}
			said := strings.Join(st.Problems, "\n")
			log, err := os.ReadFile(filepath.Join(dir, "audit.jsonl"))
			if err != nil {
				t.Fatal(err)
			}
			if before == nil && (said != "" || !strings.Contains(string(log), `"stop"`)) {
				t.Errorf("problems %q, audit log\n%s", said, log)
			}
			if before != nil && (!strings.Contains(said, "chown") || strings.Contains(string(log), `"stop"`)) {
				t.Errorf("problems %q, audit log\n%s", said, log)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				t.Fatal(err)
			}
		})
	}
}
