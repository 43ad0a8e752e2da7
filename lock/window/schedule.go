package window

import (
	"fmt"
	"time"

	"github.com/flipside-linux/flipside/lock/keep"
)

// Blackout is a span of whole days on which nothing may happen.
type Blackout struct {
	from, to time.Time // noon UTC of the first and last day
	reason   string
	zone     *time.Location
	extra    keep.Fields
}

type blackoutJSON struct {
	From   string `json:"from"`
	To     string `json:"to,omitempty"` // included; the same day if empty
	Zone   string `json:"zone"`
	Reason string `json:"reason,omitempty"`
}

// ParseBlackout reads dates as in 2026-12-24. An empty to means one day.
func ParseBlackout(from, to, zone, reason string) (Blackout, error) {
	if to == "" {
		to = from
	}
	b := Blackout{reason: reason}
	var err error
	if b.from, err = time.Parse(time.DateOnly, from); err != nil {
		return Blackout{}, fmt.Errorf("blackout from %q %w: want a date as in 2026-12-24", from, ErrSyntax)
	}
	if b.to, err = time.Parse(time.DateOnly, to); err != nil {
		return Blackout{}, fmt.Errorf("blackout to %q %w: want a date as in 2026-12-24", to, ErrSyntax)
	}
	if b.to.Before(b.from) {
		return Blackout{}, fmt.Errorf("blackout from %s to %s %w: it ends before it begins", from, to, ErrSyntax)
	}
	if b.zone, err = loadZone(zone); err != nil {
		return Blackout{}, err
	}
	return b, nil
}

func (b Blackout) span() (begin, end time.Time) {
	if b.zone == nil {
		return time.Time{}, time.Time{}
	}
	next := b.to.AddDate(0, 0, 1)
	return wall(b.from.Year(), b.from.Month(), b.from.Day(), 0, 0, b.zone), wall(next.Year(), next.Month(), next.Day(), 0, 0, b.zone)
}

func (b Blackout) String() string {
	s := "blackout " + b.from.Format(time.DateOnly)
	if !b.to.Equal(b.from) {
		s += " to " + b.to.Format(time.DateOnly)
	}
	if b.reason != "" {
		s += " (" + b.reason + ")"
	}
	return s
}

// MarshalJSON writes the blackout with its dates, its zone and its reason.
func (b Blackout) MarshalJSON() ([]byte, error) {
	j := blackoutJSON{From: b.from.Format(time.DateOnly), To: b.to.Format(time.DateOnly), Reason: b.reason}
	if b.zone != nil && b.zone != time.Local {
		j.Zone = b.zone.String()
	}
	return keep.Encode(j, b.extra)
}

// Unknown names the fields of its JSON form that this version does not know. They are kept.
func (b Blackout) Unknown() []string { return b.extra.Names() }

// UnmarshalJSON reads what MarshalJSON writes. The zone must be named.
func (b *Blackout) UnmarshalJSON(data []byte) error {
	var j blackoutJSON
	extra, err := keep.Decode(data, &j)
	if err != nil {
		return err
	}
	if j.Zone == "" {
		return fmt.Errorf("blackout from %q %w: \"zone\" is missing; want an IANA name, as in Europe/Berlin or UTC", j.From, ErrSyntax)
	}
	v, err := ParseBlackout(j.From, j.To, j.Zone, j.Reason)
	if err != nil {
		return err
	}
	*b, b.extra = v, extra
	return nil
}

// Schedule is several windows and blackouts. No windows means always, but for the blackouts.
type Schedule struct {
	Windows   []Window
	Blackouts []Blackout
}

// Status is what a schedule says at an instant.
type Status struct {
	Open  bool
	Until time.Time // when it closes; zero if it does not in the time that was looked at
	Next  time.Time // when it opens, if it is closed; zero if it does not in the time that was looked at
	Why   string    // it is closed, in words
}

// maxSteps bounds how many openings are looked at to find the next that no blackout covers: some years of daily ones.
const maxSteps = 2000

// never is a year that nobody waits for. An opening from it on is none: a blackout that is to last for good ends on 9999-12-31, and a year of five digits
// has no place in JSON.
const never = 9000

// At says whether the schedule is open at t for at least need, how long, or when it will be.
func (s Schedule) At(t time.Time, need time.Duration) Status {
	begin, end, why := s.opening(t, need)
	if end.Year() >= never {
		end = time.Time{}
	}
	switch {
	case begin.IsZero(), begin.After(t) && begin.Year() >= never:
		return Status{Why: why}
	case begin.After(t):
		return Status{Next: begin, Why: why}
	}
	return Status{Open: true, Until: end}
}

// opening finds the first instant from t on at which the schedule is open for at least need; end is zero if it stays open.
func (s Schedule) opening(t time.Time, need time.Duration) (begin, end time.Time, why string) {
	at := t
	note := func(format string, args ...any) {
		if why == "" {
			why = fmt.Sprintf(format, args...)
		}
	}
	for range maxSteps {
		if b, ok := s.blackout(at); ok {
			_, bEnd := b.span()
			note("%s", b)
			at = bEnd
			continue
		}
		from, to := s.window(at)
		switch {
		case len(s.Windows) > 0 && from.IsZero():
			note("no window ever opens")
			return time.Time{}, time.Time{}, why
		case from.After(at):
			note("no reboot window is open")
			at = from
			continue
		}
		for _, b := range s.Blackouts { // a blackout that begins inside the window cuts it short
			if bBegin, _ := b.span(); bBegin.After(at) && (to.IsZero() || bBegin.Before(to)) {
				to = bBegin
			}
		}
		if !to.IsZero() && at.Add(need).After(to) {
			note("a reboot takes about %s and the window closes in %s", short(need.Round(time.Second)), short(to.Sub(at).Round(time.Second)))
			at = to
			continue
		}
		return at, to, why
	}
	note("no window opens in the time that can be seen")
	return time.Time{}, time.Time{}, why
}

func (s Schedule) blackout(t time.Time) (Blackout, bool) {
	for _, b := range s.Blackouts {
		if begin, end := b.span(); !t.Before(begin) && t.Before(end) {
			return b, true
		}
	}
	return Blackout{}, false
}

// window returns the opening that at is in, joined with those that overlap or follow at once, or else the next one. Both are
// zero if there are no windows.
func (s Schedule) window(at time.Time) (from, to time.Time) {
	for _, w := range s.Windows {
		begin, end := w.openAt(at)
		if begin.IsZero() {
			continue
		}
		open := !begin.After(at)
		switch {
		case from.IsZero(), begin.Before(from) && from.After(at):
			from, to = begin, end
		case open && end.After(to):
			from, to = begin, end
		}
	}
	if from.IsZero() || from.After(at) {
		return from, to
	}
	for range maxSteps { // windows that touch are one
		longer := to
		for _, w := range s.Windows {
			if begin, end := w.openAt(to); !begin.IsZero() && !begin.After(to) && end.After(longer) {
				longer = end
			}
		}
		if longer.Equal(to) || longer.Sub(at) > 60*day {
			return from, longer
		}
		to = longer
	}
	return from, to
}
