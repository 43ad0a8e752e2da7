package etcd

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flipside-linux/flipside/lock"
)

// A Predecessor is where an older reboot manager keeps its semaphore.
type Predecessor interface {
	// Name says which it is, for people.
	Name() string
	// Read returns the semaphore of a group; nil if there is none.
	Read(ctx context.Context, group string) (*Old, error)
	// SetMax changes how many hosts it lets be down, and nothing else: holders stay, and can give their slots back. It returns
	// [lock.ErrConflict] if the semaphore has changed since it was read.
	SetMax(ctx context.Context, group string, old *Old, max int) error
}

// Old is the semaphore of an older reboot manager.
type Old struct {
	Max     int
	Holders []string

	rev int64 // by which it is compared
	raw map[string]json.RawMessage
}

// form is how an older reboot manager writes its semaphore.
type form struct {
	name      string
	key       func(group string) string
	max, free string // names of its fields; no free if it counts the holders
}

// airlock is a FleetLock server. It counts the holders.
var airlock = form{name: "airlock", max: "total_slots", key: func(group string) string {
	return "com.coreos.airlock/groups/" + url.QueryEscape(group) + "/v1/semaphore"
}}

// locksmith keeps the number of free slots, which may be negative, beside the holders. Its default group has another key.
var locksmith = form{name: "locksmith", max: "max", free: "semaphore", key: func(group string) string {
	const root = "coreos.com/updateengine/rebootlock/"
	if group == "default" {
		return root + "semaphore"
	}
	return root + "groups/" + url.QueryEscape(group) + "/semaphore"
}}

func (f form) decode(group string, data []byte, rev int64) (*Old, error) {
	old := &Old{rev: rev}
	fail := func(err error) (*Old, error) {
		return nil, fmt.Errorf("%w: %s's semaphore of group %q: %w", lock.ErrSchema, f.name, group, err)
	}
	if err := json.Unmarshal(data, &old.raw); err != nil {
		return fail(err)
	}
	for _, field := range []struct {
		name string
		to   any
	}{{f.max, &old.Max}, {"holders", &old.Holders}} {
		raw, ok := old.raw[field.name]
		if !ok {
			return fail(fmt.Errorf("it has no %q", field.name))
		}
		if err := json.Unmarshal(raw, field.to); err != nil {
			return fail(fmt.Errorf("%s: %w", field.name, err))
		}
	}
	if i := slices.IndexFunc(old.Holders, func(h string) bool { return lock.CheckHost(h) != nil }); i >= 0 {
		return fail(lock.CheckHost(old.Holders[i]))
	}
	if old.Max < 0 {
		old.Max = 0 // admits nobody, as 0 does
	}
	return old, nil
}

// encode writes old with another max. Fields that nobody here knows stay as they are.
func (f form) encode(old *Old, max int) ([]byte, error) {
	old.raw[f.max] = json.RawMessage(fmt.Sprint(max))
	if f.free != "" {
		old.raw[f.free] = json.RawMessage(fmt.Sprint(max - len(old.Holders)))
	}
	return json.Marshal(old.raw)
}

// Airlock is the FleetLock server of that name, which keeps its semaphore in the same etcd.
func (s *Store) Airlock() Predecessor { return predecessor{s, airlock} }

// Locksmith is locksmith where it was built for etcd v3. The one that hosts have speaks the older API: [NewLocksmith].
func (s *Store) Locksmith() Predecessor { return predecessor{s, locksmith} }

// predecessor keeps its semaphore in etcd v3.
type predecessor struct {
	s *Store
	form
}

func (p predecessor) Name() string { return p.name }

func (p predecessor) Read(ctx context.Context, group string) (*Old, error) {
	var resp *clientv3.GetResponse
	err := p.s.try(ctx, func(ctx context.Context) (err error) {
		resp, err = p.s.c.Get(ctx, p.key(group))
		return err
	})
	if err != nil || len(resp.Kvs) == 0 {
		return nil, err
	}
	return p.decode(group, resp.Kvs[0].Value, resp.Kvs[0].ModRevision)
}

func (p predecessor) SetMax(ctx context.Context, group string, old *Old, max int) error {
	data, err := p.encode(old, max)
	if err != nil {
		return err
	}
	conflict := false
	err = p.s.try(ctx, func(ctx context.Context) error {
		resp, err := p.s.c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(p.key(group)), "=", old.rev)).Then(clientv3.OpPut(p.key(group), string(data))).Commit()
		if err == nil {
			conflict = !resp.Succeeded
		}
		return err
	})
	if err == nil && conflict {
		err = lock.ErrConflict
	}
	return err
}
