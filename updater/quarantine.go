package updater

import (
	"fmt"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
)

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
