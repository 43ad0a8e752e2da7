package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
)

// A member is an etcd in a process of its own, so that it can be killed and stopped as in the field. The process is this test
// program, started again.
type member struct {
	name, dir, client, peer, cluster string
	listen                           string // where it really listens for its peers; peer leads there
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
	listen, err := url.Parse(spec[5])
	if err != nil {
		return err
	}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{*listen}, []url.URL{*peer}
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

func startCluster(t *testing.T, n int) (members []*member, endpoints []string, wire *network) {
	t.Helper()
	wire = &network{}
	var cluster []string
	dir := t.TempDir()
	for i := range n {
		m := &member{name: fmt.Sprintf("m%d", i), client: freeURL(t), listen: freeURL(t)}
		m.peer = wire.lead(t, m.listen)
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
	return members, endpoints, wire
}

func (m *member) start(t *testing.T) {
	t.Helper()
	m.cmd = exec.Command(os.Args[0])
	m.cmd.Env = append(os.Environ(), memberEnv+"="+strings.Join([]string{m.name, m.dir, m.client, m.peer, m.cluster, m.listen}, "|"))
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

// network is what the members of a cluster reach each other through. One of them can be cut off, both ways.
type network struct {
	mu    sync.Mutex
	off   end
	lines map[context.Context]line
}

// end is a member as the network knows it: the id that its messages bear, and where it listens.
type end struct{ id, listen string }

type line struct {
	from   string // id
	to     string // where the other listens
	hangUp context.CancelFunc
}

func (l line) touches(e end) bool { return e != end{} && (l.from == e.id || l.to == e.listen) }

// lead returns an address that leads to another.
func (n *network) lead(t *testing.T, to string) string {
	target, err := url.Parse(to)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.FlushInterval = -1
	proxy.ErrorLog = log.New(io.Discard, "", 0)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Raft messages say who sends them (etcd, rafthttp); what says nothing is a question of a member that joins.
		ctx, hangUp := context.WithCancel(r.Context())
		defer hangUp()
		l := line{r.Header.Get("X-Server-From"), to, hangUp}
		n.mu.Lock()
		if n.lines == nil {
			n.lines = map[context.Context]line{}
		}
		n.lines[ctx] = l
		off := n.off
		n.mu.Unlock()
		defer func() {
			n.mu.Lock()
			delete(n.lines, ctx)
			n.mu.Unlock()
		}()
		if l.touches(off) {
			panic(http.ErrAbortHandler)
		}
		proxy.ServeHTTP(w, r.WithContext(ctx))
	}))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(srv.CloseClientConnections)
	return srv.URL
}

// cut cuts a member off, and hangs up its connections; the zero end connects all again.
func (n *network) cut(e end) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.off = e
	for _, l := range n.lines {
		if l.touches(e) {
			l.hangUp()
		}
	}
}

// memberID is what a member calls itself to the others.
func memberID(t *testing.T, ctx context.Context, endpoints []string, name string) string {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: endpoints, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for ; ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		one, cancel := context.WithTimeout(ctx, 5*time.Second)
		list, err := c.MemberList(one)
		cancel()
		if err != nil {
			continue
		}
		for _, m := range list.Members {
			if m.Name == name {
				return strconv.FormatUint(m.ID, 16)
			}
		}
	}
	t.Fatalf("no member %s", name)
	return ""
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
	members, endpoints, _ := startCluster(t, 1)
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

// One member after the other is killed, or stopped so that it accepts connections and answers nothing, or cut off from the others while its clients
// still reach it, while hosts take turns.
// All get theirs, and never more than max are down.
func TestClusterLosesMembers(t *testing.T) {
	if os.Getenv("FLIPSIDE_LONG") == "" {
		t.Skip("takes a minute: FLIPSIDE_LONG=1 runs it")
	}
	members, endpoints, wire := startCluster(t, 3)
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
		// Its clients still reach it, and it still answers; but it has no majority any more.
		wire.cut(end{memberID(t, ctx, endpoints, m.name), m.listen})
		progress(m.name + " is cut off from the others")
		alone := open(t, etcd.Config{Endpoints: []string{m.client}, RequestTimeout: 2 * time.Second})
		if st, err := alone.Request(ctx, lock.Claim{Group: "g", Host: "alone"}); !errors.Is(err, lock.ErrUnavailable) {
			t.Errorf("%s answers without a majority: %+v, %v", m.name, st, err)
		}
		wire.cut(end{})
		progress(m.name + " is back among them")
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
