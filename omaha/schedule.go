package omaha

import (
	"errors"
	"math/rand/v2"
	"time"
)

// Timing says how often a host asks. Zero fields take the defaults of [DefaultTiming].
type Timing struct {
	First       time.Duration // from the start to the first check
	FirstJitter time.Duration // up to this much earlier or later
	Interval    time.Duration // between checks that were answered
	Jitter      time.Duration // up to this much earlier or later
	Retry       time.Duration // after the first check in a row that failed; doubles with each
	RetryMax    time.Duration // the longest such wait
}

// DefaultTiming is the rhythm that the fleets of update_engine have: 7 minutes after boot, then every 45. Only a check
// that failed is repeated sooner, because a host whose network came up late should not wait three quarters of an hour.
func DefaultTiming() Timing {
	return Timing{
		First: 7 * time.Minute, FirstJitter: 5 * time.Minute, Interval: 45 * time.Minute, Jitter: 5 * time.Minute,
		Retry: time.Minute, RetryMax: 4 * time.Hour,
	}
}

func (t Timing) orDefault() Timing {
	d := DefaultTiming()
	t.First = orDuration(t.First, d.First)
	t.Interval = orDuration(t.Interval, d.Interval)
	t.Retry = orDuration(t.Retry, d.Retry)
	t.RetryMax = max(orDuration(t.RetryMax, d.RetryMax), t.Retry)
	if t.FirstJitter == 0 {
		t.FirstJitter = min(d.FirstJitter, t.First/2)
	}
	if t.Jitter == 0 {
		t.Jitter = min(d.Jitter, t.Interval/4)
	}
	return t
}

// Schedule says when the next check is due. It has no clock: each call is given the time since boot, counted through
// suspend (CLOCK_BOOTTIME). Nobody sets that clock, so a step of the wall clock moves no check, and a laptop that slept
// over a check is late at once. A Schedule is for one goroutine.
type Schedule struct {
	timing   Timing
	rand     func() float64 // [0, 1)
	due      time.Duration
	failures int
}

// NewSchedule begins at uptime. random returns a number in [0, 1) and spreads a fleet; nil takes the real thing.
func NewSchedule(t Timing, uptime time.Duration, random func() float64) *Schedule {
	if random == nil {
		random = rand.Float64
	}
	s := &Schedule{timing: t.orDefault(), rand: random}
	s.due = uptime + s.spread(s.timing.First, s.timing.FirstJitter)
	return s
}

// Wait returns how long to wait at uptime for the next check: 0 when it is due.
func (s *Schedule) Wait(uptime time.Duration) time.Duration { return max(s.due-uptime, 0) }

// Now makes a check due at once, because somebody asked for it.
func (s *Schedule) Now(uptime time.Duration) { s.due = uptime }

// Failures returns how many checks in a row have failed.
func (s *Schedule) Failures() int { return s.failures }

// Answered plans the check after one that ended at uptime with an answer. The server's wish counts between half of the
// own interval and a day: it can neither keep hosts from asking nor make them ask all the time.
func (s *Schedule) Answered(uptime time.Duration, a Answer) {
	s.failures = 0
	wait := s.timing.Interval
	if a.PollInterval > 0 {
		wait = s.clamp(a.PollInterval)
	}
	s.due = uptime + s.spread(wait, s.timing.Jitter)
}

// Failed plans the check after one that ended at uptime without an answer.
func (s *Schedule) Failed(uptime time.Duration, err error) {
	wait := min(s.timing.Retry<<min(s.failures, 20), s.timing.RetryMax)
	s.failures++
	var e *Error
	if errors.As(err, &e) && e.RetryAfter > 0 {
		wait = max(wait, s.clamp(e.RetryAfter))
		s.due = uptime + wait + time.Duration(s.rand()*float64(s.timing.Jitter)) // never earlier than asked for
		return
	}
	s.due = uptime + s.spread(wait, min(wait/2, s.timing.Jitter))
}

func (s *Schedule) clamp(d time.Duration) time.Duration {
	return min(max(d, s.timing.Interval/2), MaxPoll)
}

// spread returns a time within jitter of d, never negative.
func (s *Schedule) spread(d, jitter time.Duration) time.Duration {
	return max(d+time.Duration((2*s.rand()-1)*float64(jitter)), 0)
}
