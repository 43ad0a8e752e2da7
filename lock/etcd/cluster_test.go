package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
)

// A member is an etcd in a process of its own, so that it can be killed and stopped as in the field. The process is this test
// program, started again.
type member struct {
	name, dir, client, peer, cluster string
	cmd                              *exec.Cmd
}

const memberEnv = "FLIPSIDE_TEST_ETCD_MEMBER"

func TestMain(m *testing.M) {
	if spec := os.Getenv(memberEnv); spec != "" {
		if err := runMember(strings.Split(spec, "|")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func runMember(spec []string) error {
	cfg := etcdtest.Config(spec[1])
	client, err := url.Parse(spec[2])
	if err != nil {
		return err
	}
	peer, err := url.Parse(spec[3])
	if err != nil {
		return err
	}
	cfg.Name, cfg.InitialCluster = spec[0], spec[4]
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	e, err := etcdtest.Start(cfg)
	if err != nil {
		return err
	}
	return <-e.Err()
}

func freeURL(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return "http://" + l.Addr().String()
}

func startCluster(t *testing.T, n int) (members []*member, endpoints []string) {
	t.Helper()
	var cluster []string
	dir := t.TempDir()
	for i := range n {
		m := &member{name: fmt.Sprintf("m%d", i), client: freeURL(t), peer: freeURL(t)}
		m.dir = filepath.Join(dir, m.name)
		cluster = append(cluster, m.name+"="+m.peer)
		members = append(members, m)
		endpoints = append(endpoints, m.client)
	}
	for _, m := range members {
		m.cluster = strings.Join(cluster, ",")
		m.start(t)
	}
	t.Cleanup(func() {
		for _, m := range members {
			m.kill()
		}
	})
	return members, endpoints
}

func (m *member) start(t *testing.T) {
	t.Helper()
	m.cmd = exec.Command(os.Args[0])
	m.cmd.Env = append(os.Environ(), memberEnv+"="+strings.Join([]string{m.name, m.dir, m.client, m.peer, m.cluster}, "|"))
	m.cmd.Stderr = os.Stderr
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

func (m *member) kill() {
	m.cmd.Process.Kill()
	m.cmd.Wait()
}

// insist repeats a call while the store is away, as a host does.
func insist(ctx context.Context, f func() error) error {
	for {
		err := f()
		if err == nil || ctx.Err() != nil || !errors.Is(err, lock.ErrUnavailable) && !errors.Is(err, lock.ErrConflict) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// The store is killed while a host waits, and comes back with its data: nothing is forgotten, and the host gets its turn.
func TestRestart(t *testing.T) {
	t.Parallel()
	members, endpoints := startCluster(t, 1)
	k := open(t, etcd.Config{Endpoints: endpoints, RequestTimeout: time.Second})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	a, b := lock.Claim{Group: "g", Host: "a", To: "2"}, lock.Claim{Group: "g", Host: "b", To: "2"}
	var before lock.Standing
	ask := func(c lock.Claim, st *lock.Standing) func() error {
		return func() (err error) { *st, err = k.Request(ctx, c); return err }
	}
	if err := insist(ctx, ask(a, &before)); err != nil || !before.Granted {
		t.Fatalf("%+v, %v", before, err)
	}
	var st lock.Standing
	if err := insist(ctx, ask(b, &st)); err != nil || st.Position != 1 {
		t.Fatalf("%+v, %v", st, err)
	}
	members[0].kill()
	if _, err := k.Request(ctx, a); !errors.Is(err, lock.ErrUnavailable) {
		t.Fatalf("Request of a dead store = %v", err)
	}
	members[0].start(t)
	if err := insist(ctx, ask(a, &st)); err != nil || st.Token != before.Token {
		t.Errorf("after the restart: %+v, %v, want token %d", st, err, before.Token)
	}
	if err := insist(ctx, func() error { return k.Release(ctx, "g", "a", lock.Verdict{Outcome: lock.Healthy}) }); err != nil {
		t.Fatal(err)
	}
	if err := insist(ctx, func() error { return k.Wait(ctx, b) }); err != nil {
		t.Fatal(err)
	}
	if err := insist(ctx, ask(b, &st)); err != nil || !st.Granted {
		t.Errorf("b after the restart: %+v, %v", st, err)
	}
}

// One member after the other is killed, or stopped so that it accepts connections and answers nothing, while hosts take turns.
// All get theirs, and never more than max are down.
func TestClusterLosesMembers(t *testing.T) {
	if os.Getenv("FLIPSIDE_LONG") == "" {
		t.Skip("takes a minute: FLIPSIDE_LONG=1 runs it")
	}
	members, endpoints := startCluster(t, 3)
	const hosts, limit = 12, 2
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cfg := etcd.Config{Endpoints: endpoints, RequestTimeout: 6 * time.Second}
	admin := open(t, cfg)
	if err := insist(ctx, func() error { return admin.SetMax(ctx, "g", limit) }); err != nil {
		t.Fatal(err)
	}
	var down, most, turns atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range hosts {
		k := open(t, cfg)
		c := lock.Claim{Group: "g", Host: fmt.Sprintf("host-%02d", i), To: "2"}
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				for {
					var st lock.Standing
					if err := insist(ctx, func() (err error) { st, err = k.Request(ctx, c); return err }); err != nil {
						t.Errorf("%s: %v", c.Host, err)
						return
					}
					if st.Granted {
						break
					}
					wait, cancel := context.WithTimeout(ctx, 20*time.Second)
					err := insist(wait, func() error { return k.Wait(wait, c) })
					cancel()
					if err != nil && ctx.Err() != nil {
						t.Errorf("%s: %v", c.Host, err)
						return
					}
				}
				if n := down.Add(1); n > most.Load() {
					most.Store(n)
				}
				time.Sleep(20 * time.Millisecond)
				down.Add(-1)
				if err := insist(ctx, func() error { return k.Release(ctx, "g", c.Host, lock.Verdict{Outcome: lock.Healthy}) }); err != nil {
					t.Errorf("%s: %v", c.Host, err)
					return
				}
				turns.Add(1)
			}
		})
	}
	progress := func(what string) {
		t.Helper()
		before, begin := turns.Load(), time.Now()
		for turns.Load() < before+hosts {
			if time.Since(begin) > time.Minute {
				t.Errorf("nothing goes on: %s", what)
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Logf("%d turns in %s: %s", hosts, time.Since(begin).Round(time.Millisecond), what)
	}
	progress("all members are there")
	for _, m := range members {
		m.kill()
		progress(m.name + " is killed")
		m.start(t)
		progress(m.name + " is back")
		if err := m.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		progress(m.name + " is stopped")
		if err := m.cmd.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		progress(m.name + " goes on")
	}
	close(stop)
	wg.Wait()
	if n := most.Load(); n > limit {
		t.Errorf("%d hosts were down at once, max is %d", n, limit)
	}
	s, err := admin.State(ctx, "g")
	if err != nil || len(s.Holders) > 0 {
		t.Errorf("left behind: %+v, %v", s.Holders, err)
	}
}
