package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/fleetlock"
	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/config"
)

func parse(t *testing.T, text string) config.Config {
	t.Helper()
	c, err := config.Parse("test.toml", []byte("[update]\nserver = \"http://127.0.0.1:1/\"\n[paths]\nstate = \""+t.TempDir()+"\"\nrun = \""+t.TempDir()+"\"\n"+text))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Every gate of the configuration is asked, in the order of the documentation.
func TestRebootGatesFromConfig(t *testing.T) {
	names := func(gates []reboot.Gate) (list []string) {
		for _, g := range gates {
			list = append(list, g.Name())
		}
		return list
	}
	for _, tt := range []struct {
		text        string
		gates, last []string
	}{
		{"", []string{"pause", "strategy", "window", "inhibitors", "inhibit files", "commands"}, []string{"users"}},
		{"[reboot]\nmethod = \"exit\"\ngate_dir = \"\"\nalerts = \"http://127.0.0.1:9090\"\n", []string{"pause", "strategy", "window", "inhibit files", "alerts"}, nil},
		{"[reboot]\ninhibitors = false\nusers_grace = \"0s\"\n", []string{"pause", "strategy", "window", "inhibit files", "commands"}, nil},
	} {
		p, err := rebootGates(parse(t, tt.text), nil)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(names(p.Gates), tt.gates) || !slices.Equal(names(p.Last), tt.last) {
			t.Errorf("%q: %v, then %v", tt.text, names(p.Gates), names(p.Last))
		}
	}
}

// inhibiting is a semaphore whose grant takes its time: meanwhile something else comes to be against the reboot.
type inhibiting struct {
	lock.Semaphore
	file string
}

func (s inhibiting) Mark(ctx context.Context, group, host string, m lock.Mark) error {
	if err := os.WriteFile(s.file, []byte("a backup has just begun\n"), 0o644); err != nil {
		return err
	}
	return s.Semaphore.Mark(ctx, group, host, m)
}

func keeper(t *testing.T, c config.Config, sem lock.Semaphore, now func() time.Time) *gatekeeper {
	t.Helper()
	p, err := rebootGates(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &gatekeeper{panel: p, target: &target{}, semaphore: sem, group: "web", zone: "rack-1", class: "canary", host: "a", version: "1.0.0", timeout: time.Minute, now: now}
}

const exit = "[reboot]\nmethod = \"exit\"\ngate_dir = \"\"\n"

// The host's own gates are asked once more when the slot is held and marked, and the slot can be given back then.
func TestGatesAreAskedAtTheLastInstant(t *testing.T) {
	c := parse(t, exit)
	if err := os.Mkdir(c.InhibitDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	k := lock.On(lock.NewMemory(), lock.Options{})
	g := keeper(t, c, inhibiting{k, filepath.Join(c.InhibitDir(), "backup")}, time.Now)
	o := omaha.Offer{Version: "2.0.0"}
	if a, stop := reboot.First(g.Ask(t.Context(), updater.BeforeReboot, o, false).Answers); stop {
		t.Fatalf("%+v", a)
	}
	if err := g.Rebooting(t.Context(), o, false); err == nil || !strings.Contains(err.Error(), "a backup has just begun") {
		t.Fatalf("Rebooting = %v", err)
	}
	st, err := k.State(t.Context(), "web")
	if h, ok := st.Holder("a"); err != nil || !ok || h.Phase != lock.Rebooting || h.Zone != "rack-1" || h.Class != "canary" {
		t.Errorf("%+v, %v", h, err)
	}
	if err := g.Verdict(t.Context(), updater.Verdict{Cancelled: true, Version: "2.0.0", Reason: "the reboot did not happen"}); err != nil {
		t.Fatal(err)
	}
	if st, err = k.State(t.Context(), "web"); err != nil || len(st.Holders) != 0 || len(st.Failures) != 0 {
		t.Errorf("after it was given back: %+v, %v", st, err)
	}
}

// The window closes while the semaphore takes its time.
func TestWindowIsAskedAtTheLastInstant(t *testing.T) {
	now := time.Date(2026, 11, 26, 5, 29, 0, 0, time.UTC)
	c := parse(t, exit+"[[reboot.windows]]\ndays = [\"Thu\"]\nstart = \"04:00\"\nlength = \"1h30m\"\nzone = \"UTC\"\n")
	k := lock.On(lock.NewMemory(), lock.Options{Now: func() time.Time { return now }})
	g := keeper(t, c, k, func() time.Time { return now })
	o := omaha.Offer{Version: "2.0.0"}
	if a, stop := reboot.First(g.Ask(t.Context(), updater.BeforeReboot, o, false).Answers); stop {
		t.Fatalf("%+v", a)
	}
	now = now.Add(time.Minute)
	if err := g.Rebooting(t.Context(), o, false); err == nil || !strings.HasPrefix(err.Error(), "window: ") {
		t.Errorf("Rebooting = %v", err)
	}
}

// A slot that was taken away and granted again since it was asked for is not this host's leave to reboot.
func TestRebootingIsFenced(t *testing.T) {
	c := parse(t, exit)
	k := lock.On(lock.NewMemory(), lock.Options{})
	g := keeper(t, c, k, time.Now)
	o := omaha.Offer{Version: "2.0.0"}
	g.Ask(t.Context(), updater.BeforeReboot, o, false)
	for range 2 {
		if err := k.Release(t.Context(), "web", "a", lock.Verdict{Outcome: lock.Forced}); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Request(t.Context(), g.claim(o)); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Rebooting(t.Context(), o, false); !errors.Is(err, lock.ErrFenced) {
		t.Errorf("Rebooting = %v, want ErrFenced", err)
	}
}

// A host that is configured for FleetLock goes through a reboot, and through a failure.
func TestFleetLockFromConfig(t *testing.T) {
	k := lock.On(lock.NewMemory(), lock.Options{})
	srv := httptest.NewServer(&fleetlock.Server{Semaphore: k})
	defer srv.Close()
	c := parse(t, exit+"[lock]\ngroup = \"web\"\nfleetlock = \""+srv.URL+"\"\n")
	sem, closer, err := semaphore(c.Lock, "")
	if err != nil {
		t.Fatal(err)
	}
	defer closer()
	g := keeper(t, c, sem, time.Now)
	o := omaha.Offer{Version: "2.0.0"}
	if ev := g.Ask(t.Context(), updater.BeforeDownload, o, false); len(ev.Answers) == 0 || ev.Answers[0].Verdict != reboot.Go {
		t.Errorf("before the download: %+v", ev)
	}
	if a, stop := reboot.First(g.Ask(t.Context(), updater.BeforeReboot, o, false).Answers); stop {
		t.Fatalf("%+v", a)
	}
	for _, step := range []func() error{
		func() error { return g.Rebooting(t.Context(), o, false) },
		func() error { return g.Booted(t.Context()) },
		func() error {
			return g.Verdict(t.Context(), updater.Verdict{Version: "2.0.0", Reason: "port 80 does not answer"})
		},
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	if ev := g.Ask(t.Context(), updater.BeforeReboot, o, false); !strings.Contains(ev.Halted, "port 80") {
		t.Errorf("after the failure: %+v", ev)
	}
}

// By order, the host's own gates are passed over and the semaphore is not.
func TestAnOrderPassesOverTheHostsGatesOnly(t *testing.T) {
	c := parse(t, exit)
	c.Reboot.Strategy = "off"
	k := lock.On(lock.NewMemory(), lock.Options{})
	g := keeper(t, c, k, time.Now)
	o := omaha.Offer{Version: "2.0.0"}
	if a, stop := reboot.First(g.Ask(t.Context(), updater.BeforeReboot, o, false).Answers); !stop || a.Gate != "strategy" || a.Hint == "" {
		t.Fatalf("without an order: %+v", a)
	}
	if err := k.SetMax(t.Context(), g.group, 0); err != nil {
		t.Fatal(err)
	}
	if a, stop := reboot.First(g.Ask(t.Context(), updater.BeforeReboot, o, true).Answers); !stop || a.Gate != "semaphore" {
		t.Fatalf("by order, with no slot: %+v", a)
	}
	if err := k.SetMax(t.Context(), g.group, 1); err != nil {
		t.Fatal(err)
	}
	ev := g.Ask(t.Context(), updater.BeforeReboot, o, true)
	if a, stop := reboot.First(ev.Answers); stop {
		t.Fatalf("by order, with a slot: %+v", a)
	}
	if !strings.Contains(ev.Answers[1].Why, "passed over by order: this host never reboots by itself") {
		t.Errorf("it does not say what was passed over: %+v", ev.Answers)
	}
	if err := g.Rebooting(t.Context(), o, true); err != nil {
		t.Errorf("Rebooting = %v", err)
	}
}

// A forecast takes no place in the queue.
func TestForecastClaimsNothing(t *testing.T) {
	k := lock.On(lock.NewMemory(), lock.Options{})
	g := keeper(t, parse(t, exit), k, time.Now)
	answers := g.Forecast(t.Context(), updater.BeforeReboot, omaha.Offer{Version: "2.0.0"})
	if a, stop := reboot.First(answers); stop || !strings.Contains(answers[len(answers)-1].Why, "1 of 1 slots") {
		t.Errorf("%+v, %+v", a, answers)
	}
	st, err := k.State(t.Context(), g.group)
	if err != nil || len(st.Holders)+len(st.Queue) != 0 {
		t.Errorf("the forecast left a mark: %+v, %v", st, err)
	}
}

// Every gate that is against the next step says why, since when, where that can be seen and what changes it; and until when, where that is known.
func TestEveryGateSaysAll(t *testing.T) {
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nowhere") // so logind cannot be asked; package reboot's tests have one
	prometheus := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `{"status":"success","data":{"resultType":"vector","result":[{"metric":{"alertname":"DiskFull"}}]}}`)
	}))
	defer prometheus.Close()
	dir := t.TempDir()
	c := parse(t, fmt.Sprintf(`[reboot]
strategy = "off"
gate_dir = %q
alerts = %q
[[reboot.windows]]
days = ["Thu"]
start = "04:00"
length = "1h30m"
zone = "UTC"
`, dir, prometheus.URL))
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC) // a Tuesday
	if err := errors.Join(
		(pause{Reason: "the rack is being moved", By: "user 0", Until: now.Add(time.Hour)}).write(c.PauseFile()),
		os.MkdirAll(c.InhibitDir(), 0o755), os.WriteFile(filepath.Join(c.InhibitDir(), "backup"), []byte("a backup runs\n"), 0o644),
		os.WriteFile(filepath.Join(dir, "replicas"), []byte("#!/bin/sh\necho two replicas are behind\nexit 1\n"), 0o755),
	); err != nil {
		t.Fatal(err)
	}
	store := lock.NewMemory()
	k := lock.On(store, lock.Options{Now: func() time.Time { return now }})
	if err := k.SetMax(t.Context(), "web", 0); err != nil {
		t.Fatal(err)
	}
	g := keeper(t, c, k, func() time.Time { return now })
	g.target.pin = "1.0"
	g.download = []reboot.Gate{pauseGate{c.PauseFile()}}
	o := omaha.Offer{Version: "2.0.0"}

	said := map[string]reboot.Answer{}
	keep := func(what string, answers []reboot.Answer) {
		for _, a := range answers {
			if a.Verdict != reboot.Go {
				said[what+a.Gate] = a
			}
		}
	}
	for _, gate := range append(slices.Clone(g.panel.Gates), g.panel.Last...) { // each alone: the last ones are not asked while others are against it
		keep("", (&reboot.Panel{Gates: []reboot.Gate{gate}}).Ask(t.Context(), now))
	}
	keep("full ", (&reboot.Panel{}).Ask(t.Context(), now, g.gate(o)))
	away := &reboot.Semaphore{Lock: lock.On(unavailable{store}, lock.Options{}), Claim: g.claim(o)}
	keep("away ", (&reboot.Panel{}).Ask(t.Context(), now, away))
	if err := errors.Join(g.gate(o).Withdraw(t.Context(), "b goes first"), k.SetMax(t.Context(), "web", 1)); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Request(t.Context(), lock.Claim{Group: "web", Host: "b", To: "2.0.0"}); err != nil {
		t.Fatal(err)
	}
	keep("queue ", (&reboot.Panel{}).Ask(t.Context(), now, g.gate(o)))
	if err := k.Release(t.Context(), "web", "b", lock.Verdict{Outcome: lock.Failed, Version: "2.0.0", Reason: "port 80 does not answer"}); err != nil {
		t.Fatal(err)
	}
	keep("halted ", (&reboot.Panel{}).Ask(t.Context(), now, g.gate(o)))
	keep("download ", g.Ask(t.Context(), updater.BeforeDownload, o, false).Answers)
	hanging := &reboot.Panel{Gates: []reboot.Gate{hangs{}}, Limit: time.Millisecond}
	keep("", hanging.Ask(t.Context(), now))

	want := []string{"alerts", "away semaphore", "commands", "download halt", "download pause", "download pin", "full semaphore", "halted semaphore", "hangs", "inhibit files",
		"inhibitors", "pause", "queue semaphore", "strategy", "users", "window"}
	if got := slices.Sorted(maps.Keys(said)); !slices.Equal(got, want) {
		t.Errorf("against it: %q, want %q", got, want)
	}
	for name, a := range said {
		if a.Why == "" || a.Since.IsZero() || a.Hint == "" || a.Evidence == "" {
			t.Errorf("%s does not say all: %+v", name, a)
		}
		if known := name == "pause" || name == "download pause" || name == "window"; known && a.Ask.IsZero() {
			t.Errorf("%s does not say until when: %+v", name, a)
		}
	}
}

// unavailable is a store that is away.
type unavailable struct{ *lock.Memory }

func (unavailable) Read(context.Context, string, string, int) (lock.View, error) {
	return lock.View{}, fmt.Errorf("%w: no member answers", lock.ErrUnavailable)
}

// hangs is a gate that does not answer.
type hangs struct{}

func (hangs) Name() string { return "hangs" }

func (hangs) Ask(ctx context.Context, _ time.Time) reboot.Answer {
	<-context.WithoutCancel(ctx).Done() // as a call into the kernel may, for ever
	return reboot.Answer{}
}
