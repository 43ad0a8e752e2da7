package reboot

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
)

type fixed struct {
	name      string
	answer    Answer
	asked     *[]string
	withdrawn *[]string
}

func (f fixed) Name() string { return f.name }

func (f fixed) Ask(context.Context, time.Time) Answer {
	*f.asked = append(*f.asked, f.name)
	return f.answer
}

func (f fixed) Withdraw(_ context.Context, reason string) error {
	*f.withdrawn = append(*f.withdrawn, reason)
	return nil
}

func TestAsk(t *testing.T) {
	for _, tt := range []struct {
		name                string
		a, b                Answer
		asked, withdrawn    []string
		verdicts            []Verdict
		first, firstVerdict string
	}{
		{name: "all go", a: Answer{Verdict: Go}, b: Answer{Verdict: Go}, asked: []string{"a", "b", "last"}, verdicts: []Verdict{Go, Go, Go}},
		{name: "one waits: the others are still asked, the last is not", a: Answer{Verdict: Wait, Why: "no"}, b: Answer{Verdict: Go},
			asked: []string{"a", "b"}, withdrawn: []string{"a: no"}, verdicts: []Verdict{Wait, Go}, first: "a"},
		{name: "unknown is not go", a: Answer{Verdict: Go}, b: Answer{Verdict: Unknown, Why: "?"},
			asked: []string{"a", "b"}, withdrawn: []string{"b: ?"}, verdicts: []Verdict{Go, Unknown}, first: "b"},
		{name: "an empty answer is not go", a: Answer{}, b: Answer{Verdict: Go},
			asked: []string{"a", "b"}, withdrawn: []string{"a: it does not say why"}, verdicts: []Verdict{Unknown, Go}, first: "a"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var asked, withdrawn []string
			g := func(name string, a Answer) Gate { return fixed{name, a, &asked, &withdrawn} }
			answers := Ask(t.Context(), time.Now(), []Gate{g("a", tt.a), g("b", tt.b)}, g("last", Answer{Verdict: Go}))
			var verdicts []Verdict
			for _, a := range answers {
				verdicts = append(verdicts, a.Verdict)
			}
			if !slices.Equal(asked, tt.asked) || !slices.Equal(withdrawn, tt.withdrawn) || !slices.Equal(verdicts, tt.verdicts) {
				t.Errorf("asked %v, withdrawn %q, verdicts %v", asked, withdrawn, verdicts)
			}
			if a, stop := First(answers); stop != (tt.first != "") || a.Gate != tt.first {
				t.Errorf("First = %+v, %v", a, stop)
			}
		})
	}
}

// The JSON of an answer is part of the interface of flipside status.
func TestAnswerJSON(t *testing.T) {
	at := time.Date(2026, 11, 23, 4, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		a    Answer
		want string
	}{
		{Answer{Gate: "window", Verdict: Go}, `{"gate":"window","verdict":"go"}`},
		{Answer{"window", Wait, "closed", at, at, "wait", "reboot.window_start"}, `{"gate":"window","verdict":"wait","why":"closed","ask":"2026-11-23T04:00:00Z","since":"2026-11-23T04:00:00Z","hint":"wait","evidence":"reboot.window_start"}`},
	} {
		if got, err := json.Marshal(tt.a); err != nil || string(got) != tt.want {
			t.Errorf("%s, %v, want %s", got, err, tt.want)
		}
	}
}

func TestWindowGate(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC) // a Monday
	always, err := ParseWindow("", "", "")
	if err != nil {
		t.Fatal(err)
	}
	if a := always.Ask(t.Context(), now); a.Verdict != Go {
		t.Errorf("the zero window: %+v", a)
	}
	w, err := ParseWindow("Thu 04:00", "1h30m", "UTC")
	if err != nil {
		t.Fatal(err)
	}
	opens := time.Date(2026, 11, 26, 4, 0, 0, 0, time.UTC)
	if a := w.Ask(t.Context(), now); a.Verdict != Wait || !a.Ask.Equal(opens) || !strings.Contains(a.Why, "Thu 2026-11-26 04:00:00 UTC") {
		t.Errorf("closed: %+v", a)
	}
	if a := w.Ask(t.Context(), opens); a.Verdict != Go {
		t.Errorf("open: %+v", a)
	}
	w.Need = 10 * time.Minute
	if a := w.Ask(t.Context(), opens.Add(85*time.Minute)); a.Verdict != Wait {
		t.Errorf("a reboot does not fit any more: %+v", a)
	}
	for _, bad := range [][2]string{{"Thu 04:00", ""}, {"", "1h"}, {"2:30pm", "1h"}} {
		if _, err := ParseWindow(bad[0], bad[1], ""); err == nil {
			t.Errorf("ParseWindow(%q, %q) was taken", bad[0], bad[1])
		}
	}
}

func TestSemaphoreGate(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	k := lock.On(lock.NewMemory(), lock.Options{Now: func() time.Time { return now }})
	gate := func(host string) *Semaphore {
		return &Semaphore{Lock: k, Claim: lock.Claim{Group: "web", Host: host, From: "1", To: "2"}}
	}
	if a := gate("a").Ask(t.Context(), now); a.Verdict != Go {
		t.Fatalf("a: %+v", a)
	}
	now = now.Add(90 * time.Second)
	if a := gate("b").Ask(t.Context(), now); a.Verdict != Wait || a.Why != "position 1 in the queue of group web; 1 of 1 slots held by a (granted for 1m30s)" {
		t.Errorf("b: %+v", a)
	}
	if a := gate("c").Ask(t.Context(), now); !strings.HasPrefix(a.Why, "position 2 ") {
		t.Errorf("c: %+v", a)
	}
	// Another gate is against it: the place in the queue is given back, a slot that is in use is not.
	if err := k.Mark(t.Context(), "web", "a", lock.Mark{Phase: lock.Rebooting}); err != nil {
		t.Fatal(err)
	}
	for _, h := range []string{"a", "b"} {
		if err := gate(h).Withdraw(t.Context(), "window"); err != nil {
			t.Fatal(err)
		}
	}
	s, err := k.State(t.Context(), "web")
	if err != nil || len(s.Holders) != 1 || len(s.Queue) != 1 {
		t.Errorf("after withdrawing: %+v, %v", s, err)
	}
	if err := k.Release(t.Context(), "web", "a", lock.Verdict{Outcome: lock.Failed, Reason: "port 80 does not answer"}); err != nil {
		t.Fatal(err)
	}
	c := gate("c")
	if a := c.Ask(t.Context(), now); a.Verdict != Wait || !strings.Contains(a.Why, "halted") || !strings.Contains(a.Hint, "flipside fleet resume --group web 2") || !strings.Contains(c.Halted(), "port 80") {
		t.Errorf("halted: %+v, %q", a, c.Halted())
	}
}

// The hint about a host that stays away is a command, and what the host calls itself is one word of it.
func TestHintNamesOneHost(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	k := lock.On(lock.NewMemory(), lock.Options{Now: func() time.Time { return now }})
	gate := func(host string) *Semaphore {
		return &Semaphore{Lock: k, Claim: lock.Claim{Group: "web", Host: host, From: "1", To: host[:1]}}
	}
	if a := gate("a;sh<x").Ask(t.Context(), now); a.Verdict != Go {
		t.Fatalf("a: %+v", a)
	}
	if err := k.Mark(t.Context(), "web", "a;sh<x", lock.Mark{Phase: lock.Rebooting}); err != nil {
		t.Fatal(err)
	}
	now = now.Add(24 * time.Hour)
	if a := gate("b").Ask(t.Context(), now); !strings.HasSuffix(a.Hint, "flipside fleet force-release --group web 'a;sh<x'") {
		t.Errorf("b: %+v", a)
	}
}

type awayStore struct{ lock.Store }

func (awayStore) Read(context.Context, string, string, int) (lock.View, error) {
	return lock.View{}, lock.ErrUnavailable
}

// Nobody reboots when the store cannot be asked.
func TestSemaphoreGateIsUnknownWhenTheStoreIsAway(t *testing.T) {
	g := &Semaphore{Lock: lock.On(awayStore{}, lock.Options{}), Claim: lock.Claim{Group: "web", Host: "a"}}
	if a := g.Ask(t.Context(), time.Now()); a.Verdict != Unknown || a.Why == "" || a.Hint == "" {
		t.Errorf("answer %+v, want unknown", a)
	}
}

func TestExit(t *testing.T) {
	var e *ExitError
	if err := (Exit{}).Reboot(t.Context(), "test"); !errors.As(err, &e) || e.Status != 133 {
		t.Errorf("Reboot = %v", err)
	}
}
