package updater

import (
	"errors"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/omaha"
)

// A machine that sleeps over a check makes it when it wakes up; small differences of the clocks are no sleep.
func TestSuspend(t *testing.T) {
	up, now := time.Hour, time.Now()
	w := sleepwatch{uptime: func() (time.Duration, error) { return up, nil }}
	pass := func(awake, asleep time.Duration) time.Duration {
		up, now = up+awake+asleep, now.Add(awake)
		return w.look(now)
	}
	if d := w.look(now); d != 0 {
		t.Errorf("the first look: %s", d)
	}
	for i, tc := range []struct{ awake, asleep, want time.Duration }{
		{time.Minute, 0, 0}, {time.Minute, time.Second, 0}, {time.Minute, 8 * time.Hour, 8*time.Hour + time.Second}, {time.Minute, 0, 0}, {0, 10 * time.Second, 10 * time.Second},
	} {
		if got := pass(tc.awake, tc.asleep); got != tc.want {
			t.Errorf("step %d: %s, want %s", i, got, tc.want)
		}
	}
	w.uptime = func() (time.Duration, error) { return 0, errors.New("no such clock") }
	if d := w.look(now.Add(time.Hour)); d != 0 {
		t.Errorf("without the clock: %s", d)
	}

	c := &Core{Timing: Timing{FirstCheck: 7 * time.Minute, Interval: 45 * time.Minute, MinRetry: time.Minute}}
	c.Step(now, Start{Facts{BootID: "b", Running: "USR-A", Other: "USR-B", Version: "1.0.0", Slots: map[string]SlotFacts{"USR-A": {Successful: true}}}})
	c.Slept(8 * time.Hour)
	if next := c.NextCheck(); next.After(now) {
		t.Errorf("after a suspend the check is due in %s", next.Sub(now))
	}
}

// However long a server asks a host to wait, the host asks at least once a day, and no more often than every half interval.
func TestServersWish(t *testing.T) {
	now := time.Now()
	timing := Timing{FirstCheck: time.Minute, Interval: 40 * time.Minute, MinRetry: time.Minute, Jitter: 0.1}
	start := func(random func() float64) *Core {
		c := &Core{Timing: timing, Rand: random}
		c.Step(now, Start{Facts{BootID: "b", Running: "USR-A", Other: "USR-B", Version: "1.0.0", Slots: map[string]SlotFacts{"USR-A": {Successful: true}}}})
		c.Step(now, CheckNow{})
		return c
	}
	for _, tc := range []struct{ wish, least, most time.Duration }{
		{0, 36 * time.Minute, 44 * time.Minute},
		{time.Minute, 18 * time.Minute, 22 * time.Minute},
		{2 * time.Hour, 108 * time.Minute, 132 * time.Minute},
		{omaha.MaxPoll, 21 * time.Hour, 27 * time.Hour},
		{1000 * time.Hour, 21 * time.Hour, 27 * time.Hour},
	} {
		for _, r := range []float64{0, 0.5, 0.999} {
			c := start(func() float64 { return r })
			c.Step(now, Answered{Reason: "nothing newer", Retry: tc.wish})
			if d := c.NextCheck().Sub(now); d < tc.least || d > tc.most {
				t.Errorf("PollInterval %s: the next check is in %s", tc.wish, d)
			}
			c = start(func() float64 { return r })
			c.Step(now, Answered{Err: errors.New("503"), Retry: tc.wish})
			if d := c.NextCheck().Sub(now); tc.wish > 0 && (d < min(tc.wish, omaha.MaxPoll) || d > tc.most) {
				t.Errorf("Retry-After %s: the next check is in %s", tc.wish, d)
			}
		}
	}
}
