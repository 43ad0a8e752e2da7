// Package window knows when something may happen: weekly and daily windows, and days on which it may not.
//
// # Grammar
//
// A window begins at "[Day ]HH:MM" and lasts a Go duration, as the older hosts write it: REBOOT_WINDOW_START="Thu 04:00" and
// REBOOT_WINDOW_LENGTH=1h30m. What their parser let through in silence is an error here: text after the minutes ("2:30pm" was
// 02:30), lengths of zero, ranges of days. The end of a window is not part of it.
//
// # Time zones
//
// A window begins by the wall clock of its zone and lasts its length in real time, so that a host always gets the whole of it. If the
// clock jumps over the beginning in spring, the window begins when it has jumped; if it shows the beginning twice in
// autumn, the window begins the first time.
package window

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	_ "time/tzdata" // a policy names zones, and a minimal host has no files about them

	"github.com/flipside-linux/flipside/lock/keep"
)

// ErrSyntax is wrapped by every error about how a window is written.
var ErrSyntax = errors.New("cannot be read as a window")

// Window is a window that comes every week on some days, or every day. Make one with [Parse] or from JSON; the zero Window never opens.
type Window struct {
	days         []time.Weekday // empty: every day
	hour, minute int
	length       time.Duration
	zone         *time.Location
	extra        keep.Fields
}

const day = 24 * time.Hour

var (
	dayNames  = []string{"Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"}
	startForm = regexp.MustCompile(`^(?:([A-Za-z]+)[ \t]+)?([0-9]{1,2}):([0-9]{1,2})$`)
)

// Parse reads a window as the older hosts write it. zone is an IANA name; "" is the local time of the process.
func Parse(start, length, zone string) (Window, error) {
	m := startForm.FindStringSubmatch(strings.TrimSpace(start))
	if m == nil {
		return Window{}, startError(start)
	}
	var days []string
	if m[1] != "" {
		days = []string{m[1]}
	}
	return build(days, m[2], m[3], length, zone)
}

// New makes a window from its parts: days of three letters (none: every day), a start as in 04:00, a length as in 1h30m, and a zone as
// Parse has it.
func New(days []string, start, length, zone string) (Window, error) {
	m := startForm.FindStringSubmatch(strings.TrimSpace(start))
	if m == nil || m[1] != "" {
		return Window{}, fmt.Errorf("start %q %w: want HH:MM, and the days apart from it", start, ErrSyntax)
	}
	return build(days, m[2], m[3], length, zone)
}

func startError(start string) error {
	err := fmt.Errorf("start %q %w: want [Day ]HH:MM, as in \"Thu 04:00\"", start, ErrSyntax)
	lower := strings.ToLower(start)
	switch {
	case strings.HasSuffix(lower, "am"), strings.HasSuffix(lower, "pm"):
		return fmt.Errorf("%w; hours go from 0 to 23, without am and pm", err)
	case strings.ContainsAny(start, ",") || strings.Count(start, "-") == 1:
		return fmt.Errorf("%w; name one day, or write several windows", err)
	}
	return err
}

func build(days []string, hour, minute, length, zone string) (Window, error) {
	var w Window
	for _, d := range days {
		i := slices.IndexFunc(dayNames, func(n string) bool { return strings.EqualFold(n, d) })
		if i < 0 {
			return Window{}, fmt.Errorf("day %q %w: want one of %s", d, ErrSyntax, strings.Join(dayNames, ", "))
		}
		if slices.Contains(w.days, time.Weekday(i)) {
			return Window{}, fmt.Errorf("day %q %w: it is named twice", d, ErrSyntax)
		}
		w.days = append(w.days, time.Weekday(i))
	}
	slices.Sort(w.days)
	var err error
	if w.hour, err = strconv.Atoi(hour); err != nil || w.hour > 23 {
		return Window{}, fmt.Errorf("hour %q %w: want 0 to 23", hour, ErrSyntax)
	}
	if w.minute, err = strconv.Atoi(minute); err != nil || w.minute > 59 {
		return Window{}, fmt.Errorf("minute %q %w: want 0 to 59", minute, ErrSyntax)
	}
	if w.length, err = time.ParseDuration(strings.TrimSpace(length)); err != nil {
		return Window{}, fmt.Errorf("length %q %w: want a duration with its unit, as in 1h30m", length, ErrSyntax)
	}
	most := day
	if len(w.days) > 0 {
		most = 7 * day
	}
	switch {
	case w.length <= 0:
		return Window{}, fmt.Errorf("length %q %w: a window of no length never opens", length, ErrSyntax)
	case w.length >= most:
		return Window{}, fmt.Errorf("length %q %w: it must be less than %s, the time until the window comes again", length, ErrSyntax, most)
	}
	if w.zone, err = loadZone(zone); err != nil {
		return Window{}, err
	}
	return w, nil
}

func loadZone(zone string) (*time.Location, error) {
	if zone == "" {
		return time.Local, nil
	}
	loc, err := time.LoadLocation(zone)
	if err != nil {
		return nil, fmt.Errorf("time zone %q %w: want an IANA name, as in Europe/Berlin: %w", zone, ErrSyntax, err)
	}
	return loc, nil
}

// Length is how long the window is.
func (w Window) Length() time.Duration { return w.length }

// String writes the window as people read it.
func (w Window) String() string {
	if w.zone == nil {
		return "never"
	}
	var b strings.Builder
	for i, d := range w.days {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(dayNames[d])
	}
	if len(w.days) == 0 {
		b.WriteString("daily")
	}
	fmt.Fprintf(&b, " %02d:%02d for %s", w.hour, w.minute, short(w.length))
	if w.zone != time.Local {
		b.WriteString(" (" + w.zone.String() + ")")
	}
	return b.String()
}

func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

type windowJSON struct {
	Days   []string `json:"days,omitempty"`
	Start  string   `json:"start"`
	Length string   `json:"length"`
	Zone   string   `json:"zone,omitempty"`
}

// MarshalJSON writes the window as {"days":["Thu"],"start":"04:00","length":"1h30m","zone":"Europe/Berlin"}.
func (w Window) MarshalJSON() ([]byte, error) {
	j := windowJSON{Start: fmt.Sprintf("%02d:%02d", w.hour, w.minute), Length: short(w.length)}
	for _, d := range w.days {
		j.Days = append(j.Days, dayNames[d])
	}
	if w.zone != nil && w.zone != time.Local {
		j.Zone = w.zone.String()
	}
	return keep.Encode(j, w.extra)
}

// Unknown names the fields of its JSON form that this version does not know. They are kept.
func (w Window) Unknown() []string { return w.extra.Names() }

// UnmarshalJSON reads what MarshalJSON writes. The zone must be named: a policy that many hosts read has no local time.
func (w *Window) UnmarshalJSON(data []byte) error {
	var j windowJSON
	extra, err := keep.Decode(data, &j)
	if err != nil {
		return err
	}
	if j.Zone == "" {
		return fmt.Errorf("window at %q %w: \"zone\" is missing; want an IANA name, as in Europe/Berlin or UTC", j.Start, ErrSyntax)
	}
	v, err := New(j.Days, j.Start, j.Length, j.Zone)
	if err != nil {
		return err
	}
	*w, w.extra = v, extra
	return nil
}

// openAt returns the beginning and end of the opening that t is in, or else of the next one.
func (w Window) openAt(t time.Time) (begin, end time.Time) {
	if w.zone == nil {
		return time.Time{}, time.Time{}
	}
	local := t.In(w.zone)
	// The opening that t is in began at most a week ago; the next one begins in at most eight days.
	for n := -8; n <= 8; n++ {
		d := time.Date(local.Year(), local.Month(), local.Day()+n, 12, 0, 0, 0, time.UTC)
		if len(w.days) > 0 && !slices.Contains(w.days, d.Weekday()) {
			continue
		}
		begin = wall(d.Year(), d.Month(), d.Day(), w.hour, w.minute, w.zone)
		if end = begin.Add(w.length); end.After(t) {
			return begin, end
		}
	}
	return time.Time{}, time.Time{}
}

// wall is the first instant at which the wall clock of a zone shows a time, or the instant at which it jumps over it.
func wall(year int, month time.Month, dom, hour, minute int, loc *time.Location) time.Time {
	utc := time.Date(year, month, dom, hour, minute, 0, 0, time.UTC)
	offset := func(t time.Time) time.Duration {
		_, s := t.In(loc).Zone()
		return time.Duration(s) * time.Second
	}
	before, after := utc.Add(-offset(utc.Add(-day))), utc.Add(-offset(utc.Add(day)))
	if after.Before(before) {
		before, after = after, before
	}
	// The clock shows the time at one of these instants, at both, or, if it jumps over it, at neither.
	for _, t := range []time.Time{before, after} {
		if t.Add(offset(t)).Equal(utc) {
			return t
		}
	}
	// The jump is between them: find the first instant after it.
	old := offset(before)
	lo, hi := before, after
	for hi.Sub(lo) > time.Second {
		mid := lo.Add(hi.Sub(lo) / 2).Truncate(time.Second)
		if mid.Equal(lo) {
			break
		}
		if offset(mid) == old {
			lo = mid
		} else {
			hi = mid
		}
	}
	return hi
}
