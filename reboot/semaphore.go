package reboot

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/flipside-linux/flipside/lock"
)

// Semaphore is the cluster's semaphore as a gate. Asking it takes a place in the queue, or a slot.
type Semaphore struct {
	Lock  lock.Semaphore
	Claim lock.Claim

	standing lock.Standing
}

var (
	_ Gate       = (*Semaphore)(nil)
	_ Withdrawer = (*Semaphore)(nil)
)

// Name implements [Gate].
func (*Semaphore) Name() string { return "semaphore" }

// Halted returns why the claim's version is halted for the cluster, "" if it was not when the gate was last asked.
func (s *Semaphore) Halted() string { return s.standing.Halted }

// Standing returns where the claim stood when the gate was last asked.
func (s *Semaphore) Standing() lock.Standing { return s.standing }

// Withdraw gives back a place in the queue, or a slot that has not been used yet.
func (s *Semaphore) Withdraw(ctx context.Context, reason string) error {
	s.standing = lock.Standing{}
	return s.Lock.Release(ctx, s.Claim.Group, s.Claim.Host, lock.Verdict{Outcome: lock.Withdrawn, Reason: reason})
}

// Ask implements [Gate].
func (s *Semaphore) Ask(ctx context.Context, now time.Time) Answer {
	c := s.Claim
	st, err := s.Lock.Request(ctx, c)
	s.standing = st
	if err != nil {
		a := Answer{
			Verdict: Unknown, Why: fmt.Sprintf("the semaphore of group %s cannot be asked: %v", c.Group, err),
			Hint: "it is asked again by itself", Evidence: "flipside fleet status --group " + c.Group,
		}
		switch {
		case errors.Is(err, lock.ErrUnavailable):
			a.Hint = "nobody in the group reboots until its store answers"
		case errors.Is(err, lock.ErrSchema):
			a.Hint = "update this host by hand; a newer one has changed the semaphore"
		case errors.Is(err, lock.ErrUnsigned):
			a.Hint = "flipside fleet keys shows what is signed in the group, and by whom"
		}
		return a
	}
	switch {
	case st.Halted != "":
		return Answer{
			Verdict: Wait, Why: fmt.Sprintf("release %s is halted for group %s: %s", c.To, c.Group, st.Halted),
			Hint: fmt.Sprintf("flipside fleet resume --group %s %s", c.Group, lock.Operand(c.To)), Evidence: "flipside fleet status --group " + c.Group,
		}
	case st.Granted:
		return Answer{Verdict: Go, Why: fmt.Sprintf("holds a slot of group %s", c.Group)}
	}
	var why []string
	if st.Position > 0 {
		why = append(why, fmt.Sprintf("position %d in the queue of group %s", st.Position, c.Group))
	}
	if st.Blocked != "" {
		why = append(why, st.Blocked)
	}
	if len(st.Holders) > 0 {
		why = append(why, describe(st, now))
	}
	if !st.Expected.IsZero() && st.Expected.After(now) {
		why = append(why, "expected in "+rounded(st.Expected.Sub(now)))
	}
	if len(why) == 0 {
		why = append(why, "the slot is being handed over")
	}
	a := Answer{Verdict: Wait, Why: strings.Join(why, "; "), Ask: st.Ask, Hint: "its turn comes by itself; flipside fleet policy edit lets more hosts be down at once", Evidence: "flipside fleet status --group " + c.Group}
	for _, h := range st.Holders {
		if !h.Late.IsZero() {
			a.Hint = fmt.Sprintf("%s stays away; if it is gone for good: flipside fleet force-release --group %s %s", h.Host, c.Group, lock.Operand(h.Host))
		}
	}
	return a
}

// maxNamed bounds how many holders are named.
const maxNamed = 3

func describe(st lock.Standing, now time.Time) string {
	var names []string
	for i, h := range st.Holders {
		if i == maxNamed {
			names = append(names, fmt.Sprintf("and %d more", len(st.Holders)-i))
			break
		}
		state := string(h.Phase)
		if !h.Late.IsZero() {
			state = "late"
		}
		names = append(names, fmt.Sprintf("%s (%s for %s)", h.Host, state, rounded(now.Sub(h.Since()))))
	}
	return fmt.Sprintf("%d of %d slots held by %s", len(st.Holders), st.Max, strings.Join(names, ", "))
}

// rounded prints a duration as people say it.
func rounded(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < 2*time.Minute:
		return d.Round(time.Second).String()
	case d < 48*time.Hour:
		return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}
