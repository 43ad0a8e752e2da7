package updater

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
)

// world is a host without hardware: two slots with what they hold, a saved state, a server, a semaphore. Every effect is
// one step of it, and it can die between any two.
type world struct {
	t       *testing.T
	now     time.Time
	slots   map[string]*worldSlot
	running string
	boots   int
	saved   []byte
	core    *Core
	offered string
	sick    map[string]bool // versions that are not healthy

	dieAt   int  // the effect before which it dies, counted from 0; -1 never
	power   bool // it dies of a power cut, not of a kill -9
	effects int

	queue    []Event // what comes of effects
	holding  bool    // the semaphore's slot
	verdicts []Verdict
	reports  []omaha.Event
}

type worldSlot struct {
	SlotFacts
	version string
	whole   bool // complete and verified
}

type died struct{}

func newWorld(t *testing.T, dieAt int, power bool) *world {
	w := &world{
		t: t, now: time.Date(2026, 1, 5, 12, 0, 0, 0, time.UTC), dieAt: dieAt, power: power, offered: "2.0.0", running: "USR-A", boots: 1,
		slots: map[string]*worldSlot{
			"USR-A": {SlotFacts{Priority: 1, Successful: true}, "1.0.0", true},
			"USR-B": {SlotFacts{}, "", false},
		},
		sick: map[string]bool{},
	}
	w.start()
	return w
}

// choose is what the boot loader does.
func (w *world) choose() string {
	best := ""
	for _, label := range []string{"USR-A", "USR-B"} {
		s := w.slots[label]
		if s.Bootable() && (best == "" || s.Priority > w.slots[best].Priority) {
			best = label
		}
	}
	if best == "" {
		w.t.Fatal("the boot loader finds no slot")
	}
	return best
}

func (w *world) boot() {
	w.boots++
	w.running = w.choose()
	s := w.slots[w.running]
	if !s.whole {
		w.t.Fatalf("booted %s, which is not complete", w.running)
	}
	if s.Tries > 0 {
		s.Tries--
	}
	w.start()
}

func (w *world) start() {
	st := State{Phase: Idle}
	if w.saved != nil {
		st = State{}
		if err := json.Unmarshal(w.saved, &st); err != nil {
			w.t.Fatal(err)
		}
	}
	timing := DefaultTiming()
	w.core = &Core{State: st, Timing: timing}
	f := Facts{BootID: fmt.Sprint("boot", w.boots), Running: w.running, Version: w.slots[w.running].version, Slots: map[string]SlotFacts{}}
	for l, s := range w.slots {
		f.Slots[l] = s.SlotFacts
		if l != w.running {
			f.Other = l
		}
	}
	w.queue = []Event{Start{f}}
}

// run lets the world go on until nothing more is to be done, and reports how it died, if it did.
func (w *world) run() (alive bool) {
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(died); !ok {
				panic(r)
			}
			alive = false
		}
	}()
	for range 300 {
		var ev Event
		if len(w.queue) > 0 {
			ev, w.queue = w.queue[0], w.queue[1:]
		} else {
			next := w.core.Next()
			if next.IsZero() {
				w.t.Fatalf("the core waits for nothing in phase %s", w.core.State.Phase)
			}
			if w.settled() {
				return true
			}
			if next.After(w.now) {
				w.now = next
			}
			ev = Wake{}
		}
		for _, e := range w.core.Step(w.now, ev) {
			if w.effects == w.dieAt {
				panic(died{})
			}
			w.effects++
			w.do(e)
			w.check()
		}
		if err := wakesInVain(w.core); err != nil {
			w.t.Fatal(err)
		}
	}
	w.t.Fatalf("no end: phase %s, %s", w.core.State.Phase, w.core.Status(w.now).Why)
	return false
}

// settled reports whether the host has taken, or given up, what is offered, and has told everyone.
func (w *world) settled() bool {
	st := w.core.State
	_, failed := st.Failures[w.offered]
	return st.Phase == Idle && st.Verdict == nil && len(st.Reports) == 0 && (w.slots[w.running].version == w.offered || failed)
}

func (w *world) do(e Effect) {
	say := func(ev Event) { w.queue = append(w.queue, ev) }
	switch e := e.(type) {
	case Save:
		data, err := json.Marshal(w.core.State)
		if err != nil {
			w.t.Fatal(err)
		}
		w.saved = data
	case AskServer:
		if w.slots[w.running].version == w.offered {
			say(Answered{Reason: "up to date"})
		} else {
			say(Answered{Offer: &omaha.Offer{Version: w.offered, Size: 1, SHA256: sha256.Sum256([]byte(w.offered))}})
		}
	case AskGates:
		if e.Stage == BeforeReboot {
			w.holding = true
		}
		say(GatesAnswered{Stage: e.Stage, Answers: []reboot.Answer{{Gate: "all", Verdict: reboot.Go}}})
	case Apply:
		s := w.slots[w.core.State.Update.ToSlot]
		s.SlotFacts = SlotFacts{} // first of all
		s.version, s.whole = w.core.State.Update.Offer.Version, false
		say(Checkpointed{json.RawMessage(`1`)})
		s.whole = true
		say(Applied{})
	case Arm:
		u := w.core.State.Update
		s := w.slots[u.ToSlot]
		if !s.whole || s.version != u.Offer.Version {
			w.t.Fatal("armed a slot that was not verified")
		}
		s.SlotFacts = SlotFacts{Priority: w.slots[w.running].Priority + 1, Tries: 1}
		say(ArmedNow{})
	case Disarm:
		w.slots[e.Slot].SlotFacts = SlotFacts{}
	case Stay:
		w.slots[e.Slot].SlotFacts = SlotFacts{Priority: 1, Successful: true}
		w.slots[w.running].Priority = 2
	case Reboot:
		if w.core.State.Phase == Rebooting && !w.holding {
			w.t.Fatal("rebooted without holding the semaphore")
		}
		w.boot()
	case Health:
		v := w.slots[w.running].version
		say(Judged{Good: !w.sick[v], Reason: v + " is sick"})
	case Confirm:
		s := w.slots[w.running]
		s.Successful, s.Tries = true, 0
		say(Confirmed{})
	case Deliver:
		w.reports = append(w.reports, w.core.State.Reports...)
		say(Delivered{N: len(w.core.State.Reports)})
	case GiveVerdict:
		w.holding = false
		w.verdicts = append(w.verdicts, *w.core.State.Verdict)
		say(VerdictTaken{})
	case LeaveQueue:
		w.holding = false
	}
}

// check holds at every instant: the boot loader finds a slot that is complete.
func (w *world) check() {
	w.t.Helper()
	if s := w.slots[w.choose()]; !s.whole {
		w.t.Fatalf("after effect %d the boot loader would take %s, which is not complete", w.effects, s.version)
	}
}

// TestDiesAnywhere kills the process, and cuts the power, before every single effect of an update, good and bad, and again before every
// effect of what follows. The host must end on a good release with its semaphore slot given back, and must never be without a slot to boot.
func TestDiesAnywhere(t *testing.T) {
	for _, sick := range []bool{false, true} {
		for _, power := range []bool{false, true} {
			t.Run(fmt.Sprintf("sick=%v/power=%v", sick, power), func(t *testing.T) {
				deaths := 0
				for first := 0; ; first++ {
					reached := false
					for second := -1; second < 12; second++ {
						w := newWorld(t, first, power)
						w.sick["2.0.0"] = sick
						if !w.run() {
							reached = true
							deaths++
							w.restart(second)
							if !w.run() {
								deaths++
								w.restart(-1)
								w.run()
							}
						}
						w.judge(sick)
						if t.Failed() {
							t.Fatalf("died before effect %d, then before effect %d", first, second)
						}
					}
					if !reached {
						break
					}
				}
				if deaths < 100 {
					t.Errorf("only %d deaths: the test does not do what it says", deaths)
				}
				t.Logf("%d deaths", deaths)
			})
		}
	}
}

func (w *world) restart(dieIn int) {
	w.dieAt = -1
	if dieIn >= 0 {
		w.dieAt = w.effects + dieIn
	}
	if w.power {
		w.boot()
		return
	}
	w.start()
}

func (w *world) judge(sick bool) {
	w.t.Helper()
	run := w.slots[w.running]
	_, failed := w.core.State.Failures["2.0.0"]
	switch {
	case sick && run.version != "1.0.0":
		w.t.Errorf("runs the sick release")
	case !sick && run.version != "2.0.0" && !(w.power && failed):
		w.t.Errorf("runs %s", run.version)
	}
	if !run.Successful {
		w.t.Errorf("%s is not marked successful", w.running)
	}
	if w.holding {
		w.t.Errorf("the semaphore is still held")
	}
	if other := w.slots[w.core.Facts.Other]; other.Bootable() && !other.whole {
		w.t.Errorf("the other slot is bootable and not complete")
	}
	if other := w.slots[w.core.Facts.Other]; other.Bootable() && !other.Successful {
		w.t.Errorf("the other slot boots next, and nobody waits for that")
	}
	if sick {
		told := false
		for _, v := range w.verdicts {
			told = told || (!v.Healthy && v.Version == "2.0.0")
		}
		if !told && failed {
			w.t.Errorf("the cluster was not told that the release is bad")
		}
	}
}
