package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
)

// counted counts what a client asks of its store.
type counted struct {
	lock.Store
	enqueues, commits, conflicts atomic.Int64
}

func (c *counted) Enqueue(ctx context.Context, group, host string, data []byte) (lock.View, error) {
	c.enqueues.Add(1)
	return c.Store.Enqueue(ctx, group, host, data)
}

func (c *counted) Commit(ctx context.Context, group, host string, limit int, v lock.View, ch lock.Change) (int64, lock.View, error) {
	c.commits.Add(1)
	rev, now, err := c.Store.Commit(ctx, group, host, limit, v, ch)
	if errors.Is(err, lock.ErrConflict) {
		c.conflicts.Add(1)
	}
	return rev, now, err
}

// BenchmarkWaiters measures how much of the time of a slot is lost between hosts: 50 hosts, each its own client of a real etcd,
// hold a slot for 50 ms each. Ideal is hosts * hold / max. It fails above 1.3 times that. Run it with -benchtime 3x.
func BenchmarkWaiters(b *testing.B) {
	const hosts, hold = 50, 50 * time.Millisecond
	endpoint, stop, err := etcdtest.StartEmbedded(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(stop)
	for _, limit := range []int{1, 5} {
		b.Run("max="+strconv.Itoa(limit), func(b *testing.B) {
			keepers := make([]*lock.Keeper, hosts)
			stores := make([]*counted, hosts)
			for i := range keepers {
				s, err := etcd.OpenStore(etcd.Config{Endpoints: []string{endpoint}})
				if err != nil {
					b.Fatal(err)
				}
				stores[i] = &counted{Store: s}
				keepers[i] = lock.On(stores[i], lock.Options{})
				b.Cleanup(func() { s.Close() })
			}
			ideal := hosts * hold / time.Duration(limit)
			var asked, commits, conflicts int64
			var spent []time.Duration
			for n := 0; b.Loop(); n++ {
				group := fmt.Sprintf("bench-%d-%d-%d", limit, n, time.Now().UnixNano())
				if err := keepers[0].SetMax(b.Context(), group, limit); err != nil {
					b.Fatal(err)
				}
				for _, k := range keepers { // connected, as a daemon is
					if _, err := k.State(b.Context(), group); err != nil {
						b.Fatal(err)
					}
				}
				var down, most, enqueues atomic.Int64
				for _, s := range stores {
					enqueues.Add(-s.enqueues.Load())
				}
				var wg sync.WaitGroup
				begin := time.Now()
				for i, k := range keepers {
					wg.Go(func() {
						c := lock.Claim{Group: group, Host: fmt.Sprintf("host-%02d", i), From: "1.0.0", To: "2.0.0", Reason: "bench"}
						for {
							st, err := k.Request(b.Context(), c)
							if err != nil {
								b.Errorf("Request: %v", err)
								return
							}
							if st.Granted {
								break
							}
							if err := k.Wait(b.Context(), c); err != nil {
								b.Errorf("Wait: %v", err)
								return
							}
						}
						if now := down.Add(1); now > most.Load() {
							most.Store(now)
						}
						time.Sleep(hold)
						down.Add(-1)
						if err := k.Release(b.Context(), group, c.Host, lock.Verdict{Outcome: lock.Healthy}); err != nil {
							b.Errorf("Release: %v", err)
						}
					})
				}
				wg.Wait()
				spent = append(spent, time.Since(begin))
				if most.Load() > int64(limit) {
					b.Fatalf("%d hosts held a slot at once", most.Load())
				}
				for _, s := range stores {
					enqueues.Add(s.enqueues.Load())
				}
				asked += enqueues.Load()
			}
			for _, s := range stores {
				commits += s.commits.Load()
				conflicts += s.conflicts.Load()
			}
			slices.Sort(spent)
			runs := float64(len(spent))
			ratio := float64(spent[len(spent)/2]) / float64(ideal)
			b.ReportMetric(ratio, "x-ideal")
			b.ReportMetric(float64(asked)/runs/hosts, "grant-attempts/host")
			b.ReportMetric(float64(commits)/runs/hosts, "commits/host")
			b.ReportMetric(float64(conflicts)/runs/hosts, "conflicts/host")
			if ratio > 1.3 {
				b.Errorf("the median of %d runs took %v, %.2f times the ideal %v; at most 1.3 is allowed", len(spent), spent[len(spent)/2], ratio, ideal)
			}
		})
	}
}

// BenchmarkLockUnlock is the latency of a grant and of a release without competition.
func BenchmarkLockUnlock(b *testing.B) {
	endpoint, stop, err := etcdtest.StartEmbedded(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(stop)
	k, err := etcd.New(etcd.Config{Endpoints: []string{endpoint}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { k.Close() })
	c := lock.Claim{Group: "latency", Host: "host", From: "1.0.0", To: "2.0.0"}
	var locks, unlocks []time.Duration
	for b.Loop() {
		t0 := time.Now()
		if st, err := k.Request(b.Context(), c); err != nil || !st.Granted {
			b.Fatalf("%+v, %v", st, err)
		}
		t1 := time.Now()
		if err := k.Release(b.Context(), c.Group, c.Host, lock.Verdict{Outcome: lock.Healthy}); err != nil {
			b.Fatal(err)
		}
		locks, unlocks = append(locks, t1.Sub(t0)), append(unlocks, time.Since(t1))
	}
	for name, d := range map[string][]time.Duration{"lock": locks, "unlock": unlocks} {
		slices.Sort(d)
		b.ReportMetric(float64(d[len(d)/2])/1e6, name+"-p50-ms")
		b.ReportMetric(float64(d[len(d)*95/100])/1e6, name+"-p95-ms")
	}
}
