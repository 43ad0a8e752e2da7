package etcd

import (
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

// Follow implements [lock.Store].
func (s *Store) Follow(ctx context.Context, group string, after int64, changed func(int64) bool) error {
	watch, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	ch := s.c.Watch(watch, s.state(group), clientv3.WithRev(after+1))
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case resp, ok := <-ch:
			switch {
			case !ok:
				return fmt.Errorf("following group %q: %w: the watch has ended", group, lock.ErrUnavailable)
			case resp.CompactRevision > 0:
				after = resp.CompactRevision
				ch = s.c.Watch(watch, s.state(group), clientv3.WithRev(after))
				if !changed(after) {
					return nil
				}
			case resp.Err() != nil:
				return fmt.Errorf("following group %q: %w", group, kind(resp.Err()))
			case len(resp.Events) > 0:
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
