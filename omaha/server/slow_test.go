package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Everybody who reaches the server may ask it, and be slow, silent, or gone.

// known lets the server know n hosts that run version.
func (l *lab) known(n int, version string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range n {
		h := &Host{
			ID: fmt.Sprintf("%032x", i), Alias: fmt.Sprintf("node-%d", i), Version: version, Track: "stable", Channel: "stable", State: Current,
			FirstSeen: l.clock.Now(), LastSeen: l.clock.Now(), ChangedAt: l.clock.Now(),
		}
		if i%100 == 3 {
			h.Failed, h.ErrorCode, h.FailedAt = "9.0.0", 44, l.clock.Now()
		}
		l.hosts[h.ID] = h
		l.touch(h)
	}
}

// in waits until done, for much longer than anything here takes.
func in(t *testing.T, what string, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(time.Minute):
		t.Fatal(what, " has not come to an end")
		return nil
	}
}

func gone(t *testing.T, pattern string) {
	t.Helper()
	if left, err := filepath.Glob(pattern); err != nil || len(left) > 0 {
		t.Errorf("there is still %q, %v", left, err)
	}
}

// Somebody takes a backup and stops halfway: hosts are told something new all the same, and the copy is what it was when it began.
func TestBackupThatIsNotTaken(t *testing.T) {
	l := newLab(t)
	l.known(10, "1.0.0")
	l.commit(true)
	r, w := io.Pipe()
	backup := make(chan error, 1)
	go func() { backup <- l.Backup(t.Context(), w); w.Close() }()
	copied := make([]byte, 100)
	if _, err := io.ReadFull(r, copied); err != nil {
		t.Fatal(err)
	}
	l.known(5000, "1.1.0") // far more than there was room for
	commit := make(chan error, 1)
	go func() { l.commit(true); commit <- nil }()
	in(t, "a commit beside a backup that nobody takes", commit)

	rest, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := in(t, "the backup", backup); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "state.db"), append(copied, rest...), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := New(dir, Options{Now: l.clock.Now})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if hosts := s.Hosts(); len(hosts) != 10 || hosts[0].Version != "1.0.0" {
		t.Errorf("the copy holds %d hosts", len(hosts))
	}
	gone(t, filepath.Join(l.dir, ".backup-*"))
}

// There is no room for a copy: whoever asks is told so, nothing of it stays, and the server goes on.
func TestBackupOnAFullDisk(t *testing.T) {
	l := newLab(t)
	l.known(100, "1.0.0")
	l.commit(true)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	fill, room := small(t, l.dir)
	l.start()
	l.opt.Admins.Tokens = map[string]string{"ops": "secret"}
	fill()
	ask := func() (int, string) {
		rec := httptest.NewRecorder()
		req := httptest.NewRequest("GET", "/v1/admin/backup", nil)
		req.Header.Set("Authorization", "Bearer secret")
		l.ServeHTTP(rec, req)
		return rec.Code, rec.Body.String()
	}
	if code, body := ask(); code != 500 || !strings.Contains(body, "no space left") {
		t.Errorf("%d %s", code, body)
	}
	gone(t, filepath.Join(l.dir, ".backup-*"))
	room()
	if code, body := ask(); code != 200 || len(body) < 4096 {
		t.Errorf("there is room again: %d, %d bytes", code, len(body))
	}
}

// A host that does not wait for its answer is not waited for either, however slow the disk is.
func TestSavedForNobody(t *testing.T) {
	l := newLab(t)
	tx, err := l.store.db.Begin(true) // no commit comes past it
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	l.mu.Lock()
	l.rollouts["stable"] = (&rollout{}).filled()
	l.touchRollout("stable")
	c := l.durable()
	l.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	done := make(chan error, 1)
	go func() { done <- l.saved(ctx, c) }()
	if err := in(t, "a request that nobody waits for", done); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// listener has connections with small buffers, and tells when the server has closed one.
type listener struct {
	net.Listener
	closed chan error
}

type conn struct {
	*net.TCPConn
	closed chan error
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if err := c.(*net.TCPConn).SetWriteBuffer(4096); err != nil {
		return nil, err
	}
	return &conn{c.(*net.TCPConn), l.closed}, nil
}

func (c *conn) Close() error {
	err := c.TCPConn.Close()
	select {
	case c.closed <- nil:
	default:
	}
	return err
}

// A client that asks and takes nothing is cut off, whatever it asked for.
func TestClientThatTakesNothing(t *testing.T) {
	l := newLab(t)
	l.opt.Admins.Tokens = map[string]string{"ops": "secret"}
	rel, err := l.Publish(t.Context(), "stable", "1.0.0", fakePayload(t, 1, 4<<20))
	if err != nil {
		t.Fatal(err)
	}
	l.known(5000, "1.0.0")
	l.commit(true)
	l.patience = 300 * time.Millisecond
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln := &listener{inner, make(chan error, 1)}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- l.Serve(ctx, ln) }()
	defer func() { cancel(); in(t, "the server", served) }()
	small := net.Dialer{Control: func(_, _ string, rc syscall.RawConn) error {
		return rc.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) })
	}}
	for _, path := range []string{"/v1/status", "/v1/hosts?limit=5000", "/payloads/" + rel.Payload, "/v1/admin/backup"} {
		c, err := small.DialContext(t.Context(), "tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n\r\n", path)
		in(t, "the connection of a client that takes nothing of "+path, ln.closed)
	}
}

// slowly is a connection on which each write takes a while, by its own clock.
type slowly struct {
	http.ResponseWriter
	now, deadline time.Duration
	taken         int
}

func (s *slowly) SetWriteDeadline(t time.Time) error {
	s.deadline = s.now + time.Minute // rolling says a minute from now
	return nil
}

func (s *slowly) Write(p []byte) (int, error) {
	s.now += time.Duration(len(p)) * time.Second / 2048
	if s.now > s.deadline {
		return 0, os.ErrDeadlineExceeded
	}
	s.taken += len(p)
	return len(p), nil
}

// A slow line takes a payload as long as it takes.
func TestSlowLine(t *testing.T) {
	const size = 3 << 20
	for name, r := range map[string]io.Reader{
		"whole": bytes.NewReader(make([]byte, size)), "a range": &io.LimitedReader{R: bytes.NewReader(make([]byte, 2*size)), N: size},
	} {
		line := &slowly{ResponseWriter: httptest.NewRecorder()}
		if n, err := (&rolling{ResponseWriter: line, patience: time.Minute}).ReadFrom(r); n != size || err != nil || line.taken != size {
			t.Errorf("%s: %d of %d bytes, %v", name, n, size, err)
		}
		if lim, ok := r.(*io.LimitedReader); ok && lim.N != 0 {
			t.Errorf("%s: %d bytes are left", name, lim.N)
		}
	}
}

// bites notes how much of an answer is there at once.
type bites struct {
	*httptest.ResponseRecorder
	largest int
}

func (b *bites) Write(p []byte) (int, error) {
	b.largest = max(b.largest, len(p))
	return b.ResponseRecorder.Write(p)
}

// Whoever lists the hosts has no more of them put into memory than a few at once.
func TestListingIsSmall(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.0.0", 1)
	l.known(20_000, "1.0.0")
	l.commit(true)
	ask := func(path string) *bites {
		b := &bites{ResponseRecorder: httptest.NewRecorder()}
		l.ServeHTTP(b, httptest.NewRequest("GET", path, nil))
		if b.Code != 200 || !json.Valid(b.Body.Bytes()) {
			t.Fatalf("%s: %d", path, b.Code)
		}
		if b.largest > 64<<10 {
			t.Errorf("%s: %d bytes of the answer were there at once", path, b.largest)
		}
		return b
	}
	least := uint64(math.MaxUint64) // the server may be at work on something else beside it
	for range 5 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		ask("/v1/hosts?limit=1")
		runtime.ReadMemStats(&after)
		least = min(least, after.TotalAlloc-before.TotalAlloc)
	}
	if least > 4<<20 { // of 20 000 hosts, which are several times as large
		t.Errorf("one host of many took %d KiB", least>>10)
	}
	ask("/v1/hosts?limit=10000")

	var got Status
	if err := json.Unmarshal(ask("/v1/status").Body.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	a, _ := json.Marshal(got)
	b, _ := json.Marshal(l.Status())
	if !bytes.Equal(a, b) || len(got.Failures) != 200 {
		t.Errorf("the status is not what was asked for: %d bytes, not %d, with %d failures", len(a), len(b), len(got.Failures))
	}
}

// Somebody who looks at the page and leaves does not let the semaphore look dead to others.
func TestViewerWhoLeaves(t *testing.T) {
	l := newLab(t)
	l.reboots.ask = func(ctx context.Context) ([]RebootGroup, error) { return []RebootGroup{{Name: "workers"}}, ctx.Err() }
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.reboots.get(ctx); err != nil {
		t.Error(err)
	}
	if resp, body := l.get("/v1/reboots"); resp.StatusCode != 200 {
		t.Errorf("the next one is told: %s %s", resp.Status, body)
	}
}
