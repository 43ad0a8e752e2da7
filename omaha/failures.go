package omaha

import (
	"maps"
	"slices"
	"time"
)

// Failures remembers what failed on this host and for how long to leave it alone, such as a payload's addresses. It is a
// value that can be written as JSON and read back; a zero Failures is empty and ready.
type Failures struct {
	Entries map[string]Failure `json:"entries,omitempty"`
}

// Failure is what is remembered about one key.
type Failure struct {
	Count  int           `json:"count"`
	At     time.Time     `json:"at"`     // of the last failure, by the wall clock
	Wait   time.Duration `json:"wait"`   // from then on, in nanoseconds
	Reason string        `json:"reason"` // printable
}

// Backoff is how the wait grows: First after one failure, doubling up to Max.
type Backoff struct{ First, Max time.Duration }

// AddressBackoff is for payload addresses: a minute, then two, up to four hours.
func AddressBackoff() Backoff { return Backoff{time.Minute, 4 * time.Hour} }

// maxFailures bounds the memory: an endless row of versions that fail must not fill a disk.
const maxFailures = 64

// With returns the memory after key failed at now for reason. The receiver does not change.
func (f Failures) With(key string, now time.Time, reason string, b Backoff) Failures {
	next := Failures{Entries: maps.Clone(f.Entries)}
	if next.Entries == nil {
		next.Entries = make(map[string]Failure)
	}
	e := next.Entries[key]
	e.Count++
	e.At, e.Reason = now, Printable(reason)
	e.Wait = b.Max
	if shift := e.Count - 1; shift < 32 && b.First<<shift > 0 && b.First<<shift < b.Max {
		e.Wait = b.First << shift
	}
	next.Entries[key] = e
	for len(next.Entries) > maxFailures {
		oldest := ""
		for k, e := range next.Entries {
			if oldest == "" || e.At.Before(next.Entries[oldest].At) || (e.At.Equal(next.Entries[oldest].At) && k < oldest) {
				oldest = k
			}
		}
		delete(next.Entries, oldest)
	}
	return next
}

// Without returns the memory after key did well. The receiver does not change.
func (f Failures) Without(key string) Failures {
	if _, ok := f.Entries[key]; !ok {
		return f
	}
	next := Failures{Entries: maps.Clone(f.Entries)}
	delete(next.Entries, key)
	return next
}

// Remaining returns how long key is still to be left alone at now; 0 when it may be tried. A clock that was set back
// cannot make it longer than the wait itself.
func (f Failures) Remaining(key string, now time.Time) time.Duration {
	e, ok := f.Entries[key]
	if !ok {
		return 0
	}
	return min(max(e.At.Add(e.Wait).Sub(now), 0), e.Wait)
}

// Order returns keys with those that may be tried first, and behind them the others by the time at which they may be.
// None is left out: an address that failed is better than none.
func (f Failures) Order(keys []string, now time.Time) []string {
	out := slices.Clone(keys)
	slices.SortStableFunc(out, func(a, b string) int {
		switch x, y := f.Remaining(a, now), f.Remaining(b, now); {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return 0
	})
	return out
}
