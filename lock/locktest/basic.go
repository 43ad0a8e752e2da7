package locktest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
)

// RunBasic is the part of the suite that holds for every [lock.Semaphore], also for one that reaches its store over a protocol that
// knows only of taking and giving back. open returns a client of a semaphore of max slots that nobody has used.
func RunBasic(t *testing.T, limit int, open func(t *testing.T) lock.Semaphore) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	s := open(t)
	claim := func(i int) lock.Claim {
		return lock.Claim{Group: "basic", Host: fmt.Sprintf("host-%02d", i), From: "1", To: "2"}
	}
	for i := range limit + 1 {
		for range 2 { // asking again changes nothing
			if st, err := s.Request(ctx, claim(i)); err != nil || st.Granted != (i < limit) {
				t.Fatalf("host %d: %+v, %v", i, st, err)
			}
		}
	}
	if err := s.Mark(ctx, "basic", claim(0).Host, lock.Mark{Phase: lock.Rebooting}); err != nil {
		t.Errorf("Mark of a holder: %v", err)
	}
	for i := range limit + 1 {
		for range 2 {
			if err := s.Release(ctx, "basic", claim(i).Host, lock.Verdict{Outcome: lock.Healthy}); err != nil {
				t.Errorf("Release of host %d: %v", i, err)
			}
		}
	}
	if _, err := s.Request(ctx, lock.Claim{Group: "..", Host: "a"}); !errors.Is(err, lock.ErrInvalid) {
		t.Errorf("group \"..\": %v, want ErrInvalid", err)
	}

	var down, most atomic.Int64
	var wg sync.WaitGroup
	for i := range 3*limit + 2 {
		wg.Go(func() {
			c := claim(100 + i)
			for {
				st, err := s.Request(ctx, c)
				if err != nil {
					t.Errorf("%s: %v", c.Host, err)
					return
				}
				if st.Granted {
					break
				}
				if err := s.Wait(ctx, c); err != nil {
					t.Errorf("%s: %v", c.Host, err)
					return
				}
			}
			if n := down.Add(1); n > most.Load() {
				most.Store(n)
			}
			time.Sleep(time.Millisecond)
			down.Add(-1)
			if err := s.Release(ctx, c.Group, c.Host, lock.Verdict{Outcome: lock.Healthy}); err != nil {
				t.Errorf("%s: %v", c.Host, err)
			}
		})
	}
	wg.Wait()
	if n := most.Load(); n > int64(limit) {
		t.Errorf("%d hosts were down at once, max is %d", n, limit)
	}
}
