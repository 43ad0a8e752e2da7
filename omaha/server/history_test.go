package server

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

// claims lets a host say which version it runs.
func (l *lab) claims(n int, version string) (code int, body string) {
	l.t.Helper()
	return l.post(fmt.Sprintf(`<request protocol="3.0"><app appid="%s" version="%s" track="stable" machineid="%032x"><updatecheck/></app></request>`, testApp, version, n))
}

// Hosts may claim to run anything. What is kept of the fleet's past, and what the metrics say, does not grow with it.
func TestVersionsAreBounded(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.0.0", 1)
	l.publishVersion("1.1.0", 2)
	if _, body := l.claims(1, "1.0.0-"+strings.Repeat("a", 900)); !strings.Contains(body, "error-instanceRegistrationFailed") || len(l.Hosts()) != 0 {
		t.Fatalf("a version of 900 bytes: %s", body)
	}
	const strangers = 200
	for n := range strangers {
		l.claims(n, fmt.Sprintf("7.%d.0-%s", n, strings.Repeat("a", 80)))
	}
	for n := range 30 {
		l.claims(strangers+n, "1.1.0")
		l.claims(strangers+100+n, "1.0.9") // never published here, and many run it
	}
	for range 5 {
		l.clock.Add(sampleIdle)
		l.commit(true)
	}
	past := l.history.Samples
	if len(past) < 5 {
		t.Fatalf("%d samples", len(past))
	}
	now := past[len(past)-1].Channels["stable"]
	if now["1.1.0"] != 30 || now["1.0.9"] != 30 || now[otherVersions] != strangers-maxForeign+1 || len(now) != maxForeign+2 {
		t.Errorf("the last sample is %v", now)
	}
	err := l.store.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte("samples")).ForEach(func(_, v []byte) error {
			if len(v) > 4000 {
				t.Errorf("a sample takes %d bytes", len(v))
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	_, metrics := l.get("/metrics")
	if n := strings.Count(metrics, "flipside_hosts{"); n != 3 || !strings.Contains(metrics, `flipside_hosts{channel="stable",state="current",version="other"} 200`) {
		t.Errorf("%d series of hosts", n)
	}
	_, page := l.get("/")
	wellFormed(t, page)
	before, err := json.Marshal(past)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	l.start()
	if after, err := json.Marshal(l.history.Samples[:len(past)]); err != nil || string(after) != string(before) {
		t.Errorf("after a restart: %v\n%s\n%s", err, before, after)
	}
	for range 2 * maxSamples { // old ones are thinned out, on the disk as well
		l.clock.Add(sampleIdle)
		l.mu.Lock()
		l.history.sample(l.clock.Now(), l.versions(l.catalog.Load()))
		l.mu.Unlock()
	}
	l.commit(true)
	rows := 0
	err = l.store.db.View(func(tx *bolt.Tx) error {
		rows = tx.Bucket([]byte("samples")).Stats().KeyN
		return nil
	})
	if err != nil || rows != len(l.history.Samples) || rows > maxSamples {
		t.Errorf("%d samples, %d on the disk, %v", len(l.history.Samples), rows, err)
	}
}

// What could not be written is written with the next commit: the past, and that a host was forgotten.
func TestFailedCommit(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.claims(1, "1.0.0")
	if err := l.Close(); err != nil { // from here on the test is the one that commits
		t.Fatal(err)
	}
	l.clock.Add(100 * 24 * time.Hour)
	l.claims(2, "1.0.0") // not saved
	l.commit(true)
	if said := strings.Join(l.Status().Problems, "\n"); !strings.Contains(said, "state") {
		t.Errorf("the problems are %q", said)
	}
	db, err := bolt.Open(filepath.Join(l.dir, "state.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	l.store.db = db
	l.commit(true)
	if said := l.Status().Problems; len(said) != 0 {
		t.Errorf("the problems are %q", said)
	}
	samples := len(l.history.Samples)
	if hosts, _, err := l.store.load(); err != nil || len(hosts) != 1 {
		t.Errorf("%d hosts are on the disk, %v", len(hosts), err)
	}
	if past, err := l.store.loadHistory(); err != nil || len(past.Samples) != samples || len(past.Activity) != len(l.history.Activity) {
		t.Errorf("of %d samples %d are on the disk, %v", samples, len(past.Samples), err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	l.start()
	if hosts := l.Hosts(); len(hosts) != 1 || hosts[0].ID != fmt.Sprintf("%032x", 2) {
		t.Errorf("after a restart there are %d hosts: %+v", len(hosts), hosts)
	}
	if len(l.history.Samples) < samples || len(l.history.Activity) == 0 {
		t.Errorf("%d samples of %d are left", len(l.history.Samples), samples)
	}
}

// The past of an older state is taken apart, and bounded.
func TestHistoryOfLayoutTwo(t *testing.T) {
	dir := t.TempDir()
	many := map[string]int{"1.0.0": 50}
	for n := range 500 {
		many[fmt.Sprintf("7.%d.0", n)] = 1
	}
	at := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	old, err := json.Marshal(history{
		Samples:  []Sample{{At: at, Channels: map[string]map[string]int{"stable": {"1.0.0": 3}}}, {At: at.Add(time.Hour), Channels: map[string]map[string]int{"stable": many}}},
		Activity: []Activity{{At: at, Host: "h1", From: Seen, To: Current}},
	})
	if err != nil {
		t.Fatal(err)
	}
	put(t, dir, map[string]map[string]string{"meta": {"version": "2", "history": string(old)}, "hosts": {}, "rollouts": {}, "events": {}})
	s, err := New(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if len(s.history.Samples) != 2 || s.history.Samples[0].Channels["stable"]["1.0.0"] != 3 || len(s.history.Activity) != 1 {
		t.Fatalf("the past is %+v", s.history)
	}
	if m := s.history.Samples[1].Channels["stable"]; m["1.0.0"] != 50 || len(m) > 100 || m[otherVersions] < 400 {
		t.Errorf("%d versions, %d of 1.0.0, %d of others", len(m), m["1.0.0"], m[otherVersions])
	}
	err = s.store.db.View(func(tx *bolt.Tx) error {
		if left := tx.Bucket([]byte("meta")).Get([]byte("history")); left != nil {
			t.Errorf("%d bytes of the old past are left", len(left))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
