package lock

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Synchronised reports whether this machine's clock was set by something that knows the time, such as an NTP client, and not long ago: the kernel says so. Where it may not be
// asked, as in a unit with ProtectClock=, that is the error, and the answer is whether systemd-timesyncd has set the clock since the boot.
func Synchronised() (bool, error) {
	// What the flag STA_UNSYNC says depends on who keeps the hardware clock; the error does not. 16 s is the kernel's word for unknown.
	const unknown = 16 * time.Second
	var t unix.Timex
	if _, err := unix.Adjtimex(&t); err != nil {
		_, none := os.Stat("/run/systemd/timesync/synchronized")
		return none == nil, fmt.Errorf("asking the kernel whether the clock is set: %w", err)
	}
	return time.Duration(t.Maxerror)*time.Microsecond < unknown, nil
}

// watched is a phase of a holder as this keeper has seen it.
type watched struct {
	token int64
	phase Phase
	since time.Time // by this keeper's clock, which need not be right, only go on
}

// begin begins a change of a group's state by this keeper, with what it knows of the time.
func (k *Keeper) begin(s State, group string, now time.Time, by string) *step {
	st := s.begin(now, by)
	st.unsure = !k.opt.Synchronised()
	st.seen = make(map[string]time.Duration, len(s.Holders))
	k.mu.Lock()
	defer k.mu.Unlock()
	old := k.watched[group]
	if st.unsure != k.unsure { // the clock may have been set meanwhile, to a time years away
		k.unsure, old = st.unsure, nil
		clear(k.watched)
	}
	is := make(map[string]watched, len(s.Holders))
	for _, h := range s.Holders {
		w, ok := old[h.Host]
		if !ok || w.token != h.Token || w.phase != h.Phase || now.Before(w.since) {
			w = watched{h.Token, h.Phase, now}
		}
		is[h.Host] = w
		st.seen[h.Host] = now.Sub(w.since)
	}
	if k.watched[group] = is; len(is) == 0 {
		delete(k.watched, group)
	}
	return st
}

// stays is how long a holder has been in its phase, as far as it is known here. Times of different clocks are only compared if both were set by something that knows the time; otherwise
// it is as long as this keeper has itself seen it.
func (s *step) stays(h Holder) time.Duration {
	seen := s.seen[h.Host]
	if s.unsure || h.Unsure {
		return seen
	}
	return max(seen, s.now.Sub(h.Since()))
}
