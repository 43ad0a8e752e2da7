package host

import (
	"fmt"
	"sync"
	"testing"

	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
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

// A host that is paused says so, whatever became of its last check.
func TestPausedIsSaidBeforeAnError(t *testing.T) {
	paused := reboot.Answer{Gate: "pause", Verdict: reboot.Wait, Why: "updates are paused on this host"}
	for _, gates := range [][]reboot.Answer{nil, {paused}} {
		st := updater.Status{Phase: updater.Idle, Gates: gates, LastError: "checking for an update: no route to host", Why: "checking for an update: no route to host"}
		if got := sayPaused(st, paused); got.Why != paused.Why || len(got.Gates) != 1 || got.LastError != st.LastError {
			t.Errorf("%d gates asked before: %+v, want that it is paused", len(gates), got)
		}
		if got := sayPaused(st, reboot.Answer{Gate: "pause", Verdict: reboot.Go}); got.Why != st.Why {
			t.Errorf("not paused: it says %q, want the error", got.Why)
		}
	}
}

func TestManagerIsToldOnePrintableLine(t *testing.T) {
	if got := oneLine(updater.Status{Phase: updater.Idle, Why: "a\nb\u009bc\u202e"}); got != "idle: a b c " {
		t.Errorf("the manager is told %q", got)
	}
}
