package etcd_test

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
)

// TestThousandClients lets a thousand real clients, each with its own connection, through a real etcd, and prints how many got
// their turn in a second.
func TestThousandClients(t *testing.T) {
	if os.Getenv("FLIPSIDE_LONG") == "" {
		t.Skip("takes a while: FLIPSIDE_LONG=1 runs it")
	}
	const clients, limit = 1000, 10
	endpoint, stop, err := etcdtest.StartEmbedded(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	keepers := make([]*lock.Keeper, clients)
	for i := range keepers {
		keepers[i] = open(t, etcd.Config{Endpoints: []string{endpoint}, RequestTimeout: time.Minute})
	}
	if err := keepers[0].SetMax(t.Context(), "many", limit); err != nil {
		t.Fatal(err)
	}
	var down, most, requests atomic.Int64
	var wg sync.WaitGroup
	begin := time.Now()
	for i, k := range keepers {
		wg.Go(func() {
			c := lock.Claim{Group: "many", Host: fmt.Sprintf("host-%04d", i), From: "1.0.0", To: "2.0.0"}
			for {
				requests.Add(1)
				st, err := k.Request(t.Context(), c)
				if err != nil {
					t.Errorf("%s: %v", c.Host, err)
					return
				}
				if st.Granted {
					break
				}
				if err := k.Wait(t.Context(), c); err != nil {
					t.Errorf("%s: %v", c.Host, err)
					return
				}
			}
			if n := down.Add(1); n > most.Load() {
				most.Store(n)
			}
			if err := k.Mark(t.Context(), c.Group, c.Host, lock.Mark{Phase: lock.Rebooting}); err != nil {
				t.Errorf("%s: %v", c.Host, err)
			}
			down.Add(-1)
			if err := k.Release(t.Context(), c.Group, c.Host, lock.Verdict{Outcome: lock.Healthy}); err != nil {
				t.Errorf("%s: %v", c.Host, err)
			}
		})
	}
	wg.Wait()
	took := time.Since(begin)
	t.Logf("%d clients, max %d: %s, %.0f turns a second, %.2f requests a client, at most %d down", clients, limit, took.Round(time.Millisecond),
		clients/took.Seconds(), float64(requests.Load())/clients, most.Load())
	if most.Load() > limit {
		t.Errorf("%d hosts were down at once, max is %d", most.Load(), limit)
	}
	if s, err := keepers[0].State(t.Context(), "many"); err != nil || len(s.Holders)+len(s.Queue) > 0 {
		t.Errorf("left behind: %d holders, %d waiters, %v", len(s.Holders), len(s.Queue), err)
	}
}
