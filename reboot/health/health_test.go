package health

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
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
