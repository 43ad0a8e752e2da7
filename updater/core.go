package updater

import (
	"fmt"
	"maps"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
)

// Timing says how often things are tried. The zero value is not useful; see [DefaultTiming].
type Timing struct {
	FirstCheck time.Duration // after the start of the daemon
	Interval   time.Duration // between checks
	Jitter     float64       // each wait is stretched or shrunk by up to this share
	MinRetry   time.Duration // first wait after a failed check or download; doubles with each failure, up to Interval
	GateRetry  time.Duration // between two questions to gates that name no time
	Quarantine time.Duration // a version that failed is not tried for this long; doubles with each failure, up to 16 times
}

// DefaultTiming is that of a host in the field: the intervals of the older update engines.
func DefaultTiming() Timing {
	return Timing{
		FirstCheck: 7 * time.Minute,
		Interval:   45 * time.Minute,
		Jitter:     0.1,
		MinRetry:   time.Minute,
		GateRetry:  time.Minute,
		Quarantine: 24 * time.Hour,
	}
}

// codeIgnoredPerPolicy tells the server that the release was put aside, not that it failed here.
const codeIgnoredPerPolicy = 35

// maxReports bounds the events kept for a server that is away. The oldest go first: the newest say how the host is.
const maxReports = 16

// Core decides. It is a state machine without input or output: every method returns at once, and the same events
// at the same times lead to the same effects.
type Core struct {
	State  State
	Facts  Facts
	Timing Timing
	// Rand returns a number in [0, 1) and spreads a fleet's checks. Nil means no jitter.
	Rand func() float64

	busy         bool // an effect that reports back is under way
	checkDue     time.Time
	wedged       int // answers in a row by which this host is mid-update
	gatesDue     time.Time
	gatesAsked   time.Time
	gatesAgain   time.Time // when the gates are due again once they have answered: something changed while they were asked
	verdictDue   time.Time
	deliverDue   time.Time
	telling      bool
	delivering   bool
	onDemand     bool
	offered      *omaha.Offer // waits for the download gates
	answers      []reboot.Answer
	answersStage Stage
	waive        bool   // somebody wants the reboot whatever the host's own gates say
	toldGate     string // that the host waits for, and of which this was told
}

// Answers returns what the gates said last, and which gates they were.
func (c *Core) Answers() (Stage, []reboot.Answer) { return c.answersStage, c.answers }

// Queued reports whether the cluster's semaphore is what keeps the host from rebooting, so that watching it is worth while.
func (c *Core) Queued() bool {
	a, stop := reboot.First(c.answers)
	return stop && c.State.Phase == Armed && c.answersStage == BeforeReboot && a.Gate == (*reboot.Semaphore)(nil).Name() && a.Verdict == reboot.Wait
}

// Slept brings everything that is due nearer by the time that the machine was suspended for. Times in Core carry Go's
// monotonic clock, so that a step of the wall clock moves nothing; that clock stands still during a suspend.
func (c *Core) Slept(d time.Duration) {
	for _, due := range []*time.Time{&c.checkDue, &c.gatesDue, &c.deliverDue, &c.verdictDue} {
		if !due.IsZero() {
			*due = due.Add(-d)
		}
	}
}

// NextCheck returns when the server is asked next.
func (c *Core) NextCheck() time.Time { return c.checkDue }

// Next returns when Step wants a Wake, the zero time if an effect is under way that will report back.
func (c *Core) Next() time.Time {
	var next time.Time
	earlier := func(t time.Time) {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	if !c.telling && c.State.Verdict != nil {
		earlier(c.verdictDue)
	}
	if !c.delivering && len(c.State.Reports) > 0 {
		earlier(c.deliverDue)
	}
	if !c.busy {
		switch c.State.Phase {
		case Idle, Applying:
			earlier(c.checkDue)
		case Armed:
			earlier(c.checkDue)
			if c.State.Verdict == nil { // before that they are not asked
				earlier(c.gatesDue)
			}
		case Failing, Trial:
			earlier(c.gatesDue)
		}
	}
	return next
}

// Step takes in what happened at now and returns what is to be done about it.
func (c *Core) Step(now time.Time, ev Event) []Effect {
	s := &steps{c: c, now: now}
	switch ev := ev.(type) {
	case Start:
		s.start(ev.Facts)
	case Wake:
		s.wake()
	case CheckNow:
		c.onDemand = true
		c.checkDue = now
		s.wake()
	case Answered:
		c.busy = false
		s.answered(ev)
	case GatesAnswered:
		c.busy = false
		before := c.answers
		if c.answersStage != ev.Stage {
			before = nil
		}
		c.answersStage, c.answers = ev.Stage, datedBy(before, ev.Answers, now)
		if ev.Stage == BeforeDownload {
			s.downloadGates(ev)
		} else {
			s.rebootGates(ev)
		}
	case GatesChanged:
		// At once, but never again and again: a watch that returns without reason must not become a busy loop.
		c.gatesDue = c.gatesAsked.Add(minGateGap)
		if c.gatesDue.Before(now) {
			c.gatesDue = now
		}
		s.again()
		s.wake()
	case Checkpointed:
		if u := c.State.Update; u != nil && c.State.Phase == Applying {
			u.Checkpoint = ev.Data
			s.do(Save{})
		}
	case Applied:
		s.report(omaha.DownloadFinished())
		s.do(Arm{})
	case ApplyFailed:
		c.busy = false
		s.applyFailed(ev)
	case ArmedNow:
		c.busy = false
		c.State.Update.Armed = now
		s.setSlot(c.State.Update.ToSlot, SlotFacts{Priority: s.slot(c.Facts.Running).Priority + 1, Tries: 1})
		s.holds(c.State.Update.ToSlot, c.State.Update.Offer.Version)
		c.toldGate = ""
		s.enter(Armed)
		s.do(Save{})
		s.note(UpdateArmed, "release %s is in place on %s and boots next", c.State.Update.Offer.Version, c.State.Update.ToSlot)
		if c.State.Update.Rollback == "" {
			s.report(omaha.Installed())
		}
		c.gatesDue = now
		s.wake()
	case ArmFailed:
		c.busy = false
		s.applyFailed(ApplyFailed{Err: ev.Err, Code: 5, Transient: true})
	case RebootFailed:
		c.busy = false
		s.rebootFailed(ev.Err)
	case Judged:
		c.busy = false
		s.judged(ev)
	case Confirmed:
		c.busy = false
		s.confirmed()
	case ConfirmFailed:
		c.busy = false
		s.failed(SlotTrouble, fmt.Errorf("marking the running slot successful: %w", ev.Err))
		c.gatesDue = now.Add(c.Timing.GateRetry)
	case Delivered:
		c.delivering = false
		n := min(ev.N, len(c.State.Reports))
		c.State.Reports = c.State.Reports[n:]
		if n > 0 {
			s.do(Save{})
		}
		if ev.Err != nil {
			c.deliverDue = now.Add(c.Timing.MinRetry)
		} else if len(c.State.Reports) > 0 {
			s.deliver()
		}
	case Cancelled:
		s.cancelled("by " + ev.By)
	case WentBack:
		s.wentBack(ev.By, ev.BelowFloor)
	case Hurried:
		s.hurried(ev)
	case VerdictTaken:
		c.telling = false
		if ev.Err != nil {
			s.warn(Semaphore, "the reboot slot could not be given back yet: %v", ev.Err)
			c.State.Verdict.Error = ev.Err.Error()
			c.verdictDue = now.Add(c.Timing.MinRetry)
			break
		}
		c.State.Verdict = nil
		s.do(Save{})
		s.wake()
	}
	return s.effects
}

// steps collects the effects of one Step.
type steps struct {
	c       *Core
	now     time.Time
	effects []Effect
}

func (s *steps) do(e Effect)             { s.effects = append(s.effects, e) }
func (s *steps) enter(p Phase)           { s.c.State.Phase, s.c.State.Since = p, s.now }
func (s *steps) begin(e Effect)          { s.c.busy = true; s.do(e) }
func (s *steps) slot(l string) SlotFacts { return s.c.Facts.Slots[l] }
func (s *steps) checkIn(d time.Duration) { s.c.checkDue = s.now.Add(s.jitter(d)) }
func (s *steps) setSlot(l string, f SlotFacts) {
	if s.c.Facts.Slots == nil {
		s.c.Facts.Slots = map[string]SlotFacts{}
	}
	s.c.Facts.Slots[l] = f
}

func (s *steps) failed(k Kind, err error) {
	s.c.State.LastError, s.c.State.ErrorAt = err.Error(), s.now
	s.warn(k, "%v", err)
}

func (s *steps) report(r omaha.Event) {
	rs := append(s.c.State.Reports, r)
	if len(rs) > maxReports {
		rs = rs[len(rs)-maxReports:]
	}
	s.c.State.Reports = rs
	s.deliver()
}

func (s *steps) deliver() {
	if !s.c.delivering && len(s.c.State.Reports) > 0 {
		s.c.delivering = true
		s.do(Deliver{})
	}
}

func (s *steps) tell() {
	if !s.c.telling && s.c.State.Verdict != nil {
		s.c.telling = true
		s.do(GiveVerdict{})
	}
}

// holds notes which release is complete in a slot, none if version is empty.
func (s *steps) holds(slot, version string) {
	held := maps.Clone(s.c.State.Holds)
	if held == nil {
		held = map[string]string{}
	}
	held[slot] = version
	if version == "" {
		delete(held, slot)
	}
	s.c.State.Holds = held
}

// unarm makes a slot unbootable that waits for its first boot. Whoever stops waiting for that does so before saying it: otherwise the slot would come
// up all the same, past the gates and under another release's name.
func (s *steps) unarm(slot string) {
	if f := s.slot(slot); f.Bootable() && !f.Successful && slot != s.c.Facts.Running {
		s.do(Disarm{slot})
		s.setSlot(slot, SlotFacts{})
	}
}

// forget ends an update that is not booted.
func (s *steps) forget() {
	if u := s.c.State.Update; u != nil {
		s.unarm(u.ToSlot)
	}
	s.c.State.Update = nil
	s.c.offered, s.c.waive = nil, false
	s.enter(Idle)
	s.do(Save{})
	s.wake()
}

func (s *steps) wake() {
	c := s.c
	st := &c.State
	due := func(t time.Time) bool { return !t.IsZero() && !t.After(s.now) }
	if st.Verdict != nil && due(orNow(c.verdictDue, s.now)) {
		s.tell()
	}
	if due(orNow(c.deliverDue, s.now)) {
		s.deliver()
	}
	if c.busy {
		return
	}
	switch st.Phase {
	case Armed:
		if due(c.gatesDue) && st.Verdict == nil {
			c.gatesAsked, c.gatesAgain = s.now, time.Time{}
			s.begin(AskGates{BeforeReboot, st.Update.Offer, c.waive})
			return
		}
	case Failing:
		if due(c.gatesDue) {
			s.begin(Reboot{"the new side is not healthy: " + st.Update.Healthless})
		}
		return
	case Trial:
		if due(c.gatesDue) {
			c.gatesDue = time.Time{}
			s.begin(Health{})
		}
		return
	case Rebooting:
		return
	}
	if due(c.checkDue) {
		c.checkDue = time.Time{}
		s.begin(AskServer{OnDemand: c.onDemand, Unwedge: st.Unwedge, Whole: st.Whole})
		c.onDemand = false
	}
}

func orNow(t, now time.Time) time.Time {
	if t.IsZero() {
		return now
	}
	return t
}
