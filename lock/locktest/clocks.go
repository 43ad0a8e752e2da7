package locktest

import (
	"slices"
	"strings"
	"time"

	"github.com/flipside-linux/flipside/lock"
)

// wrong opens a client whose clock is off, and known to be.
func (e env) wrong(off time.Duration) *lock.Keeper {
	return e.b.Open(e.T, lock.Options{Now: func() time.Time { return e.clock.Now().Add(off) }, Synchronised: func() bool { return false }})
}

const years = 3 * 365 * 24 * time.Hour

// wrongClocks: a host whose clock nothing has set makes nobody late, and is served; and one that stays away is found by all.
func wrongClocks(e env) {
	e.policy(func(p *lock.Policy) {
		p.Max, p.BootDeadline, p.GrantDeadline = 2, lock.Duration(30*time.Minute), lock.Duration(15*time.Minute)
	})
	slow, fast := e.wrong(-years), e.wrong(years)
	ask := func(k *lock.Keeper, host string) lock.Standing {
		e.Helper()
		st, err := k.Request(e.ctx, e.claim(host))
		e.must(err)
		return st
	}
	quiet := func() {
		e.Helper()
		if s := e.state(); len(s.Failures) != 0 || slices.ContainsFunc(s.Holders, func(h lock.Holder) bool { return !h.Late.IsZero() }) {
			e.Fatalf("somebody is late: %+v, failures %+v", s.Holders, s.Failures)
		}
	}

	// a goes down, and comes up without the time. b follows by the right clock.
	e.granted("a")
	e.must(e.k.Mark(e.ctx, e.group, "a", lock.Mark{Phase: lock.Rebooting}))
	e.clock.advance(2 * time.Minute)
	e.must(slow.Mark(e.ctx, e.group, "a", lock.Mark{Phase: lock.Booted, Version: "2.0.0"}))
	e.clock.advance(time.Second)
	quiet()
	e.granted("b")
	e.must(e.k.Mark(e.ctx, e.group, "b", lock.Mark{Phase: lock.Rebooting}))

	// Others look from other years, wait in the queue between those who know the time, and give back what they have.
	ask(fast, "fast")
	ask(slow, "slow")
	if q := e.state().Queue; len(q) != 2 || q[0].Host != "fast" || q[1].Host != "slow" {
		e.Fatalf("queue %+v", q)
	}
	e.must(fast.Tick(e.ctx, e.group))
	e.must(slow.Tick(e.ctx, e.group))
	quiet()
	e.must(slow.Release(e.ctx, e.group, "a", lock.Verdict{Outcome: lock.Healthy, Version: "2.0.0"}))
	e.release("b", lock.Healthy)
	if hs := e.holders(); !slices.Equal(hs, []string{"fast", "slow"}) {
		e.Fatalf("holders %v, want fast and slow", hs)
	}
	for _, k := range []*lock.Keeper{fast, slow, e.k} {
		e.must(k.Tick(e.ctx, e.group)) // nobody takes an unused slot by a clock that is not its own
	}
	e.must(fast.Mark(e.ctx, e.group, "fast", lock.Mark{Phase: lock.Rebooting}))
	e.must(slow.Mark(e.ctx, e.group, "slow", lock.Mark{Phase: lock.Rebooting}))
	e.must(e.k.Tick(e.ctx, e.group))
	quiet()

	// Both stay away. Who has seen it for long enough says so.
	e.clock.advance(29 * time.Minute)
	quiet()
	e.clock.advance(2 * time.Minute)
	if st := e.request(e.claim("c")); st.Granted || !strings.Contains(st.Halted, "rebooting for more than 30m") {
		e.Errorf("c, which has seen two hosts stay away: %+v, want halted", st)
	}
	for _, h := range e.state().Holders {
		if h.Late.IsZero() {
			e.Errorf("%s stays away and is not late: %+v", h.Host, h)
		}
	}
}

// noClock: in a group where nothing ever sets a clock everything goes on, and a host that stays away, or does not use its slot, is found by those who wait.
func noClock(e env) {
	e.policy(func(p *lock.Policy) {
		p.BootDeadline, p.GrantDeadline = lock.Duration(30*time.Minute), lock.Duration(15*time.Minute)
	})
	hosts := map[string]*lock.Keeper{"a": e.wrong(-years), "b": e.wrong(years), "c": e.wrong(-20 * time.Hour), "d": e.wrong(time.Hour)}
	ask := func(host string) lock.Standing {
		e.Helper()
		st, err := hosts[host].Request(e.ctx, e.claim(host))
		e.must(err)
		return st
	}
	for _, h := range []string{"a", "b", "c", "d"} {
		if st := ask(h); st.Granted != (h == "a") {
			e.Fatalf("%s: %+v", h, st)
		}
	}
	e.must(hosts["a"].Mark(e.ctx, e.group, "a", lock.Mark{Phase: lock.Rebooting}))
	e.clock.advance(3 * time.Minute)
	e.must(hosts["a"].Mark(e.ctx, e.group, "a", lock.Mark{Phase: lock.Booted}))
	e.must(hosts["a"].Release(e.ctx, e.group, "a", lock.Verdict{Outcome: lock.Healthy}))
	for range 4 { // b was served and does not use it
		for _, h := range []string{"c", "d"} {
			ask(h)
		}
		if hs := e.holders(); !slices.Equal(hs, []string{"b"}) {
			e.Fatalf("holders %v, want b", hs)
		}
		e.clock.advance(5 * time.Minute)
	}
	ask("d")
	if hs := e.holders(); !slices.Equal(hs, []string{"c"}) {
		e.Fatalf("holders %v, want c in place of b, which did not use its slot", hs)
	}
	e.must(hosts["c"].Mark(e.ctx, e.group, "c", lock.Mark{Phase: lock.Rebooting}))
	for range 7 {
		if st := ask("d"); st.Halted != "" {
			e.Fatalf("d: %+v", st)
		}
		e.clock.advance(5 * time.Minute)
	}
	if st := ask("d"); !strings.Contains(st.Halted, "c: rebooting for more than") {
		e.Errorf("d, which has seen c stay away: %+v, want halted", st)
	}
}
