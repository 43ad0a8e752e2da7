package lock

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

const (
	// askAgain is how often a host that waits says so, though nothing has changed.
	askAgain = 5 * time.Minute
	// silent is how long a host that does not say so is still served. After that it is passed over until it asks again: a slot that nobody
	// comes for costs the others time. It keeps its place, because it may be the store that was away.
	silent = 30 * time.Minute
	// forgotten is how long the place of a silent host is kept.
	forgotten = 24 * time.Hour
)

// order sorts waiters as they are served: by class, then by arrival.
func (p Policy) order(queue []Waiter) {
	slices.SortStableFunc(queue, func(a, b Waiter) int {
		return cmp.Or(cmp.Compare(p.rank(a.Class), p.rank(b.Class)), cmp.Compare(a.Arrival, b.Arrival), cmp.Compare(a.Host, b.Host))
	})
}

// admit gives the free slots to those who wait, in order. It looks at everything that can be against it at once: the total,
// the zones, the windows, the halts. It reports whether slots are left that another waiter could have.
func (s *step) admit(queue []Waiter) (left bool) {
	free := s.Policy.Max - len(s.Holders)
	if free <= 0 || !s.Window(s.now).Open {
		return false
	}
	queue = slices.Clone(queue)
	s.Policy.order(queue)
	for _, w := range queue {
		if free == 0 {
			return false
		}
		if s.holder(w.Host) >= 0 { // a claim that was sent twice
			s.remove = append(s.remove, w.Host)
			continue
		}
		if quiet := s.now.Sub(w.Asked); !w.Asked.IsZero() && !w.Unsure && !s.unsure && quiet > silent {
			if quiet > forgotten {
				s.remove = append(s.remove, w.Host)
				s.log("left the queue", w.Host, w.To, w.From, fmt.Sprintf("has not asked for %s", quiet.Round(time.Minute)))
			}
			continue
		}
		if _, halted := s.Halts[w.To]; halted || s.zoneFull(w.Zone) || !s.ledger.admits(w, s) {
			continue
		}
		s.Holders = append(s.Holders, Holder{
			Host: w.Host, Zone: w.Zone, Class: w.Class, BootID: w.BootID, From: w.From, To: w.To, Reason: w.Reason,
			Phase: Granted, Queued: w.Since, Granted: s.now, Unsure: s.unsure, Proof: w.Proof,
		})
		s.remove = append(s.remove, w.Host)
		s.log("granted", w.Host, w.To, w.From, w.Reason)
		free--
	}
	return free > 0
}

func (s *step) zoneFull(zone string) bool {
	limit := s.Policy.zoneMax(zone)
	if limit < 0 {
		return false
	}
	n := 0
	for _, h := range s.Holders {
		if h.Zone == zone {
			n++
		}
	}
	return n >= limit
}

// standing says where a claim stands; position is its place in the queue.
func (s State) standing(c Claim, position int, now time.Time) Standing {
	st := Standing{Max: s.Policy.Max, Holders: s.Holders}
	if h, ok := s.Holder(c.Host); ok {
		st.Granted, st.Token = true, h.Token
		// A host that asks has not gone down yet, or again, and had better not if the version was halted since.
		if halt, bad := s.Halts[h.To]; bad {
			st.Granted, st.Halted = false, halt.Reason
		}
		return st
	}
	if halt, ok := s.Halts[c.To]; ok {
		st.Halted = halt.Reason
		return st
	}
	st.Position = position
	sched := s.Window(now)
	step := step{State: s}
	switch {
	case s.Policy.Max == 0:
		st.Blocked = "the group is paused (max is 0)"
	case !sched.Open:
		st.Blocked, st.Ask = sched.Why, sched.Next
	case len(s.Holders) < s.Policy.Max && step.zoneFull(c.Zone):
		st.Blocked = fmt.Sprintf("zone %q has as many hosts down as it may", c.Zone)
	}
	if sched.Open || !sched.Next.IsZero() {
		st.Expected = s.expect(position, now, sched.Next)
	}
	return st
}

// expect forecasts when the waiter at a position is granted a slot; zero if that cannot be known.
func (s State) expect(position int, now, opens time.Time) time.Time {
	each := s.RebootTime()
	if each <= 0 || s.Policy.Max <= 0 || position < 1 {
		return time.Time{}
	}
	if opens.After(now) {
		now = opens
	}
	slots := make([]time.Time, 0, s.Policy.Max)
	for _, h := range s.Holders {
		free := h.Granted.Add(each)
		if free.Before(now) {
			free = now
		}
		slots = append(slots, free)
	}
	slices.SortFunc(slots, time.Time.Compare)
	if over := len(slots) - s.Policy.Max; over > 0 { // max was lowered: the first that come back free nothing
		slots = slots[over:]
	}
	for len(slots) < s.Policy.Max && len(slots) < position+len(s.Holders) {
		slots = append([]time.Time{now}, slots...)
	}
	round, i := (position-1)/len(slots), (position-1)%len(slots)
	return slots[i].Add(time.Duration(round) * each)
}
