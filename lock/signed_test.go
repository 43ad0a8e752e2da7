package lock_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
)

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// signedGroup is a group of hosts with keys, on a store that an attacker may write to.
type signedGroup struct {
	*testing.T
	store *lock.Memory
	now   time.Time
	owner crypto.Signer
	op    *lock.Keeper            // an operator with the owner's key
	host  map[string]*lock.Keeper // each with its own
	key   map[string]crypto.Signer

	wasWell, wasPolicy []byte
}

const group = "g"

func newSignedGroup(t *testing.T, limit int, hosts ...string) *signedGroup {
	t.Helper()
	g := &signedGroup{
		T: t, store: lock.NewMemory(), now: time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC), owner: newKey(t),
		host: map[string]*lock.Keeper{}, key: map[string]crypto.Signer{},
	}
	g.op = lock.On(g.store, lock.Options{Now: g.clock, Owner: g.owner})
	g.must(lock.On(g.store, lock.Options{Now: g.clock}).SetMax(t.Context(), group, limit))
	g.must(g.op.Sign(t.Context(), group))
	for _, h := range hosts {
		g.key[h] = newKey(t)
		g.host[h] = g.keeper(g.key[h])
		g.must(g.host[h].Enrol(t.Context(), group, h))
		_, err := g.op.Accept(t.Context(), group, h, "")
		g.must(err)
	}
	return g
}

func (g *signedGroup) clock() time.Time { return g.now }

// keeper is a client that believes the owner, with a key of its own or none.
func (g *signedGroup) keeper(key crypto.Signer) *lock.Keeper {
	return lock.On(g.store, lock.Options{Now: g.clock, Owners: []crypto.PublicKey{g.owner.Public()}, Signer: key})
}

func (g *signedGroup) must(err error) {
	g.Helper()
	if err != nil {
		g.Fatal(err)
	}
}

func (g *signedGroup) request(host string) lock.Standing {
	g.Helper()
	st, err := g.host[host].Request(g.Context(), lock.Claim{Group: group, Host: host, From: "1", To: "2"})
	g.must(err)
	return st
}

func (g *signedGroup) mark(host string) error {
	return g.host[host].Mark(g.Context(), group, host, lock.Mark{Phase: lock.Rebooting})
}

// goesDown takes a host through a grant to its reboot.
func (g *signedGroup) goesDown(host string) lock.Standing {
	g.Helper()
	st := g.request(host)
	if !st.Granted {
		g.Fatalf("%s is not granted: %+v", host, st)
	}
	g.must(g.mark(host))
	return st
}

func (g *signedGroup) isWell(host string) {
	g.Helper()
	g.must(g.host[host].Release(g.Context(), group, host, lock.Verdict{Outcome: lock.Healthy}))
}

func (g *signedGroup) state() lock.State {
	g.Helper()
	st, err := g.op.State(g.Context(), group)
	g.must(err)
	return st
}

func (g *signedGroup) holders() []string {
	g.Helper()
	var names []string
	for _, h := range g.state().Holders {
		names = append(names, h.Host)
	}
	slices.Sort(names)
	return names
}

// forge rewrites the state as somebody does who has the credentials for the store and no key.
func (g *signedGroup) forge(change func(*lock.State)) {
	g.Helper()
	v, err := g.store.Read(g.Context(), group, "", 0)
	g.must(err)
	var s lock.State
	g.must(json.Unmarshal(v.State, &s))
	change(&s)
	data, err := json.Marshal(s)
	g.must(err)
	_, _, err = g.store.Commit(g.Context(), group, "", 0, v, lock.Change{State: data, Signal: true})
	g.must(err)
}

// put writes records over what is there.
func (g *signedGroup) put(name string, data []byte) {
	g.Helper()
	v, err := g.store.Read(g.Context(), group, "", 0)
	g.must(err)
	r := lock.Record{Name: name, Data: data}
	if list, err := g.store.Records(g.Context(), group, name); err == nil && len(list) > 0 {
		r.Born, r.Version = list[0].Born, list[0].Version
	}
	_, _, err = g.store.Commit(g.Context(), group, "", 0, v, lock.Change{State: v.State, Records: []lock.Record{r}})
	g.must(err)
}

func (g *signedGroup) record(name string) []byte {
	g.Helper()
	list, err := g.store.Records(g.Context(), group, name)
	if err != nil || len(list) != 1 {
		g.Fatal(list, err)
	}
	return list[0].Data
}

func TestSignedGroup(t *testing.T) {
	g := newSignedGroup(t, 1, "a", "b")
	first := g.goesDown("a")
	if st := g.request("b"); st.Granted || st.Position != 1 {
		t.Fatalf("b: %+v", st)
	}
	if h := g.state().Holders; len(h) != 1 || h[0].Token != first.Token || len(g.state().Tampered) > 0 {
		t.Fatalf("%+v", g.state())
	}
	g.isWell("a")
	if st := g.goesDown("b"); st.Token <= first.Token {
		t.Error(st.Token)
	}
	g.must(g.host["b"].Mark(t.Context(), group, "b", lock.Mark{Phase: lock.Booted, Version: "2"}))
	g.isWell("b")
	if h := g.holders(); len(h) != 0 {
		t.Error(h)
	}

	// An owner's word.
	g.goesDown("a")
	for who, k := range map[string]*lock.Keeper{"b": g.host["b"], "a client without a key": g.keeper(nil), "one that knows no owner": lock.On(g.store, lock.Options{Now: g.clock})} {
		if err := k.Release(t.Context(), group, "a", lock.Verdict{Outcome: lock.Forced}); !errors.Is(err, lock.ErrUnsigned) {
			t.Errorf("%s releases a's slot: %v", who, err)
		}
		if err := k.SetMax(t.Context(), group, 5); !errors.Is(err, lock.ErrUnsigned) {
			t.Errorf("%s sets max: %v", who, err)
		}
	}
	g.must(g.op.Release(t.Context(), group, "a", lock.Verdict{Outcome: lock.Forced, Reason: "burnt"}))
	g.must(g.op.SetMax(t.Context(), group, 2))
	if s := g.state(); len(s.Holders) != 0 || s.Policy.Max != 2 {
		t.Errorf("%+v", s)
	}
	g.must(g.op.Pause(t.Context(), group, ""))
	if st := g.request("a"); st.Granted || st.Blocked == "" {
		t.Errorf("paused: %+v", st)
	}
	g.must(g.op.Unpause(t.Context(), group, ""))

	// A key that is not accepted, and one that is not the one that it should be.
	g.host["c"] = g.keeper(newKey(t))
	if st := g.request("c"); st.Granted || !strings.Contains(st.Blocked, "not accepted") {
		t.Errorf("c: %+v", st)
	}
	if err := g.mark("c"); !errors.Is(err, lock.ErrNotHeld) {
		t.Errorf("c goes down: %v", err)
	}
	if _, err := g.op.Accept(t.Context(), group, "c", "sha256:"+strings.Repeat("0", 64)); !errors.Is(err, lock.ErrUnsigned) {
		t.Errorf("another key than the one that c has: %v", err)
	}
	if _, err := g.op.Accept(t.Context(), group, "d", ""); !errors.Is(err, lock.ErrUnsigned) {
		t.Errorf("a host that has left no key: %v", err)
	}
	keys, err := g.op.Keys(t.Context(), group)
	g.must(err)
	if len(keys) != 3 || keys[0].Fingerprint == "" || keys[0].Left != "" || keys[2].Fingerprint != "" || keys[2].Left == "" {
		t.Errorf("%+v", keys)
	}
	if _, err := g.op.Accept(t.Context(), group, "a", ""); !errors.Is(err, lock.ErrUnsigned) {
		t.Errorf("the owner's own key as that of a: %v", err)
	}
	_, err = g.op.Accept(t.Context(), group, "c", keys[2].Left)
	g.must(err)
	g.goesDown("c")
	g.must(g.op.Forget(t.Context(), group, "c", "sold"))
	if h := g.holders(); slices.Contains(h, "c") {
		t.Error(h)
	}

	// A version that knows nothing of signatures, and hosts that name no owner, do not reboot by a signed group.
	if _, err := lock.On(g.store, lock.Options{Now: g.clock}).Request(t.Context(), lock.Claim{Group: group, Host: "a", To: "2"}); !errors.Is(err, lock.ErrUnsigned) {
		t.Error(err)
	}
	g.must(g.op.Unsign(t.Context(), group))
	if _, err := lock.On(g.store, lock.Options{Now: g.clock}).Request(t.Context(), lock.Claim{Group: group, Host: "a", To: "2"}); err != nil {
		t.Error(err)
	}
}

// A group that nobody has signed does not do for who asks for signatures.
func TestUnsignedGroup(t *testing.T) {
	store := lock.NewMemory()
	k := lock.On(store, lock.Options{Owners: []crypto.PublicKey{newKey(t).Public()}, Signer: newKey(t)})
	if _, err := k.Request(t.Context(), lock.Claim{Group: group, Host: "a"}); !errors.Is(err, lock.ErrUnsigned) {
		t.Errorf("Request: %v", err)
	}
	if st, err := k.State(t.Context(), group); err != nil || len(st.Tampered) != 1 {
		t.Errorf("%+v, %v", st, err)
	}
	// It is not signed over a host that is down without having signed that.
	plain := lock.On(store, lock.Options{})
	if st, err := plain.Request(t.Context(), lock.Claim{Group: group, Host: "b"}); err != nil || !st.Granted {
		t.Fatal(st, err)
	}
	if err := plain.Mark(t.Context(), group, "b", lock.Mark{Phase: lock.Rebooting}); err != nil {
		t.Fatal(err)
	}
	op := lock.On(store, lock.Options{Owner: newKey(t)})
	if err := op.Sign(t.Context(), group); !errors.Is(err, lock.ErrInvalid) {
		t.Errorf("Sign with a host that is down: %v", err)
	}
	if err := plain.Sign(t.Context(), group); !errors.Is(err, lock.ErrUnsigned) {
		t.Errorf("Sign without a key: %v", err)
	}
}

// Somebody has the credentials for the store and no key. Whatever they write: no host goes down beside a, which is down, and everybody can see it.
func TestForgedRecords(t *testing.T) {
	attacks := []struct {
		name string
		do   func(g *signedGroup)
	}{
		{"the slot of a is freed", func(g *signedGroup) { g.forge(func(s *lock.State) { s.Holders = nil }) }},
		{"and the policy lets ten go", func(g *signedGroup) {
			g.forge(func(s *lock.State) { s.Holders, s.Policy.Max = nil, 10 })
		}},
		{"a's slot is called granted, so that its time ends", func(g *signedGroup) {
			g.forge(func(s *lock.State) { s.Holders[0].Phase, s.Holders[0].Granted = lock.Granted, g.now.Add(-time.Hour) })
		}},
		{"a's slot is another grant's", func(g *signedGroup) { g.forge(func(s *lock.State) { s.Holders[0].Token++ }) }},
		{"b is granted a slot", func(g *signedGroup) {
			g.forge(func(s *lock.State) {
				s.Holders = append(s.Holders, lock.Holder{Host: "b", To: "2", From: "1", Phase: lock.Granted, Granted: g.now, Token: 99})
			})
		}},
		{"all that is signed by a is put back to when it was well", func(g *signedGroup) {
			g.put("a", g.wasWell)
			g.forge(func(s *lock.State) { s.Holders = nil })
		}},
		{"a's record is overwritten by a key of the attacker's", func(g *signedGroup) {
			g.must(lock.On(g.store, lock.Options{Now: g.clock, Signer: newKey(g.T)}).Enrol(g.Context(), group, "a"))
			g.forge(func(s *lock.State) { s.Holders = nil })
		}},
		{"the owner's record is an older one", func(g *signedGroup) {
			g.put("/owner", g.wasPolicy)
			g.forge(func(s *lock.State) { s.Holders = nil })
		}},
		{"the owner's record is the attacker's", func(g *signedGroup) {
			g.forge(func(s *lock.State) { s.Holders = nil })
			attacker := lock.On(g.store, lock.Options{Now: g.clock, Owner: newKey(g.T)})
			g.must(attacker.SignOver(g.Context(), group))
			g.must(attacker.Unsign(g.Context(), group))
			g.put("/owner", []byte(`{"statement":"e30="}`))
			g.forge(func(s *lock.State) { s.Holders, s.Schema = nil, 1 })
		}},
	}
	for _, tt := range attacks {
		t.Run(strings.ReplaceAll(tt.name, " ", "-"), func(t *testing.T) {
			g := newSignedGroup(t, 1, "a", "b", "c")
			g.wasPolicy = g.record("/owner")
			g.must(g.op.SetMax(t.Context(), group, 2))
			g.must(g.op.SetMax(t.Context(), group, 1))
			g.wasWell = g.record("a")
			g.goesDown("a")
			tt.do(g)
			for _, host := range []string{"b", "c"} {
				st, err := g.host[host].Request(t.Context(), lock.Claim{Group: group, Host: host, From: "1", To: "2"})
				if err != nil && !errors.Is(err, lock.ErrUnsigned) {
					t.Errorf("%s asks: %v", host, err)
				}
				if err == nil && st.Granted && st.Token != 99 {
					t.Errorf("%s is granted a slot beside a: %+v", host, st)
				}
				if err := g.mark(host); err == nil {
					t.Errorf("%s goes down beside a", host)
				}
			}
			s, err := g.op.State(t.Context(), group)
			g.must(err)
			entries, err := g.op.History(t.Context(), group)
			g.must(err)
			told := slices.ContainsFunc(entries, func(e lock.Entry) bool {
				return slices.Contains([]string{"restored", "removed", "policy restored"}, e.What)
			})
			if len(s.Tampered) == 0 && !told {
				t.Errorf("nothing is to be seen of it: %+v", s)
			}
			t.Logf("tampered %q", s.Tampered)
		})
	}
}

// What a signed of one grant does nothing for a later one.
func TestReplayAcrossGrants(t *testing.T) {
	g := newSignedGroup(t, 1, "a", "b")
	g.goesDown("a")
	g.isWell("a")
	well := g.record("a")
	for range 2 {
		g.goesDown("a")
		g.put("a", well)
		if st := g.request("b"); st.Granted {
			t.Fatalf("an old word of a frees its slot: %+v", st)
		}
		if s := g.state(); len(s.Holders) != 1 || len(s.Tampered) == 0 {
			t.Errorf("%+v", s)
		}
		g.isWell("a") // its own word puts it right
		if s := g.state(); len(s.Tampered) != 0 {
			t.Errorf("%q", s.Tampered)
		}
		if st := g.request("b"); !st.Granted {
			t.Errorf("b: %+v", st)
		}
		g.must(g.host["b"].Release(t.Context(), group, "b", lock.Verdict{Outcome: lock.Cancelled}))
	}
}

// A host whose record somebody has spoilt while it was well puts it right by asking.
func TestSpoiltRecordIsPutRight(t *testing.T) {
	g := newSignedGroup(t, 1, "a", "b")
	g.put("a", []byte("rubbish"))
	if st := g.request("b"); st.Granted {
		t.Fatalf("nobody knows of a: %+v", st)
	}
	g.request("a")
	if s := g.state(); len(s.Tampered) != 0 {
		t.Errorf("%q", s.Tampered)
	}
	g.isWell("b")
	if st := g.request("a"); !st.Granted {
		t.Errorf("%+v, %+v", st, g.state())
	}
}

// The record of a host is spoilt, and it is said of it that it reboots, in a zone where nobody else does. It does not go down beside another of its own zone.
func TestSpoiltRecordInAnotherZone(t *testing.T) {
	g := newSignedGroup(t, 2, "a", "b")
	g.must(g.op.EditPolicy(t.Context(), group, "", func(p *lock.Policy) error { p.ZoneMax = 1; return nil }))
	ask := func(host string) lock.Standing {
		t.Helper()
		st, err := g.host[host].Request(t.Context(), lock.Claim{Group: group, Host: host, From: "1", To: "2", Zone: "rack"})
		g.must(err)
		return st
	}
	if st := ask("a"); !st.Granted {
		t.Fatalf("%+v", st)
	}
	g.must(g.mark("a"))
	g.put("b", []byte("rubbish"))
	g.forge(func(s *lock.State) {
		s.Holders = append(s.Holders, lock.Holder{Host: "b", Zone: "elsewhere", From: "1", To: "2", Phase: lock.Rebooting, Granted: g.now, Rebooting: g.now})
	})
	if err := g.mark("b"); !errors.Is(err, lock.ErrNotHeld) {
		t.Errorf("b goes down: %v", err)
	}
	if st := ask("b"); st.Granted {
		t.Errorf("b is granted a slot: %+v", st)
	}
	if err := g.mark("b"); !errors.Is(err, lock.ErrNotHeld) {
		t.Errorf("b goes down: %v", err)
	}
	if h := g.holders(); !slices.Equal(h, []string{"a"}) {
		t.Errorf("down: %q", h)
	}
}

// away is a store that is away when what an owner has signed is read.
type away struct{ *lock.Memory }

func (a away) Records(ctx context.Context, group string, names ...string) ([]lock.Record, error) {
	if slices.Contains(names, "/owner") {
		return nil, fmt.Errorf("%w: it is away", lock.ErrUnavailable)
	}
	return a.Memory.Records(ctx, group, names...)
}

// A host whose key is accepted leaves it again while the store answers only in part. Nobody has said that it is well, so its slot is not freed.
func TestEnrolIsNoVerdict(t *testing.T) {
	g := newSignedGroup(t, 1, "a", "b")
	g.goesDown("a")
	g.put("a", []byte("rubbish"))
	back := lock.On(away{g.store}, lock.Options{Now: g.clock, Owners: []crypto.PublicKey{g.owner.Public()}, Signer: g.key["a"]}) // another process
	if err := back.Enrol(t.Context(), group, "a"); !errors.Is(err, lock.ErrUnavailable) {
		t.Errorf("Enrol: %v", err)
	}
	if h := g.holders(); !slices.Equal(h, []string{"a"}) {
		t.Errorf("down: %q", h)
	}
	if st := g.request("b"); st.Granted {
		t.Errorf("b is granted a's slot: %+v", st)
	}
}

// What was signed before a group was used without signatures comes back with none of it.
func TestUnsignThenSign(t *testing.T) {
	g := newSignedGroup(t, 1, "a", "b")
	g.goesDown("a")
	g.forge(func(s *lock.State) { s.Holders = nil })
	g.must(g.op.Unsign(t.Context(), group))
	plain := lock.On(g.store, lock.Options{Now: g.clock})
	st, err := plain.State(t.Context(), group)
	g.must(err)
	if len(st.Holders) != 1 || st.Holders[0].Host != "a" {
		t.Errorf("a has signed that it is down: %+v", st.Holders)
	}
	if err := g.mark("b"); !errors.Is(err, lock.ErrUnsigned) {
		t.Errorf("a host that asks for signatures: %v", err)
	}

	g.must(plain.SetMax(t.Context(), group, 3))
	if st, err := plain.Request(t.Context(), lock.Claim{Group: group, Host: "b", From: "1", To: "2"}); err != nil || !st.Granted {
		t.Fatal(st, err)
	}
	g.must(plain.Mark(t.Context(), group, "b", lock.Mark{Phase: lock.Rebooting}))
	for _, host := range []string{"a", "b"} {
		if err := g.op.Sign(t.Context(), group); !errors.Is(err, lock.ErrInvalid) || !strings.Contains(err.Error(), host) {
			t.Errorf("it is signed while %s is down: %v", host, err)
		}
		g.must(plain.Release(t.Context(), group, host, lock.Verdict{Outcome: lock.Healthy}))
	}
	g.must(g.op.Sign(t.Context(), group))
	if s := g.state(); s.Policy.Max != 3 || len(s.Tampered) != 0 {
		t.Errorf("%+v, %q", s.Policy, s.Tampered)
	}
	for _, host := range []string{"a", "b"} {
		_, err := g.op.Accept(t.Context(), group, host, "")
		g.must(err)
	}
	g.isWell("a") // its last word was that it goes down
	g.goesDown("b")
}

// Somebody spoils the owner's record while a reboots. Nobody can give the slot back then, and nothing can be signed over it, but for an owner, who has looked at a.
func TestSpoiltPolicyWhileDown(t *testing.T) {
	g := newSignedGroup(t, 1, "a", "b")
	g.goesDown("a")
	g.put("/owner", []byte("rubbish"))
	release := func(k *lock.Keeper, o lock.Outcome) error {
		return k.Release(t.Context(), group, "a", lock.Verdict{Outcome: o, Reason: "seen"})
	}
	if err := release(g.host["a"], lock.Healthy); !errors.Is(err, lock.ErrUnsigned) {
		t.Errorf("a: %v", err)
	}
	if err := g.op.Sign(t.Context(), group); !errors.Is(err, lock.ErrInvalid) || !strings.Contains(err.Error(), "flipside fleet force-release --group g --owner-key") {
		t.Errorf("Sign does not say what to do: %v", err)
	}
	for who, k := range map[string]*lock.Keeper{"b": g.host["b"], "a client without a key": g.keeper(nil)} {
		if err := release(k, lock.Forced); !errors.Is(err, lock.ErrUnsigned) {
			t.Errorf("%s releases a's slot: %v", who, err)
		}
	}
	if err := release(g.op, lock.Healthy); !errors.Is(err, lock.ErrUnsigned) {
		t.Errorf("an owner, as if it were a: %v", err)
	}
	g.must(release(g.op, lock.Forced))
	g.must(g.op.Sign(t.Context(), group))
	for _, host := range []string{"a", "b"} {
		_, err := g.op.Accept(t.Context(), group, host, "")
		g.must(err)
	}
	if st := g.request("b"); st.Granted {
		t.Errorf("a has signed that it goes down, and not yet that it is well: %+v", st)
	}
	g.must(release(g.host["a"], lock.Healthy))
	if err := g.mark("b"); err != nil {
		t.Errorf("b: %v; %+v", err, g.state())
	}
	if s := g.state(); len(s.Tampered) != 0 {
		t.Errorf("%q", s.Tampered)
	}
}

// An owner whom nobody has told this keeper of has signed. Its policy and the keys that it has accepted are not dropped by a slip.
func TestSignOver(t *testing.T) {
	g := newSignedGroup(t, 1, "a")
	other := newKey(t)
	slip := lock.On(g.store, lock.Options{Now: g.clock, Owner: other})
	for what, err := range map[string]error{"Sign": slip.Sign(t.Context(), group), "Unsign": slip.Unsign(t.Context(), group)} {
		if !errors.Is(err, lock.ErrUnsigned) || !strings.Contains(err.Error(), "sign --force") {
			t.Errorf("%s: %v", what, err)
		}
	}
	g.goesDown("a")
	if err := slip.Release(t.Context(), group, "a", lock.Verdict{Outcome: lock.Forced}); !errors.Is(err, lock.ErrUnsigned) {
		t.Errorf("Release: %v", err)
	}
	g.isWell("a")

	// With both keys named, nothing is lost.
	g.must(lock.On(g.store, lock.Options{Now: g.clock, Owner: other, Owners: []crypto.PublicKey{g.owner.Public()}}).Sign(t.Context(), group))
	keys, err := slip.Keys(t.Context(), group)
	g.must(err)
	if len(keys) != 1 || keys[0].Fingerprint == "" {
		t.Errorf("%+v", keys)
	}
	g.must(g.op.SignOver(t.Context(), group))
	keys, err = g.op.Keys(t.Context(), group)
	g.must(err)
	if len(keys) != 1 || keys[0].Fingerprint != "" {
		t.Errorf("a key that another owner has accepted is believed: %+v", keys)
	}
}

// placed is a store with a name.
type placed struct {
	*lock.Memory
	place string
}

func (p placed) Records(ctx context.Context, group string, names ...string) ([]lock.Record, error) {
	list, err := p.Memory.Records(ctx, group, names...)
	for i := range list {
		list[i].Place = p.place
	}
	return list, err
}

// The same data, down to the store's counters, is nothing in a store of another name; neither the policy, nor a host's word, nor its wish.
func TestSignedForAnotherStore(t *testing.T) {
	g := newSignedGroup(t, 1)
	here, there := placed{g.store, "here"}, placed{g.store, "there"}
	op := lock.On(here, lock.Options{Now: g.clock, Owner: g.owner})
	if err := op.Sign(t.Context(), group); err != nil {
		t.Fatal(err)
	}
	host := lock.Options{Now: g.clock, Owners: []crypto.PublicKey{g.owner.Public()}, Signer: newKey(t)}
	a := lock.On(here, host)
	g.must(a.Enrol(t.Context(), group, "a"))
	_, err := op.Accept(t.Context(), group, "a", "")
	g.must(err)
	claim := lock.Claim{Group: group, Host: "a", From: "1", To: "2"}
	if st, err := a.Request(t.Context(), claim); err != nil || !st.Granted {
		t.Fatal(st, err)
	}
	if err := lock.On(there, host).Mark(t.Context(), group, "a", lock.Mark{Phase: lock.Rebooting}); !errors.Is(err, lock.ErrUnsigned) {
		t.Errorf("Mark there: %v", err)
	}
	// The owner signs there too; what a has signed here is nothing there.
	over := lock.On(there, lock.Options{Now: g.clock, Owner: g.owner})
	g.must(over.Sign(t.Context(), group))
	if _, err := over.Accept(t.Context(), group, "a", ""); !errors.Is(err, lock.ErrUnsigned) {
		t.Errorf("Accept there: %v", err)
	}
}

// Every host has its own key, one in three commands is an attacker's, and no more than max are down at any time.
func TestNeverMoreThanMaxUnderAttack(t *testing.T) {
	const limit = 2
	var names []string
	for i := range 8 {
		names = append(names, fmt.Sprintf("h%d", i))
	}
	g := newSignedGroup(t, limit, names...)
	old := map[string][][]byte{}
	rng := mrand.New(mrand.NewPCG(7, 7))
	isDown := map[string]bool{}
	reboots := 0
	for range 900 {
		host := names[rng.IntN(len(names))]
		if list, err := g.store.Records(t.Context(), group, host); err == nil && len(list) == 1 {
			old[host] = append(old[host], list[0].Data)
		}
		switch n := rng.IntN(9); {
		case n == 0:
			g.forge(func(s *lock.State) { s.Holders = nil })
		case n == 1:
			g.forge(func(s *lock.State) { s.Policy.Max, s.Halts, s.Failures = 100, nil, nil })
		case n == 2 && len(old[host]) > 0:
			g.put(host, old[host][rng.IntN(len(old[host]))])
		case n == 3:
			g.forge(func(s *lock.State) {
				s.Holders = append(s.Holders, lock.Holder{Host: host, From: "1", To: "2", Phase: lock.Granted, Granted: g.now, Token: 5})
			})
		case isDown[host]:
			if err := g.host[host].Release(t.Context(), group, host, lock.Verdict{Outcome: lock.Healthy}); err != nil {
				t.Fatal(err)
			}
			isDown[host] = false
		default:
			st, err := g.host[host].Request(t.Context(), lock.Claim{Group: group, Host: host, From: "1", To: "2"})
			if err != nil {
				t.Fatal(err)
			}
			if st.Granted && g.mark(host) == nil {
				isDown[host] = true
				reboots++
			}
		}
		g.now = g.now.Add(time.Minute)
		n := 0
		for _, is := range isDown {
			if is {
				n++
			}
		}
		if n > limit {
			t.Fatalf("%d hosts are down, max is %d", n, limit)
		}
	}
	if reboots < 20 {
		t.Errorf("only %d reboots: nobody gets on any more", reboots)
	}
	t.Logf("%d reboots", reboots)
}

func FuzzRecord(f *testing.F) {
	m := lock.NewMemory()
	key := newKey(f)
	k := lock.On(m, lock.Options{Signer: key})
	if err := k.Enrol(context.Background(), group, "a"); err != nil {
		f.Fatal(err)
	}
	list, err := m.Records(context.Background(), group, "a")
	if err != nil || len(list) != 1 {
		f.Fatal(list, err)
	}
	f.Add(list[0].Data)
	f.Add([]byte(`{"statement":"","key":"","signature":""}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m := lock.NewMemory()
		if _, _, err := m.Commit(t.Context(), group, "", 0, lock.View{}, lock.Change{State: []byte(`{"schema":2}`), Records: []lock.Record{{Name: "/owner", Data: data}, {Name: "a", Data: data}}}); err != nil {
			t.Fatal(err)
		}
		k := lock.On(m, lock.Options{Owners: []crypto.PublicKey{key.Public()}})
		if st, err := k.State(t.Context(), group); err == nil && len(st.Tampered) == 0 {
			t.Fatalf("it was believed: %q", data)
		}
		if _, err := k.Keys(t.Context(), group); err != nil {
			t.Fatal(err)
		}
	})
}
