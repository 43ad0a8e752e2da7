package lock_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/window"
)

// alone is a group in memory, with a clock to move.
type alone struct {
	*testing.T
	store *lock.Memory
	*lock.Keeper
	now time.Time
}

func newAlone(t *testing.T) *alone {
	a := &alone{T: t, store: lock.NewMemory(), now: time.Date(2026, 12, 1, 4, 0, 0, 0, time.UTC)}
	a.Keeper = lock.On(a.store, lock.Options{Now: func() time.Time { return a.now }})
	return a
}

func (a *alone) must(err error) {
	a.Helper()
	if err != nil {
		a.Fatal(err)
	}
}

func (a *alone) state() lock.State {
	a.Helper()
	s, err := a.State(a.Context(), group)
	a.must(err)
	return s
}

func (a *alone) ask(host, to string) lock.Standing {
	a.Helper()
	st, err := a.Request(a.Context(), lock.Claim{Group: group, Host: host, To: to})
	a.must(err)
	return st
}

func (a *alone) goesDown(host, to string) {
	a.Helper()
	if st := a.ask(host, to); !st.Granted {
		a.Fatalf("%s: %+v", host, st)
	}
	a.must(a.Mark(a.Context(), group, host, lock.Mark{Phase: lock.Rebooting}))
}

// The whole state is one value in the store. Hosts that fail, with names, versions and reasons of their own making, do not fill it.
func TestFailuresAreBounded(t *testing.T) {
	a := newAlone(t)
	long := strings.Repeat("x", 20000)
	for i := range 40 {
		a.now = a.now.Add(time.Minute)
		v := lock.Verdict{Outcome: lock.Failed, Version: fmt.Sprintf("%d\x1b[31m", i) + long, Reason: long}
		a.must(a.Release(t.Context(), group, "a", v))
	}
	a.must(a.EditPolicy(t.Context(), group, "", func(p *lock.Policy) error { p.FailureBudget = 60; return nil }))
	for i := range 60 {
		a.now = a.now.Add(time.Minute)
		if s := a.state(); s.Halts["2.0.0"].Reason != "" {
			t.Fatalf("halted after %d failures, the budget is 60", i)
		}
		a.must(a.Release(t.Context(), group, fmt.Sprintf("host-%d", i), lock.Verdict{Outcome: lock.Failed, Version: "2.0.0", Reason: long}))
	}
	s := a.state()
	if s.Halts["2.0.0"].Reason == "" || s.Failures["2.0.0"].Count() != 60 {
		t.Errorf("60 hosts failed, the budget is 60: %d counted, halts %v", s.Failures["2.0.0"].Count(), s.Halts)
	}
	v, err := a.store.Read(t.Context(), group, "", 0)
	a.must(err)
	if len(v.State) > 100_000 || len(s.Failures) > 32 || len(s.Halts) > 32 {
		t.Errorf("%d versions, %d halts, %d bytes of state", len(s.Failures), len(s.Halts), len(v.State))
	}
	last := ""
	for version := range s.Halts {
		if strings.Contains(version, "\x1b") || len(version) > 100 {
			t.Fatalf("version %.200q", version)
		}
		if strings.HasPrefix(version, "39 ") {
			last = version
		}
	}
	if st := a.ask("b", fmt.Sprintf("39\x1b[31m%s", long)); last == "" || st.Halted == "" {
		t.Errorf("the version that failed last is not halted any more: %+v", st)
	}
}

// A job that shares the semaphore leads to no version. That it takes long says nothing about a release.
func TestLateWithoutAVersion(t *testing.T) {
	a := newAlone(t)
	a.goesDown("job", "")
	a.now = a.now.Add(45 * time.Minute)
	if st := a.ask("b", "2"); st.Granted || st.Halted != "" {
		t.Errorf("b: %+v, want it to wait", st)
	}
	if h, ok := a.state().Holder("job"); !ok || h.Late.IsZero() {
		t.Errorf("the job holds its slot for 45 minutes and is %+v", h)
	}
	a.must(a.Release(t.Context(), group, "job", lock.Verdict{Outcome: lock.Healthy}))
	a.must(a.Release(t.Context(), group, "b", lock.Verdict{Outcome: lock.Cancelled}))
	if st := a.ask("zincati", ""); !st.Granted {
		t.Errorf("the next without a version: %+v", st)
	}
	if s := a.state(); len(s.Failures) != 0 || len(s.Halts) != 0 {
		t.Errorf("failures %+v, halts %+v", s.Failures, s.Halts)
	}
}

// Reboots that take longer than the windows last begin with one. The time before, in which a host has a slot and is up, counts for nothing.
func TestRebootsLongerThanTheWindow(t *testing.T) {
	a := newAlone(t)
	w, err := window.New(nil, "04:00", "20m", "UTC")
	a.must(err)
	a.must(a.EditPolicy(t.Context(), group, "", func(p *lock.Policy) error {
		p.Windows, p.RebootTime = []window.Window{w}, lock.Duration(3*time.Minute)
		return nil
	}))
	a.ask("a", "2")
	a.now = a.now.Add(14 * time.Minute) // it takes its time before it goes down
	a.goesDown("a", "2")
	a.now = a.now.Add(3 * time.Minute)
	a.must(a.Release(t.Context(), group, "a", lock.Verdict{Outcome: lock.Healthy}))
	if s := a.state(); s.RebootTime() != 3*time.Minute || s.Overlong() != "" {
		t.Errorf("a reboot takes %s, want 3m0s; %s", s.RebootTime(), s.Overlong())
	}
	for day := 2; day < 30; day++ {
		a.now = time.Date(2026, 12, day, 4, 0, 1, 0, time.UTC)
		a.goesDown("b", "2")
		a.now = a.now.Add(28 * time.Minute)
		a.must(a.Release(t.Context(), group, "b", lock.Verdict{Outcome: lock.Healthy}))
	}
	if s := a.state(); s.RebootTime() < 20*time.Minute || !strings.Contains(s.Overlong(), "first 5m0s") {
		t.Errorf("a reboot takes %s: %q", s.RebootTime(), s.Overlong())
	}
	a.now = time.Date(2027, 1, 1, 4, 6, 0, 0, time.UTC)
	st := a.ask("c", "2")
	if opens := time.Date(2027, 1, 2, 4, 0, 0, 0, time.UTC); st.Granted || !st.Ask.Equal(opens) {
		t.Errorf("c, six minutes into the window: %+v, want to be asked again at %s", st, opens)
	}
	a.now = st.Ask.Add(time.Minute)
	if st := a.ask("c", "2"); !st.Granted {
		t.Errorf("c, at the beginning of the next: %+v", st)
	}
}

// Who has left the queue is remembered for those who watch, and not for ever: then everybody looks again.
func TestManyLeaveTheQueue(t *testing.T) {
	a := newAlone(t)
	var hosts []string
	for i := range 10_001 {
		hosts = append(hosts, fmt.Sprint("host-", i))
		_, err := a.store.Enqueue(t.Context(), group, hosts[i], nil)
		a.must(err)
	}
	v, err := a.store.Read(t.Context(), group, "", 0)
	a.must(err)
	rev, _, err := a.store.Commit(t.Context(), group, "", 0, v, lock.Change{Remove: hosts})
	a.must(err)
	for _, h := range []string{hosts[0], hosts[10_000], "who never came"} {
		a.must(a.store.Watch(t.Context(), group, h, v.Rev))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.store.Watch(ctx, group, hosts[0], rev); !errors.Is(err, context.Canceled) {
		t.Errorf("a watch from now on: %v, want it to wait", err)
	}
}

// Who may write to the store cannot make its readers count for hours: a record brings the key that it is verified by, and that may be of any size.
func TestHugeKey(t *testing.T) {
	raw := bytes.Repeat([]byte{0xff}, 20<<10)
	der, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: new(big.Int).SetBytes(raw), E: 1<<31 - 1})
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(map[string][]byte{"statement": []byte("{}"), "key": der, "signature": append([]byte{0}, raw[1:]...)})
	if err != nil {
		t.Fatal(err)
	}
	m := lock.NewMemory()
	change := lock.Change{State: []byte(`{"schema":2}`), Records: []lock.Record{{Name: "/owner", Data: data}}}
	if _, _, err := m.Commit(t.Context(), group, "", 0, lock.View{}, change); err != nil {
		t.Fatal(err)
	}
	k := lock.On(m, lock.Options{Owners: []crypto.PublicKey{newKey(t).Public()}})
	if st, err := k.State(t.Context(), group); err != nil || len(st.Tampered) == 0 || !strings.Contains(strings.Join(st.Tampered, "\n"), "its RSA key has 163840 bits") {
		t.Errorf("tampered %q, %v", st.Tampered, err)
	}
}
