// Package locktest is the conformance suite of the reboot semaphore. Every backend passes it; a backend's test is a constructor:
//
//	func TestConformance(t *testing.T) {
//		locktest.Run(t, func(t *testing.T) locktest.Backend { return locktest.Backend{Open: open} })
//	}
package locktest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
)

// Backend makes clients of one store. Each client stands for another host.
type Backend struct {
	// Open returns a new client of the same store, with these options.
	Open func(t *testing.T, opt lock.Options) *lock.Keeper
}

// patience is how long something that is about to happen may take on a busy machine.
const patience = 30 * time.Second

// clock is a time that tests move.
type clock struct{ now atomic.Int64 }

func newClock() *clock {
	c := &clock{}
	c.now.Store(time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC).UnixNano())
	return c
}

func (c *clock) Now() time.Time          { return time.Unix(0, c.now.Load()).UTC() }
func (c *clock) advance(d time.Duration) { c.now.Add(int64(d)) }

// env is one test on one backend.
type env struct {
	*testing.T
	ctx   context.Context
	b     Backend
	clock *clock
	k     *lock.Keeper
	group string
}

// Run runs the suite. make is called once for each test and returns a backend; the group is another in each.
func Run(t *testing.T, newBackend func(t *testing.T) Backend) {
	tests := []struct {
		name string
		run  func(env)
	}{
		{"grant and release", grantAndRelease},
		{"first come first served", firstCome},
		{"woken by release", wokenByRelease},
		{"set max", setMax},
		{"failure halts the version", failureHalts},
		{"budget of two, and successes in between", budgetOfTwo},
		{"late is suspect", late},
		{"a slot that nobody uses is taken back", takenBack},
		{"who is silent is passed over and keeps its place", passedOver},
		{"who does not ask any more leaves the queue", leavesTheQueue},
		{"pause", pause},
		{"zones", zones},
		{"classes", classes},
		{"window", windows},
		{"marks and fencing", marks},
		{"withdraw", withdraw},
		{"another version", anotherVersion},
		{"history", history},
		{"bad input", badInput},
		{"never more than max", neverMoreThanMax},
		{"lost replies", lostReplies},
		{"groups are apart", groupsApart},
		{"follow", follow},
		{"wrong clocks", wrongClocks},
		{"no clock is right", noClock},
		{"signed", signed},
	}
	for i, tt := range tests {
		t.Run(strings.ReplaceAll(tt.name, " ", "-"), func(t *testing.T) {
			e := env{T: t, b: newBackend(t), clock: newClock(), group: fmt.Sprintf("g%d", i)}
			ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
			defer cancel()
			e.ctx = ctx
			e.k = e.open()
			tt.run(e)
		})
	}
}

func (e env) open() *lock.Keeper {
	return e.b.Open(e.T, lock.Options{Now: e.clock.Now})
}

func (e env) claim(host string) lock.Claim {
	return lock.Claim{Group: e.group, Host: host, BootID: "boot-" + host, From: "1.0.0", To: "2.0.0", Reason: "update"}
}

func (e env) request(c lock.Claim) lock.Standing {
	e.Helper()
	st, err := e.k.Request(e.ctx, c)
	if err != nil {
		e.Fatalf("Request of %s: %v", c.Host, err)
	}
	return st
}

func (e env) granted(host string) lock.Standing {
	e.Helper()
	st := e.request(e.claim(host))
	if !st.Granted || st.Token == 0 {
		e.Fatalf("%s is not granted: %+v", host, st)
	}
	return st
}

func (e env) waits(host string, position int) lock.Standing {
	e.Helper()
	st := e.request(e.claim(host))
	if st.Granted || st.Position != position {
		e.Fatalf("%s: %+v, want position %d", host, st, position)
	}
	return st
}

func (e env) release(host string, o lock.Outcome) {
	e.Helper()
	if err := e.k.Release(e.ctx, e.group, host, lock.Verdict{Outcome: o, Version: "2.0.0", Reason: "because"}); err != nil {
		e.Fatalf("Release of %s: %v", host, err)
	}
}

func (e env) state() lock.State {
	e.Helper()
	s, err := e.k.State(e.ctx, e.group)
	if err != nil {
		e.Fatal(err)
	}
	return s
}

func (e env) holders() []string {
	e.Helper()
	var names []string
	for _, h := range e.state().Holders {
		names = append(names, h.Host)
	}
	return names
}

func (e env) policy(edit func(*lock.Policy)) {
	e.Helper()
	if err := e.k.EditPolicy(e.ctx, e.group, "test", func(p *lock.Policy) error { edit(p); return nil }); err != nil {
		e.Fatal(err)
	}
}

func (e env) must(err error) {
	e.Helper()
	if err != nil {
		e.Fatal(err)
	}
}

func grantAndRelease(e env) {
	if s := e.state(); s.Policy.Max != 1 || len(s.Holders) != 0 {
		e.Fatalf("an unused group is %+v", s)
	}
	first := e.granted("a")
	if again := e.granted("a"); again.Token != first.Token {
		e.Errorf("asked again, the token is %d, want %d", again.Token, first.Token)
	}
	h, ok := e.state().Holder("a")
	if !ok || h.Phase != lock.Granted || h.From != "1.0.0" || h.To != "2.0.0" || h.BootID != "boot-a" || h.Token != first.Token || !h.Granted.Equal(e.clock.Now()) {
		e.Errorf("the record is %+v", h)
	}
	e.release("a", lock.Healthy)
	e.release("a", lock.Healthy) // again: does nothing
	e.release("nobody", lock.Healthy)
	if hs := e.holders(); len(hs) != 0 {
		e.Errorf("holders after the release: %v", hs)
	}
	if next := e.granted("a"); next.Token <= first.Token {
		e.Errorf("a later grant has token %d, the one before %d", next.Token, first.Token)
	}
}

func firstCome(e env) {
	e.granted("z")
	for i, h := range []string{"c", "a", "b"} {
		e.waits(h, i+1)
	}
	e.waits("b", 3) // asking again keeps the place
	e.waits("a", 2)
	for _, h := range []string{"c", "a", "b"} {
		e.release(e.holders()[0], lock.Healthy)
		if hs := e.holders(); !slices.Equal(hs, []string{h}) {
			e.Fatalf("holders %v, want %s", hs, h)
		}
	}
	if q := e.state().Queue; len(q) != 0 {
		e.Errorf("queue %+v, want it empty", q)
	}
}

func wokenByRelease(e env) {
	e.granted("a")
	other := e.open()
	st, err := other.Request(e.ctx, e.claim("b"))
	e.must(err)
	if st.Position != 1 {
		e.Fatalf("standing %+v", st)
	}
	woken := make(chan error, 1)
	go func() { woken <- other.Wait(e.ctx, e.claim("b")) }()
	e.release("a", lock.Healthy)
	select {
	case err := <-woken:
		e.must(err)
	case <-time.After(patience):
		e.Fatal("b was not woken")
	}
	if st, err = other.Request(e.ctx, e.claim("b")); err != nil || !st.Granted {
		e.Errorf("after the wake-up: %+v, %v", st, err)
	}

	// What happened between the answer and Wait is not missed.
	e.waits("a", 1)
	e.release("b", lock.Healthy)
	e.must(e.k.Wait(e.ctx, e.claim("a")))
	e.granted("a")
}

func setMax(e env) {
	e.must(e.k.SetMax(e.ctx, e.group, 2))
	e.granted("a")
	e.granted("b")
	e.waits("c", 1)
	e.must(e.k.SetMax(e.ctx, e.group, 1)) // holders stay
	if hs := e.holders(); len(hs) != 2 {
		e.Errorf("holders after lowering max: %v", hs)
	}
	e.release("a", lock.Healthy)
	e.waits("c", 1)
	e.must(e.k.SetMax(e.ctx, e.group, 0)) // pause
	e.release("b", lock.Healthy)
	if st := e.waits("c", 1); !strings.Contains(st.Blocked, "paused") {
		e.Errorf("a paused group says %q", st.Blocked)
	}
	e.must(e.k.SetMax(e.ctx, e.group, 1))
	e.granted("c")
	if err := e.k.SetMax(e.ctx, e.group, -5); !errors.Is(err, lock.ErrInvalid) {
		e.Errorf("SetMax(-5) = %v", err)
	}
}

func failureHalts(e env) {
	e.granted("a")
	e.waits("b", 1)
	woken := make(chan error, 1)
	go func() { woken <- e.k.Wait(e.ctx, e.claim("b")) }()
	e.must(e.k.Mark(e.ctx, e.group, "a", lock.Mark{Phase: lock.Rebooting}))
	e.release("a", lock.Failed)
	select {
	case err := <-woken:
		e.must(err)
	case <-time.After(patience):
		e.Fatal("the halt woke nobody")
	}
	if st := e.request(e.claim("b")); st.Granted || !strings.Contains(st.Halted, "because") || st.Position != 0 {
		e.Errorf("b after the failure: %+v, want halted", st)
	}
	s := e.state()
	if len(s.Holders) != 0 || len(s.Queue) != 0 || len(s.Halts) != 1 {
		e.Errorf("state %+v", s)
	}
	other := e.claim("b")
	other.To = "3.0.0"
	if st := e.request(other); !st.Granted {
		e.Errorf("another version is not halted: %+v", st)
	}
	e.release("b", lock.Cancelled)
	e.release("a", lock.Failed) // told again after a lost reply: counts once
	e.must(e.k.Resume(e.ctx, e.group, "2.0.0", "looked at"))
	e.granted("b")

	// A host that was granted before the halt, and has not rebooted, must not.
	e.must(e.k.SetMax(e.ctx, e.group, 2))
	e.granted("c")
	e.must(e.k.SetMax(e.ctx, e.group, 3))
	e.granted("d")
	e.must(e.k.Mark(e.ctx, e.group, "b", lock.Mark{Phase: lock.Rebooting}))
	e.must(e.k.Mark(e.ctx, e.group, "d", lock.Mark{Phase: lock.Rebooting}))
	e.release("b", lock.Failed)
	// The reply to d's mark was lost, so that d has not gone down: it must not do so now.
	if err := e.k.Mark(e.ctx, e.group, "d", lock.Mark{Phase: lock.Rebooting}); !errors.Is(err, lock.ErrHalted) {
		e.Errorf("a mark told again after the halt = %v, want ErrHalted", err)
	}
	if err := e.k.Mark(e.ctx, e.group, "c", lock.Mark{Phase: lock.Rebooting}); !errors.Is(err, lock.ErrHalted) {
		e.Errorf("Mark of a halted version = %v, want ErrHalted", err)
	}
	if st := e.request(e.claim("c")); st.Granted || st.Halted == "" {
		e.Errorf("a holder of a halted version: %+v", st)
	}
}

func budgetOfTwo(e env) {
	e.policy(func(p *lock.Policy) { p.FailureBudget, p.FailuresInRow = 3, 2 })
	for _, h := range []string{"a", "b", "c"} {
		e.granted(h)
		if h == "b" {
			e.release(h, lock.Healthy)
			continue
		}
		e.release(h, lock.Failed)
	}
	if s := e.state(); len(s.Halts) != 0 || len(s.Failures["2.0.0"].Hosts) != 2 {
		e.Fatalf("after two failures that were not in a row: %+v", s)
	}
	e.granted("d")
	e.release("d", lock.Failed)
	if s := e.state(); s.Halts["2.0.0"].Reason == "" {
		e.Errorf("not halted: %+v", s)
	}
}

func late(e env) {
	e.policy(func(p *lock.Policy) { p.BootDeadline = lock.Duration(10 * time.Minute) })
	e.granted("a")
	e.must(e.k.Mark(e.ctx, e.group, "a", lock.Mark{Phase: lock.Rebooting}))
	e.waits("b", 1)
	e.clock.advance(9 * time.Minute)
	e.waits("b", 1)
	e.clock.advance(2 * time.Minute)
	if st := e.request(e.claim("b")); st.Granted || !strings.Contains(st.Halted, "a") {
		e.Errorf("b when a is late: %+v, want halted", st)
	}
	if h, ok := e.state().Holder("a"); !ok || h.Late.IsZero() {
		e.Errorf("the late holder is %+v, %v; it must keep its slot", h, ok)
	}
	e.release("a", lock.Healthy) // it was only slow
	if s := e.state(); len(s.Failures) != 0 || len(s.Halts) != 1 {
		e.Errorf("after it came back: %+v; the halt stays until somebody looks", s)
	}
	e.must(e.k.Resume(e.ctx, e.group, "", "looked at"))
	e.granted("b")

	// Nobody has looked since a host became late: the one that is about to follow it must not.
	e.policy(func(p *lock.Policy) { p.Max, p.GrantDeadline = 2, 0 })
	e.granted("c")
	e.must(e.k.Mark(e.ctx, e.group, "b", lock.Mark{Phase: lock.Rebooting}))
	e.clock.advance(time.Hour)
	if err := e.k.Mark(e.ctx, e.group, "c", lock.Mark{Phase: lock.Rebooting}); !errors.Is(err, lock.ErrHalted) {
		e.Errorf("Mark when another holder is late = %v, want ErrHalted", err)
	}
}

// takenBack: a host went away while it waited, and was granted a slot that it does not use.
func takenBack(e env) {
	e.policy(func(p *lock.Policy) { p.GrantDeadline = lock.Duration(10 * time.Minute) })
	e.granted("a")
	e.waits("gone", 1)
	e.waits("b", 2)
	e.release("a", lock.Healthy)
	e.clock.advance(9 * time.Minute)
	e.waits("b", 1)
	e.clock.advance(2 * time.Minute)
	e.granted("b")
	if err := e.k.Mark(e.ctx, e.group, "gone", lock.Mark{Phase: lock.Rebooting}); !errors.Is(err, lock.ErrNotHeld) {
		e.Errorf("Mark of a host whose slot was taken back = %v, want ErrNotHeld", err)
	}
	e.clock.advance(time.Hour) // the store was away, or the host was slow: nobody has taken the slot yet
	e.must(e.k.Mark(e.ctx, e.group, "b", lock.Mark{Phase: lock.Rebooting}))
	e.clock.advance(20 * time.Minute)
	if hs := e.holders(); !slices.Equal(hs, []string{"b"}) {
		e.Errorf("holders %v: a slot that is used is not taken back", hs)
	}
	if s := e.state(); len(s.Failures) != 0 {
		e.Errorf("failures %+v: a host that has not gone down says nothing about the version", s.Failures)
	}
}

// silence lets time go by in which only b goes on asking.
func silence(e env, d time.Duration) {
	e.policy(func(p *lock.Policy) { p.BootDeadline = 0 })
	e.granted("a")
	e.must(e.k.Mark(e.ctx, e.group, "a", lock.Mark{Phase: lock.Rebooting}))
	e.waits("silent", 1)
	e.waits("b", 2)
	e.clock.advance(d)
	e.waits("b", 2)
	e.release("a", lock.Healthy)
	if hs := e.holders(); !slices.Equal(hs, []string{"b"}) {
		e.Errorf("holders %v, want b", hs)
	}
}

// A store that was away for a while made everybody silent: nobody may lose a place in the queue by that.
func passedOver(e env) {
	silence(e, 40*time.Minute)
	e.waits("c", 2)
	e.waits("silent", 1)
	e.release("b", lock.Healthy)
	if hs := e.holders(); !slices.Equal(hs, []string{"silent"}) {
		e.Errorf("holders %v, want the one that came before c", hs)
	}
}

func leavesTheQueue(e env) {
	silence(e, 25*time.Hour)
	if q := e.state().Queue; len(q) != 0 {
		e.Errorf("queue %+v", q)
	}
}

func pause(e env) {
	e.must(e.k.SetMax(e.ctx, e.group, 3))
	e.granted("a")
	e.must(e.k.Pause(e.ctx, e.group, "the network is rebuilt"))
	e.must(e.k.Pause(e.ctx, e.group, "again"))
	e.waits("b", 1)
	e.must(e.k.Unpause(e.ctx, e.group, "it is done"))
	e.granted("b")
	if s := e.state(); s.Policy.Max != 3 || s.Policy.PausedMax != 0 || len(s.Holders) != 2 {
		e.Errorf("after the pause: %+v", s)
	}
	e.must(e.k.SetMax(e.ctx, e.group, 0))
	if err := e.k.Unpause(e.ctx, e.group, ""); !errors.Is(err, lock.ErrInvalid) {
		e.Errorf("Unpause of a group whose max was set to 0 = %v, want ErrInvalid", err)
	}
}

func zones(e env) {
	e.policy(func(p *lock.Policy) { p.Max, p.ZoneMax, p.Zones = 4, 1, map[string]int{"big": 2} })
	for _, tt := range []struct {
		host, zone string
		granted    bool
	}{{"a1", "a", true}, {"a2", "a", false}, {"b1", "b", true}, {"c1", "big", true}, {"c2", "big", true}, {"d1", "d", false}} {
		c := e.claim(tt.host)
		c.Zone = tt.zone
		st := e.request(c)
		if st.Granted != tt.granted {
			e.Errorf("%s: %+v, want granted %v", tt.host, st, tt.granted)
		}
		if tt.host == "a2" && !strings.Contains(st.Blocked, `"a"`) {
			e.Errorf("a2 is told %q", st.Blocked)
		}
	}
	e.release("b1", lock.Healthy) // d1 passes a2, whose zone is full
	if hs := e.holders(); !slices.Equal(hs, []string{"a1", "c1", "c2", "d1"}) {
		e.Errorf("holders %v", hs)
	}
	e.release("a1", lock.Healthy)
	if hs := e.holders(); !slices.Contains(hs, "a2") {
		e.Errorf("holders %v, want a2 among them", hs)
	}
}

func classes(e env) {
	e.policy(func(p *lock.Policy) { p.Classes = []string{"security", "ordinary"} })
	e.granted("z")
	for i, class := range []string{"", "ordinary", "security"} {
		c := e.claim(fmt.Sprintf("h%d", i))
		c.Class = class
		if st := e.request(c); st.Position != 1 {
			e.Errorf("class %q: %+v, want position 1", class, st)
		}
	}
	for _, want := range []string{"h2", "h1", "h0"} {
		e.release(e.holders()[0], lock.Healthy)
		if hs := e.holders(); !slices.Equal(hs, []string{want}) {
			e.Errorf("holders %v, want %s", hs, want)
		}
	}
}

func withdraw(e env) {
	e.granted("a")
	e.waits("b", 1)
	e.release("b", lock.Withdrawn)
	if q := e.state().Queue; len(q) != 0 {
		e.Errorf("queue %+v", q)
	}
	e.must(e.k.Mark(e.ctx, e.group, "a", lock.Mark{Phase: lock.Rebooting}))
	e.release("a", lock.Withdrawn)
	if hs := e.holders(); len(hs) != 1 {
		e.Error("a host that reboots has withdrawn its slot")
	}
	e.release("a", lock.Cancelled) // the reboot did not happen
	if hs := e.holders(); len(hs) != 0 {
		e.Errorf("holders %v", hs)
	}
}

func groupsApart(e env) {
	e.granted("a")
	c := e.claim("b")
	c.Group = e.group + ".other"
	if st := e.request(c); !st.Granted {
		e.Errorf("another group: %+v", st)
	}
	names, err := e.k.Groups(e.ctx)
	if err != nil || !slices.Contains(names, e.group) || !slices.Contains(names, c.Group) {
		e.Errorf("groups %v, %v", names, err)
	}
}

func follow(e env) {
	ctx, cancel := context.WithCancel(e.ctx)
	defer cancel()
	seen := make(chan int, 10)
	done := make(chan error, 1)
	go func() {
		done <- e.open().Follow(ctx, e.group, func(s lock.State) bool {
			seen <- len(s.Holders)
			return len(s.Holders) == 0
		})
	}()
	next := func(want int) {
		e.Helper()
		select {
		case n := <-seen:
			if n != want {
				e.Errorf("%d holders seen, want %d", n, want)
			}
		case <-time.After(patience):
			e.Fatal("the change was not seen")
		}
	}
	next(0)
	e.granted("a")
	next(1)
	if err := <-done; err != nil {
		e.Error(err)
	}
}
