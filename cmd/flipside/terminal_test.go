package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/lock"
)

// onTerminal gives f a terminal of so many columns to write to, and returns what arrived there.
func onTerminal(t *testing.T, columns int, f func(*os.File)) string {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals here: %v", err)
	}
	defer master.Close()
	fd := int(master.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: uint16(columns)})
	}
	if err != nil {
		t.Skipf("no pseudo-terminals here: %v", err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals here: %v", err)
	}
	got := make(chan string)
	go func() {
		b, _ := io.ReadAll(master) // until the other side is closed
		got <- string(b)
	}()
	f(slave)
	slave.Close()
	return <-got
}

var colours = regexp.MustCompile("\x1b\\[[0-9;]*m")

// What a host says that it updates to stands in a command that an operator may copy.
func TestHaltedVersionIsOneWord(t *testing.T) {
	var out bytes.Buffer
	a := &app{stdout: &out}
	st := lock.State{Policy: lock.Policy{Max: 1}, Halts: map[string]lock.Halt{"": {}, "1.2.0": {}, "1;sh<x": {}, "--all": {}}}
	if err := a.groupScreen("web", st, time.Now()).print(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{" --all\n", " 1.2.0\n", " '1;sh<x'\n", " -- '--all'\n"} {
		if !strings.Contains(out.String(), "fleet resume --group web"+want) {
			t.Errorf("there is no hint with%q in\n%s", want, out.String())
		}
	}
}

// On a narrow terminal nothing is cut and nothing is longer than a line: lines are broken, and cells go on in their column.
func TestNarrowTerminal(t *testing.T) {
	t.Setenv("NO_COLOR", "")
	t.Setenv("TERM", "xterm-256color")
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	why := `windows [{"days":["Tue"],"start":"04:00","length":"2h0m0s"}] to [{"days":["Thu"],"start":"05:00","length":"1h0m0s"}], ` + strings.Repeat("blackouts unset to some, ", 8) + "the-last-word"
	st := lock.State{Policy: lock.Policy{Max: 1, RebootTime: lock.Duration(2 * time.Minute)}, Halts: map[string]lock.Halt{"4230.2.1": {Since: now.Add(-time.Hour), Reason: why}}}
	st.Holders = []lock.Holder{{Host: "host-0-d690773a", From: "4230.2.1", To: "4230.2.2", Reason: "because", Phase: lock.Rebooting, Token: 123456, Granted: now, Rebooting: now}}
	for i := range 3 {
		claim := lock.Claim{Host: fmt.Sprintf("host-%d-d690773a", i+1), From: "4230.2.1", To: "4230.2.2", Zone: "r1"}
		st.Queue = append(st.Queue, lock.Waiter{Claim: claim, Since: now, Arrival: int64(i)})
	}
	for _, width := range []int{60, 80, 200} {
		out := onTerminal(t, width, func(f *os.File) {
			a := &app{stdout: f}
			history := a.sheet()
			a.entryTable(history, []lock.Entry{{Time: now, What: "policy", By: "somebody on a-machine", Why: why}, {Time: now, What: "granted", Host: "host-0-d690773a", From: "4230.2.1", Version: "4230.2.2"}})
			for _, s := range []*sheet{history, a.groupScreen("web", st, now), a.planScreen("web", st, false, now)} {
				if err := s.print(f); err != nil {
					t.Error(err)
				}
			}
		})
		for line := range strings.Lines(colours.ReplaceAllString(out, "")) {
			if line = strings.TrimRight(line, "\r\n"); utf8.RuneCountInString(line) > width {
				t.Errorf("at %d, a line of %d columns: %s", width, utf8.RuneCountInString(line), line)
			}
		}
		if !strings.Contains(out, "the-last-word") || !strings.Contains(strings.Join(strings.Fields(colours.ReplaceAllString(out, "")), " "), "somebody on a-machine") || !strings.Contains(out, "123456") || !strings.Contains(out, "because") {
			t.Errorf("at %d, something was cut:\n%s", width, out)
		}
		t.Logf("\n%s", out)
	}
}

// What a group's commands draw fits a terminal of 80 columns with hosts as they are called by default, and obeys NO_COLOR and TERM=dumb.
func TestGroupFitsTheTerminal(t *testing.T) {
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	claim := func(i int) lock.Claim {
		return lock.Claim{Host: fmt.Sprintf("host-%d-d690773a", i), From: "4230.2.1", To: "4230.2.2", Reason: "update from 4230.2.1 to 4230.2.2"}
	}
	st := lock.State{Policy: lock.Policy{Max: 1, RebootTime: lock.Duration(2 * time.Minute)}}
	h := claim(0)
	st.Holders = []lock.Holder{{Host: h.Host, From: h.From, To: h.To, Reason: h.Reason, Phase: lock.Rebooting, Token: 123456, Granted: now.Add(-time.Minute), Rebooting: now.Add(-time.Minute)}}
	for i := 1; i <= 12; i++ {
		st.Queue = append(st.Queue, lock.Waiter{Claim: claim(i), Since: now.Add(-time.Minute), Arrival: int64(i)})
	}
	draw := func() string {
		return onTerminal(t, 80, func(f *os.File) {
			a := &app{stdout: f}
			for _, s := range []*sheet{a.groupScreen("web", st, now), a.planScreen("web", st, false, now)} {
				if err := s.print(f); err != nil {
					t.Error(err)
				}
			}
		})
	}
	t.Setenv("NO_COLOR", "")
	t.Setenv("TERM", "xterm-256color")
	out := draw()
	if !colours.MatchString(out) {
		t.Error("it has no colours")
	}
	for line := range strings.Lines(colours.ReplaceAllString(out, "")) {
		if line = strings.TrimRight(line, "\r\n"); utf8.RuneCountInString(line) > 80 {
			t.Errorf("a line of %d columns: %s", utf8.RuneCountInString(line), line)
		}
	}
	for _, env := range [][2]string{{"NO_COLOR", "1"}, {"TERM", "dumb"}} {
		t.Run(env[0], func(t *testing.T) {
			t.Setenv(env[0], env[1])
			if out := draw(); colours.MatchString(out) {
				t.Errorf("%s=%s, and it has colours: %q", env[0], env[1], out)
			}
		})
	}
	t.Logf("\n%s", out)
}

// A table without rows has an end, also where its titles do not fit.
func TestEmptyTable(t *testing.T) {
	s := &sheet{pen: pen{width: 40}}
	s.table([]string{"HOST", "VERSION", "CHANNEL", "STATE", "LAST SEEN", "WHY"}, nil)
}
