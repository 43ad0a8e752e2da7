package server

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

// layoutOne writes a state file as the first layout had it.
func layoutOne(t *testing.T, dir string) {
	t.Helper()
	put(t, dir, map[string]map[string]string{
		"meta": {
			"version": "1",
			"history": `{"samples":[{"at":"2026-11-01T12:00:00Z","versions":{"1.0.0":3}}],"activity":[{"at":"2026-11-01T12:00:00Z","host":"h1","from":"seen","to":"current"}]}`,
		},
		"hosts":    {"h1": `{"id":"h1","version":"1.0.0","track":"stable","channel":"stable","state":"granted","target":"1.1.0","first_seen":"2026-11-01T12:00:00Z","last_seen":"2026-11-01T12:00:00Z","changed_at":"2026-11-01T12:00:00Z"}`},
		"rollouts": {"stable": `{"version":"1.1.0","failures":{"h9":true}}`},
	})
}

func put(t *testing.T, dir string, content map[string]map[string]string) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(dir, "state.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.Update(func(tx *bolt.Tx) error {
		for name, values := range content {
			b, err := tx.CreateBucketIfNotExists([]byte(name))
			if err != nil {
				return err
			}
			for k, v := range values {
				if err := b.Put([]byte(k), []byte(v)); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// An old layout is carried over with everything in it; a newer one, or one that cannot be read, is left alone.
func TestMigrate(t *testing.T) {
	dir := t.TempDir()
	layoutOne(t, dir)
	for range 2 { // the second time there is nothing to do
		s, err := New(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		h, ok := s.Host("h1")
		if !ok || h.State != Granted || h.Target != "1.1.0" || !s.rollouts["stable"].active["h1"] || !s.rollouts["stable"].Failures["h9"] {
			t.Errorf("host %+v, rollout %+v", h, s.rollouts["stable"])
		}
		if past := s.history; len(past.Samples) < 1 || past.Samples[0].Channels[""]["1.0.0"] != 3 || len(past.Activity) != 1 {
			t.Errorf("history %+v", past)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, version := range []string{fmt.Sprint(len(migrations()) + 1), "0", "x"} {
		put(t, dir, map[string]map[string]string{"meta": {"version": version}})
		if s, err := New(dir, Options{}); err == nil || !strings.Contains(err.Error(), "layout") {
			t.Errorf("layout %s: %v, %v", version, s, err)
		}
	}
}

// That a host was seen again is written only now and then; anything else about it with the next commit, and all of it on closing.
func TestLazyWrites(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	c := l.client(1, "1.1.0")
	l.check(c)
	l.commit(true)
	onDisk := func() (h Host) {
		t.Helper()
		hosts, _, err := l.store.load()
		if err != nil || hosts[c.MachineID] == nil {
			t.Fatalf("the host is not on the disk: %v", err)
		}
		return *hosts[c.MachineID]
	}
	first := onDisk().LastSeen
	l.clock.Add(time.Minute)
	l.check(c)
	l.commit(true)
	if got := onDisk().LastSeen; !got.Equal(first) {
		t.Errorf("a check without news was written at once: %s", got)
	}
	c.MachineAlias = "web-1"
	l.check(c)
	l.commit(true)
	if got := onDisk(); got.Alias != "web-1" || !got.LastSeen.Equal(first.Add(time.Minute)) {
		t.Errorf("news were not written: %+v", got)
	}
	l.clock.Add(lazySeen)
	l.check(c)
	l.commit(true)
	if got := onDisk().LastSeen; !got.Equal(l.clock.Now()) {
		t.Errorf("after %s the host was last seen at %s", lazySeen, got)
	}
	l.clock.Add(time.Minute)
	l.check(c)
	want := l.clock.Now()
	l.Close()
	l.start()
	if h, _ := l.Host(c.MachineID); !h.LastSeen.Equal(want) {
		t.Errorf("after a restart the host was last seen at %s, not %s", h.LastSeen, want)
	}
}
