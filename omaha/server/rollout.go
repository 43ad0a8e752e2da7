package server

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/blang/semver/v4"
	wire "github.com/flatcar/go-omaha/omaha"
)

// rollout is how far one version has come on one channel. It begins anew when the channel moves.
type rollout struct {
	Version  string          `json:"version"`
	Granted  []time.Time     `json:"granted,omitempty"`  // when grants were given, within the last period
	Failures map[string]bool `json:"failures,omitempty"` // hosts whose failure speaks against the release
	Timeouts map[string]bool `json:"timeouts,omitempty"` // hosts that were not heard of in time
	Differs  map[string]bool `json:"differs,omitempty"`  // hosts whose boot measured something else than the release
	Measured PCRs            `json:"measured,omitempty"` // what the release was said to measure when all hosts were last looked at
	Done     int             `json:"done,omitempty"`     // hosts that came up with it
	Stop     Stop            `json:"stop,omitzero"`      // why it goes no further, if the server stopped it

	active map[string]bool // hosts that update now: follows from the hosts
}

// filled returns r with all its maps.
func (r *rollout) filled() *rollout {
	for _, m := range []*map[string]bool{&r.Failures, &r.Timeouts, &r.Differs, &r.active} {
		if *m == nil {
			*m = map[string]bool{}
		}
	}
	return r
}

// of returns the rollout of a channel. One that was stopped and is resumed counts its failures from zero again. Server.mu is held.
func (s *Server) of(channel string, ch Channel) *rollout {
	r := s.rollouts[channel]
	if r == nil {
		r = (&rollout{}).filled()
		s.rollouts[channel] = r
	}
	if r.Version != ch.Version {
		r.Measured = s.catalog.Load().releases[ch.Version].PCRs
	}
	if r.Version != ch.Version || r.Stop.Why != "" && !r.Stop.holds(ch) {
		r.Version, r.Done, r.Stop = ch.Version, 0, Stop{}
		clear(r.Failures)
		clear(r.Timeouts)
		clear(r.Differs)
		s.touchRollout(channel)
		s.touchStops()
	}
	if ch.Stopped != "" && r.Stop.Why == "" { // by a server that kept it in the channel's file
		r.Stop = Stop{Version: ch.Version, Why: ch.Stopped, At: s.opt.Now().UTC(), Resumed: ch.Resumed}
		s.touchRollout(channel)
		s.touchStops()
	}
	return r
}

// event applies one event to a host. What does not fit the host's state changes nothing, and is acknowledged all the
// same: a host that repeats itself after a lost answer is right to do so.
func (s *Server) event(c *catalog, h *Host, e *wire.EventRequest, now time.Time) {
	type pair struct{ kind, result int }
	switch (pair{int(e.Type), int(e.Result)}) {
	case pair{13, 1}:
		s.advance(h, Downloading, now)
	case pair{14, 1}:
		s.advance(h, Downloaded, now)
	case pair{800, 1}, pair{3, 1}:
		s.advance(h, Installed, now)
	case pair{3, 2}:
		// update_engine says 3/2 at every poll with an empty version, and "0.0.0.0" the first time ever: only a real
		// previous version tells of an update.
		if e.PreviousVersion == "" || e.PreviousVersion == "0.0.0.0" || e.PreviousVersion == h.Version {
			return
		}
		h.Previous = clean(e.PreviousVersion)
		s.finish(h, Complete, now)
	case pair{3, 0}:
		if h.Target == "" {
			return // nothing was granted: an error of the check itself, or a failure that was told before
		}
		version := h.Target
		if version != h.Failed {
			h.Failures = 0
		}
		h.Failed, h.FailedAt, h.ErrorCode, h.Failures = version, now, e.ErrorCode, h.Failures+1
		s.finish(h, Failed, now)
		ch, ok := c.channels[h.Channel]
		if !ok || !blamesRelease(e.ErrorCode) {
			return
		}
		if r := s.of(h.Channel, ch); ch.step(version) {
			r.Failures[h.ID] = true
			s.touchRollout(h.Channel)
			s.stop(h.Channel, ch, r)
		}
	}
}

// advance moves a host on within an update that it was granted.
func (s *Server) advance(h *Host, state State, now time.Time) {
	if h.Target != "" && (h.State.active() || h.State == TimedOut) {
		h.set(state, now)
		if r := s.rollouts[h.Channel]; r != nil {
			r.active[h.ID] = true
		}
	}
}

// finish ends a host's update.
func (s *Server) finish(h *Host, state State, now time.Time) {
	fresh := state == Complete && h.State != Complete
	h.set(state, now)
	h.Target = ""
	if state == Complete && h.Failed == h.Version { // it has come up after all
		h.Failed, h.FailedAt, h.ErrorCode, h.Failures = "", time.Time{}, 0, 0
	}
	if r := s.rollouts[h.Channel]; r != nil {
		delete(r.active, h.ID)
		if fresh && s.catalog.Load().channels[h.Channel].step(h.Version) {
			r.Done++
			s.touchRollout(h.Channel)
		}
	}
}

// expire takes the place of a host that was not heard of in time, so that others can have it. The host itself is not
// stuck: its next check or event goes on where it was.
//
// It goes through all that update now, so it looks no more often than once a second.
func (s *Server) expire(now time.Time) {
	d := now.Sub(s.expired)
	if d >= 0 && d < time.Second {
		return
	}
	s.expired = now
	if d < -time.Minute {
		s.rewind(now)
	}
	c := s.catalog.Load()
	s.remeasure(c)
	for name, r := range s.rollouts {
		ch, ok := c.channels[name]
		if !ok {
			continue
		}
		limit := now.Add(-ch.grantTimeout())
		for id := range r.active {
			h := s.hosts[id]
			if h == nil || h.Channel != name {
				delete(r.active, id)
				continue
			}
			if h.GrantedAt.After(limit) {
				continue
			}
			delete(r.active, id)
			if h.State != Installed { // one that waits for its reboot has done its part
				from := h.State
				h.set(TimedOut, now)
				s.changed(h, from, now)
				s.touch(h)
				if ch.step(h.Target) {
					r.Timeouts[id] = true
					s.touchRollout(name)
					s.stop(name, ch, r)
				}
			}
		}
	}
}

// rewind lets nothing that is known have happened later than now. A clock that was wrong and is put right would otherwise keep places, limits, failures and proofs in force
// until the wrong time has come. Server.mu is held.
func (s *Server) rewind(now time.Time) {
	back := func(times ...*time.Time) (moved bool) {
		for _, t := range times {
			if t.After(now) {
				*t, moved = now, true
			}
		}
		return moved
	}
	for _, h := range s.hosts {
		moved := back(&h.FirstSeen, &h.LastSeen, &h.ChangedAt, &h.GrantedAt, &h.FailedAt)
		if h.Proof != nil {
			p := *h.Proof
			if back(&p.At, &p.Since, &p.TriedAt) {
				h.Proof, moved = &p, true
			}
		}
		if moved {
			s.touch(h)
		}
	}
	for name, r := range s.rollouts {
		for i := range r.Granted {
			if back(&r.Granted[i]) {
				s.touchRollout(name)
			}
		}
	}
}

// stop ends a rollout by itself when it went wrong often enough: at once, whether or not that can be written anywhere. Server.mu is held.
func (s *Server) stop(name string, ch Channel, r *rollout) {
	if r.Stop.holds(ch) || ch.Version != r.Version {
		return
	}
	failed := s.steps(r.Failures, ch, func(h *Host) string { return h.Failed })
	var why string
	switch {
	case ch.StopFailures > 0 && len(r.Failures) >= ch.StopFailures:
		why = fmt.Sprintf("%d hosts failed with %s", len(r.Failures), failed)
	case ch.StopTimeouts > 0 && len(r.Timeouts) >= ch.StopTimeouts:
		late := s.steps(r.Timeouts, ch, func(h *Host) string { return h.Target })
		why = fmt.Sprintf("%d hosts did not finish %s in time", len(r.Timeouts), late)
	case ch.StopDiffers > 0 && len(r.Differs) >= ch.StopDiffers:
		why = fmt.Sprintf("%d boots of %s measured something else than the release", len(r.Differs), r.Version)
	case ch.tooMany(len(r.Failures), r.Done):
		why = fmt.Sprintf("%d of %d hosts failed with %s", len(r.Failures), len(r.Failures)+r.Done, failed)
	default:
		return
	}
	s.log.Error("rollout stopped", "channel", name, "why", why)
	r.Stop = Stop{Version: r.Version, Why: why, At: s.opt.Now().UTC().Truncate(time.Second), Resumed: ch.Resumed}
	s.touchRollout(name)
	s.touchStops()
	if s.store != nil {
		s.store.fresh = append(s.store.fresh, map[string]any{"channel": name, "version": r.Version, "why": why})
	}
	s.durable()
}

// steps names the versions that a rollout went wrong with: its own, or floors on the way to it, which hosts get first.
func (s *Server) steps(hosts map[string]bool, ch Channel, of func(*Host) string) string {
	var list []string
	for id := range hosts {
		version := ch.Version
		if h := s.hosts[id]; h != nil && ch.step(of(h)) { // or it is forgotten, or was there once more since
			version = of(h)
		}
		if !slices.Contains(list, version) {
			list = append(list, version)
		}
	}
	slices.SortFunc(list, compareVersions)
	return strings.Join(list, ", ")
}

// decide answers a check: a release, or why there is none ("" when the host has what it should have).
func (s *Server) decide(c *catalog, h *Host, name string, ch Channel, running semver.Version, prefix string, now time.Time) (*Release, string) {
	if ch.Version == "" {
		return nil, fmt.Sprintf("channel %s holds no release", name)
	}
	target, err := ch.next(running)
	if err != nil {
		return nil, err.Error()
	}
	r := s.of(name, ch)
	version := target.String()
	if cmp := target.Compare(running); cmp == 0 || (cmp < 0 && !ch.Downgrade) {
		if h.State.active() || h.State == TimedOut {
			if h.Target == h.Version {
				s.finish(h, Complete, now)
			} else {
				s.finish(h, Current, now)
			}
		} else if h.State != Complete {
			s.finish(h, Current, now)
		}
		return nil, ""
	}
	rel, ok := c.releases[version]
	if !ok {
		return nil, fmt.Sprintf("release %s is not in the directory", version)
	}
	if why := s.held(h, r.Stop.on(ch), r, rel, prefix, now); why != "" {
		if !h.State.active() && h.State != Failed {
			h.set(Held, now)
		}
		return nil, why
	}
	if h.Target != version || !r.active[h.ID] {
		h.GrantedAt = now
		r.Granted = append(r.Granted, now)
		s.touchRollout(name)
	}
	h.Target = version
	r.active[h.ID] = true
	h.set(Granted, now)
	return &rel, ""
}

// under says whether a version is one that a host asks for with a prefix: "1.2", "1.2." and "1.2.*" all mean 1.2.x.
func under(version, prefix string) bool {
	prefix = strings.TrimSuffix(strings.TrimSuffix(prefix, "*"), ".")
	rest, ok := strings.CutPrefix(version, prefix)
	return ok && (prefix == "" || rest == "" || strings.ContainsAny(rest[:1], ".-+"))
}

// held says why a host may not have a release now, or "".
func (s *Server) held(h *Host, ch Channel, r *rollout, rel Release, prefix string, now time.Time) string {
	switch {
	case slices.Contains(ch.Blacklist, rel.Version):
		return fmt.Sprintf("release %s is withdrawn", rel.Version)
	case ch.Stopped != "":
		return "the rollout was stopped: " + ch.Stopped
	case ch.Paused:
		return "the rollout is paused"
	case now.Before(h.retryAt(rel.Version, ch.retryFailed())):
		return fmt.Sprintf("release %s failed on this host, it may try again at %s", rel.Version, h.retryAt(rel.Version, ch.retryFailed()).UTC().Format(time.RFC3339))
	case !under(rel.Version, prefix):
		return fmt.Sprintf("the host asks for %s only", clean(prefix))
	case !ch.in(h.ID, rel.Version):
		return fmt.Sprintf("the release goes to %d %% of the hosts so far", ch.Share())
	}
	if h.Target == rel.Version && r.active[h.ID] {
		return "" // it has its place already
	}
	if open, err := ch.open(now); err != nil || !open {
		return fmt.Sprintf("updates begin only in the channel's hours, %s", ch.Hours)
	}
	if ch.After != "" {
		if n, need := s.healthy(ch.After, rel.Version, now), max(ch.AfterHealthy, 1); n < need {
			return fmt.Sprintf("channel %s goes first: %d of %d hosts are healthy with %s", ch.After, n, need, rel.Version)
		}
	}
	if ch.MaxConcurrent > 0 && len(r.active) >= ch.MaxConcurrent {
		return fmt.Sprintf("%d hosts update now, the limit is %d", len(r.active), ch.MaxConcurrent)
	}
	if ch.MaxPerPeriod > 0 {
		begin := now.Add(-ch.period())
		r.Granted = slices.DeleteFunc(r.Granted, func(t time.Time) bool { return !t.After(begin) })
		if len(r.Granted) >= ch.MaxPerPeriod {
			return fmt.Sprintf("%d hosts began in the last %s, the limit is %d", len(r.Granted), ch.period(), ch.MaxPerPeriod)
		}
	} else {
		r.Granted = nil
	}
	return ""
}

// healthy counts the hosts of a channel that have booted version and are well, at most once a second.
func (s *Server) healthy(channel, version string, now time.Time) int {
	key := channel + " " + version
	if c, ok := s.canaries[key]; ok && now.Sub(c.at) >= 0 && now.Sub(c.at) < time.Second {
		return c.n
	}
	n := 0
	for _, h := range s.hosts {
		if h.Channel == channel && h.Version == version && (h.State == Complete || h.State == Current) && h.Failed != version {
			n++
		}
	}
	clear(s.canaries) // a version or two are all that is ever asked for
	s.canaries[key] = canary{n, now}
	return n
}

// canary is a count that healthy has made.
type canary struct {
	n  int
	at time.Time
}
