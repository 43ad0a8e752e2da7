package lock

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/flipside-linux/flipside/lock/keep"
	"github.com/flipside-linux/flipside/lock/window"
)

// schema is the version of the stored state. It grows when an older version would misunderstand a newer state; a new field that an
// older version may ignore does not make it grow.
const schema = 1

// signedSchema is that of a group whose policy and whose hosts' words are signed: who does not know signatures must not reboot by it.
const signedSchema = 2

// State is what the cluster knows of a group.
type State struct {
	Schema   int                `json:"schema"`
	Policy   Policy             `json:"policy"`
	Holders  []Holder           `json:"holders,omitempty"`
	Failures map[string]Failure `json:"failures,omitempty"` // by version
	Halts    map[string]Halt    `json:"halts,omitempty"`    // by version
	Measured Duration           `json:"measured,omitempty"` // how long a healthy host is away, smoothed
	Seq      int64              `json:"seq,omitempty"`      // number of audit entries so far
	Queue    []Waiter           `json:"queue,omitempty"`    // only in answers; a store keeps it beside the state
	Tampered []string           `json:"tampered,omitempty"` // only in answers: what somebody has written who may not, or what cannot be checked here

	extra keep.Fields
}

// Holder is a host that has a slot.
type Holder struct {
	Host      string    `json:"host"`
	Zone      string    `json:"zone,omitempty"`
	Class     string    `json:"class,omitempty"`
	BootID    string    `json:"boot_id,omitempty"`
	From      string    `json:"from,omitempty"`
	To        string    `json:"to,omitempty"`
	Reason    string    `json:"reason,omitempty"`
	Phase     Phase     `json:"phase"`
	Token     int64     `json:"token,omitempty"`
	Queued    time.Time `json:"queued,omitzero"`
	Granted   time.Time `json:"granted"`
	Rebooting time.Time `json:"rebooting,omitzero"`
	Booted    time.Time `json:"booted,omitzero"`
	Version   string    `json:"version,omitempty"`     // that it came up with
	NewBootID string    `json:"new_boot_id,omitempty"` // of the boot that it came up with
	Late      time.Time `json:"late,omitzero"`         // when it was found to stay away too long
	Unsure    bool      `json:"unsure,omitempty"`      // the time of its phase is by a clock that nothing had set
	Proof     []byte    `json:"proof,omitempty"`       // signed by the host: that it has asked for the slot

	extra keep.Fields
}

// Since is when the holder entered its phase.
func (h Holder) Since() time.Time {
	switch {
	case h.Phase == Booted && !h.Booted.IsZero():
		return h.Booted
	case h.Phase != Granted && !h.Rebooting.IsZero():
		return h.Rebooting
	}
	return h.Granted
}

// Waiter is a claim in the queue.
type Waiter struct {
	Claim
	Since   time.Time `json:"since"`
	Asked   time.Time `json:"asked,omitzero"`    // when it last said that it still waits
	Arrival int64     `json:"arrival,omitempty"` // the store's revision: the order of the queue
	Unsure  bool      `json:"unsure,omitempty"`  // these times are by a clock that nothing had set
	Proof   []byte    `json:"proof,omitempty"`   // signed by the host: that it asks
}

// Failure counts what went wrong with a version.
type Failure struct {
	Hosts []FailedHost `json:"hosts"`            // the last few
	More  int          `json:"more,omitempty"`   // hosts before them
	InRow int          `json:"in_row,omitempty"` // since the last success

	extra keep.Fields
}

// FailedHost is one host that a version failed on.
type FailedHost struct {
	Host   string    `json:"host"`
	At     time.Time `json:"at"`
	Reason string    `json:"reason,omitempty"`
	Late   bool      `json:"late,omitempty"` // it has not come back in time; it may yet
}

// Count is how many hosts the version failed on.
func (f Failure) Count() int { return len(f.Hosts) + f.More }

// What is remembered of failures is bounded, because all of the state is one value in the store, which is written at every change: etcd takes 1.5 MiB.
const (
	maxFailedHosts    = 16 // of one version, in words
	maxFailedVersions = 32 // that have failed or are halted
	maxFailedReason   = 200
)

// Halt says why a version is not given to any more hosts.
type Halt struct {
	Since  time.Time `json:"since"`
	Reason string    `json:"reason"`

	extra keep.Fields
}

// Entry is a line of the audit trail.
type Entry struct {
	Seq     int64     `json:"seq"`
	Rev     int64     `json:"rev,omitempty"` // the store's revision of the change
	Time    time.Time `json:"time"`
	What    string    `json:"what"`
	Host    string    `json:"host,omitempty"`
	By      string    `json:"by,omitempty"`
	Version string    `json:"version,omitempty"`
	From    string    `json:"from,omitempty"`
	Why     string    `json:"why,omitempty"`
}

// clone makes a copy that can be changed without changing s.
func (s State) clone() State {
	s.Holders = slices.Clone(s.Holders)
	s.Failures = maps.Clone(s.Failures)
	s.Halts = maps.Clone(s.Halts)
	s.Queue, s.Tampered = nil, nil
	return s
}

func (s State) holder(host string) int {
	return slices.IndexFunc(s.Holders, func(h Holder) bool { return h.Host == host })
}

// Holder returns the record of a host that has a slot.
func (s State) Holder(host string) (Holder, bool) {
	if i := s.holder(host); i >= 0 {
		return s.Holders[i], true
	}
	return Holder{}, false
}

// RebootTime is how long a reboot is expected to take: measured, or else what the policy says, or else unknown.
func (s State) RebootTime() time.Duration {
	if s.Measured > 0 {
		return time.Duration(s.Measured)
	}
	return time.Duration(s.Policy.RebootTime)
}

// Window says whether a slot may be given out now, and until or from when: as long as a reboot takes has to be left. What takes longer than the windows last is let in at
// the beginning of one, or nobody would ever be.
func (s State) Window(now time.Time) window.Status {
	need := s.RebootTime()
	if longest := s.Policy.longest(); longest > 0 {
		need = min(need, longest-longest/4)
	}
	return s.Policy.schedule().At(now, need)
}

// Overlong says in words that reboots take longer than the windows have room for, "" if they do not.
func (s State) Overlong() string {
	each, longest := s.RebootTime().Round(time.Second), s.Policy.longest()
	if longest == 0 || each <= longest-longest/4 {
		return ""
	}
	return fmt.Sprintf("a reboot takes about %s and the longest window lasts %s: slots are only given out in its first %s", each, longest, longest/4)
}

// step collects what one change does to the state.
type step struct {
	State
	now     time.Time
	unsure  bool                     // nothing that knows the time has set the clock that now is by
	seen    map[string]time.Duration // by holder: how long this keeper has seen it in its phase
	by      string
	audit   []Entry
	remove  []string          // hosts that leave the queue
	signal  bool              // every waiter should look again
	queued  bool              // the host that makes the change is in the queue
	ledger  *ledger           // what is signed; nil in a group that asks for no signatures
	keys    map[string]string // of the hosts, if the change is one of them
	outcome Outcome           // that frees a slot
}

func (s State) begin(now time.Time, by string) *step {
	return &step{State: s.clone(), now: now.UTC().Round(0), by: by}
}

func (s *step) log(what, host, version, from, why string) {
	s.Seq++
	s.audit = append(s.audit, Entry{Seq: s.Seq, Time: s.now, What: what, Host: host, By: s.by, Version: version, From: from, Why: why})
}

// changed reports whether there is anything to commit.
func (s *step) changed() bool { return len(s.audit) > 0 || len(s.remove) > 0 }

// takeBack takes slots back that were never used. It is safe, whoever has them: nobody goes down without a mark, and that fails with ErrNotHeld
// from then on. It comes after what else a change does: a host that uses its slot now is not too late for anybody.
func (s *step) takeBack() {
	limit := time.Duration(s.Policy.GrantDeadline)
	if limit <= 0 {
		return
	}
	s.Holders = slices.DeleteFunc(s.Holders, func(h Holder) bool {
		unused := h.Phase == Granted && s.stays(h) > limit
		if unused {
			s.log("taken back", h.Host, h.To, h.From, fmt.Sprintf("not used within %s", limit))
		}
		return unused
	})
}

// findLate finds holders that stay away too long. It comes before what else a change does: what they say about a version counts for whoever is
// about to reboot into it.
func (s *step) findLate() {
	limit := time.Duration(s.Policy.BootDeadline)
	if limit <= 0 {
		return
	}
	for i := range s.Holders {
		h := &s.Holders[i]
		if h.Phase == Granted || !h.Late.IsZero() || h.Reason == unknownReason || s.stays(*h) <= limit {
			continue
		}
		h.Late = s.now
		why := fmt.Sprintf("%s for more than %s", h.Phase, limit)
		s.log("late", h.Host, h.To, h.From, why)
		s.failed(h.Host, h.To, why, true)
	}
}

// failed counts a failure of a version on a host, once, and halts the version if its budget is spent. Without a version there is nothing that others could be kept from.
func (s *step) failed(host, version, reason string, late bool) {
	if version == "" {
		return
	}
	f := s.Failures[version]
	f.Hosts = slices.Clone(f.Hosts)
	entry := FailedHost{Host: host, At: s.now, Reason: clipTo(reason, maxFailedReason), Late: late}
	if i := slices.IndexFunc(f.Hosts, func(h FailedHost) bool { return h.Host == host }); i >= 0 {
		f.Hosts[i] = entry
	} else {
		f.InRow++
		f.Hosts = append(f.Hosts, entry)
		if over := len(f.Hosts) - maxFailedHosts; over > 0 {
			f.Hosts, f.More = f.Hosts[over:], f.More+over
		}
	}
	if s.Failures == nil {
		s.Failures = map[string]Failure{}
	}
	s.Failures[version] = f
	s.forgetOldest(version)
	if _, halted := s.Halts[version]; halted {
		return
	}
	why := ""
	switch n := f.Count(); {
	case s.Policy.FailureBudget > 0 && n >= s.Policy.FailureBudget:
		why = fmt.Sprintf("failed on %d host(s), budget %d; last %s: %s", n, s.Policy.FailureBudget, host, reason)
	case s.Policy.FailuresInRow > 0 && f.InRow >= s.Policy.FailuresInRow:
		why = fmt.Sprintf("failed on %d hosts in a row; last %s: %s", f.InRow, host, reason)
	default:
		return
	}
	if s.Halts == nil {
		s.Halts = map[string]Halt{}
	}
	s.Halts[version] = Halt{Since: s.now, Reason: clip(why)}
	s.log("halt", host, version, "", why)
	s.signal = true
}

// forgetOldest bounds the versions that have failed: the one whose last failure is the longest ago goes, one that is not halted first.
func (s *step) forgetOldest(but string) {
	for {
		last := map[string]time.Time{}
		for v, f := range s.Failures {
			last[v] = time.Time{}
			if n := len(f.Hosts); n > 0 {
				last[v] = f.Hosts[n-1].At
			}
		}
		for v, h := range s.Halts {
			last[v] = later(last[v], h.Since)
		}
		if len(last) <= maxFailedVersions {
			return
		}
		oldest, wasHalted := "", false
		for _, v := range slices.Sorted(maps.Keys(last)) {
			_, halted := s.Halts[v]
			if v != but && (oldest == "" || wasHalted && !halted || wasHalted == halted && last[v].Before(last[oldest])) {
				oldest, wasHalted = v, halted
			}
		}
		delete(s.Failures, oldest)
		delete(s.Halts, oldest)
		s.log("forgotten", "", oldest, "", fmt.Sprintf("more than %d versions have failed", maxFailedVersions))
	}
}

// succeeded takes a host that was late off the list, and ends a row of failures.
func (s *step) succeeded(host, version string) {
	f, ok := s.Failures[version]
	if !ok {
		return
	}
	f.Hosts = slices.DeleteFunc(slices.Clone(f.Hosts), func(h FailedHost) bool { return h.Host == host })
	f.InRow = 0
	if f.Count() == 0 {
		delete(s.Failures, version)
		return
	}
	s.Failures[version] = f
}

// verdict ends the life of a holder, or of a waiter.
func (s *step) verdict(host string, v Verdict) error {
	i := s.holder(host)
	if i >= 0 && v.Token != 0 && v.Token != s.Holders[i].Token {
		return fmt.Errorf("releasing the slot of %q with token %d: %w: the slot was granted with %d", host, v.Token, ErrFenced, s.Holders[i].Token)
	}
	if v.Outcome == Withdrawn && i >= 0 && s.Holders[i].Phase != Granted {
		return nil
	}
	version, from := clipTo(v.Version, maxVersion), ""
	s.outcome = v.Outcome
	if i >= 0 {
		h := s.Holders[i]
		from = h.From
		if version == "" {
			version = h.To
		}
		s.Holders = slices.Delete(s.Holders, i, i+1)
		if v.Outcome == Healthy && !h.Rebooting.IsZero() {
			s.measure(s.now.Sub(h.Rebooting))
		}
	}
	held := i >= 0
	if held {
		s.log(string(v.Outcome), host, version, from, clip(v.Reason))
	}
	switch v.Outcome {
	case Healthy:
		if version != "" {
			s.succeeded(host, version)
		}
	case Failed:
		if version == "" {
			break
		}
		if !held && s.knownFailure(host, version) {
			break // told again after a lost reply
		}
		if !held {
			s.log("failed without a slot", host, version, "", clip(v.Reason))
		}
		s.failed(host, version, orUnsaid(v.Reason), false)
	case Cancelled, Withdrawn, Forced:
	default:
		return fmt.Errorf("%w outcome %q", ErrInvalid, v.Outcome)
	}
	return nil
}

func orUnsaid(reason string) string {
	if reason == "" {
		return "no reason given"
	}
	return reason
}

func (s *step) knownFailure(host, version string) bool {
	return slices.ContainsFunc(s.Failures[version].Hosts, func(h FailedHost) bool { return h.Host == host && !h.Late })
}

// measure smooths how long a healthy host was away, from going down to being well. What took longer than the deadline is no measure for the others.
func (s *step) measure(d time.Duration) {
	if limit := time.Duration(s.Policy.BootDeadline); d <= 0 || limit > 0 && d > limit {
		return
	}
	was := s.RebootTime()
	if was == 0 {
		s.Measured = Duration(d)
		return
	}
	d = min(d, 4*was) // one that took all day says little about the next
	s.Measured = Duration(was + (d-was)/8)
}

// mark records a step in the life of a holder.
func (s *step) mark(host string, m Mark) error {
	i := s.holder(host)
	if i < 0 {
		return fmt.Errorf("marking %q as %s: %w", host, m.Phase, ErrNotHeld)
	}
	h := &s.Holders[i]
	if m.Token != 0 && m.Token != h.Token {
		return fmt.Errorf("marking %q as %s with token %d: %w: the slot was granted with %d", host, m.Phase, m.Token, ErrFenced, h.Token)
	}
	switch m.Phase {
	case Rebooting:
		// Also when the mark is told again after a lost reply: the host still runs, and must not go down any more.
		if halt, ok := s.Halts[h.To]; ok {
			return fmt.Errorf("marking %q as %s: %w: %q: %s", host, m.Phase, ErrHalted, h.To, halt.Reason)
		}
		if st := s.Policy.schedule().At(s.now, 0); !st.Open {
			return fmt.Errorf("marking %q as %s: %w: %s", host, m.Phase, ErrClosed, st.Why)
		}
		if err := s.mayGoDown(i); err != nil {
			return fmt.Errorf("marking %q as %s: %w", host, m.Phase, err)
		}
		if h.Phase != Granted {
			return nil
		}
		h.Rebooting = later(s.now, h.Granted)
	case Booted:
		if h.Phase == Booted {
			return nil
		}
		h.Booted = later(s.now, h.Rebooting) // a clock without a battery begins anywhere
		h.Version, h.NewBootID = clipTo(m.Version, maxVersion), clip(m.BootID)
	default:
		return fmt.Errorf("%w phase %q to mark", ErrInvalid, m.Phase)
	}
	h.Phase, h.Unsure = m.Phase, s.unsure
	s.log(string(m.Phase), host, h.To, h.From, clipTo(m.Version, maxVersion))
	return nil
}

// setPolicy changes the policy; holders stay.
func (s *step) setPolicy(p Policy, why string) error {
	if err := p.Check(); err != nil {
		return err
	}
	if p.extra == nil {
		p.extra = s.Policy.extra
	}
	if p.Max > 0 {
		p.PausedMax = 0
	}
	what := s.Policy.changes(p)
	if what == "" {
		return nil // it is as it was
	}
	if why != "" {
		what = why + ": " + what
	}
	s.Policy = p
	s.signal = true
	s.log("policy", "", "", "", clipTo(what, maxPolicy))
	return nil
}

// resume lifts halts. Failures are forgotten with them: they have been looked at.
func (s *step) resume(version, why string) {
	for _, v := range slices.Sorted(maps.Keys(s.Halts)) {
		if version == "" || v == version {
			s.log("resume", "", v, "", why)
			s.signal = true
		}
	}
	if version == "" {
		s.Halts, s.Failures = nil, nil
		return
	}
	delete(s.Halts, version)
	delete(s.Failures, version)
}
