package reboot

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// says is a gate that answers what it is told to.
type says struct {
	name   string
	answer func(ctx context.Context) Answer
	last   string // why it was withdrawn
}

func (s *says) Name() string                                    { return s.name }
func (s *says) Ask(ctx context.Context, _ time.Time) Answer     { return s.answer(ctx) }
func (s *says) Withdraw(_ context.Context, reason string) error { s.last = reason; return nil }
func always(v Verdict, why string) func(context.Context) Answer {
	return func(context.Context) Answer { return Answer{Verdict: v, Why: why} }
}

func TestPanelRemembersSince(t *testing.T) {
	g := &says{name: "g", answer: always(Unknown, "away")}
	users := &says{name: "users", answer: always(Go, "")}
	p := &Panel{Gates: []Gate{g}, Last: []Gate{users}}
	begin := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for i, tt := range []struct {
		answer func(context.Context) Answer
		since  time.Duration
	}{
		{always(Unknown, "away"), 0},
		{always(Unknown, "still away"), 0},
		{always(Wait, "no"), 2 * time.Minute},
		{always(Wait, "no, for another reason"), 2 * time.Minute},
		{always(Go, ""), -1},
		{always(Wait, "no"), 5 * time.Minute},
	} {
		g.answer = tt.answer
		a := p.Ask(t.Context(), begin.Add(time.Duration(i)*time.Minute))
		if tt.since < 0 {
			if len(a) != 2 || a[1].Gate != "users" {
				t.Errorf("%d: %+v, want the last gate to be asked", i, a)
			}
			continue
		}
		if len(a) != 1 || !a[0].Since.Equal(begin.Add(tt.since)) {
			t.Errorf("%d: %+v, want since %s", i, a, tt.since)
		}
	}
	if !strings.HasPrefix(users.last, "g: ") {
		t.Errorf("the last gate was withdrawn with %q", users.last)
	}
}

// A gate that hangs is unknown after its time, is not asked again while it hangs, and is when it has answered.
func TestPanelBoundsAGate(t *testing.T) {
	release := make(chan struct{})
	var asked atomic.Int64
	g := &says{name: "nfs", answer: func(context.Context) Answer {
		if asked.Add(1) == 1 {
			<-release
		}
		return Answer{Verdict: Go}
	}}
	p := &Panel{Gates: []Gate{g}, Limit: time.Millisecond}
	now := time.Now()
	if a := p.Ask(t.Context(), now); a[0].Verdict != Unknown || !strings.Contains(a[0].Why, "has not answered within") {
		t.Errorf("it hangs: %+v", a)
	}
	if a := p.Ask(t.Context(), now.Add(time.Hour)); a[0].Verdict != Unknown || !strings.Contains(a[0].Why, "1h0m ago") || asked.Load() != 1 {
		t.Errorf("it still hangs: %+v, asked %d times", a, asked.Load())
	}
	close(release)
	p.Limit = time.Minute
	for deadline := time.Now().Add(2 * time.Minute); p.Ask(t.Context(), now)[0].Verdict != Go; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it is never asked again")
		}
	}
}

// A gate that heeds its context says itself that it was cut off.
func TestPanelCutsOff(t *testing.T) {
	g := &says{name: "slow", answer: func(ctx context.Context) Answer {
		<-ctx.Done()
		return Answer{Verdict: Unknown, Why: "cut off"}
	}}
	p := &Panel{Gates: []Gate{g}, Limit: time.Millisecond}
	if a := p.Ask(t.Context(), time.Now()); a[0].Verdict != Unknown {
		t.Errorf("%+v", a)
	}
}
