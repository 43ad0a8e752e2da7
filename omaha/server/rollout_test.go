package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/omaha"
)

func (l *lab) change(edit func(*Channel)) {
	l.t.Helper()
	if _, err := l.publish.Change("stable", func(c *Channel) error { edit(c); return nil }); err != nil {
		l.t.Fatal(err)
	}
	if err := l.Reload(); err != nil {
		l.t.Fatal(err)
	}
}

// wants checks that a host gets version, or is held with a reason that holds the words.
func (l *lab) wants(c *omaha.Client, version, words string) {
	l.t.Helper()
	a := l.check(c)
	switch {
	case version != "" && (a.Offer == nil || a.Offer.Version != version):
		l.t.Errorf("host %s got %v, want %s", c.MachineID, a.Reason, version)
	case version == "" && (a.Offer != nil || !strings.Contains(a.Reason.Text, words)):
		l.t.Errorf("host %s got %q, want %q", c.MachineID, a.Reason, words)
	}
}

func TestPolicy(t *testing.T) {
	t.Run("paused", func(t *testing.T) {
		l := newLab(t)
		l.publishVersion("1.1.0", 1)
		l.change(func(c *Channel) { c.Paused = true })
		l.wants(l.client(1, "1.0.0"), "", "paused")
		if h, _ := l.Host(l.client(1, "").MachineID); h.State != Held || h.Why != "the rollout is paused" {
			t.Errorf("host is %+v", h)
		}
		l.change(func(c *Channel) { c.Paused = false })
		l.wants(l.client(1, "1.0.0"), "1.1.0", "")
	})
	t.Run("blacklist", func(t *testing.T) {
		l := newLab(t)
		l.publishVersion("1.1.0", 1)
		l.change(func(c *Channel) { c.Blacklist = []string{"1.1.0"} })
		l.wants(l.client(1, "1.0.0"), "", "withdrawn")
	})
	t.Run("concurrent", func(t *testing.T) {
		l := newLab(t)
		l.publishVersion("1.1.0", 1)
		l.change(func(c *Channel) { c.MaxConcurrent = 2 })
		a, b, c := l.client(1, "1.0.0"), l.client(2, "1.0.0"), l.client(3, "1.0.0")
		l.wants(a, "1.1.0", "")
		l.wants(b, "1.1.0", "")
		l.wants(c, "", "2 hosts update now, the limit is 2")
		l.wants(a, "1.1.0", "") // asking again takes no second place
		l.report(a, omaha.Failed(9))
		l.wants(c, "1.1.0", "")
		l.wants(a, "", "limit")
	})
	t.Run("expired", func(t *testing.T) {
		l := newLab(t)
		l.publishVersion("1.1.0", 1)
		l.change(func(c *Channel) { c.MaxConcurrent, c.GrantTimeout = 1, "30m" })
		a, b := l.client(1, "1.0.0"), l.client(2, "1.0.0")
		l.wants(a, "1.1.0", "")
		l.report(a, omaha.DownloadStarted())
		l.clock.Add(31 * time.Minute)
		l.wants(b, "1.1.0", "")
		if got := l.state(a); got != TimedOut {
			t.Errorf("the silent host is %s", got)
		}
		l.report(b, omaha.Failed(9))
		l.wants(a, "1.1.0", "") // not stuck
	})
	t.Run("period", func(t *testing.T) {
		l := newLab(t)
		l.publishVersion("1.1.0", 1)
		l.change(func(c *Channel) { c.MaxPerPeriod, c.Period = 2, "1h" })
		l.wants(l.client(1, "1.0.0"), "1.1.0", "")
		l.wants(l.client(2, "1.0.0"), "1.1.0", "")
		l.wants(l.client(3, "1.0.0"), "", "2 hosts began in the last 1h0m0s, the limit is 2")
		l.clock.Add(61 * time.Minute)
		l.wants(l.client(3, "1.0.0"), "1.1.0", "")
	})
	t.Run("failures", func(t *testing.T) {
		l := newLab(t)
		l.publishVersion("1.1.0", 1)
		l.change(func(c *Channel) { c.StopFailures = 2 })
		for i := range 3 {
			l.wants(l.client(i, "1.0.0"), "1.1.0", "")
		}
		l.report(l.client(0, "1.0.0"), omaha.Failed(omaha.CodeRollback))
		l.report(l.client(1, "1.0.0"), omaha.Failed(omaha.CodeTransfer)) // the network's fault
		l.wants(l.client(4, "1.0.0"), "1.1.0", "")
		l.report(l.client(2, "1.0.0"), omaha.Failed(omaha.CodePayloadHash))
		l.wants(l.client(5, "1.0.0"), "", "stopped: 2 hosts failed with 1.1.0")
		l.wants(l.client(4, "1.0.0"), "", "stopped") // also one that was granted and has not finished
		if _, err := l.publish.Pause("stable", false); err != nil {
			t.Fatal(err)
		}
		l.Reload()
		l.wants(l.client(5, "1.0.0"), "1.1.0", "")
		l.report(l.client(5, "1.0.0"), omaha.Failed(omaha.CodeRollback)) // counted from zero again
		l.wants(l.client(6, "1.0.0"), "1.1.0", "")
	})
	t.Run("time-outs", func(t *testing.T) {
		l := newLab(t)
		l.publishVersion("1.1.0", 1)
		l.change(func(c *Channel) { c.StopTimeouts, c.GrantTimeout = 1, "10m" })
		l.wants(l.client(1, "1.0.0"), "1.1.0", "")
		l.clock.Add(11 * time.Minute)
		l.wants(l.client(2, "1.0.0"), "", "1 hosts did not finish 1.1.0 in time")
	})
	t.Run("floors", func(t *testing.T) {
		l := newLab(t)
		for i, v := range []string{"1.1.0", "1.2.0", "2.0.0"} {
			l.publishVersion(v, byte(i))
		}
		l.change(func(c *Channel) { c.Floors = []string{"1.2.0", "1.1.0"} })
		l.wants(l.client(1, "1.0.0"), "1.1.0", "")
		l.wants(l.client(1, "1.1.0"), "1.2.0", "")
		l.wants(l.client(1, "1.2.0"), "2.0.0", "")
		l.wants(l.client(1, "2.0.0"), "", "nothing newer")
		l.wants(l.client(1, "3.0.0"), "", "nothing newer")
	})
	t.Run("a floor that fails", func(t *testing.T) {
		for stop, want := range map[string]string{"failures": "2 hosts failed with 1.1.0", "time-outs": "2 hosts did not finish 1.1.0 in time", "share": "2 of 10 hosts failed with 1.1.0, 2.0.0"} {
			l := newLab(t)
			l.publishVersion("1.1.0", 1)
			l.publishVersion("2.0.0", 2)
			l.change(func(c *Channel) { c.Floors, c.GrantTimeout = []string{"1.1.0"}, "10m" })
			l.wants(l.client(100, "0.9.0"), "1.1.0", "")
			switch stop {
			case "failures":
				l.change(func(c *Channel) { c.StopFailures = 2 })
				for i := range 2 {
					l.wants(l.client(i, "1.0.0"), "1.1.0", "")
					l.report(l.client(i, "1.0.0"), omaha.Failed(omaha.CodeRollback))
				}
			case "time-outs":
				l.change(func(c *Channel) { c.StopTimeouts = 2 })
				l.wants(l.client(1, "1.0.0"), "1.1.0", "")
				l.clock.Add(11 * time.Minute)
			case "share":
				l.change(func(c *Channel) { c.StopFailurePercent = 20 })
				for i := range 10 { // eight come up with the floor, one fails with it and one with what follows
					c := l.client(i, "1.0.0")
					if i == 9 {
						c.Version = "1.1.0"
					}
					l.check(c)
					if i >= 8 {
						l.report(c, omaha.Failed(omaha.CodeRollback))
						continue
					}
					c.Version = "1.1.0"
					l.report(c, omaha.Booted("1.0.0"))
				}
			}
			l.wants(l.client(50, "1.0.0"), "", "stopped: "+want)
			l.wants(l.client(51, "1.1.0"), "", "stopped: "+want)
		}
	})
	t.Run("a version of another time fails", func(t *testing.T) {
		l := newLab(t)
		l.publishVersion("1.1.0", 1)
		l.change(func(c *Channel) { c.StopFailures = 1 })
		l.wants(l.client(1, "1.0.0"), "1.1.0", "")
		l.publishVersion("1.2.0", 2)
		l.report(l.client(1, "1.0.0"), omaha.Failed(omaha.CodeRollback))
		l.wants(l.client(2, "1.0.0"), "1.2.0", "")
	})
	t.Run("nobody", func(t *testing.T) {
		l := newLab(t)
		l.publishVersion("1.1.0", 1)
		none, all := 0, 100
		if c, err := l.publish.Apply("stable", Order{Action: "limit", Limits: &Limits{Percent: &none}}); err != nil || c.Words() != "no host" {
			t.Errorf("0 percent: %+v, %v", c, err)
		}
		if err := l.Reload(); err != nil {
			t.Fatal(err)
		}
		l.wants(l.client(1, "1.0.0"), "", "0 % of the hosts")
		// By hand, too; and what changes something else leaves it so.
		if err := os.WriteFile(filepath.Join(l.dir, "channels", "stable.toml"), []byte("version = \"1.1.0\"\npercent = 0\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		l.change(func(c *Channel) { c.PollInterval = "5m" })
		l.wants(l.client(1, "1.0.0"), "", "0 % of the hosts")
		if c, err := l.publish.Apply("stable", Order{Action: "limit", Limits: &Limits{Percent: &all}}); err != nil || c.Words() != "all hosts" {
			t.Errorf("100 percent: %+v, %v", c, err)
		}
	})
	t.Run("downgrade", func(t *testing.T) {
		l := newLab(t)
		l.publishVersion("1.1.0", 1)
		l.publishVersion("1.2.0", 2)
		ch, err := l.publish.Rollback("stable", true)
		if err != nil || ch.Version != "1.1.0" {
			t.Fatalf("%+v, %v", ch, err)
		}
		l.Reload()
		l.wants(l.client(1, "1.2.0"), "", "older than the running") // the host has a say, too
		a, err := l.client(1, "1.2.0").Check(context.Background(), omaha.CheckRequest{AllowDowngrade: true})
		if err != nil || a.Offer == nil || !a.Offer.Downgrade {
			t.Errorf("%+v, %v", a, err)
		}
	})
	t.Run("board", func(t *testing.T) {
		l := newLab(t)
		l.publishVersion("1.1.0", 1)
		l.publishVersion("1.2.0", 2)
		if _, err := l.publish.Move("stable@amd64-usr", "1.1.0"); err != nil {
			t.Fatal(err)
		}
		l.Reload()
		l.wants(l.client(1, "1.0.0"), "1.1.0", "")
	})
	t.Run("a failed version again", func(t *testing.T) {
		l := newLab(t)
		l.publishVersion("1.1.0", 1)
		c := l.client(1, "1.0.0")
		l.wants(c, "1.1.0", "")
		if a := l.check(c, omaha.Failed(omaha.CodeRollback)); a.Offer != nil {
			t.Error("the version that failed is offered in the answer to its failure")
		}
		l.wants(c, "", "failed on this host")
		l.clock.Add(61 * time.Minute)
		l.wants(c, "1.1.0", "")
		l.report(c, omaha.Failed(omaha.CodeRollback))
		l.clock.Add(61 * time.Minute)
		l.wants(c, "", "failed on this host")
	})
	t.Run("hours", func(t *testing.T) {
		l := newLab(t) // Monday noon
		l.publishVersion("1.1.0", 1)
		l.change(func(c *Channel) { c.Hours, c.TimeZone = "Mon-Fri 09:00-17:00", "America/New_York" })
		l.wants(l.client(1, "1.0.0"), "", "Mon-Fri 09:00-17:00")
		l.clock.Add(2 * time.Hour) // nine o'clock there
		l.wants(l.client(1, "1.0.0"), "1.1.0", "")
		l.clock.Add(9 * time.Hour)
		l.wants(l.client(1, "1.0.0"), "", "hours") // its grant has timed out meanwhile
	})
	t.Run("canaries", func(t *testing.T) {
		l := newLab(t)
		l.publishVersion("1.1.0", 1)
		if _, err := l.publish.Move("canary", "1.1.0"); err != nil {
			t.Fatal(err)
		}
		l.change(func(c *Channel) { c.After, c.AfterHealthy = "canary", 2 })
		l.wants(l.client(1, "1.0.0"), "", "channel canary goes first: 0 of 2")
		for i := 10; i < 12; i++ {
			c := l.client(i, "1.0.0")
			c.Track = "canary"
			l.wants(c, "1.1.0", "")
			c.Version = "1.1.0"
			l.check(c, omaha.Booted("1.0.0"))
			l.clock.Add(2 * time.Second)
		}
		l.wants(l.client(1, "1.0.0"), "1.1.0", "")
	})
	t.Run("unknown track", func(t *testing.T) {
		l := newLab(t)
		l.wants(l.client(1, "1.0.0"), "", "does not know this application, track")
	})
	t.Run("foreign application", func(t *testing.T) {
		l := newLab(t)
		c := l.client(1, "1.0.0")
		c.AppID = "org.example.other"
		l.wants(c, "", "does not know this application")
		if len(l.Hosts()) != 0 {
			t.Error("a host of another application was noted")
		}
	})
}

// The percentage takes about as many hosts as it says, keeps those that are in, and draws anew for each version.
func TestPercent(t *testing.T) {
	count := func(percent int, version string) map[int]bool {
		in := map[int]bool{}
		for i := range 2000 {
			if (Channel{Percent: &percent}).in(fmt.Sprintf("%032x", i), version) {
				in[i] = true
			}
		}
		return in
	}
	ten, thirty := count(10, "1.1.0"), count(30, "1.1.0")
	if len(ten) < 150 || len(ten) > 250 || len(thirty) < 520 || len(thirty) > 680 {
		t.Errorf("10 %% are %d and 30 %% are %d of 2000", len(ten), len(thirty))
	}
	for i := range ten {
		if !thirty[i] {
			t.Fatalf("host %d fell out when the percentage grew", i)
		}
	}
	same := 0
	for i := range count(10, "1.2.0") {
		if ten[i] {
			same++
		}
	}
	if same > 60 {
		t.Errorf("%d hosts are the first ones of two versions", same)
	}
	if n, all := len(count(0, "1.1.0")), len(count(100, "1.1.0")); n != 0 || all != 2000 || !(Channel{}).in("a", "1.1.0") {
		t.Errorf("0 %% are %d hosts, 100 %% are %d of 2000, and no number has to be all", n, all)
	}
}

// Many hosts at the same moment get exactly as many grants as the policy allows.
func TestNoOvergrant(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.change(func(c *Channel) { c.MaxConcurrent = 5 })
	var wg sync.WaitGroup
	var mu sync.Mutex
	granted := 0
	for i := range 64 {
		wg.Go(func() {
			a, err := l.client(i, "1.0.0").Check(context.Background(), omaha.CheckRequest{})
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			if a.Offer != nil {
				granted++
			}
		})
	}
	wg.Wait()
	if granted != 5 {
		t.Errorf("%d grants, the limit is 5", granted)
	}
}

// A rollout of a thousand hosts over HTTP, of which some fail, is stopped by its policy; the rest keep their version.
func TestThousandHosts(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.change(func(c *Channel) { c.MaxConcurrent, c.StopFailures = 50, 20 })
	versions := make([]string, 1000)
	for i := range versions {
		versions[i] = "1.0.0"
	}
	for round := range 40 {
		var wg sync.WaitGroup
		for w := range 8 {
			wg.Go(func() {
				for i := w; i < len(versions); i += 8 {
					c := l.client(i, versions[i])
					a, err := c.Check(context.Background(), omaha.CheckRequest{})
					if err != nil {
						t.Error(err)
						return
					}
					if a.Offer == nil {
						continue
					}
					// Every tenth host does not come up with the new version.
					events := []omaha.Event{omaha.DownloadStarted(), omaha.DownloadFinished(), omaha.Installed()}
					if i%10 == 7 {
						events = append(events, omaha.Failed(omaha.CodeRollback))
					}
					for _, e := range events {
						if err := c.Report(context.Background(), e); err != nil {
							t.Error(err)
							return
						}
					}
					if i%10 != 7 {
						c.Version, versions[i] = "1.1.0", "1.1.0"
						if err := c.Report(context.Background(), omaha.Booted("1.0.0")); err != nil {
							t.Error(err)
						}
					}
				}
			})
		}
		wg.Wait()
		if ch, err := l.publish.Channel("stable"); err != nil || ch.Stopped != "" {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		if round == 39 {
			t.Fatal("the rollout was never stopped")
		}
	}
	states := map[State]int{}
	for _, h := range l.Hosts() {
		states[h.State]++
	}
	failed := len(l.Status().Failures)
	if failed < 20 || failed > 70 { // the ones that were under way when the twentieth failed may fail as well
		t.Errorf("%d hosts failed: %v", failed, states)
	}
	if states[Complete] == 0 || states[Held] == 0 || states[Complete]+failed+states[Held] != 1000 {
		t.Errorf("states are %v, %d failed", states, failed)
	}
	t.Logf("stopped with %v", states)
}

func TestHours(t *testing.T) {
	at := func(s string) time.Time {
		now, err := time.Parse("Mon 2006-01-02 15:04", s)
		if err != nil {
			t.Fatal(err)
		}
		return now
	}
	for _, tc := range []struct {
		hours, zone, now string
		open             bool
	}{
		{"", "", "Mon 2026-11-23 03:00", true},
		{"09:00-17:00", "", "Sun 2026-11-22 09:00", true},
		{"09:00-17:00", "", "Sun 2026-11-22 17:00", false},
		{"Mon-Fri 09:00-17:00", "", "Sun 2026-11-22 12:00", false},
		{"Sat,Sun 09:00-17:00", "", "Sun 2026-11-22 12:00", true},
		{"Fri-Mon 09:00-17:00", "", "Sun 2026-11-22 12:00", true},
		{"Fri 22:00-04:00", "", "Sat 2026-11-21 03:59", true},
		{"Fri 22:00-04:00", "", "Sat 2026-11-21 22:30", false},
		{"Fri 22:00-04:00", "", "Fri 2026-11-20 03:00", false},
		{"09:00-10:00", "Europe/Berlin", "Mon 2026-11-23 08:30", true},
		{"09:00-10:00", "Europe/Berlin", "Wed 2026-07-01 07:30", true}, // summer time
	} {
		if got, err := (Channel{Hours: tc.hours, TimeZone: tc.zone}).open(at(tc.now)); err != nil || got != tc.open {
			t.Errorf("%q %s at %s: %v, %v", tc.hours, tc.zone, tc.now, got, err)
		}
	}
	for _, bad := range []Channel{{Hours: "always"}, {Hours: "Mon-Fry 09:00-17:00"}, {Hours: "25:00-26:00"}, {Hours: "09:00"}, {Hours: "09:00-10:00", TimeZone: "Atlantis"}} {
		if bad.check() == nil {
			t.Errorf("%q %q was accepted", bad.Hours, bad.TimeZone)
		}
	}
}

func TestPublish(t *testing.T) {
	dir := t.TempDir()
	p := &Publisher{Dir: dir}
	ctx := context.Background()
	good := fakePayload(t, 1, 1000)
	rel, err := p.Add(ctx, "1.1.0", good)
	if err != nil {
		t.Fatal(err)
	}
	again, err := p.Add(ctx, "1.1.0", good)
	if err != nil || again.SHA256 != rel.SHA256 || !again.Published.Equal(rel.Published) {
		t.Errorf("the same again: %+v, %v", again, err)
	}
	if _, err := p.Add(ctx, "1.1.0", fakePayload(t, 2, 1000)); !errors.Is(err, ErrExists) {
		t.Errorf("another payload for the same version: %v", err)
	}
	text := filepath.Join(t.TempDir(), "text")
	os.WriteFile(text, []byte("this is not a payload at all, is it?"), 0o644)
	for name, path := range map[string]string{"text": text, "directory": dir, "nothing": filepath.Join(dir, "nope")} {
		if _, err := p.Add(ctx, "1.2.0", path); err == nil {
			t.Errorf("%s was published", name)
		}
	}
	for _, version := range []string{"", "1", "1.2", "v1.2.3", "1.2.3.4", "../../1.2.3", "1.2.3/x"} {
		if _, err := p.Add(ctx, version, good); err == nil {
			t.Errorf("version %q was published", version)
		}
	}
	for _, channel := range []string{"", "..", "a/b", ".hidden", "a b", strings.Repeat("a", 65)} {
		if _, err := p.Move(channel, "1.1.0"); err == nil {
			t.Errorf("channel %q was made", channel)
		}
	}
	if _, err := p.Move("stable", "9.9.9"); !errors.Is(err, ErrUnknown) {
		t.Errorf("channel moved to nothing: %v", err)
	}
	if _, err := p.Rollback("stable", false); !errors.Is(err, ErrUnknown) {
		t.Errorf("rollback of nothing: %v", err)
	}
	p.Verify = func(context.Context, string, *Delta) error { return errors.New("wrong key") }
	if _, err := p.Add(ctx, "1.3.0", good); err == nil || !strings.Contains(err.Error(), "wrong key") {
		t.Errorf("a payload that does not verify: %v", err)
	}
	log, err := os.ReadFile(filepath.Join(dir, "audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		var entry struct{ At, Who, What string }
		if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.Who == "" || entry.What == "" {
			t.Errorf("audit line %q: %v", line, err)
		}
	}
	left, _ := filepath.Glob(filepath.Join(dir, "payloads", "*"))
	if len(left) != 1 {
		t.Errorf("payloads holds %v", left)
	}
}

// A running server notices what others write, and keeps the last good state of a file that it cannot read.
func TestDirectoryIsNoticed(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	p := &Publisher{Dir: l.dir} // another program
	if _, err := p.Add(context.Background(), "1.2.0", fakePayload(t, 2, 1000)); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Move("stable", "1.2.0"); err != nil {
		t.Fatal(err)
	}
	l.clock.Add(2 * time.Second)
	l.wants(l.client(1, "1.0.0"), "1.2.0", "")

	path := filepath.Join(l.dir, "channels", "stable.toml")
	for name, content := range map[string]string{
		"broken": "version = ", "unknown key": `version = "1.2.0"` + "\npercentage = 5\n", "no such release": `version = "7.0.0"`,
		"not a version": `version = "latest"`, "percent": `version = "1.2.0"` + "\npercent = 500\n", "empty": "\x00",
	} {
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		l.clock.Add(2 * time.Second)
		l.wants(l.client(1, "1.0.0"), "1.2.0", "")
		if problems := l.Status().Problems; len(problems) != 1 || !strings.Contains(problems[0], "stable") {
			t.Errorf("%s: problems %q", name, problems)
		}
	}
	os.Remove(path)
	l.clock.Add(2 * time.Second)
	l.wants(l.client(1, "1.0.0"), "", "does not know")
}

func TestStateSurvivesRestart(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.change(func(c *Channel) { c.MaxConcurrent, c.StopFailures = 1, 2 })
	l.wants(l.client(1, "1.0.0"), "1.1.0", "")
	l.report(l.client(1, "1.0.0"), omaha.DownloadStarted())
	if _, err := New(l.dir, Options{}); !errors.Is(err, ErrBusy) {
		t.Errorf("a second server on the directory: %v", err)
	}
	before := l.Hosts()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l.start()
	after := l.Hosts()
	if len(after) != 1 || after[0].State != Downloading || after[0].Target != "1.1.0" || !after[0].GrantedAt.Equal(before[0].GrantedAt) {
		t.Errorf("before %+v\nafter %+v", before, after)
	}
	l.wants(l.client(2, "1.0.0"), "", "limit")
	l.report(l.client(1, "1.0.0"), omaha.Failed(omaha.CodeRollback))
	l.Close()
	l.start()
	l.wants(l.client(2, "1.0.0"), "1.1.0", "")
	l.report(l.client(2, "1.0.0"), omaha.Failed(omaha.CodeRollback))
	l.wants(l.client(3, "1.0.0"), "", "2 hosts failed")
}

// Ids cost nothing to invent, so the number of hosts is bounded, and those that are gone are forgotten.
func TestHostsAreBounded(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.opt.MaxHosts = 2
	l.wants(l.client(1, "1.0.0"), "1.1.0", "")
	l.wants(l.client(2, "1.0.0"), "1.1.0", "")
	l.wants(l.client(3, "1.0.0"), "", "refuses this host's machine id")
	l.wants(l.client(1, "1.0.0"), "1.1.0", "")
	l.clock.Add(80 * 24 * time.Hour)
	l.wants(l.client(1, "1.0.0"), "1.1.0", "")
	l.clock.Add(80 * 24 * time.Hour)
	l.commit(true)
	if hosts := l.Hosts(); len(hosts) != 1 || hosts[0].ID != l.client(1, "").MachineID {
		t.Errorf("hosts are %+v", hosts)
	}
	l.Close()
	l.start()
	if hosts := l.Hosts(); len(hosts) != 1 {
		t.Errorf("after a restart: %+v", hosts)
	}
	l.wants(l.client(3, "1.0.0"), "1.1.0", "")
}

func TestHostileRequests(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	app := `<app appid="` + testApp + `" version="1.0.0" track="stable" machineid="m"><updatecheck/></app>`
	for name, tc := range map[string]struct {
		body string
		code int
	}{
		"nothing":           {"", 400},
		"not XML":           {"{}", 400},
		"DOCTYPE":           {`<!DOCTYPE r [<!ENTITY a "b">]><request protocol="3.0">` + app + `</request>`, 400},
		"protocol 4":        {`<request protocol="4.0">` + app + `</request>`, 400},
		"too large":         {`<request protocol="3.0"><!--` + strings.Repeat("x", 70_000) + `-->` + app + `</request>`, 400},
		"17 applications":   {`<request protocol="3.0">` + strings.Repeat(app, 17) + `</request>`, 400},
		"two update checks": {`<request protocol="3.0">` + strings.Replace(app, "<updatecheck/>", "<updatecheck/><updatecheck/>", 1) + `</request>`, 400},
		"long attribute":    {`<request protocol="3.0">` + strings.Replace(app, "stable", strings.Repeat("s", 2000), 1) + `</request>`, 400},
		"fine":              {`<request protocol="3.0">` + app + `</request>`, 200},
		"no machine id":     {`<request protocol="3.0">` + strings.Replace(app, `machineid="m"`, "", 1) + `</request>`, 200},
	} {
		t.Run(name, func(t *testing.T) {
			resp, body := l.post(tc.body)
			if resp != tc.code {
				t.Errorf("status %d, want %d: %s", resp, tc.code, body)
			}
			if offered := strings.Contains(body, "<manifest"); offered != (name == "fine") {
				t.Errorf("answer %s", body)
			}
		})
	}
	if hosts := l.Hosts(); len(hosts) != 1 {
		t.Errorf("%d hosts are known", len(hosts))
	}
}
