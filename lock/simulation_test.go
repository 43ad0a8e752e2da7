package lock_test

import (
	"container/heap"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
)

// The simulation runs the code that really decides, under a simulated clock and store, with hosts whose clocks are wrong, begin anywhere with each boot, or are never set; whose
// new version sometimes does not come up, that sometimes never come back, and with a store that is away now and then. It is
// small by default; FLIPSIDE_LONG=1 makes it 10 000 hosts and four seeds, FLIPSIDE_SEED=n repeats one.

type event struct {
	at   time.Time
	seq  int
	call func()
}

type agenda []event

func (a agenda) Len() int { return len(a) }
func (a agenda) Less(i, j int) bool {
	if a[i].at.Equal(a[j].at) {
		return a[i].seq < a[j].seq
	}
	return a[i].at.Before(a[j].at)
}
func (a agenda) Swap(i, j int) { a[i], a[j] = a[j], a[i] }
func (a *agenda) Push(x any)   { *a = append(*a, x.(event)) }
func (a *agenda) Pop() any     { old := *a; e := old[len(old)-1]; *a = old[:len(old)-1]; return e }

// world is the fleet, the store and the time.
type world struct {
	t       *testing.T
	rng     *rand.Rand
	now     time.Time
	seq     int
	agenda  agenda
	memory  *lock.Memory
	away    func(time.Time) bool // the store cannot be asked
	hosts   []*simHost
	byName  map[string]*simHost
	down    map[string]int // by zone
	total   int
	max     int
	zoneMax int

	most, failed, afterHalt, done, requests int
	halted                                  time.Time
	finished                                time.Time
}

type simHost struct {
	w      *world
	name   string
	zone   string
	keeper *lock.Keeper
	state  string // waiting, down, done, failed, gone, halted
	queued time.Time
	begun  time.Time
	buried bool
	asks   int
	trail  []lock.Entry

	never  bool          // nothing ever sets its clock
	off    time.Duration // of its clock, once that is set
	forget bool          // its clock begins anew with each boot, until it is set
	booted time.Time
	syncs  time.Time
}

// clock is what the host takes for the time.
func (h *simHost) clock() time.Time {
	if h.w.now.Before(h.syncs) {
		return time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC).Add(h.w.now.Sub(h.booted))
	}
	return h.w.now.Add(h.off)
}

// simStore is the memory as one host sees it: it can be away, and what a commit hands over wakes the hosts that are served.
type simStore struct {
	*lock.Memory
	w *world
}

func (s simStore) check() error {
	if s.w.away(s.w.now) {
		return lock.ErrUnavailable
	}
	return nil
}

func (s simStore) Read(ctx context.Context, group, host string, limit int) (lock.View, error) {
	if err := s.check(); err != nil {
		return lock.View{}, err
	}
	return s.Memory.Read(ctx, group, host, limit)
}

func (s simStore) Commit(ctx context.Context, group, host string, limit int, v lock.View, c lock.Change) (int64, lock.View, error) {
	if err := s.check(); err != nil {
		return 0, lock.View{}, err
	}
	rev, now, err := s.Memory.Commit(ctx, group, host, limit, v, c)
	if err == nil && s.w.rng.IntN(200) == 0 {
		err = fmt.Errorf("%w: the answer was lost", lock.ErrUnavailable)
	}
	if rev > 0 {
		for _, data := range c.Audit {
			var e lock.Entry
			if json.Unmarshal(data, &e) == nil && s.w.byName[e.Host] != nil {
				s.w.byName[e.Host].trail = append(s.w.byName[e.Host].trail, e)
			}
		}
		for _, name := range c.Remove {
			if h := s.w.byName[name]; h != nil && h.state == "waiting" {
				s.w.in(time.Second, h.ask)
			}
		}
		if c.Signal {
			for _, h := range s.w.hosts {
				if h.state == "waiting" {
					s.w.in(time.Second+time.Duration(s.w.rng.IntN(1000))*time.Millisecond, h.ask)
				}
			}
		}
	}
	return rev, now, err
}

func (w *world) in(d time.Duration, call func()) {
	w.seq++
	heap.Push(&w.agenda, event{w.now.Add(d), w.seq, call})
}

// rush is the time within which all hosts want to reboot.
const rush = 10 * time.Minute

// outages is how often the store is away, for ten minutes each.
const outages = 4

func newWorld(t *testing.T, seed uint64, hosts, limit, zoneMax, budget int) *world {
	w := &world{
		t: t, rng: rand.New(rand.NewPCG(seed, 1)), now: time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC), memory: lock.NewMemory(),
		byName: map[string]*simHost{}, down: map[string]int{}, max: limit, zoneMax: zoneMax,
	}
	begin := w.now
	times := [outages]time.Duration{20 * time.Minute, 2 * time.Hour, 5 * time.Hour, 9 * time.Hour}
	w.away = func(now time.Time) bool {
		for _, o := range times {
			if d := now.Sub(begin.Add(o)); d >= 0 && d < 10*time.Minute {
				return true
			}
		}
		return false
	}
	operator := lock.On(simStore{w.memory, w}, lock.Options{Now: func() time.Time { return w.now }, By: "operator"})
	p := lock.DefaultPolicy()
	p.Max, p.ZoneMax, p.FailureBudget, p.BootDeadline, p.RebootTime = limit, zoneMax, budget, lock.Duration(30*time.Minute), lock.Duration(2*time.Minute)
	if err := operator.SetPolicy(t.Context(), "fleet", p, "simulation"); err != nil && !errors.Is(err, lock.ErrUnavailable) {
		t.Fatal(err)
	}
	for i := range hosts {
		h := &simHost{w: w, name: fmt.Sprintf("host-%05d", i), zone: string(rune('a' + i%3)), state: "idle"}
		h.off = time.Duration(w.rng.NormFloat64() * float64(time.Minute))
		switch i % 5 {
		case 1:
			h.forget = true
		case 3:
			h.never, h.off = true, time.Duration(w.rng.NormFloat64()*float64(1000*24*time.Hour))
		}
		h.keeper = lock.On(simStore{w.memory, w}, lock.Options{
			Now:          h.clock,
			Synchronised: func() bool { return !h.never && !w.now.Before(h.syncs) },
			Pause:        func(context.Context, time.Duration) error { return nil },
		})
		w.hosts = append(w.hosts, h)
		w.byName[h.name] = h
		w.in(time.Duration(w.rng.Float64()*float64(rush)), h.ask)
	}
	var look func()
	look = func() { // the operator looks every hour and takes the slots of those who are gone
		s, err := operator.State(t.Context(), "fleet")
		if err == nil {
			for _, h := range s.Holders {
				if gone := w.byName[h.Host]; gone.state == "gone" && !h.Late.IsZero() {
					if !gone.buried { // from now on nobody counts it as one that is down for a while
						gone.buried = true
						gone.up()
					}
					_ = operator.Release(t.Context(), "fleet", h.Host, lock.Verdict{Outcome: lock.Forced, Reason: "gone"})
				}
			}
		}
		if !w.over() {
			w.in(time.Hour, look)
		}
	}
	w.in(time.Hour, look)
	return w
}

func (w *world) over() bool {
	for _, h := range w.hosts {
		if h.state == "idle" || h.state == "waiting" || h.state == "down" {
			return false
		}
	}
	return true
}

func (h *simHost) ask() {
	w := h.w
	if h.state != "idle" && h.state != "waiting" {
		return
	}
	w.requests++
	if h.queued.IsZero() {
		h.queued = w.now
	}
	h.state = "waiting"
	st, err := h.keeper.Request(w.t.Context(), lock.Claim{Group: "fleet", Host: h.name, Zone: h.zone, From: "1", To: "2"})
	switch {
	case err != nil:
		h.again()
	case st.Halted != "":
		if w.halted.IsZero() {
			w.halted = w.now
		}
		h.state = "halted"
	case st.Granted:
		h.reboot()
	default: // woken by the watch; and, as real hosts do, it says now and then that it still waits
		h.asks++
		n := h.asks
		w.in(20*time.Minute+time.Duration(w.rng.IntN(300))*time.Second, func() {
			if h.asks == n {
				h.ask()
			}
		})
	}
}

// again asks later, after a failure. A host in the queue needs no timer but this one.
func (h *simHost) again() {
	h.w.in(time.Minute+time.Duration(h.w.rng.IntN(60))*time.Second, h.ask)
}

func (h *simHost) reboot() {
	w := h.w
	err := h.keeper.Mark(w.t.Context(), "fleet", h.name, lock.Mark{Phase: lock.Rebooting})
	if errors.Is(err, lock.ErrHalted) {
		h.state = "halted"
		h.tell(lock.Verdict{Outcome: lock.Cancelled}, "halted")
		return
	}
	if err != nil {
		h.again()
		return
	}
	if w.away(w.now) {
		w.t.Errorf("%s reboots while the store is away", h.name)
	}
	if !w.halted.IsZero() {
		w.afterHalt++
	}
	h.state, h.begun = "down", w.now
	w.total++
	w.down[h.zone]++
	w.most = max(w.most, w.total)
	if w.total > w.max || w.down[h.zone] > w.zoneMax {
		w.t.Fatalf("%d hosts are down, %d in zone %s; at most %d and %d may be", w.total, w.down[h.zone], h.zone, w.max, w.zoneMax)
	}
	takes := time.Duration(float64(2*time.Minute) * math.Exp(w.rng.NormFloat64()/4))
	switch dice := w.rng.Float64(); {
	case dice < 0.0005:
		h.state = "gone" // until the operator comes it counts as down
	case dice < 0.02:
		w.failed++
		w.in(2*takes, func() {
			h.up()
			h.judge(lock.Verdict{Outcome: lock.Failed, Version: "2", Reason: "does not come up"}, "failed")
		})
	default:
		w.in(takes, func() { h.up(); h.judge(lock.Verdict{Outcome: lock.Healthy, Version: "2"}, "done") })
	}
}

// judge says that the host is up again, and a little later how.
func (h *simHost) judge(v lock.Verdict, then string) {
	w := h.w
	if h.booted = w.now; h.forget {
		h.syncs = w.now.Add(5 * time.Minute)
	}
	_ = h.keeper.Mark(w.t.Context(), "fleet", h.name, lock.Mark{Phase: lock.Booted, Version: v.Version})
	w.in(20*time.Second, func() { h.tell(v, then) })
}

// wronged fails if a host was found to stay away that came back in time.
func (w *world) wronged() {
	for _, h := range w.hosts {
		for _, e := range h.trail {
			if (e.What == "late" || e.What == "left the queue") && h.state != "gone" {
				w.t.Errorf("%s (%+v off, never set %v, anew with each boot %v): %s %s", h.name, h.off, h.never, h.forget, e.What, e.Why)
			}
		}
	}
}

func (h *simHost) up() {
	h.w.total--
	h.w.down[h.zone]--
}

// tell gives the verdict, and again until the store has taken it.
func (h *simHost) tell(v lock.Verdict, then string) {
	w := h.w
	if err := h.keeper.Release(w.t.Context(), "fleet", h.name, v); err != nil {
		w.in(time.Minute, func() { h.tell(v, then) })
		return
	}
	h.state = then
	w.done++
	w.finished = w.now
}

func (w *world) run(until func() bool) {
	for len(w.agenda) > 0 && !until() {
		e := heap.Pop(&w.agenda).(event)
		w.now = e.at
		e.call()
		if w.now.Sub(time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC)) > 60*24*time.Hour {
			w.t.Fatal("the rollout takes more than sixty days")
		}
	}
}

func seeds(t *testing.T) (list []uint64, hosts int) {
	n := uint64(2)
	hosts = 200
	if testing.Short() {
		n = 1
	}
	if os.Getenv("FLIPSIDE_LONG") != "" {
		hosts, n = 10000, 4
	}
	if s := os.Getenv("FLIPSIDE_SEED"); s != "" {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return []uint64{v}, hosts
	}
	for i := range n {
		list = append(list, i+1)
	}
	return list, hosts
}

func TestSimulationFinishes(t *testing.T) {
	list, hosts := seeds(t)
	for _, seed := range list {
		t.Run(fmt.Sprint("seed-", seed), func(t *testing.T) {
			const limit, zoneMax = 20, 8
			w := newWorld(t, seed, hosts, limit, zoneMax, 0)
			var forecast time.Time
			w.in(rush+time.Minute, func() { // everybody has asked
				s, err := lock.On(w.memory, lock.Options{Now: func() time.Time { return w.now }}).State(t.Context(), "fleet")
				if err != nil {
					t.Fatal(err)
				}
				turns, never := s.Forecast(w.now)
				if len(never) > 0 {
					t.Errorf("%d hosts get no turn by the forecast", len(never))
				}
				for _, turn := range turns {
					if turn.Done.After(forecast) {
						forecast = turn.Done
					}
				}
			})
			w.run(func() bool { return w.over() })
			w.wronged()
			counts, lost := map[string]int{}, 0
			longest := time.Duration(0)
			for _, h := range w.hosts {
				counts[h.state]++
				longest = max(longest, h.begun.Sub(h.queued))
				if h.lostTurn() {
					lost++
				}
			}
			if counts["done"]+counts["failed"]+counts["gone"] != hosts {
				t.Errorf("not everybody had a turn: %v", counts)
			}
			if late, host := overtaken(w.hosts); late > 30*time.Minute {
				t.Errorf("%s was overtaken for %s by hosts of its zone that came after it", host, late)
				for _, e := range w.byName[host].trail {
					t.Logf("%s %s %s", e.Time.Format(time.TimeOnly), e.What, e.Why)
				}
			}
			if most := limit * outages; lost > most {
				t.Errorf("%d hosts lost a turn that they could not use in time, more than could have had one before the %d outages", lost, outages)
			}
			begin := time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC)
			t.Logf("%d hosts: %v, at most %d down, %.2f requests a host, finished after %s, longest wait %s, %d lost a turn", hosts, counts, w.most,
				float64(w.requests)/float64(hosts), w.finished.Sub(begin).Round(time.Minute), longest.Round(time.Minute), lost)
			if forecast.IsZero() {
				t.Log("everybody was done before the forecast")
				return
			}
			took, said := w.finished.Sub(begin), forecast.Sub(begin)
			t.Logf("the forecast after the rush was %s, %.0f %% of what it took", said.Round(time.Minute), 100*said.Hours()/took.Hours())
			if took > said+said/4+time.Hour || took < said-said/4-time.Hour {
				t.Errorf("it took %s, the forecast was %s", took, said)
			}
		})
	}
}

// overtaken is the longest time that a host of the same zone, which had asked later, was served before another. First come, first served means
// none; but a host that cannot reach the store when it is served begins a little later.
// Whoever had a turn and could not use it in time queues again, at the end.
func overtaken(hosts []*simHost) (longest time.Duration, name string) {
	byZone := map[string][]*simHost{}
	for _, h := range hosts {
		if !h.begun.IsZero() && !h.lostTurn() {
			byZone[h.zone] = append(byZone[h.zone], h)
		}
	}
	for _, hs := range byZone {
		slices.SortFunc(hs, func(a, b *simHost) int { return b.queued.Compare(a.queued) })
		first := hs[0].begun // of those who came later
		for _, h := range hs {
			if d := h.begun.Sub(first); d > longest {
				longest, name = d, h.name
			}
			if h.begun.Before(first) {
				first = h.begun
			}
		}
	}
	return longest, name
}

func (h *simHost) lostTurn() bool {
	return slices.ContainsFunc(h.trail, func(e lock.Entry) bool { return e.What == "taken back" })
}

// The failure budget stops the version: no host begins after the halt, and no more fail than the budget and those that were under way.
func TestSimulationHalts(t *testing.T) {
	list, hosts := seeds(t)
	for _, seed := range list {
		t.Run(fmt.Sprint("seed-", seed), func(t *testing.T) {
			const limit, zoneMax, budget = 20, 8, 3
			w := newWorld(t, seed, hosts, limit, zoneMax, budget)
			w.run(func() bool { return w.over() })
			w.wronged()
			s, err := lock.On(w.memory, lock.Options{Now: func() time.Time { return w.now }}).State(t.Context(), "fleet")
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d of %d hosts had a turn, %d failed; %s", w.done, hosts, w.failed, s.Halts["2"].Reason)
			if len(s.Halts) == 0 {
				t.Fatalf("%d hosts failed and nothing was halted", w.failed)
			}
			if w.afterHalt > 0 {
				t.Errorf("%d hosts rebooted after the halt was known", w.afterHalt)
			}
			if w.failed > budget+limit-1 {
				t.Errorf("%d hosts failed; the budget is %d and %d may be under way", w.failed, budget, limit-1)
			}
		})
	}
}
