package lock_test

import (
	"context"
	"crypto"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/lock"
)

// counting is a store that counts what is asked of it: calls, and the records that they return.
type counting struct {
	lock.Store
	calls, records int
}

func (c *counting) Read(ctx context.Context, group, host string, limit int) (lock.View, error) {
	c.calls++
	return c.Store.Read(ctx, group, host, limit)
}

func (c *counting) Commit(ctx context.Context, group, host string, limit int, v lock.View, change lock.Change) (int64, lock.View, error) {
	c.calls++
	c.records += len(change.Records)
	return c.Store.Commit(ctx, group, host, limit, v, change)
}

func (c *counting) Records(ctx context.Context, group string, names ...string) ([]lock.Record, error) {
	list, err := c.Store.Records(ctx, group, names...)
	c.calls++
	c.records += len(list)
	return list, err
}

// What it costs a host to leave its key does not depend on how many hosts the group has, and all keys together are accepted at the cost of looking at each a few times.
func TestEnrolmentIsLinear(t *testing.T) {
	type cost struct{ calls, records int }
	enrol := func(hosts int) (last, accept cost) {
		store := &counting{Store: lock.NewMemory()}
		owner := newKey(t)
		op := lock.On(store, lock.Options{Owner: owner})
		if err := op.Sign(t.Context(), group); err != nil {
			t.Fatal(err)
		}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		name := func(i int) string { return fmt.Sprintf("host-%03d", i) }
		leave := func(i int) {
			t.Helper()
			must(lock.On(store, lock.Options{Owners: []crypto.PublicKey{owner.Public()}, Signer: newKey(t)}).Enrol(t.Context(), group, name(i)))
		}
		for i := range hosts {
			leave(i)
		}
		*store = counting{Store: store.Store}
		accepted, err := op.AcceptAll(t.Context(), group)
		must(err)
		accept = cost{store.calls, store.records}
		if len(accepted) != hosts || !slices.IsSortedFunc(accepted, func(a, b lock.HostKey) int { return strings.Compare(a.Host, b.Host) }) {
			t.Errorf("%d hosts accepted, want %d in order", len(accepted), hosts)
		}
		if again, err := op.AcceptAll(t.Context(), group); err != nil || len(again) != 0 {
			t.Errorf("accepted again: %v, %v", again, err)
		}
		keys, err := op.Keys(t.Context(), group)
		must(err)
		for _, k := range keys {
			if k.Fingerprint == "" || k.Problem != "" {
				t.Errorf("%+v", k)
			}
		}
		if len(keys) != hosts {
			t.Errorf("%d keys, want %d", len(keys), hosts)
		}
		*store = counting{Store: store.Store}
		leave(hosts) // one more, beside those who are accepted
		return cost{store.calls, store.records}, accept
	}
	few, acceptFew := enrol(10)
	many, acceptMany := enrol(100)
	t.Logf("the next host: %+v beside 10, %+v beside 100; all accepted: %+v of 10, %+v of 100", few, many, acceptFew, acceptMany)
	if few != many {
		t.Errorf("a host's enrolment costs %+v beside 10 hosts, %+v beside 100", few, many)
	}
	if acceptFew.calls != acceptMany.calls || acceptMany.records > 10*acceptFew.records {
		t.Errorf("accepting all costs %+v for 10 hosts, %+v for 100", acceptFew, acceptMany)
	}
}
