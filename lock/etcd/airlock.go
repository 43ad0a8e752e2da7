package etcd

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flipside-linux/flipside/lock"
)

// Airlock is the semaphore of a FleetLock server of that name, as it keeps it in the same etcd.
type Airlock struct {
	Slots   int
	Holders []string
	rev     int64
	raw     map[string]json.RawMessage
}

func airlockKey(group string) string {
	return "com.coreos.airlock/groups/" + url.QueryEscape(group) + "/v1/semaphore"
}

// ReadAirlock reads the semaphore of a group; nil if there is none.
func (s *Store) ReadAirlock(ctx context.Context, group string) (*Airlock, error) {
	var a *Airlock
	err := s.try(ctx, func(ctx context.Context) error {
		resp, err := s.c.Get(ctx, airlockKey(group))
		if err != nil || len(resp.Kvs) == 0 {
			return err
		}
		a = &Airlock{rev: resp.Kvs[0].ModRevision}
		return json.Unmarshal(resp.Kvs[0].Value, &a.raw)
	})
	if err != nil || a == nil {
		return nil, err
	}
	for name, to := range map[string]any{"total_slots": &a.Slots, "holders": &a.Holders} {
		if err := json.Unmarshal(a.raw[name], to); err != nil {
			return nil, fmt.Errorf("%w: airlock's semaphore of group %q: %s: %w", lock.ErrSchema, group, name, err)
		}
	}
	return a, nil
}

// FreezeAirlock takes all slots away from airlock: it admits nobody any more, and its holders can still give their slots back. It
// returns [lock.ErrConflict] if the semaphore has changed since it was read.
func (s *Store) FreezeAirlock(ctx context.Context, group string, a *Airlock) error {
	if a.Slots == 0 {
		return nil
	}
	a.raw["total_slots"] = json.RawMessage("0")
	data, err := json.Marshal(a.raw)
	if err != nil {
		return err
	}
	conflict := false
	err = s.try(ctx, func(ctx context.Context) error {
		resp, err := s.c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(airlockKey(group)), "=", a.rev)).Then(clientv3.OpPut(airlockKey(group), string(data))).Commit()
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
