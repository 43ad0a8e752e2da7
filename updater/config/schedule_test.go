package config

import (
	"strings"
	"testing"
	"time"
)

func TestSchedule(t *testing.T) {
	c, err := Parse("test.toml", []byte(`
[update]
server = "https://updates.example.org/v1/update/"
[reboot]
time_zone = "Europe/Berlin"
[[reboot.windows]]
days = ["Tue", "Thu"]
start = "04:00"
length = "2h"
[[reboot.windows]]
days = ["Sun"]
start = "23:30"
length = "1h"
zone = "UTC"
[[reboot.blackouts]]
from = "2026-12-24"
to = "2026-12-31"
reason = "the holidays"
`))
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.Reboot.Schedule()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		at, next string
	}{
		{"2026-11-26T03:30:00Z", ""}, // 04:30 in Berlin, a Thursday
		{"2026-11-26T05:30:00Z", "2026-11-29T23:30:00Z"},
		{"2026-12-24T03:30:00Z", "2027-01-03T23:30:00Z"}, // the Thursday and the Sunday after it are blacked out
	} {
		at, err := time.Parse(time.RFC3339, tt.at)
		if err != nil {
			t.Fatal(err)
		}
		st := s.At(at, 0)
		if st.Open != (tt.next == "") || !st.Open && st.Next.UTC().Format(time.RFC3339) != tt.next {
			t.Errorf("%s: %+v, want it to open at %q", tt.at, st, tt.next)
		}
	}
	for _, set := range c.Settings() {
		if set.Key == "reboot.windows" && !strings.Contains(set.Value, `{days = ["Tue", "Thu"], start = "04:00", length = "2h"}`) {
			t.Errorf("it is shown as %s", set.Value)
		}
	}
}

func TestScheduleErrors(t *testing.T) {
	for text, want := range map[string]string{
		"[[reboot.windows]]\nstart = \"4pm\"\nlength = \"1h\"\n":                            "test.toml",
		"[[reboot.windows]]\ndays = [\"Thursday\"]\nstart = \"04:00\"\nlength = \"1h\"\n":   "Thursday",
		"[[reboot.windows]]\ndyas = [\"Thu\"]\nstart = \"04:00\"\nlength = \"1h\"\n":        "dyas",
		"[[reboot.blackouts]]\nfrom = \"24.12.2026\"\n":                                     "24.12.2026",
		"[[reboot.windows]]\nstart = \"04:00\"\nlength = \"1h\"\nzone = \"Mars/Olympus\"\n": "Mars/Olympus",
		"[reboot]\nalerts = \"prometheus:9090\"\n":                                          "reboot.alerts",
		"[reboot]\nalerts_query = \"up\"\n":                                                 "reboot.alerts_query",
		"[lock]\nendpoints = [\"http://a:1\"]\nfleetlock = \"http://b:1\"\n":                "set one",
		"[lock]\nendpoints = [\"http://a:1\"]\nproxy = \"http://b:1\"\n":                    "etcd is asked directly",
		"[lock]\nfleetlock = \"http://a:1\"\nproxy = \"proxy:3128\"\n":                      "lock.proxy \"proxy:3128\" is not",
		"proxy = \"ftp://me:secret@proxy\"\n":                                               "update.proxy \"ftp://me:xxxxx@proxy\" is not",
		"proxy = \"http://me:secret@%zz\"\n":                                                "update.proxy cannot be read",
	} {
		_, err := Parse("test.toml", []byte("[update]\nserver = \"https://updates.example.org/v1/update/\"\n"+text))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want an error with %q", text, err, want)
		}
	}
}
