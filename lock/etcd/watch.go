package etcd

import (
	"cmp"
	"context"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flipside-linux/flipside/lock"
)

// Watch implements [lock.Store].
func (s *Store) Watch(ctx context.Context, group, host string, after int64) error {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	own := s.c.Watch(ctx, s.queue(group)+host, clientv3.WithRev(after+1), clientv3.WithFilterPut())
	signal := s.c.Watch(ctx, s.signal(group), clientv3.WithRev(after+1))
	for {
		var resp clientv3.WatchResponse
		var ok bool
		select {
		case <-ctx.Done():
			return ctx.Err()
		case resp, ok = <-own:
		case resp, ok = <-signal:
		}
		switch {
		case !ok:
			return fmt.Errorf("watching group %q: %w: the watch has ended", group, lock.ErrUnavailable)
		case resp.CompactRevision > 0:
			return nil // what happened since can no longer be told
		case resp.Err() != nil:
			return fmt.Errorf("watching group %q: %w", group, kind(resp.Err()))
		case len(resp.Events) > 0:
			return nil
		}
	}
}

// recheck is how often a follower asks for the state beside its watch.
const recheck = 30 * time.Second

// version is the state at one time.
type version struct {
	mod   int64 // the revision at which it was written, 0 if there is none
	value string
}

// Follow implements [lock.Store]. An etcd that was put back from a snapshot may count fewer revisions than were seen before, and says nothing to a watch until it has counted
// them again. So the state is asked for now and then as well.
func (s *Store) Follow(ctx context.Context, group string, after int64, changed func(int64) bool) error {
	var ch clientv3.WatchChan
	stop := func() {}
	watch := func(from int64) {
		stop()
		var one context.Context
		one, stop = context.WithCancel(clientv3.WithRequireLeader(ctx))
		ch = s.c.Watch(one, s.state(group), clientv3.WithRev(from))
	}
	defer func() { stop() }()
	watch(after + 1)
	look := func() (rev int64, is version, err error) {
		err = s.try(ctx, func(ctx context.Context) error {
			resp, err := s.c.Get(ctx, s.state(group))
			if err != nil {
				return err
			}
			rev, is = resp.Header.Revision, version{}
			for _, kv := range resp.Kvs {
				is = version{kv.ModRevision, string(kv.Value)}
			}
			return nil
		})
		return rev, is, err
	}
	var last version
	asked := false // before that, last is not known: the caller has seen one that was written by after
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
			timer.Reset(cmp.Or(s.cfg.recheck, recheck))
			rev, is, err := look()
			if err != nil {
				continue // the watch waits for etcd too
			}
			back := rev < after
			if back {
				watch(rev + 1)
			}
			fresh := back || is != last
			if !back && !asked {
				fresh = is.mod > after
			}
			after, last, asked = rev, is, true
			if fresh && !changed(rev) {
				return nil
			}
		case resp, ok := <-ch:
			switch {
			case !ok:
				return fmt.Errorf("following group %q: %w: the watch has ended", group, lock.ErrUnavailable)
			case resp.CompactRevision > 0:
				after = resp.CompactRevision
				watch(after)
				if !changed(after) {
					return nil
				}
			case resp.Err() != nil:
				return fmt.Errorf("following group %q: %w", group, kind(resp.Err()))
			case len(resp.Events) > 0:
				after = max(after, resp.Header.Revision)
				kv := resp.Events[len(resp.Events)-1].Kv
				if kv.ModRevision <= last.mod {
					continue // it was found by asking
				}
				last, asked = version{kv.ModRevision, string(kv.Value)}, true
				if resp.Events[len(resp.Events)-1].Type == clientv3.EventTypeDelete {
					last = version{}
				}
				if !changed(resp.Header.Revision) {
					return nil
				}
			}
		}
	}
}

// leased returns the lease that this client's places in the queue are bound to. It is kept alive until the store is closed.
func (s *Store) leased(ctx context.Context) (clientv3.LeaseID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lease != 0 {
		select {
		case _, alive := <-s.gone:
			if !alive { // it could not be renewed in time
				s.drop()
			}
		default:
		}
	}
	if s.lease != 0 {
		return s.lease, nil
	}
	resp, err := s.c.Grant(ctx, int64(max(1, s.cfg.WaiterTTL/time.Second)))
	if err != nil {
		return 0, err
	}
	keep, stop := context.WithCancel(context.Background())
	alive, err := s.c.KeepAlive(keep, resp.ID)
	if err != nil {
		stop()
		return 0, err
	}
	gone := make(chan *clientv3.LeaseKeepAliveResponse)
	go func() {
		defer close(gone)
		for range alive { // the client renews; its answers only have to be taken
		}
	}()
	s.lease, s.gone, s.stop = resp.ID, gone, stop
	return s.lease, nil
}

func (s *Store) drop() {
	s.stop()
	s.lease = 0
}

func (s *Store) forget(lease clientv3.LeaseID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lease == lease && lease != 0 {
		s.drop()
	}
}

// Close implements [lock.Store]. Places in the queue live on until their lease ends, so that a daemon that is restarted keeps its own.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.lease != 0 {
		s.drop()
	}
	s.mu.Unlock()
	return s.c.Close()
}
