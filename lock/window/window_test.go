package window

import (
	"encoding/json"
	"errors"
	"testing"
	"time"
)

func at(t *testing.T, s string) time.Time {
	t.Helper()
	v, err := time.Parse(time.RFC3339, s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func mustParse(t *testing.T, start, length, zone string) Window {
	t.Helper()
	w, err := Parse(start, length, zone)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestParse(t *testing.T) {
	for _, tt := range []struct{ start, length, want string }{
		{"Thu 04:00", "1h30m", "Thu 04:00 for 1h30m (UTC)"},
		{"thu 4:0", "90m", "Thu 04:00 for 1h30m (UTC)"},
		{"14:00", "1.5h", "daily 14:00 for 1h30m (UTC)"},
		{" Sun  23:59 ", "167h", "Sun 23:59 for 167h (UTC)"},
	} {
		if got := mustParse(t, tt.start, tt.length, "UTC").String(); got != tt.want {
			t.Errorf("Parse(%q, %q) = %s, want %s", tt.start, tt.length, got, tt.want)
		}
	}
}

// What the older parser let through, or understood as something else than was meant.
func TestParseRefuses(t *testing.T) {
	for _, tt := range []struct{ start, length string }{
		{"2:30pm", "1h"}, {"14:00:30", "1h"}, {"14:00Z", "1h"}, {"14:00junk", "1h"}, {"14", "1h"}, {"14.00", "1h"}, {"24:00", "1h"}, {"12:60", "1h"},
		{"Thursday 04:00", "1h"}, {"Mon-Fri 04:00", "1h"}, {"Mon,Tue 04:00", "1h"}, {"Mon Tue 04:00", "1h"}, {"-1:00", "1h"}, {"+1:00", "1h"}, {"", "1h"},
		{"14:00", ""}, {"14:00", "0"}, {"14:00", "0s"}, {"14:00", "-1h"}, {"14:00", "60"}, {"14:00", "1d"}, {"14:00", "24h"}, {"Thu 14:00", "168h"},
	} {
		if _, err := Parse(tt.start, tt.length, "UTC"); !errors.Is(err, ErrSyntax) {
			t.Errorf("Parse(%q, %q) = %v, want an error", tt.start, tt.length, err)
		}
	}
	if _, err := Parse("14:00", "1h", "Mars/Olympus"); !errors.Is(err, ErrSyntax) {
		t.Errorf("a zone that does not exist: %v", err)
	}
}

func TestDaylightSaving(t *testing.T) {
	// Berlin 2026: the clock jumps from 02:00 to 03:00 on 29 March, and goes back from 03:00 to 02:00 on 25 October.
	for _, tt := range []struct {
		name, start, length, now string
		begin, end               string
	}{
		{"ordinary day", "02:30", "1h", "2026-03-27T12:00:00+01:00", "2026-03-28T02:30:00+01:00", "2026-03-28T03:30:00+01:00"},
		{"the beginning is jumped over", "02:30", "1h", "2026-03-28T12:00:00+01:00", "2026-03-29T03:00:00+02:00", "2026-03-29T04:00:00+02:00"},
		{"not open before the jump", "02:30", "1h", "2026-03-29T01:59:00+01:00", "2026-03-29T03:00:00+02:00", "2026-03-29T04:00:00+02:00"},
		{"spans the jump and keeps its length", "01:30", "2h", "2026-03-29T00:00:00+01:00", "2026-03-29T01:30:00+01:00", "2026-03-29T04:30:00+02:00"},
		{"shown twice: the first time", "02:30", "30m", "2026-10-25T00:00:00+02:00", "2026-10-25T02:30:00+02:00", "2026-10-25T03:00:00+02:00"},
		{"shown twice: over when shown again", "02:30", "30m", "2026-10-25T02:40:00+01:00", "2026-10-26T02:30:00+01:00", "2026-10-26T03:00:00+01:00"},
		{"spans going back and keeps its length", "01:30", "2h", "2026-10-25T02:10:00+01:00", "2026-10-25T01:30:00+02:00", "2026-10-25T03:30:00+02:00"},
		{"weekly over midnight", "Sat 23:00", "2h", "2026-10-25T00:30:00+02:00", "2026-10-24T23:00:00+02:00", "2026-10-25T01:00:00+02:00"},
		{"the end is not part of it", "Sat 23:00", "2h", "2026-10-25T01:00:00+02:00", "2026-10-31T23:00:00+01:00", "2026-11-01T01:00:00+01:00"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			begin, end := mustParse(t, tt.start, tt.length, "Europe/Berlin").openAt(at(t, tt.now))
			if !begin.Equal(at(t, tt.begin)) || !end.Equal(at(t, tt.end)) {
				t.Errorf("at %s the window is %s to %s, want %s to %s", tt.now, begin, end, tt.begin, tt.end)
			}
		})
	}
}

// Half-hour changes and zones that skip a whole day must not confuse it.
func TestStrangeZones(t *testing.T) {
	begin, _ := mustParse(t, "02:15", "1h", "Australia/Lord_Howe").openAt(at(t, "2026-10-03T12:00:00Z"))
	if begin.In(time.UTC).Format(time.RFC3339) != "2026-10-03T15:30:00Z" { // 02:00 becomes 02:30
		t.Errorf("Lord Howe: %s", begin.In(time.UTC))
	}
	begin, _ = mustParse(t, "Fri 12:00", "1h", "Pacific/Apia").openAt(at(t, "2011-12-30T08:00:00Z")) // Friday 30 December 2011 did not exist
	if begin.Before(at(t, "2011-12-30T10:00:00Z")) {
		t.Errorf("Apia: %s", begin)
	}
}

func TestSchedule(t *testing.T) {
	blackout, err := ParseBlackout("2026-12-24", "2027-01-01", "UTC", "the holidays")
	if err != nil {
		t.Fatal(err)
	}
	thu := mustParse(t, "Thu 22:00", "4h", "UTC")
	fri := mustParse(t, "Fri 02:00", "1h", "UTC")
	s := Schedule{Windows: []Window{thu, fri}, Blackouts: []Blackout{blackout}}
	for _, tt := range []struct {
		name, now string
		need      time.Duration
		open      bool
		time      string
		why       string
	}{
		{"open; windows that touch are one", "2026-12-17T23:00:00Z", 0, true, "2026-12-18T03:00:00Z", ""},
		{"closed", "2026-12-18T03:00:00Z", 0, false, "2027-01-07T22:00:00Z", "no reboot window is open"},
		{"does not fit any more", "2026-12-04T02:50:00Z", 20 * time.Minute, false, "2026-12-10T22:00:00Z", "a reboot takes about 20m and the window closes in 10m"},
		{"fits over the seam", "2026-12-04T01:50:00Z", 20 * time.Minute, true, "2026-12-04T03:00:00Z", ""},
		{"blackout", "2026-12-24T22:30:00Z", 0, false, "2027-01-07T22:00:00Z", "blackout 2026-12-24 to 2027-01-01 (the holidays)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			st := s.At(at(t, tt.now), tt.need)
			got := st.Next
			if st.Open {
				got = st.Until
			}
			if st.Open != tt.open || !got.Equal(at(t, tt.time)) || st.Why != tt.why {
				t.Errorf("At = %+v, want open %v, %s, %q", st, tt.open, tt.time, tt.why)
			}
		})
	}
	if st := (Schedule{}).At(at(t, "2026-12-24T22:30:00Z"), time.Hour); !st.Open || !st.Until.IsZero() {
		t.Errorf("no windows: %+v, want always open", st)
	}
	if st := (Schedule{Windows: []Window{{}}}).At(at(t, "2026-12-24T22:30:00Z"), 0); st.Open || st.Why == "" {
		t.Errorf("a zero window: %+v, want never open", st)
	}
}

// A date that is written for "never" is not waited for: the year after it has no place in JSON.
func TestClosedForGood(t *testing.T) {
	now := at(t, "2026-11-29T12:00:00Z")
	for _, zone := range []string{"UTC", "Pacific/Kiritimati", "Etc/GMT+12"} {
		for _, windows := range [][]Window{nil, {mustParse(t, "04:00", "1h", zone)}} {
			b, err := ParseBlackout("2026-11-01", "9999-12-31", zone, "retired")
			if err != nil {
				t.Fatal(err)
			}
			st := Schedule{windows, []Blackout{b}}.At(now, time.Minute)
			if st.Open || !st.Next.IsZero() || st.Why != "blackout 2026-11-01 to 9999-12-31 (retired)" {
				t.Errorf("zone %s, %d windows: %+v, want closed for good", zone, len(windows), st)
			}
			if b, err = ParseBlackout("9999-12-31", "", zone, ""); err != nil {
				t.Fatal(err)
			}
			if st = (Schedule{nil, []Blackout{b}}).At(now, time.Minute); !st.Open || !st.Until.IsZero() {
				t.Errorf("zone %s: %+v, want open for good", zone, st)
			}
		}
	}
}

func TestJSON(t *testing.T) {
	const text = `{"days":["Mon","Thu"],"start":"04:00","length":"1h30m","zone":"Europe/Berlin"}`
	var w Window
	if err := json.Unmarshal([]byte(text), &w); err != nil {
		t.Fatal(err)
	}
	if out, err := json.Marshal(w); err != nil || string(out) != text {
		t.Errorf("%s, %v, want %s", out, err, text)
	}
	for _, bad := range []string{`{}`, `{"start":"Thu 04:00","length":"1h","zone":"UTC"}`, `{"start":"04:00","length":"1h"}`, `{"days":["Mon","mon"],"start":"04:00","length":"1h","zone":"UTC"}`, `3`} {
		if err := json.Unmarshal([]byte(bad), &w); err == nil {
			t.Errorf("%s was taken for a window", bad)
		}
	}
	const dates = `{"from":"2026-12-24","to":"2027-01-01","zone":"UTC","reason":"holidays"}`
	var b Blackout
	if err := json.Unmarshal([]byte(dates), &b); err != nil {
		t.Fatal(err)
	}
	if out, err := json.Marshal(b); err != nil || string(out) != dates {
		t.Errorf("%s, %v, want %s", out, err, dates)
	}
	for _, bad := range []string{`{"from":"24.12.2026","zone":"UTC"}`, `{"from":"2026-12-24"}`, `{"from":"2026-12-24","to":"2026-12-23","zone":"UTC"}`} {
		if err := json.Unmarshal([]byte(bad), &b); err == nil {
			t.Errorf("%s was taken for a blackout", bad)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"Thu 04:00", "2:30pm", "24:00", "Mon-Fri 1:1", "\xff 0:0"} {
		f.Add(s, "1h30m")
	}
	f.Fuzz(func(t *testing.T, start, length string) {
		w, err := Parse(start, length, "Europe/Berlin")
		if err != nil {
			return
		}
		now := time.Date(2026, 10, 24, 12, 0, 0, 0, time.UTC)
		begin, end := w.openAt(now)
		if end.Sub(begin) != w.Length() || !end.After(now) || begin.Sub(now) > 8*day {
			t.Errorf("%s at %s: %s to %s", w, now, begin, end)
		}
	})
}
