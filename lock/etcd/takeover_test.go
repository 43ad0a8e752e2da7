package etcd_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
)

const smithKey = "coreos.com/updateengine/rebootlock/groups/web/semaphore"

// smith is a host as locksmith coordinates it: one compare-and-swap for each change, and nothing but a free slot to look at. It stands
// for the old program, which cannot run on an etcd of today; read and swap reach the store.
type smith struct {
	read func() (value string, index int64, err error)
	swap func(value string, index int64) (bool, error)
}

type smithValue struct {
	Free    int      `json:"semaphore"`
	Max     int      `json:"max"`
	Holders []string `json:"holders"`
}

func (s smith) change(f func(*smithValue) bool) (bool, error) {
	for {
		text, index, err := s.read()
		if err != nil {
			return false, err
		}
		var v smithValue
		if err := json.Unmarshal([]byte(text), &v); err != nil {
			return false, err
		}
		if !f(&v) {
			return false, nil
		}
		data, err := json.Marshal(v)
		if err != nil {
			return false, err
		}
		if ok, err := s.swap(string(data), index); ok || err != nil {
			return ok, err
		}
	}
}

func (s smith) lock(id string) (bool, error) {
	return s.change(func(v *smithValue) bool {
		if v.Free <= 0 {
			return false
		}
		v.Free--
		v.Holders = append(v.Holders, id)
		return true
	})
}

func (s smith) unlock(id string) (bool, error) {
	return s.change(func(v *smithValue) bool {
		i := slices.Index(v.Holders, id)
		if i < 0 {
			return false
		}
		v.Free++
		v.Holders = slices.Delete(v.Holders, i, i+1)
		return true
	})
}

func smithV3(t *testing.T, c *clientv3.Client) smith {
	ctx := context.WithoutCancel(t.Context())
	return smith{
		read: func() (string, int64, error) {
			resp, err := c.Get(ctx, smithKey)
			if err != nil {
				return "", 0, err
			}
			return string(resp.Kvs[0].Value), resp.Kvs[0].ModRevision, nil
		},
		swap: func(value string, index int64) (bool, error) {
			resp, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(smithKey), "=", index)).Then(clientv3.OpPut(smithKey, value)).Commit()
			return err == nil && resp.Succeeded, err
		},
	}
}

// During the whole migration, with hosts that take turns on both sides, never more than max are down.
func TestMixedFleetNeverExceedsMax(t *testing.T) {
	t.Parallel()
	endpoint, _ := start(t)
	c := client(t, endpoint)
	const limit = 3
	if _, err := c.Put(t.Context(), smithKey, fmt.Sprintf(`{"semaphore":%d,"max":%d,"holders":null}`, limit, limit)); err != nil {
		t.Fatal(err)
	}
	var down, most atomic.Int64
	var turns [2]atomic.Int64
	stop := make(chan struct{})
	stopped := func() bool {
		select {
		case <-stop:
			return true
		default:
			return false
		}
	}
	reboot := func(side int) {
		if n := down.Add(1); n > most.Load() {
			most.Store(n)
		}
		time.Sleep(3 * time.Millisecond)
		down.Add(-1)
		turns[side].Add(1)
	}
	var wg sync.WaitGroup
	for i := range 6 {
		s, id := smithV3(t, client(t, endpoint)), fmt.Sprintf("old-%d", i)
		wg.Go(func() {
			for !stopped() {
				ok, err := s.lock(id)
				if err != nil {
					t.Error(err)
					return
				}
				if ok {
					reboot(0)
					if ok, err := s.unlock(id); err != nil || !ok {
						t.Errorf("unlock: %v, %v", ok, err)
						return
					}
				}
				time.Sleep(2 * time.Millisecond)
			}
		})
	}
	k := open(t, etcd.Config{Endpoints: []string{endpoint}})
	store, err := etcd.OpenStore(etcd.Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	take := func(leave, limit int) []string {
		t.Helper()
		holders, err := etcd.Takeover{From: store.Locksmith(), FromGroup: "web", Group: "web", Leave: leave, Max: limit}.Run(t.Context(), k)
		if err != nil {
			t.Error(err)
		}
		return holders
	}
	await := func(side int) {
		t.Helper()
		for from, begin := turns[side].Load(), time.Now(); turns[side].Load() < from+5; time.Sleep(time.Millisecond) {
			if time.Since(begin) > time.Minute {
				t.Fatal("nothing goes on")
			}
		}
	}
	await(0)
	take(1, 0)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for i := range 4 {
		k := open(t, etcd.Config{Endpoints: []string{endpoint}})
		cl := lock.Claim{Group: "web", Host: fmt.Sprintf("new-%d", i)}
		wg.Go(func() {
			for !stopped() {
				st, err := k.Request(ctx, cl)
				if err == nil && !st.Granted {
					wait, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
					_ = k.Wait(wait, cl)
					cancel()
					continue
				}
				if err == nil {
					err = k.Mark(ctx, "web", cl.Host, lock.Mark{Phase: lock.Rebooting})
				}
				if errors.Is(err, lock.ErrNotHeld) {
					continue
				}
				if err == nil {
					reboot(1)
					err = k.Release(ctx, "web", cl.Host, lock.Verdict{Outcome: lock.Healthy})
				}
				if err != nil && ctx.Err() == nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for len(take(1, limit)) > 1 { // until the holders there fit in what is left to them
		time.Sleep(5 * time.Millisecond)
	}
	take(1, limit)
	if s, err := k.State(t.Context(), "web"); err != nil || s.Policy.Max != limit-1 {
		t.Errorf("max here is %d, %v, want %d", s.Policy.Max, err, limit-1)
	}
	await(0)
	await(1)
	for back := (etcd.Takeover{From: store.Locksmith(), FromGroup: "web", Group: "web", Leave: 2, Max: limit}); ; time.Sleep(time.Millisecond) {
		// One slot goes back, as soon as not too many are down here.
		if _, err := back.Run(t.Context(), k); err == nil {
			break
		} else if !errors.Is(err, etcd.ErrDown) {
			t.Fatal(err)
		}
	}
	for len(take(0, limit)) > 0 {
		time.Sleep(5 * time.Millisecond)
	}
	await(1)
	before := turns[0].Load()
	await(1)
	if turns[0].Load() != before {
		t.Error("a host took a slot from the old semaphore after it was taken over")
	}
	s, err := k.State(t.Context(), "web")
	if err != nil || s.Policy.Max != limit {
		t.Errorf("in the end max is %d, %v", s.Policy.Max, err)
	}
	close(stop)
	cancel()
	wg.Wait()
	if n := most.Load(); n > limit {
		t.Errorf("%d hosts were down at once, max is %d", n, limit)
	}
	t.Logf("%d turns there, %d here, at most %d down", turns[0].Load(), turns[1].Load(), most.Load())
}

// The v2 API as etcd 3.4 answers it, recorded; TestLocksmithOnEtcd34 asks the real one where it is installed.
func TestLocksmithV2Answers(t *testing.T) {
	t.Parallel()
	value, index := `{"semaphore":0,"max":2,"holders":["a","b"],"later":1}`, 640
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch {
		case !strings.HasSuffix(r.URL.Path, "/groups/web/semaphore"):
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"errorCode":100,"message":"Key not found","cause":"/coreos.com","index":7}`)
		case r.Method == http.MethodPut && r.URL.Query().Get("prevIndex") != strconv.Itoa(index):
			w.WriteHeader(http.StatusPreconditionFailed)
			fmt.Fprint(w, `{"errorCode":101,"message":"Compare failed","cause":"[640 != 641]","index":641}`)
		case r.Method == http.MethodPut:
			value, index = r.PostFormValue("value"), index+1
			fmt.Fprintf(w, `{"action":"compareAndSwap","node":{"value":%q,"modifiedIndex":%d}}`, value, index)
		default:
			fmt.Fprintf(w, `{"action":"get","node":{"key":"/x","value":%q,"modifiedIndex":%d,"createdIndex":3}}`, value, index)
		}
	}))
	defer srv.Close()
	p, err := etcd.NewLocksmith(etcd.Config{Endpoints: []string{"http://127.0.0.1:1", srv.URL}})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	if old, err := p.Read(ctx, "other"); err != nil || old != nil {
		t.Errorf("no semaphore: %+v, %v", old, err)
	}
	old, err := p.Read(ctx, "web")
	if err != nil || old.Max != 2 || !slices.Equal(old.Holders, []string{"a", "b"}) {
		t.Fatalf("%+v, %v", old, err)
	}
	if err := p.SetMax(ctx, "web", old, 0); err != nil {
		t.Fatal(err)
	}
	if value != `{"holders":["a","b"],"later":1,"max":0,"semaphore":-2}` {
		t.Errorf("it is left with %s", value)
	}
	if err := p.SetMax(ctx, "web", old, 1); !errors.Is(err, lock.ErrConflict) {
		t.Errorf("a lost race: %v", err)
	}
	value = `{"semaphore":1,"max":"many"}`
	if _, err := p.Read(ctx, "web"); !errors.Is(err, lock.ErrSchema) {
		t.Errorf("garbage: %v", err)
	}
	srv.Close()
	if _, err := p.Read(ctx, "web"); !errors.Is(err, lock.ErrUnavailable) {
		t.Errorf("nobody answers: %v", err)
	}
}

// A real etcd with the API that locksmith speaks, where one is installed (Debian 12's etcd-server is 3.4).
func TestLocksmithOnEtcd34(t *testing.T) {
	t.Parallel()
	path, err := exec.LookPath("etcd")
	if err != nil {
		t.Skip("etcd is not installed (package etcd-server): a real etcd v2 is not tested")
	}
	if out, err := exec.Command(path, "--help").CombinedOutput(); err != nil || !strings.Contains(string(out), "--enable-v2") {
		t.Skipf("%s has no v2 API any more", path)
	}
	var urls []string
	for range 2 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		urls = append(urls, "http://"+l.Addr().String())
		l.Close()
	}
	cmd := exec.Command(path, "--enable-v2", "--data-dir", t.TempDir(), "--listen-client-urls", urls[0], "--advertise-client-urls", urls[0],
		"--listen-peer-urls", urls[1], "--initial-advertise-peer-urls", urls[1], "--initial-cluster", "default="+urls[1])
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Env = append(os.Environ(), "ETCD_UNSUPPORTED_ARCH=arm64")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	p, err := etcd.NewLocksmith(etcd.Config{Endpoints: urls[:1]})
	if err != nil {
		t.Fatal(err)
	}
	put := func(value string) error {
		req, err := http.NewRequestWithContext(t.Context(), "PUT", urls[0]+"/v2/keys/"+smithKey, strings.NewReader("value="+value))
		if err != nil {
			return err
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode >= 300 {
			return errors.New(resp.Status)
		}
		return nil
	}
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if err := put(`{"semaphore":1,"max":2,"holders":["n1"]}`); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	k := lock.On(lock.NewMemory(), lock.Options{})
	take := etcd.Takeover{From: p, FromGroup: "web", Group: "web"}
	if _, err := (etcd.Takeover{From: p, FromGroup: "none", Group: "web"}).Run(t.Context(), k); !errors.Is(err, etcd.ErrNothing) {
		t.Errorf("no semaphore: %v", err)
	}
	holders, err := take.Run(t.Context(), k)
	if err != nil || !slices.Equal(holders, []string{"n1"}) {
		t.Fatalf("%v, %v", holders, err)
	}
	old, err := p.Read(t.Context(), "web")
	if err != nil || old.Max != 0 || len(old.Holders) != 1 {
		t.Errorf("it is left with %+v, %v", old, err)
	}
	stale := *old
	if err := put(`{"semaphore":0,"max":0,"holders":[]}`); err != nil {
		t.Fatal(err)
	}
	if err := p.SetMax(t.Context(), "web", &stale, 5); !errors.Is(err, lock.ErrConflict) {
		t.Errorf("a lost race: %v", err)
	}
	if holders, err := take.Run(t.Context(), k); err != nil || len(holders) != 0 {
		t.Errorf("%v, %v", holders, err)
	}
	if s, err := k.State(t.Context(), "web"); err != nil || s.Policy.Max != 2 || len(s.Holders) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
}
