package etcd_test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
	"github.com/flipside-linux/flipside/lock/locktest"
)

func start(t *testing.T) (endpoint string, stop func()) {
	t.Helper()
	endpoint, stop, err := etcdtest.StartEmbedded(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return endpoint, stop
}

func open(t *testing.T, cfg etcd.Config) *lock.Keeper {
	t.Helper()
	k, err := etcd.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func TestConformance(t *testing.T) {
	t.Parallel()
	endpoint, _ := start(t)
	locktest.Run(t, func(*testing.T) locktest.Backend {
		return locktest.Backend{Open: func(t *testing.T, opt lock.Options) *lock.Keeper {
			return open(t, etcd.Config{Endpoints: []string{endpoint}, Keeper: opt})
		}}
	})
}

func TestUnavailable(t *testing.T) {
	t.Parallel()
	hung, err := net.Listen("tcp", "127.0.0.1:0") // accepts connections and says nothing, as a stopped member does
	if err != nil {
		t.Fatal(err)
	}
	defer hung.Close()
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()
	for name, l := range map[string]net.Listener{"hung": hung, "gone": gone} {
		t.Run(name, func(t *testing.T) {
			k := open(t, etcd.Config{Endpoints: []string{"http://" + l.Addr().String()}, RequestTimeout: 300 * time.Millisecond})
			c := lock.Claim{Group: "g", Host: "a"}
			if _, err := k.Request(t.Context(), c); !errors.Is(err, lock.ErrUnavailable) {
				t.Errorf("Request = %v, want ErrUnavailable", err)
			}
			if err := k.Release(t.Context(), "g", "a", lock.Verdict{Outcome: lock.Healthy}); !errors.Is(err, lock.ErrUnavailable) {
				t.Errorf("Release = %v, want ErrUnavailable", err)
			}
			if err := k.Mark(t.Context(), "g", "a", lock.Mark{Phase: lock.Rebooting}); !errors.Is(err, lock.ErrUnavailable) {
				t.Errorf("Mark = %v, want ErrUnavailable", err)
			}
			if _, err := k.State(t.Context(), "g"); !errors.Is(err, lock.ErrUnavailable) {
				t.Errorf("State = %v, want ErrUnavailable", err)
			}
		})
	}
}

// A member that answers nothing must not use up the time of one that does.
func TestHungMemberIsPassedOver(t *testing.T) {
	t.Parallel()
	endpoint, _ := start(t)
	hung, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer hung.Close()
	k := open(t, etcd.Config{Endpoints: []string{"http://" + hung.Addr().String(), endpoint}})
	if st, err := k.Request(t.Context(), lock.Claim{Group: "g", Host: "a"}); err != nil || !st.Granted {
		t.Errorf("Request = %+v, %v", st, err)
	}
}

// What happened before a compaction cannot be watched any more; the waiter asks again rather than wait for ever.
func TestCompaction(t *testing.T) {
	t.Parallel()
	endpoint, _ := start(t)
	k := open(t, etcd.Config{Endpoints: []string{endpoint}})
	ctx := t.Context()
	for _, h := range []string{"a", "b"} {
		if _, err := k.Request(ctx, lock.Claim{Group: "g", Host: h}); err != nil {
			t.Fatal(err)
		}
	}
	if err := k.Release(ctx, "g", "a", lock.Verdict{Outcome: lock.Healthy}); err != nil {
		t.Fatal(err)
	}
	c := client(t, endpoint)
	resp, err := c.Put(ctx, "x", "y")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Compact(ctx, resp.Header.Revision); err != nil {
		t.Fatal(err)
	}
	if err := k.Wait(ctx, lock.Claim{Group: "g", Host: "b"}); err != nil {
		t.Errorf("Wait = %v", err)
	}
}

func client(t *testing.T, endpoint string) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// A host whose daemon is restarted keeps its place in the queue, also when the lease of the old one ends.
func TestPlaceOfARestartedHost(t *testing.T) {
	t.Parallel()
	endpoint, _ := start(t)
	ctx := t.Context()
	ask := func(k *lock.Keeper, host string, position int) {
		t.Helper()
		if st, err := k.Request(ctx, lock.Claim{Group: "g", Host: host}); err != nil || st.Position != position {
			t.Fatalf("%s: %+v, %v, want position %d", host, st, err, position)
		}
	}
	other, old := open(t, etcd.Config{Endpoints: []string{endpoint}}), open(t, etcd.Config{Endpoints: []string{endpoint}})
	ask(other, "holder", 0)
	ask(old, "a", 1)
	ask(other, "b", 2)
	raw := client(t, endpoint)
	leaseOfA := func() clientv3.LeaseID {
		t.Helper()
		resp, err := raw.Get(ctx, etcd.DefaultPrefix+"g/queue/a")
		if err != nil || len(resp.Kvs) != 1 {
			t.Fatalf("the place of a: %v, %v", resp, err)
		}
		return clientv3.LeaseID(resp.Kvs[0].Lease)
	}
	was := leaseOfA()
	old.Close()
	restarted := open(t, etcd.Config{Endpoints: []string{endpoint}})
	ask(restarted, "a", 1)
	if _, err := raw.Revoke(ctx, was); err != nil { // as it ends by itself when nobody renews it
		t.Fatal(err)
	}
	leaseOfA()
	ask(other, "b", 2)
	ask(restarted, "a", 1)
}

// A host that is gone for good leaves the queue when its lease ends; a slot that was granted has no lease.
func TestWaiterThatIsGoneLeavesTheQueue(t *testing.T) {
	t.Parallel()
	endpoint, _ := start(t)
	k := open(t, etcd.Config{Endpoints: []string{endpoint}})
	gone := open(t, etcd.Config{Endpoints: []string{endpoint}, WaiterTTL: time.Second})
	ctx := t.Context()
	if _, err := gone.Request(ctx, lock.Claim{Group: "g", Host: "holder"}); err != nil {
		t.Fatal(err)
	}
	if _, err := gone.Request(ctx, lock.Claim{Group: "g", Host: "waiter"}); err != nil {
		t.Fatal(err)
	}
	gone.Close()
	for deadline := time.Now().Add(2 * time.Minute); ; {
		s, err := k.State(ctx, "g")
		if err != nil {
			t.Fatal(err)
		}
		if len(s.Queue) == 0 {
			if len(s.Holders) != 1 {
				t.Errorf("holders %+v, want the one that was granted", s.Holders)
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the waiter never left")
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func TestUnreadableState(t *testing.T) {
	t.Parallel()
	endpoint, _ := start(t)
	c := client(t, endpoint)
	k := open(t, etcd.Config{Endpoints: []string{endpoint}})
	for _, body := range []string{"garbage", `{"schema":3}`, `{}`, `{"schema":1,"policy":{"max":-1}}`, `{"schema":1,"holders":3}`, ""} {
		if _, err := c.Put(t.Context(), etcd.DefaultPrefix+"g/state", body); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Request(t.Context(), lock.Claim{Group: "g", Host: "a"}); !errors.Is(err, lock.ErrSchema) {
			t.Errorf("Request on %q = %v, want ErrSchema", body, err)
		}
		resp, err := c.Get(t.Context(), etcd.DefaultPrefix+"g/state")
		if err != nil || string(resp.Kvs[0].Value) != body {
			t.Errorf("what cannot be read was changed to %q", resp.Kvs[0].Value)
		}
	}
}

// An older host must not take away what a newer one wrote.
func TestUnknownFieldsSurvive(t *testing.T) {
	t.Parallel()
	endpoint, _ := start(t)
	c := client(t, endpoint)
	k := open(t, etcd.Config{Endpoints: []string{endpoint}})
	const body = `{"schema":1,"policy":{"max":2,"failure_budget":1,"boot_deadline":"0s","moon":"full","windows":[{"start":"04:00","length":"1h","zone":"UTC","tide":"low"}]},"holders":[{"host":"x","phase":"rebooting","granted":"2026-01-01T00:00:00Z","colour":"red"}],"halts":{"9":{"since":"2026-01-01T00:00:00Z","reason":"r","by":"me"}},"future":{"a":[1]}}`
	if _, err := c.Put(t.Context(), etcd.DefaultPrefix+"g/state", body); err != nil {
		t.Fatal(err)
	}
	if err := k.SetMax(t.Context(), "g", 3); err != nil {
		t.Fatal(err)
	}
	resp, err := c.Get(t.Context(), etcd.DefaultPrefix+"g/state")
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(resp.Kvs[0].Value, &got); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"moon":"full"`, `"tide":"low"`, `"by":"me"`, `"colour":"red"`, `"future":{"a":[1]}`, `"max":3`} {
		if !strings.Contains(string(resp.Kvs[0].Value), want) {
			t.Errorf("%s is gone from %s", want, resp.Kvs[0].Value)
		}
	}
}

func TestPasswords(t *testing.T) {
	t.Parallel()
	endpoint, _ := start(t)
	c := client(t, endpoint)
	ctx := t.Context()
	for _, step := range []func() error{
		func() error { _, err := c.UserAdd(ctx, "root", "secret"); return err },
		func() error { _, err := c.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := c.AuthEnable(ctx); return err },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	request := func(user, password string) error {
		k, err := etcd.New(etcd.Config{Endpoints: []string{endpoint}, User: user, Password: password, RequestTimeout: 2 * time.Second})
		if err != nil {
			return err
		}
		defer k.Close()
		_, err = k.Request(ctx, lock.Claim{Group: "g", Host: "a"})
		return err
	}
	if err := request("root", "secret"); err != nil {
		t.Errorf("the right password: %v", err)
	}
	for _, bad := range [][2]string{{"root", "wrong"}, {"", ""}} {
		if err := request(bad[0], bad[1]); !errors.Is(err, os.ErrPermission) {
			t.Errorf("user %q: %v, want a permission error", bad[0], err)
		}
	}
}

// A token that the client was given for its password ends after a while; neither a call nor a watch may end with it.
func TestAuthTokenExpires(t *testing.T) {
	t.Parallel()
	cfg := etcdtest.Config(t.TempDir())
	cfg.AuthTokenTTL = 1
	e, err := etcdtest.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	endpoint := "http://" + e.Clients[0].Addr().String()
	c := client(t, endpoint)
	ctx := t.Context()
	for _, step := range []func() error{
		func() error { _, err := c.UserAdd(ctx, "root", "secret"); return err },
		func() error { _, err := c.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := c.AuthEnable(ctx); return err },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	login := etcd.Config{Endpoints: []string{endpoint}, User: "root", Password: "secret"}
	idle, waiter := open(t, login), open(t, login)
	if st, err := idle.Request(ctx, lock.Claim{Group: "g", Host: "a"}); err != nil || !st.Granted {
		t.Fatalf("%+v, %v", st, err)
	}
	if st, err := waiter.Request(ctx, lock.Claim{Group: "g", Host: "b"}); err != nil || st.Position != 1 {
		t.Fatalf("%+v, %v", st, err)
	}
	woken := make(chan error, 1)
	go func() { woken <- waiter.Wait(ctx, lock.Claim{Group: "g", Host: "b"}) }()
	select {
	case err := <-woken: // it may be woken when the token ends, but not with an error that lasts
		if err != nil && !errors.Is(err, lock.ErrUnavailable) {
			t.Errorf("Wait = %v", err)
		}
		woken <- nil
	case <-time.After(3 * time.Second): // the time that the test is about
	}
	if err := idle.Release(ctx, "g", "a", lock.Verdict{Outcome: lock.Healthy}); err != nil {
		t.Errorf("a call after the token has ended: %v", err)
	}
	select {
	case err := <-woken:
		if err != nil {
			t.Errorf("Wait = %v", err)
		}
	case <-time.After(2 * time.Minute):
		t.Error("the waiter was not woken after its token had ended")
	}
	if st, err := waiter.Request(ctx, lock.Claim{Group: "g", Host: "b"}); err != nil || !st.Granted {
		t.Errorf("%+v, %v", st, err)
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	pem := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(pem, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]etcd.Config{
		"no endpoints":     {},
		"half a pair":      {Endpoints: []string{"https://x:1"}, Cert: "x"},
		"half a login":     {Endpoints: []string{"http://x:1"}, User: "x"},
		"an empty CA file": {Endpoints: []string{"https://x:1"}, CA: pem},
		"no CA file":       {Endpoints: []string{"https://x:1"}, CA: pem + ".not"},
		"no certificate":   {Endpoints: []string{"https://x:1"}, Cert: pem, Key: pem},
	} {
		if k, err := etcd.New(cfg); err == nil {
			k.Close()
			t.Errorf("%s: no error", name)
		}
	}
}

func TestWaitEndsWithItsContext(t *testing.T) {
	t.Parallel()
	endpoint, _ := start(t)
	k := open(t, etcd.Config{Endpoints: []string{endpoint}})
	for _, h := range []string{"a", "b"} {
		if _, err := k.Request(t.Context(), lock.Claim{Group: "g", Host: h}); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := k.Wait(ctx, lock.Claim{Group: "g", Host: "b"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait = %v", err)
	}
}
