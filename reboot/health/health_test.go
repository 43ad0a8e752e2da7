package health

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func write(t *testing.T, dir, name, body string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+body), mode); err != nil {
		t.Fatal(err)
	}
}

func TestRun(t *testing.T) {
	for _, tt := range []struct {
		name  string
		setup func(t *testing.T, dir string)
		want  string // "" means good
	}{
		{"no checks", func(*testing.T, string) {}, ""},
		{"all good", func(t *testing.T, d string) {
			write(t, d, "10-a", "exit 0\n", 0o755)
			write(t, d, "20-b", "echo fine\n", 0o755)
		}, ""},
		{"one bad", func(t *testing.T, d string) {
			write(t, d, "10-a", "exit 0\n", 0o755)
			write(t, d, "20-web", "echo starting\necho port 80 does not answer >&2\nexit 3\n", 0o755)
		}, "health check 20-web: port 80 does not answer (exit status 3)"},
		{"silent", func(t *testing.T, d string) { write(t, d, "x", "exit 1\n", 0o755) }, "health check x: exit status 1"},
		{"too slow", func(t *testing.T, d string) { write(t, d, "x", "sleep 60\n", 0o755) }, "did not end within"},
		{"not executable", func(t *testing.T, d string) { write(t, d, "x", "exit 0\n", 0o644) }, "is not executable"},
		{"terminal codes", func(t *testing.T, d string) { write(t, d, "x", `printf '\033[31mred\n'; exit 1`, 0o755) }, "[31mred (exit status 1)"},
		{"codes of eight bits, and marks", func(t *testing.T, d string) {
			write(t, d, "x", `printf '\302\2332Jgr\303\274n \342\200\256der\342\200\250\n'; exit 1`, 0o755)
		}, "x: 2Jgrün der (exit status 1)"},
		{"hidden files are not checks", func(t *testing.T, d string) { write(t, d, ".swp", "exit 1\n", 0o644) }, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			tt.setup(t, dir)
			timeout := time.Minute
			if tt.name == "too slow" {
				timeout = 300 * time.Millisecond
			}
			err := Checks{Dir: dir, Timeout: timeout}.Run(t.Context())
			if tt.want == "" {
				if err != nil {
					t.Fatalf("error = %v, want a good boot", err)
				}
				return
			}
			var f *Failure
			if !errors.As(err, &f) || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error = %v, want a Failure with %q", err, tt.want)
			}
			if strings.ContainsRune(err.Error(), 0x1b) {
				t.Errorf("the reason %q carries terminal codes", err)
			}
		})
	}
}

// child is the process that the program of a test left in the file "child" beside itself, and whether it is there and runs.
func child(t *testing.T, dir string) (pid int, runs bool) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "child"))
	if errors.Is(err, os.ErrNotExist) {
		return 0, false
	}
	if err != nil {
		t.Fatal(err)
	}
	if pid, err = strconv.Atoi(strings.TrimSpace(string(text))); err != nil {
		t.Fatal(err)
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, state, _ := strings.Cut(string(stat), ") ")
	return pid, err == nil && !strings.HasPrefix(state, "Z") && !strings.HasPrefix(state, "X") // who has ended stays until its new parent takes note of it
}

// leaveChild is a script that starts a child, which holds the script's output, and has its number in the file "child".
const leaveChild = `d=$(dirname "$0"); sleep 600 & echo $! >"$d/.child"; mv "$d/.child" "$d/child"; `

func TestSuccessLeavesAChild(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "x", leaveChild+"echo ok; exit 0\n", 0o755)
	err := Checks{Dir: dir}.Run(t.Context())
	pid, runs := child(t, dir)
	if runs {
		defer syscall.Kill(pid, syscall.SIGKILL)
	}
	if err != nil {
		t.Errorf("error = %v, want a good boot: it exited with 0", err)
	}
	if !runs {
		t.Error("what it left behind was ended")
	}
}

func TestTimeoutEndsWhatItStarted(t *testing.T) {
	for timeout := 200 * time.Millisecond; ; timeout *= 2 {
		dir := t.TempDir()
		write(t, dir, "x", leaveChild+"wait\n", 0o755)
		err := Checks{Dir: dir, Timeout: timeout}.Run(t.Context())
		var f *Failure
		if !errors.As(err, &f) || !strings.Contains(f.Reason, "did not end within") {
			t.Fatalf("error = %v, want that it did not end", err)
		}
		pid, runs := child(t, dir)
		if pid == 0 {
			continue // its time was over before it had come so far
		}
		for range 1000 { // it has been sent its signal, and ends when it gets to it
			if !runs {
				return
			}
			time.Sleep(10 * time.Millisecond)
			_, runs = child(t, dir)
		}
		syscall.Kill(pid, syscall.SIGKILL)
		t.Fatal("what it started goes on after its time")
	}
}

func TestSoakRunsTheChecksAgain(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "x", `d=$(dirname "$0"); [ -e "$d/.seen" ] && { echo went bad; exit 1; }; touch "$d/.seen"`, 0o755)
	err := Checks{Dir: dir, Soak: time.Millisecond}.Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "went bad") {
		t.Errorf("error = %v, want the failure of the second round", err)
	}
}

func TestDirectoryThatCannotBeReadIsNotGood(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := (Checks{Dir: file}).Run(context.Background()); err == nil {
		t.Error("a directory that cannot be read was taken for a good boot")
	}
}
