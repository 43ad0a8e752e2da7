package omaha

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func middle() float64 { return 0.5 } // no jitter

func TestScheduleRhythm(t *testing.T) {
	up := 10 * time.Second
	s := NewSchedule(Timing{}, up, middle)
	if got := s.Wait(up); got != 7*time.Minute {
		t.Errorf("first check after %s", got)
	}
	up += 7 * time.Minute
	if got := s.Wait(up); got != 0 {
		t.Errorf("due check waits %s", got)
	}
	s.Answered(up, Answer{})
	if got := s.Wait(up); got != 45*time.Minute {
		t.Errorf("second check after %s", got)
	}
	s.Now(up)
	if got := s.Wait(up); got != 0 {
		t.Errorf("check on demand waits %s", got)
	}
	for i, want := range []time.Duration{1, 2, 4, 8, 16, 32, 64, 128, 240, 240} {
		s.Failed(up, errors.New("no network"))
		if got := s.Wait(up); got != want*time.Minute {
			t.Errorf("failure %d: wait %s, want %s", i+1, got, want*time.Minute)
		}
	}
	s.Answered(up, Answer{})
	if s.Failures() != 0 || s.Wait(up) != 45*time.Minute {
		t.Errorf("after an answer: %d failures, wait %s", s.Failures(), s.Wait(up))
	}
}

func TestScheduleClampsTheServer(t *testing.T) {
	for wish, want := range map[time.Duration]time.Duration{
		MinPoll: 22*time.Minute + 30*time.Second, time.Hour: time.Hour, MaxPoll: MaxPoll, 1000 * time.Hour: MaxPoll,
	} {
		s := NewSchedule(Timing{}, 0, middle)
		s.Answered(0, Answer{PollInterval: wish})
		if got := s.Wait(0); got != want {
			t.Errorf("PollInterval %s: wait %s, want %s", wish, got, want)
		}
		s.Failed(0, fmt.Errorf("check: %w", &Error{RetryAfter: wish}))
		if got := s.Wait(0); got < want || got > want+5*time.Minute {
			t.Errorf("Retry-After %s: wait %s, want %s and a little", wish, got, want)
		}
	}
}

// Time asleep counts: whoever wakes behind the due time asks at once.
func TestScheduleSuspend(t *testing.T) {
	s := NewSchedule(Timing{}, 0, middle)
	s.Answered(time.Minute, Answer{})
	if got := s.Wait(9 * time.Hour); got != 0 {
		t.Errorf("after a night asleep it waits %s", got)
	}
}

// Whatever happens, the wait is neither negative nor longer than a day and the jitter.
func TestScheduleBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		up := time.Duration(rapid.Int64Range(0, 1<<50).Draw(t, "uptime"))
		timing := Timing{
			First:    time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "first")),
			Interval: time.Duration(rapid.Int64Range(0, int64(24*time.Hour)).Draw(t, "interval")),
			Retry:    time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "retry")),
		}
		s := NewSchedule(timing, up, func() float64 { return rapid.Float64Range(0, 0.999).Draw(t, "random") })
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			wish := time.Duration(rapid.Int64().Draw(t, "wish"))
			if rapid.Bool().Draw(t, "answered") {
				s.Answered(up, Answer{PollInterval: wish})
			} else {
				s.Failed(up, &Error{RetryAfter: wish})
			}
			if w := s.Wait(up); w < 0 || w > MaxPoll+6*time.Hour {
				t.Fatalf("wait %s", w)
			}
			up += s.Wait(up)
		}
	})
}

func TestFailures(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	var f Failures
	for i, want := range []time.Duration{1, 2, 4, 8, 16, 32, 64, 128, 168, 168} {
		f = f.With("1.1.0", now, "did not come\nup", VersionBackoff())
		if got := f.Remaining("1.1.0", now); got != want*time.Hour {
			t.Errorf("failure %d: %s, want %s", i+1, got, want*time.Hour)
		}
	}
	if got := f.Remaining("1.2.0", now); got != 0 {
		t.Errorf("another version waits %s", got)
	}
	if got := f.Remaining("1.1.0", now.Add(200*time.Hour)); got != 0 {
		t.Errorf("after the wait: %s", got)
	}
	if got := f.Remaining("1.1.0", now.Add(-10000*time.Hour)); got != 168*time.Hour {
		t.Errorf("with a clock that was set back: %s", got)
	}
	data, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	var back Failures
	if err := json.Unmarshal(data, &back); err != nil || !cmp.Equal(f, back) {
		t.Errorf("%s reads back as %+v, %v", data, back, err)
	}
	if e := f.Entries["1.1.0"]; e.Reason != "did not come\ufffdup" {
		t.Errorf("reason %q", e.Reason)
	}
	if g := f.Without("1.1.0"); g.Remaining("1.1.0", now) != 0 || f.Remaining("1.1.0", now) == 0 {
		t.Error("Without changed the wrong value")
	}
	for i := range 200 {
		f = f.With(fmt.Sprint(i), now.Add(time.Duration(i)*time.Minute), "x", VersionBackoff())
	}
	if len(f.Entries) != maxFailures || f.Remaining("199", now) == 0 {
		t.Errorf("%d entries", len(f.Entries))
	}
}

func TestFailuresOrder(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	f := Failures{}.With("a", now, "", AddressBackoff()).With("a", now, "", AddressBackoff()).With("b", now, "", AddressBackoff())
	if got := f.Order([]string{"a", "b", "c", "d"}, now); !cmp.Equal(got, []string{"c", "d", "b", "a"}) {
		t.Errorf("order %v", got)
	}
}
