package updater

import (
	"fmt"
	"time"

	"github.com/flipside-linux/flipside/omaha"
)

func (s *steps) jitter(d time.Duration) time.Duration {
	if s.c.Rand == nil {
		return d
	}
	return d + time.Duration((2*s.c.Rand()-1)*s.c.Timing.Jitter*float64(d))
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
