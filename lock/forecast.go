package lock

import (
	"slices"
	"time"
)

// Turn is when a host that waits is likely to be granted a slot, and when it is likely to be done.
type Turn struct {
	Host string    `json:"host"`
	Zone string    `json:"zone,omitempty"`
	To   string    `json:"to,omitempty"`
	At   time.Time `json:"at"`
	Done time.Time `json:"done"`
}

// Forecast plays the queue of s forward with the rules that really decide, if every reboot takes as long as those before it. It
// returns the turns in order, and the hosts that get none as things are: their version is halted, the group is paused, a holder is
// late. Without a measured or configured reboot time it returns no turns.
func (s State) Forecast(now time.Time) (turns []Turn, never []Waiter) {
	each := s.RebootTime()
	queue := slices.Clone(s.Queue)
	if each <= 0 {
		return nil, queue
	}
	for i := range queue {
		queue[i].Asked = time.Time{} // as if they all go on asking
	}
	s.Policy.order(queue)
	st := s.begin(now, "")
	done := map[string]time.Time{}
	for _, h := range st.Holders {
		if h.Late.IsZero() { // who is late holds its slot, as far as anybody knows
			done[h.Host] = later(h.Granted.Add(each), now)
		}
	}
	for len(queue) > 0 {
		st.remove, st.audit = nil, nil
		if n := 64 + 4*s.Policy.Max; n < len(queue) { // most turns are decided by the first few
			if left := st.admit(queue[:n]); left {
				st.admit(queue)
			}
		} else {
			st.admit(queue)
		}
		for _, host := range st.remove {
			i := slices.IndexFunc(queue, func(w Waiter) bool { return w.Host == host })
			w := queue[i]
			queue = slices.Delete(queue, i, i+1)
			done[host] = st.now.Add(each)
			turns = append(turns, Turn{Host: host, Zone: w.Zone, To: w.To, At: st.now, Done: done[host]})
		}
		next, host := time.Time{}, ""
		for h, t := range done {
			if next.IsZero() || t.Before(next) || t.Equal(next) && h < host {
				next, host = t, h
			}
		}
		if sched := st.Window(st.now); !sched.Open {
			if sched.Next.IsZero() {
				break
			}
			for h, t := range done { // whoever is down comes back meanwhile
				if !t.After(sched.Next) {
					st.drop(h)
					delete(done, h)
				}
			}
			st.now = sched.Next
			continue
		}
		if host == "" {
			break
		}
		st.now = next
		st.drop(host)
		delete(done, host)
	}
	return turns, queue
}

func (s *step) drop(host string) {
	if i := s.holder(host); i >= 0 {
		s.Holders = slices.Delete(s.Holders, i, i+1)
	}
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}
