package server

import (
	"fmt"
	"strings"
	"time"
	_ "time/tzdata" // a server in a bare container knows its time zones, too
)

// open says whether updates may begin at now, by the channel's hours. Hours that end before they begin go over midnight,
// and belong to the day on which they begin.
func (c Channel) open(now time.Time) (bool, error) {
	zone := time.UTC
	if c.TimeZone != "" {
		var err error
		if zone, err = time.LoadLocation(c.TimeZone); err != nil {
			return false, fmt.Errorf("time_zone = %q is not known", c.TimeZone)
		}
	}
	if c.Hours == "" {
		return true, nil
	}
	days, hours, ok := strings.Cut(strings.TrimSpace(c.Hours), " ")
	if !ok {
		days, hours = "Mon-Sun", days
	}
	on, err := weekdays(days)
	if err != nil {
		return false, fmt.Errorf("hours = %q: %w", c.Hours, err)
	}
	from, to, ok := strings.Cut(strings.TrimSpace(hours), "-")
	begin, err1 := time.Parse("15:04", from)
	end, err2 := time.Parse("15:04", to)
	if !ok || err1 != nil || err2 != nil {
		return false, fmt.Errorf("hours = %q: %q is not a span such as 09:00-17:00", c.Hours, hours)
	}
	now = now.In(zone)
	minute := func(t time.Time) int { return t.Hour()*60 + t.Minute() }
	today, yesterday := on[now.Weekday()], on[(now.Weekday()+6)%7]
	switch a, b, n := minute(begin), minute(end), minute(now); {
	case a < b:
		return today && n >= a && n < b, nil
	case n >= a:
		return today, nil
	default:
		return yesterday && n < b, nil
	}
}

// weekdays reads "Mon-Fri" or "Sat,Sun".
func weekdays(s string) (map[time.Weekday]bool, error) {
	number := func(name string) (time.Weekday, error) {
		for d := time.Sunday; d <= time.Saturday; d++ {
			if strings.EqualFold(name, d.String()[:3]) {
				return d, nil
			}
		}
		return 0, fmt.Errorf("%q is not a day such as Mon", name)
	}
	on := map[time.Weekday]bool{}
	for part := range strings.SplitSeq(s, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		a, err := number(first)
		if err != nil {
			return nil, err
		}
		b, err := number(last)
		if err != nil {
			return nil, err
		}
		for d := a; ; d = (d + 1) % 7 {
			on[d] = true
			if d == b {
				break
			}
		}
	}
	return on, nil
}
