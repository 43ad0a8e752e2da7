package reboot

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/godbus/dbus/v5/prop"
)

func TestInhibitorsGate(t *testing.T) {
	stop := startBus(t)
	f := &fakeLogin1{inhibitors: []Inhibitor{{"shutdown", "net", "says goodbye", "delay", 0, 2}}}
	f.export(t)
	if a := (Inhibitors{}).Ask(t.Context(), time.Now()); a.Verdict != Go {
		t.Errorf("a delay inhibitor: %+v, want go", a)
	}
	f.mu.Lock()
	f.inhibitors = append(f.inhibitors, Inhibitor{"shutdown", "backup", "a long job", "block", 1000, 42})
	f.mu.Unlock()
	if a := (Inhibitors{}).Ask(t.Context(), time.Now()); a.Verdict != Wait || !strings.Contains(a.Why, "backup") || strings.Contains(a.Why, "net") || a.Hint == "" || a.Evidence == "" {
		t.Errorf("a block inhibitor: %+v", a)
	}
	stop()
	if a := (Inhibitors{}).Ask(t.Context(), time.Now()); a.Verdict != Unknown {
		t.Errorf("no bus: %+v, want unknown", a)
	}
}

func TestUsersGate(t *testing.T) {
	stop := startBus(t)
	f := &fakeLogin1{}
	f.export(t)
	var told []string
	g := &Users{Grace: 10 * time.Minute, Tell: func(tty, text string) error { told = append(told, tty+" "+text); return nil }}
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	if a := g.Ask(t.Context(), now); a.Verdict != Go {
		t.Errorf("nobody is logged in: %+v", a)
	}
	f.session(t, "1", "ann", "pts/0", "user", "active")
	f.session(t, "2", "gdm", "", "greeter", "active")
	f.session(t, "3", "bob", "pts/1", "user", "closing")
	for range 2 {
		if a := g.Ask(t.Context(), now); a.Verdict != Wait || a.Why != "ann on pts/0 logged in; they have until 12:10:00" || !a.Ask.Equal(now.Add(9*time.Minute)) {
			t.Errorf("ann is logged in: %+v", a)
		}
	}
	if len(told) != 1 || !strings.Contains(told[0], "pts/0") || !strings.Contains(told[0], "12:10:00") {
		t.Errorf("told %q, want ann once", told)
	}
	for range 2 {
		if a := g.Ask(t.Context(), now.Add(9*time.Minute)); a.Verdict != Wait || !a.Ask.Equal(now.Add(10*time.Minute)) {
			t.Errorf("the last minute: %+v", a)
		}
	}
	if len(told) != 2 {
		t.Errorf("told %q, want ann again in the last minute, once", told)
	}
	if a := g.Ask(t.Context(), now.Add(10*time.Minute)); a.Verdict != Go {
		t.Errorf("after the grace: %+v", a)
	}
	f.session(t, "4", "root", "tty1", "user-early", "active")
	if a := g.Ask(t.Context(), now.Add(11*time.Minute)); a.Verdict != Go || len(told) != 3 || !strings.Contains(told[2], "tty1") {
		t.Errorf("somebody came after the time: %+v, told %q", a, told)
	}
	// Something else is against the reboot: the time begins anew.
	if err := g.Withdraw(t.Context(), "window"); err != nil {
		t.Fatal(err)
	}
	if a := g.Ask(t.Context(), now.Add(time.Hour)); a.Verdict != Wait || !strings.Contains(a.Why, "13:10:00") || len(told) != 5 {
		t.Errorf("the next day: %+v, told %q", a, told)
	}
	stop()
	if a := g.Ask(t.Context(), now); a.Verdict != Unknown {
		t.Errorf("no bus: %+v, want unknown", a)
	}
}

// session adds a session to the fake logind.
func (f *fakeLogin1) session(t *testing.T, id, user, tty, class, state string) {
	t.Helper()
	path := login1Path + dbus.ObjectPath("/session/_3"+id)
	if _, err := prop.Export(f.conn, path, prop.Map{"org.freedesktop.login1.Session": {
		"Class": {Value: class}, "State": {Value: state}, "TTY": {Value: tty},
	}}); err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sessions = append(f.sessions, fakeSession{id, 1000, user, "", path})
}

func TestFilesGate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "inhibit.d")
	ask := func() Answer { return Files{dir}.Ask(t.Context(), time.Now()) }
	if a := ask(); a.Verdict != Go {
		t.Errorf("no directory: %+v", a)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if a := ask(); a.Verdict != Go {
		t.Errorf("an empty directory: %+v", a)
	}
	for name, body := range map[string]string{"backup": "the nightly \x1b[31mbackup\nmore", "empty": "", ".swp": "x"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if a := ask(); a.Verdict != Wait || a.Why != "backup: the nightly [31mbackup; empty: no reason given" || a.Since.IsZero() {
		t.Errorf("two files: %+v", a)
	}
	if a := (Files{filepath.Join(dir, "backup")}).Ask(t.Context(), time.Now()); a.Verdict != Unknown {
		t.Errorf("not a directory: %+v", a)
	}
}

func TestCommandsGate(t *testing.T) {
	dir := t.TempDir()
	ask := func() Answer { return Commands{Dir: dir}.Ask(t.Context(), time.Now()) }
	if a := ask(); a.Verdict != Go {
		t.Errorf("no programs: %+v", a)
	}
	if err := os.WriteFile(filepath.Join(dir, "raid"), []byte("#!/bin/sh\necho the array is rebuilding\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if a := ask(); a.Verdict != Wait || !strings.HasPrefix(a.Why, "raid: the array is rebuilding") {
		t.Errorf("a program that is against it: %+v", a)
	}
	dir = filepath.Join(dir, "raid")
	if a := ask(); a.Verdict != Unknown {
		t.Errorf("a directory that cannot be read: %+v", a)
	}
}
