package etcd_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
)

func newKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// interrupted is a store between whose reads and whose commit something happens.
type interrupted struct {
	*etcd.Store
	before func()
}

func (s *interrupted) Commit(ctx context.Context, group, host string, limit int, v lock.View, c lock.Change) (int64, lock.View, error) {
	if f := s.before; f != nil {
		s.before = nil
		f()
	}
	return s.Store.Commit(ctx, group, host, limit, v, c)
}

// Somebody has etcd's credentials and nobody's key. They write, delete and put back whatever they like, at the worst moment; while a is down, b does not go down.
func TestStolenCredentials(t *testing.T) {
	t.Parallel()
	endpoint, _ := start(t)
	const prefix = etcd.DefaultPrefix + "g/"
	thief, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	defer thief.Close()
	owner := newKey(t)
	newHost := func(name string, key crypto.Signer) (*lock.Keeper, *interrupted) {
		s, err := etcd.OpenStore(etcd.Config{Endpoints: []string{endpoint}})
		if err != nil {
			t.Fatal(err)
		}
		in := &interrupted{Store: s}
		k := lock.On(in, lock.Options{Owners: []crypto.PublicKey{owner.Public()}, Signer: key})
		t.Cleanup(func() { k.Close() })
		if err := k.Enrol(t.Context(), "g", name); err != nil {
			t.Fatal(err)
		}
		return k, in
	}
	op := open(t, etcd.Config{Endpoints: []string{endpoint}, Keeper: lock.Options{Owner: owner}})
	keyOfA := newKey(t)
	a, _ := newHost("a", keyOfA)
	b, store := newHost("b", newKey(t))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	get := func(key string) string {
		t.Helper()
		resp, err := thief.Get(t.Context(), prefix+key)
		if err != nil || len(resp.Kvs) != 1 {
			t.Fatal(key, resp, err)
		}
		return string(resp.Kvs[0].Value)
	}
	put := func(key, value string) {
		t.Helper()
		_, err := thief.Put(t.Context(), prefix+key, value)
		must(err)
	}
	remove := func(key string) {
		t.Helper()
		_, err := thief.Delete(t.Context(), prefix+key)
		must(err)
	}
	renew := func() { // an operator puts everything right
		t.Helper()
		must(op.Sign(t.Context(), "g"))
		for name, k := range map[string]*lock.Keeper{"a": a, "b": b} {
			must(k.Enrol(t.Context(), "g", name))
			_, err := op.Accept(t.Context(), "g", name, "")
			must(err)
		}
	}
	renew()
	quiet := get("state")
	well := get("record/a")
	signed := get("record//owner")
	claim := func(host string) lock.Claim { return lock.Claim{Group: "g", Host: host, To: "2"} }
	goDown := func(k *lock.Keeper, host string) error {
		if _, err := k.Request(t.Context(), claim(host)); err != nil {
			return err
		}
		return k.Mark(t.Context(), "g", host, lock.Mark{Phase: lock.Rebooting})
	}
	// A state in which b holds a slot that was never granted.
	forged := func() string {
		var s lock.State
		must(json.Unmarshal([]byte(quiet), &s))
		s.Holders = []lock.Holder{{Host: "b", To: "2", Phase: lock.Granted}}
		data, err := json.Marshal(s)
		must(err)
		return string(data)
	}

	for _, tt := range []struct {
		name string
		do   func()
	}{
		{"the state of yesterday is put back", func() { put("state", quiet) }},
		{"b is given a slot", func() { put("state", forged()) }},
		{"the state and the word of a are put back", func() { put("state", quiet); put("record/a", well) }},
		{"the word of a is deleted, and made again", func() {
			put("state", quiet)
			remove("record/a")
			put("record/a", well)
			put("record/a", well)
			put("record/a", well)
		}},
		{"the word of a is deleted", func() { put("state", quiet); remove("record/a") }},
		{"the state is deleted", func() { remove("state") }},
		{"the policy of yesterday is put back", func() { put("record//owner", signed); put("state", quiet) }},
		{"everything is deleted", func() {
			_, err := thief.Delete(t.Context(), prefix, clientv3.WithPrefix())
			must(err)
		}},
	} {
		if err := goDown(a, "a"); err != nil {
			t.Fatalf("%s: a: %v", tt.name, err)
		}
		tt.do()
		if err := goDown(b, "b"); err == nil {
			t.Errorf("%s: b goes down beside a", tt.name)
		} else if !errors.Is(err, lock.ErrNotHeld) && !errors.Is(err, lock.ErrUnsigned) {
			t.Errorf("%s: b: %v", tt.name, err)
		}
		// a comes back, as another process. What it says needs the state and the policy, which an operator puts right where they are gone.
		a, _ = newHost("a", keyOfA)
		err := a.Release(t.Context(), "g", "a", lock.Verdict{Outcome: lock.Healthy})
		if errors.Is(err, lock.ErrUnsigned) {
			renew()
			err = a.Release(t.Context(), "g", "a", lock.Verdict{Outcome: lock.Healthy})
		}
		if err != nil {
			t.Fatalf("%s: a is well: %v", tt.name, err)
		}
		if err := b.Release(t.Context(), "g", "b", lock.Verdict{Outcome: lock.Cancelled}); err != nil {
			t.Fatalf("%s: b: %v", tt.name, err)
		}
		if st, err := op.State(t.Context(), "g"); err != nil || len(st.Holders) > 0 || len(st.Tampered) > 0 {
			t.Errorf("%s: afterwards: %+v, %v", tt.name, st, err)
		}
	}

	// Between b's look and b's commit a goes down, and the thief covers that up.
	if st, err := b.Request(t.Context(), claim("b")); err != nil || !st.Granted {
		t.Fatal(st, err)
	}
	granted := get("state")
	store.before = func() {
		put("state", quiet)
		must(goDown(a, "a"))
		remove("record/a")
		remove("state")
		put("state", granted)
	}
	if err := b.Mark(t.Context(), "g", "b", lock.Mark{Phase: lock.Rebooting}); err == nil {
		t.Error("b goes down beside a, behind whose back the state was put back")
	} else if !strings.Contains(err.Error(), "down already") && !errors.Is(err, lock.ErrUnsigned) {
		t.Error(err)
	}
}

// Two hosts are told that they hold the one slot, by a proof that is used twice. While a says that it goes down, the thief spoils the record of b, past the
// state. Not both go down.
func TestSpoiltWhileAnotherGoesDown(t *testing.T) {
	t.Parallel()
	endpoint, _ := start(t)
	const prefix = etcd.DefaultPrefix + "g/"
	thief, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	defer thief.Close()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	owner := newKey(t)
	op := open(t, etcd.Config{Endpoints: []string{endpoint}, Keeper: lock.Options{Owner: owner}})
	must(op.Sign(t.Context(), "g"))
	hosts, stores := map[string]*lock.Keeper{}, map[string]*interrupted{}
	for _, name := range []string{"a", "b"} {
		s, err := etcd.OpenStore(etcd.Config{Endpoints: []string{endpoint}})
		must(err)
		stores[name] = &interrupted{Store: s}
		hosts[name] = lock.On(stores[name], lock.Options{Owners: []crypto.PublicKey{owner.Public()}, Signer: newKey(t)})
		t.Cleanup(func() { hosts[name].Close() })
		must(hosts[name].Enrol(t.Context(), "g", name))
		_, err = op.Accept(t.Context(), "g", name, "")
		must(err)
	}
	request := func(host string) lock.Standing {
		t.Helper()
		st, err := hosts[host].Request(t.Context(), lock.Claim{Group: "g", Host: host, To: "2"})
		must(err)
		return st
	}
	mark := func(host string) error {
		return hosts[host].Mark(t.Context(), "g", host, lock.Mark{Phase: lock.Rebooting})
	}
	put := func(key string, change func(*lock.State)) {
		t.Helper()
		resp, err := thief.Get(t.Context(), prefix+"state")
		must(err)
		var s lock.State
		must(json.Unmarshal(resp.Kvs[0].Value, &s))
		change(&s)
		data, err := json.Marshal(s)
		must(err)
		_, err = thief.Put(t.Context(), prefix+key, string(data))
		must(err)
	}

	if st := request("a"); !st.Granted {
		t.Fatalf("a: %+v", st)
	}
	if st := request("b"); st.Granted {
		t.Fatalf("b: %+v", st)
	}
	place, err := thief.Get(t.Context(), prefix+"queue/b")
	must(err)
	var w lock.Waiter
	must(json.Unmarshal(place.Kvs[0].Value, &w))
	put("state", func(s *lock.State) {
		s.Holders = append(s.Holders, lock.Holder{Host: "b", To: "2", Phase: lock.Granted, Granted: time.Now(), Token: s.Holders[0].Token, Proof: w.Proof})
	})
	for name := range hosts {
		if st := request(name); !st.Granted {
			t.Fatalf("the forged slot is told from a real one already: %s: %+v", name, st)
		}
	}
	put("state", func(s *lock.State) { s.Holders[1].Phase, s.Holders[1].Rebooting = lock.Rebooting, time.Now() })
	var b error
	stores["a"].before = func() {
		_, err := thief.Put(t.Context(), prefix+"record/b", "rubbish")
		must(err)
		b = mark("b")
	}
	a := mark("a")
	if a == nil && b == nil {
		t.Fatal("both go down, and max is 1")
	}
	if !errors.Is(b, lock.ErrNotHeld) {
		t.Errorf("b goes down by nothing that it has said: %v", b)
	}
	if a != nil {
		t.Errorf("a: %v", a)
	}
	// By asking again b puts its record right, and waits.
	if st := request("b"); st.Granted {
		t.Errorf("b: %+v", st)
	}
	if st, err := op.State(t.Context(), "g"); err != nil || len(st.Holders) != 1 || st.Holders[0].Host != "a" || len(st.Tampered) > 0 {
		t.Errorf("%+v, %v", st, err)
	}
}

// reader counts what is read of a store's records.
type reader struct {
	*etcd.Store
	bytes int
}

func (s *reader) Records(ctx context.Context, group string, names ...string) ([]lock.Record, error) {
	list, err := s.Store.Records(ctx, group, names...)
	for _, r := range list {
		s.bytes += len(r.Data)
	}
	return list, err
}

// Somebody fills the place of the records with rubbish. The hosts read their own, however many these are.
func TestRubbishBesideRecords(t *testing.T) {
	t.Parallel()
	endpoint, _ := start(t)
	thief, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	defer thief.Close()
	owner := newKey(t)
	op := open(t, etcd.Config{Endpoints: []string{endpoint}, Keeper: lock.Options{Owner: owner}})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(op.Sign(t.Context(), "g"))
	store, err := etcd.OpenStore(etcd.Config{Endpoints: []string{endpoint}})
	must(err)
	counts := &reader{Store: store}
	a := lock.On(counts, lock.Options{Owners: []crypto.PublicKey{owner.Public()}, Signer: newKey(t)})
	t.Cleanup(func() { a.Close() })
	must(a.Enrol(t.Context(), "g", "a"))
	const rubbish, size = 150, 10_000
	for i := range rubbish {
		_, err := thief.Put(t.Context(), fmt.Sprintf("%sg/record/host-%03d", etcd.DefaultPrefix, i), strings.Repeat("x", size))
		must(err)
	}
	_, err = op.Accept(t.Context(), "g", "a", "")
	must(err)
	counts.bytes = 0
	if st, err := a.Request(t.Context(), lock.Claim{Group: "g", Host: "a", To: "2"}); err != nil || !st.Granted {
		t.Fatal(st, err)
	}
	must(a.Mark(t.Context(), "g", "a", lock.Mark{Phase: lock.Rebooting}))
	must(a.Release(t.Context(), "g", "a", lock.Verdict{Outcome: lock.Healthy}))
	if counts.bytes > rubbish*size/4 {
		t.Errorf("a reboot reads %d bytes of records", counts.bytes)
	}
	// More names than one transaction may ask for, one of them nobody's; and the whole list.
	names := []string{"a", "nobody"}
	for i := range rubbish {
		names = append(names, fmt.Sprintf("host-%03d", i))
	}
	list, err := store.Records(t.Context(), "g", names...)
	if err != nil || len(list) != rubbish+1 || !strings.Contains(list[0].Place, etcd.DefaultPrefix) || list[0].Name != "a" || list[rubbish].Name != "host-149" {
		t.Errorf("%d records, %v", len(list), err)
	}
	keys, err := op.Keys(t.Context(), "g")
	if err != nil || len(keys) != rubbish+1 {
		t.Errorf("%d keys, %v", len(keys), err)
	}
}
