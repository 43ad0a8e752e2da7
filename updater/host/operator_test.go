package host

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/flipside-linux/flipside/updater/config"
)

// Two people who choose at the same moment, one the channel and one the pin, both get what they chose.
func TestChoicesAtTheSameTime(t *testing.T) {
	c := config.Default()
	c.Paths.State = t.TempDir()
	d := &operator{conf: c, target: &target{}}
	for n := range 20 {
		value := fmt.Sprint(n)
		var wg sync.WaitGroup
		for _, field := range []func(*config.Choices) **string{
			func(ch *config.Choices) **string { return &ch.Channel },
			func(ch *config.Choices) **string { return &ch.Pin },
		} {
			wg.Go(func() {
				if err := d.decide(value, field); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		got, err := config.ReadChoices(c.Paths.State)
		if err != nil {
			t.Fatal(err)
		}
		if deref(got.Channel) != value || deref(got.Pin) != value {
			t.Fatalf("round %d: channel %q, pin %q", n, deref(got.Channel), deref(got.Pin))
		}
	}
}

// A program for the next boot's secrets that leaves something running has not failed.
func TestUnlockLeavesSomethingBehind(t *testing.T) {
	c := config.Default()
	c.Trust.Unlock = script(t, "sleep 3 &\nexit 0\n")
	g := &guard{conf: c}
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
