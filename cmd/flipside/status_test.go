package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/control"
)

// stand is a daemon that always says the same, but for the time of its last check.
type stand struct {
	st      updater.Status
	changed chan struct{}
	plan    updater.Plan
	refuse  error
}

func (s *stand) Status(context.Context) (updater.Status, <-chan struct{}) { return s.st, s.changed }

func (s *stand) Do(_ context.Context, _ string, c control.Command) error {
	if c.Action == control.Check {
		s.st.LastCheck = time.Now()
	}
	return s.refuse
}

func (s *stand) Plan(context.Context, string) (updater.Plan, error) { return s.plan, s.refuse }

// ask runs one command line against a daemon with this status.
func ask(t *testing.T, st updater.Status, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "control.sock")
	l, err := control.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- control.Serve(ctx, l, &stand{st: st, changed: make(chan struct{})}, slog.New(slog.DiscardHandler))
	}()
	defer func() { cancel(); <-done }()
	var out, errs bytes.Buffer
	a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}
	code = a.run(t.Context(), append([]string{"--socket", path}, args...))
	return code, out.String(), errs.String()
}

func TestStatusAndItsExitCodes(t *testing.T) {
	now := time.Now()
	idle := updater.Status{Schema: "flipside.status/v1", Version: "1.0.0", Slot: "USR-A", Phase: updater.Idle, Why: "up to date", LastCheck: now, NextCheck: now.Add(time.Hour), LastAnswer: "up to date"}
	armed := idle
	armed.Phase, armed.Why, armed.Stage = updater.Armed, "release 2.0.0 waits: outside the window", updater.BeforeReboot
	armed.Gates = []reboot.Answer{{Gate: "window", Verdict: reboot.Wait, Why: "outside the window", Hint: "set reboot.window_start"}}
	armed.Slots = []updater.SlotStatus{{Label: "USR-A", Priority: 1, Successful: true, Running: true}, {Label: "USR-B", Priority: 2, Tries: 1, Next: true}}
	failed := idle
	failed.LastError, failed.ErrorAt, failed.Why = "connection refused", now.Add(time.Hour), "connection refused"
	blocked := idle
	blocked.Blocked, blocked.Why = true, "updates are paused"

	for _, tt := range []struct {
		name string
		st   updater.Status
		args []string
		code int
		want []string
	}{
		{"idle", idle, []string{"status"}, exitOK, []string{"1.0.0 on USR-A, idle\nup to date\n"}},
		{"armed", armed, []string{"status"}, exitReboot, []string{"USR-B  2         1      no", "boots next", "window     wait      outside the window", "-> set reboot.window_start"}},
		{"json", idle, []string{"--json", "status"}, exitOK, []string{`"schema": "flipside.status/v1"`, `"why": "up to date"`}},
		{"failed", failed, []string{"status"}, exitOK, []string{": failed\n", "last error"}},
		{"check: nothing", idle, []string{"check"}, exitNothing, []string{"up to date"}},
		{"check: armed", armed, []string{"check"}, exitReboot, nil},
		{"check: failed", failed, []string{"check"}, exitFailed, []string{"connection refused"}},
		{"check: blocked", blocked, []string{"update"}, exitBlocked, []string{"updates are paused"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, out, errs := ask(t, tt.st, tt.args...)
			if code != tt.code {
				t.Errorf("exit status %d, want %d; stderr %q", code, tt.code, errs)
			}
			for _, w := range tt.want {
				if !strings.Contains(out, w) {
					t.Errorf("no %q in\n%s", w, out)
				}
			}
		})
	}
}

// What a daemon took and did not answer, because it was killed, is not said to be done.
func TestNoAnswerIsNoSuccess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			bufio.NewReader(c).ReadString('\n')
			c.Close()
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for _, line := range []string{
		"status", "--json status", "why", "watch", "plan", "check", "update", "pause", "resume", "pin 1.0.0", "unpin", "channel set beta", "cancel -y", "rollback -y",
		"reboot", "--json reboot --now -y", "config reload",
	} {
		var out, errs bytes.Buffer
		a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}
		code := a.run(ctx, append([]string{"--socket", path}, strings.Fields(line)...))
		if code != exitFailed || out.Len() > 0 || !strings.Contains(errs.String(), "flipsided ended before it answered") {
			t.Errorf("flipside %s ended with %d and printed\n%s%s", line, code, &out, &errs)
		}
	}
}

// An update that the daemon did not live to finish is not one that went on.
func TestUpdateWhoseDaemonEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "control.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			bufio.NewReader(c).ReadString('\n')
			json.NewEncoder(c).Encode(control.Reply{Status: &updater.Status{
				Phase: updater.Applying, LastCheck: time.Now(), NextCheck: time.Now().Add(time.Hour), Update: &updater.UpdateStatus{Version: "2.0.0"}}})
			c.Close()
		}
	}()
	var out, errs bytes.Buffer
	a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}
	if code := a.run(t.Context(), []string{"--socket", path, "update"}); code != exitFailed || !strings.Contains(errs.String(), "ended before the release was in place") {
		t.Errorf("it ended with %d and printed\n%s%s", code, &out, &errs)
	}
}

func TestUsageErrors(t *testing.T) {
	for _, args := range [][]string{{"status", "extra"}, {"--nonsense"}, {"nonsense"}, {"payload", "info"}} {
		var out, errs bytes.Buffer
		a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}
		if code := a.run(t.Context(), args); code != exitUsage {
			t.Errorf("%q: exit status %d, want %d: %s", args, code, exitUsage, errs.String())
		}
	}
}

// On a terminal no line is longer than it is wide, and what gates say stands in columns, however long their names are.
func TestStatusFitsTheTerminal(t *testing.T) {
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	st := updater.Status{
		Version: "2.0.0", Slot: "USR-A", Phase: updater.Armed, Stage: updater.BeforeReboot, Blocked: true, Channel: "stable",
		Why:       "release 2.1.0 waits for its reboot: outside the reboot window; the next opens Thu 2026-11-26 04:00:00 UTC",
		LastCheck: now.Add(-20 * time.Minute), LastAnswer: "release 2.1.0 is offered", NextCheck: now.Add(25 * time.Minute),
		Warnings:  []string{"trust.proof cannot work here: the TPM has no SHA-256 bank of PCRs; the firmware's settings switch it on, or tpm2_pcrallocate sha256:all and a restart"},
		LastError: `checking for an update: Post "https://updates.example.org/v1/update/": dial tcp: lookup updates.example.org on 127.0.0.53:53: server misbehaving`,
		ErrorAt:   now.Add(-3 * time.Hour),
		Quarantine: map[string]updater.Failure{"2.0.9": {
			Reason: `health check "port-80" failed: connection refused, three times in a row after the boot`, Last: now.Add(-30 * time.Hour), Until: now.Add(10 * time.Hour)}},
		Slots: []updater.SlotStatus{{Label: "USR-A", Size: 1 << 30, Priority: 1, Successful: true, Running: true}, {Label: "USR-B", Size: 1 << 30, Priority: 2, Tries: 1, Next: true}},
		Gates: []reboot.Answer{
			{Gate: "pause", Verdict: reboot.Go},
			{Gate: "window", Verdict: reboot.Wait, Why: "outside the reboot window; the next opens Thu 2026-11-26 04:00:00 UTC", Since: now.Add(-26 * time.Hour), Ask: now.Add(30 * time.Hour),
				Hint: "flipside reboot --now, or change the window (reboot.window_start)", Evidence: "reboot.windows: flipside config show"},
			{Gate: "inhibit files", Verdict: reboot.Wait, Why: "backup: a backup runs", Since: now.Add(-time.Minute), Hint: "rm /run/flipside/inhibit/backup", Evidence: "the files in /run/flipside/inhibit"},
		},
	}
	for _, width := range []int{80, 120} {
		var out strings.Builder
		printStatus(&out, pen{width: width}, st, now)
		var columns []int
		for line := range strings.Lines(out.String()) {
			line = strings.TrimRight(line, "\n")
			if n := utf8.RuneCountInString(line); n > width {
				t.Errorf("%d columns: a line of %d: %s", width, n, line)
			}
			for _, g := range st.Gates {
				if rest, ok := strings.CutPrefix(line, "  "+g.Gate+" "); ok {
					columns = append(columns, len(line)-len(strings.TrimLeft(rest, " ")))
				}
			}
		}
		if len(columns) != len(st.Gates) || columns[0] != columns[1] || columns[0] != columns[2] {
			t.Errorf("%d columns: the gates' words begin in columns %v:\n%s", width, columns, &out)
		}
	}
}
