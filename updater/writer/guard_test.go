package writer

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/flipside-linux/flipside/updater/config"
)

// A program for the next boot's secrets that leaves something running has not failed.
func TestUnlockLeavesSomethingBehind(t *testing.T) {
	c := config.Default()
	c.Trust.Unlock = script(t, "sleep 3 &\nexit 0\n")
	g := &Guard{conf: c}
	if err := g.secrets(t.Context(), "arm", "USR-B"); err != nil {
		t.Error(err)
	}
	g.conf.Trust.Unlock = script(t, "sleep 3 &\nexit 1\n")
	if err := g.secrets(t.Context(), "arm", "USR-B"); err == nil {
		t.Error("a program that fails let a slot be armed")
	}
}

func script(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}
