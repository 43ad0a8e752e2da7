package updater

import (
	"errors"
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

// minGateGap is the least time between two questions to the reboot gates.
const minGateGap = 250 * time.Millisecond

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

func (s *steps) jitter(d time.Duration) time.Duration {
	if s.c.Rand == nil {
		return d
	}
	return d + time.Duration((2*s.c.Rand()-1)*s.c.Timing.Jitter*float64(d))
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

// start holds the saved state against what the boot and the disk say. The disk wins.
func (s *steps) start(f Facts) {
	c := s.c
	c.Facts = f
	st := &c.State
	s.holds(f.Running, f.Version)
	s.checkIn(c.Timing.FirstCheck)
	u := st.Update
	if u == nil {
		s.startWithoutUpdate()
		return
	}
	newBoot := u.BootID != f.BootID
	switch {
	case f.Running == u.ToSlot && st.Phase == Failing && newBoot && u.Healthless != "":
		// The boot loader chose the bad side although its bits are gone. Another reboot would change nothing.
		s.failed(SlotTrouble, fmt.Errorf("slot %s was judged bad (%s) and was booted again; repair the other slot", u.ToSlot, u.Healthless))
		s.do(Save{})
	case f.Running == u.ToSlot && st.Phase == Failing:
		s.failing()
	case f.Running == u.ToSlot:
		// Also when the phase is still Applying: power was lost between arming the slot and saving that.
		s.trial()
	case f.Running != u.FromSlot:
		s.failed(SlotTrouble, fmt.Errorf("the host runs from %s, neither the old slot %s nor the new slot %s of the update to %q; the update is forgotten", f.Running, u.FromSlot, u.ToSlot, u.Offer.Version))
		s.forget()
	case st.Phase == Applying && u.Rollback != "":
		s.begin(Arm{})
	case u.Rollback != "" && s.slot(u.ToSlot).Successful:
		// Power was lost between undoing the rollback and saving that.
		if st.Phase == Rebooting {
			s.giveBack("the host does not go back")
		}
		s.stay()
	case st.Phase == Applying:
		// Resume, but ask the server first: the offer may be gone.
		s.note(UpdateResumed, "the update to %s was interrupted and goes on", u.Offer.Version)
		s.unarm(u.ToSlot) // it was armed, and that was not saved: the gates would not be asked about it
		c.checkDue = s.now
		st.Unwedge = true
		s.wake()
	case s.slot(u.ToSlot).Bootable():
		// Not booted yet: the daemon was restarted, or the machine was started from the old slot by hand.
		if st.Phase == Rebooting {
			s.enter(Armed)
			s.giveBack("the host did not boot the new side")
		}
		s.enter(Armed)
		c.gatesDue = s.now
		s.wake()
	case st.Phase == Armed && s.slot(u.ToSlot).Priority == 0 && (newBoot || st.Failures[u.Offer.Version].Held):
		// Cut short between giving the release up and saving that: nobody has booted it. A boot loader spends tries and leaves the priority.
		s.note(Ordered, "release %s was given up before it was booted", u.Offer.Version)
		s.do(Disarm{u.ToSlot}) // its secrets come after its bits
		s.do(LeaveQueue{"given up"})
		s.report(omaha.Failed(codeIgnoredPerPolicy))
		s.forget()
	case newBoot:
		reason := u.Healthless
		switch {
		case reason != "":
		case st.Phase == Trial:
			reason = "the first boot ended before the host was known to be healthy"
		default:
			reason = "the new side did not come up"
		}
		s.fellBack(reason)
	default:
		// Same boot, and the slot is not bootable: somebody took its bits away. Write and verify it again.
		s.enter(Applying)
		c.checkDue = s.now
		s.do(Save{})
		s.wake()
	}
}

func (s *steps) startWithoutUpdate() {
	c := s.c
	st := &c.State
	if st.Phase != Idle {
		s.enter(Idle)
	}
	if run := s.slot(c.Facts.Running); !run.Successful && c.Facts.Running != "" {
		// A slot on trial that this state knows nothing of: a fresh image, or the state was lost.
		st.Update = &Update{Offer: omaha.Offer{Version: c.Facts.Version}, FromSlot: c.Facts.Other, ToSlot: c.Facts.Running, Started: s.now, BootID: c.Facts.BootID}
		s.trial()
		return
	}
	if st.Verdict == nil {
		// In case the host still holds a reboot slot from a time that this state does not know. Freeing what is not held does nothing.
		st.Verdict = &Verdict{Healthy: true, Version: c.Facts.Version}
	}
	s.do(Save{})
	s.tell()
	s.deliver()
	s.wake()
}

func (s *steps) trial() {
	u := s.c.State.Update
	applying := s.c.State.Phase == Applying // then the slot may still hold what was there before
	s.enter(Trial)
	u.BootID = s.c.Facts.BootID
	if u.Rollback != "" || applying {
		u.Offer.Version = s.c.Facts.Version
	}
	s.do(Save{})
	s.note(TrialBoot, "first boot of release %s from %s: checking its health", u.Offer.Version, u.ToSlot)
	s.begin(Health{})
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

// again keeps the time at which the gates are due through an answer that is on its way, and to a question from before.
func (s *steps) again() {
	if s.c.busy && s.c.State.Phase == Armed {
		s.c.gatesAgain = s.c.gatesDue
	}
}

func orNow(t, now time.Time) time.Time {
	if t.IsZero() {
		return now
	}
	return t
}

// backoff is the wait after n failures in a row.
func (s *steps) backoff(n int) time.Duration {
	d := s.c.Timing.MinRetry << min(n-1, 20)
	if d <= 0 || d > s.c.Timing.Interval {
		d = s.c.Timing.Interval
	}
	return d
}

// wish bounds how long a server may ask a host to wait: it can neither keep hosts from asking for more than a day, nor make
// them ask all the time.
func (s *steps) wish(d time.Duration) time.Duration {
	return min(max(d, s.c.Timing.Interval/2), max(omaha.MaxPoll, s.c.Timing.Interval))
}

// checkAgain plans the check after n in a row that were of no use, and never earlier than the server asks for.
func (s *steps) checkAgain(n int, retry time.Duration) {
	c := s.c
	s.checkIn(s.backoff(n))
	if wish := s.wish(retry); retry > 0 && s.now.Add(wish).After(c.checkDue) {
		c.checkDue = s.now.Add(wish)
		if c.Rand != nil { // not all hosts at the same moment
			c.checkDue = c.checkDue.Add(time.Duration(c.Rand() * c.Timing.Jitter * float64(wish)))
		}
	}
}

func (s *steps) answered(ev Answered) {
	c := s.c
	st := &c.State
	st.LastCheck = s.now
	if ev.Err != nil {
		st.CheckFails++
		s.checkAgain(st.CheckFails, ev.Retry)
		s.failed(CheckFailed, fmt.Errorf("checking for an update: %w", ev.Err))
		s.do(Save{})
		s.wake()
		return
	}
	st.CheckFails = 0
	st.Unwedge = ev.Wedged
	if ev.Wedged {
		c.wedged++
		s.checkAgain(c.wedged, ev.Retry)
	} else {
		c.wedged = 0
		wait := c.Timing.Interval
		if ev.Retry > 0 {
			wait = s.wish(ev.Retry)
		}
		s.checkIn(wait)
	}
	switch u := st.Update; {
	case ev.Offer == nil:
		st.LastAnswer = ev.Reason
		if st.Phase == Applying && !ev.Wedged {
			s.note(Withdrawn, "the server took the offer of release %s back: %s", u.Offer.Version, ev.Reason)
			s.forget()
			return
		}
		s.do(Save{})
	case u != nil && u.Rollback != "":
		st.LastAnswer = fmt.Sprintf("release %s; the host goes back to %s first", ev.Offer.Version, u.ToSlot)
		s.do(Save{})
	case st.Phase == Armed && sameRelease(u.Offer, *ev.Offer):
		st.LastAnswer = fmt.Sprintf("release %s, which is in place already", ev.Offer.Version)
		s.do(Save{})
	default:
		st.LastAnswer = fmt.Sprintf("release %s is offered", ev.Offer.Version)
		c.offered = ev.Offer
		s.begin(AskGates{Stage: BeforeDownload, Offer: *ev.Offer})
		return
	}
	s.wake()
}

// downloadGates starts the download if every gate says go. A host on its way to another release gives that up for a newer offer.
func (s *steps) downloadGates(ev GatesAnswered) {
	c := s.c
	st := &c.State
	offer := c.offered
	c.offered = nil
	if offer == nil {
		s.wake()
		return
	}
	if q, ok := s.quarantine(*offer); ok {
		c.answers = append(c.answers, q)
	}
	if a, stop := reboot.First(c.answers); stop {
		s.do(Note{Kind: NotTaken, Text: fmt.Sprintf("release %s is not taken: %s", offer.Version, a.Why), Version: offer.Version, Gate: a.Gate, Phase: st.Phase})
		if !a.Ask.IsZero() && a.Ask.Before(c.checkDue) && a.Ask.After(s.now) {
			c.checkDue = a.Ask
		}
		s.do(Save{})
		s.wake()
		return
	}
	instead := ""
	switch {
	case st.Update != nil && st.Phase == Applying && samePayload(st.Update.Offer, *offer):
		st.Update.Offer = *offer // its addresses may have changed
	default:
		if st.Phase == Armed {
			instead = fmt.Sprintf(" instead of release %s, which is given up", st.Update.Offer.Version)
			s.do(LeaveQueue{"release " + offer.Version + " is newer"})
			s.unarm(st.Update.ToSlot)
		}
		st.Update = &Update{Offer: *offer, FromSlot: c.Facts.Running, FromVer: c.Facts.Version, ToSlot: c.Facts.Other, Started: s.now}
	}
	s.unarm(st.Update.ToSlot)
	st.Update.BootID = c.Facts.BootID
	s.enter(Applying)
	s.setSlot(st.Update.ToSlot, SlotFacts{})
	s.holds(st.Update.ToSlot, "")
	s.do(Save{})
	s.note(UpdateStarted, "taking release %s to %s%s", offer.Version, st.Update.ToSlot, instead)
	s.report(omaha.DownloadStarted())
	s.begin(Apply{})
}

// samePayload reports whether two offers are of the same bytes.
func samePayload(a, b omaha.Offer) bool { return a.SHA256 == b.SHA256 && a.Size == b.Size }

// sameRelease reports whether two offers are of one release: the same bytes, or it whole and as a delta.
func sameRelease(a, b omaha.Offer) bool {
	return samePayload(a, b) || a.Version == b.Version && a.Delta != b.Delta
}

// unfit reports whether an error, by its Omaha code, may lie in what a delta is applied to, or in the delta, and not in the release that it makes: the
// slot or a file does not hold what it should, the old image is another one, wrong hash, malformed, unknown operation.
func unfit(code int) bool {
	switch code {
	case 15, 16, 20, 23, 29, 45:
		return true
	}
	return false
}

// quarantine is the gate that remembers versions that failed here, because no server does.
func (s *steps) quarantine(o omaha.Offer) (reboot.Answer, bool) {
	f, ok := s.c.State.Failures[o.Version]
	if ok && f.Held {
		return reboot.Answer{
			Gate: "quarantine", Verdict: reboot.Wait, Since: f.Last,
			Why:  fmt.Sprintf("release %s was %s", o.Version, f.Reason),
			Hint: "flipside check --forgive " + o.Version + " takes it again", Evidence: "flipside history",
		}, true
	}
	if !ok || !s.now.Before(f.Until) {
		return reboot.Answer{}, false
	}
	return reboot.Answer{
		Gate:    "quarantine",
		Verdict: reboot.Wait,
		Why:     fmt.Sprintf("release %s failed on this host (%s)", o.Version, f.Reason),
		Since:   f.Last,
		Ask:     f.Until,
		Hint:    "flipside check --forgive " + o.Version + " tries it again", Evidence: "flipside history",
	}, true
}

func (s *steps) quarantined(version, reason string) {
	st := &s.c.State
	if st.Failures == nil {
		st.Failures = map[string]Failure{}
	}
	f := st.Failures[version]
	f.Count++
	f.Reason, f.Last = reason, s.now
	f.Until = s.now.Add(s.c.Timing.Quarantine << min(f.Count-1, 4))
	st.Failures[version] = f
}

// Forgive forgets that a version failed here. If the semaphore could not be told so yet, or cannot be (FleetLock knows no failures), the slot
// is only given back: somebody has looked at it.
func (c *Core) Forgive(version string) bool {
	_, ok := c.State.Failures[version]
	if v := c.State.Verdict; v != nil && v.Version == version && !v.Healthy {
		c.State.Verdict = &Verdict{Cancelled: true, Version: version, Reason: "forgiven"}
		c.verdictDue = time.Time{}
	}
	delete(c.State.Failures, version)
	return ok
}

func (s *steps) applyFailed(ev ApplyFailed) {
	c := s.c
	st := &c.State
	if st.Update == nil {
		return
	}
	v := st.Update.Offer.Version
	if st.Update.Rollback != "" {
		s.failed(UpdateFailed, fmt.Errorf("going back to %s: %w", st.Update.ToSlot, ev.Err))
		s.stay() // whatever became of the table
		return
	}
	if ev.Transient {
		st.CheckFails++
		s.failed(UpdateFailed, fmt.Errorf("taking release %s: %w", v, ev.Err))
		s.checkIn(s.backoff(st.CheckFails))
		st.Unwedge = true
		s.do(Save{})
		s.wake()
		return
	}
	// Once: a delta that comes although none was asked for is a release like any other, with its quarantine.
	if st.Update.Offer.Delta && !st.Whole && unfit(ev.Code) {
		s.failed(UpdateFailed, fmt.Errorf("the delta to release %s cannot be used here; the whole release is asked for: %w", v, ev.Err))
		st.Whole = true
		c.checkDue = s.now
		s.forget()
		return
	}
	s.failed(UpdateRefused, fmt.Errorf("release %s is refused: %w", v, ev.Err))
	s.quarantined(v, ev.Err.Error())
	st.LastUpdate = &Done{From: c.Facts.Version, To: v, At: s.now, Reason: ev.Err.Error()}
	s.report(omaha.Failed(ev.Code))
	s.forget()
}

func (s *steps) rebootGates(ev GatesAnswered) {
	c := s.c
	st := &c.State
	if st.Phase != Armed {
		s.do(LeaveQueue{"nothing waits for a reboot any more"}) // it was given up while the gates were asked, and they may have granted a slot
		s.wake()
		return
	}
	u := st.Update
	if ev.Halted != "" {
		// The release is bad for the cluster. It must not come up here either, not even after a power cut.
		if u.Rollback != "" {
			s.warn(Halted, "release %s is halted: %s; the host does not go back to it", u.Offer.Version, ev.Halted)
			s.giveBack("halted: " + ev.Halted)
			s.stay()
			return
		}
		s.warn(Halted, "release %s is halted: %s; slot %s is made unbootable again", u.Offer.Version, ev.Halted, u.ToSlot)
		s.do(Disarm{u.ToSlot})
		s.setSlot(u.ToSlot, SlotFacts{})
		s.giveBack("halted: " + ev.Halted)
		st.LastUpdate = &Done{From: u.FromVer, To: u.Offer.Version, At: s.now, Reason: "halted for the cluster: " + ev.Halted}
		st.LastAnswer = fmt.Sprintf("release %s, which is halted for the cluster: %s", u.Offer.Version, ev.Halted)
		s.report(omaha.Failed(codeIgnoredPerPolicy))
		s.forget()
		return
	}
	if _, stop := reboot.First(ev.Answers); stop {
		c.gatesDue = s.now.Add(c.Timing.GateRetry)
		for _, a := range ev.Answers {
			if a.Verdict != reboot.Go && a.Ask.After(s.now) && a.Ask.Before(c.gatesDue) {
				c.gatesDue = a.Ask
			}
		}
		if !c.gatesAgain.IsZero() {
			c.gatesDue = c.gatesAgain
		}
		s.rebootWaits(ev.Answers)
		s.wake()
		return
	}
	s.enter(Rebooting)
	s.do(Save{})
	s.note(RebootAsked, "rebooting from %s to %s", u.FromVer, u.Offer.Version)
	s.begin(Reboot{fmt.Sprintf("update from %s to %s", u.FromVer, u.Offer.Version)})
}

// rebootWaits tells which gate the host waits for, once for each.
func (s *steps) rebootWaits(answers []reboot.Answer) {
	a, _ := reboot.First(answers)
	if s.c.toldGate == a.Gate {
		return
	}
	s.c.toldGate = a.Gate
	n := s.c.about(Note{Kind: RebootWaits, Text: fmt.Sprintf("release %s waits to reboot: %s", s.c.State.Update.Offer.Version, a.Why)})
	n.Gate = a.Gate
	s.do(n)
}

func (s *steps) rebootFailed(err error) {
	c := s.c
	s.failed(RebootStuck, fmt.Errorf("rebooting: %w", err))
	c.waive = false
	c.gatesDue = s.now.Add(c.Timing.GateRetry)
	if c.State.Phase == Rebooting {
		s.enter(Armed)
		s.giveBack("the reboot did not happen: " + err.Error())
		return
	}
	s.do(Save{})
}

// giveBack gives a reboot slot back that was not used. Like a verdict it is kept until the semaphore has confirmed it.
func (s *steps) giveBack(reason string) {
	if s.c.State.Verdict == nil { // or else there is one that frees the slot too
		s.c.State.Verdict = &Verdict{Cancelled: true, Version: s.c.State.Update.Offer.Version, Reason: reason}
	}
	s.do(Save{})
	s.tell()
}

func (s *steps) judged(ev Judged) {
	c := s.c
	u := c.State.Update
	if ev.Good {
		s.begin(Confirm{})
		return
	}
	s.failed(Unhealthy, fmt.Errorf("release %s is not healthy: %s", u.Offer.Version, ev.Reason))
	if !s.slot(u.FromSlot).Bootable() {
		s.failed(Unhealthy, errors.Join(fmt.Errorf("release %s is not healthy: %s", u.Offer.Version, ev.Reason), errors.New("there is no other slot to go back to; the health is checked again")))
		c.gatesDue = s.now.Add(c.Timing.GateRetry)
		s.do(Save{})
		return
	}
	u.Healthless = ev.Reason
	s.failing()
}

func (s *steps) failing() {
	u := s.c.State.Update
	s.enter(Failing)
	s.do(Save{})
	s.do(Disarm{u.ToSlot})
	s.note(RebootAsked, "rebooting to go back from %s", u.Offer.Version)
	s.begin(Reboot{"the new side is not healthy: " + u.Healthless})
}

func (s *steps) confirmed() {
	c := s.c
	st := &c.State
	u := st.Update
	s.setSlot(u.ToSlot, SlotFacts{Priority: max(1, s.slot(u.ToSlot).Priority), Successful: true})
	s.note(Healthy, "release %s is healthy and confirmed", u.Offer.Version)
	if u.FromVer != "" {
		st.LastUpdate = &Done{From: u.FromVer, To: u.Offer.Version, At: s.now, Good: true}
		s.report(omaha.Booted(u.FromVer))
	}
	st.Verdict = &Verdict{Healthy: true, Version: u.Offer.Version}
	delete(st.Failures, u.Offer.Version)
	st.Whole = false
	st.LastError, st.ErrorAt = "", time.Time{}
	st.LastAnswer = fmt.Sprintf("release %s, which is in place and healthy now", u.Offer.Version)
	st.Update = nil
	s.enter(Idle)
	s.do(Save{})
	s.tell()
	s.wake()
}

// fellBack is the end of an update whose new side was bad or never came up: the host runs from the old side again.
func (s *steps) fellBack(reason string) {
	c := s.c
	st := &c.State
	u := st.Update
	s.failed(FellBack, fmt.Errorf("release %s failed and the host is back on %s: %s", u.Offer.Version, c.Facts.Version, reason))
	s.quarantined(u.Offer.Version, reason)
	if u.Rollback != "" {
		delete(st.Failures, u.FromVer) // the host is on it again, so it was not taken back
	}
	st.LastUpdate = &Done{From: u.FromVer, To: u.Offer.Version, At: s.now, Reason: reason}
	st.Verdict = &Verdict{Version: u.Offer.Version, Reason: reason}
	if u.Rollback != "" {
		// One host that cannot go back says nothing about a release that the others run: it must not spend their failure budget.
		st.Verdict.Cancelled, st.Verdict.Reason = true, "going back failed: "+reason
	}
	s.report(omaha.Failed(omaha.CodeRollback))
	st.Update = nil
	s.enter(Idle)
	s.do(Save{})
	s.do(Disarm{u.ToSlot})
	s.tell()
	s.wake()
}
