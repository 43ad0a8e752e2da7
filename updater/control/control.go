// Package control is the daemon's control socket: how the flipside command talks to flipsided on hosts and in
// places where there is no message bus (early boot, containers, rescue systems).
//
// The protocol is one JSON object per line over a Unix stream socket. The client sends one [Request]; the daemon answers
// with [Reply] lines, one for most methods and one for each change for "watch", and closes. Everyone who may
// connect may read; only root and the daemon's own user may change something, which the kernel's peer credentials decide.
package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/updater"
)

// Request is what a client asks.
type Request struct {
	Method  string   `json:"method"` // status, watch or check
	Forgive []string `json:"forgive,omitempty"`
}

// Reply is one line of an answer.
type Reply struct {
	Status *updater.Status `json:"status,omitempty"`
	Error  string          `json:"error,omitempty"`
	Denied bool            `json:"denied,omitempty"` // the error is one of permission
}

// Errors of the client.
var (
	// ErrNotRunning means that no daemon listens on the socket.
	ErrNotRunning = errors.New("flipsided is not running")
	// ErrDenied means that the daemon refuses this user.
	ErrDenied = errors.New("not permitted")
)

const (
	maxRequest = 64 << 10
	maxReply   = 4 << 20
	maxClients = 32
	// patience bounds how long a client may take to send its request or to take a line.
	patience = 10 * time.Second
)

// Daemon is what the socket gives access to.
type Daemon interface {
	Status(context.Context) (updater.Status, <-chan struct{})
	CheckNow(ctx context.Context, by string, forgive ...string) error
}

// Listen makes the socket at path, replacing one that nobody listens on.
func Listen(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("making the control socket: %w", err)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("making the control socket: another flipsided listens on %s", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("making the control socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("making the control socket: %w", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, fmt.Errorf("making the control socket: %w", err)
	}
	return l, nil
}

// Serve answers clients until ctx is done.
func Serve(ctx context.Context, l *net.UnixListener, d Daemon, log *slog.Logger) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	places := make(chan struct{}, maxClients)
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("control socket: %w", err)
		}
		select {
		case places <- struct{}{}:
		default:
			c.Close() // more clients than people have hands
			continue
		}
		wg.Go(func() {
			defer func() { <-places }()
			defer c.Close()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			if err := serve(ctx, c, d); err != nil {
				log.Debug("control client", "error", err)
			}
		})
	}
}

func serve(ctx context.Context, c *net.UnixConn, d Daemon) error {
	c.SetReadDeadline(time.Now().Add(patience))
	line, err := bufio.NewReader(io.LimitReader(c, maxRequest)).ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("reading a request: %w", err)
	}
	enc := json.NewEncoder(c)
	send := func(r Reply) error {
		c.SetWriteDeadline(time.Now().Add(patience))
		return enc.Encode(r)
	}
	var req Request
	if err := json.Unmarshal(line, &req); err != nil {
		return send(Reply{Error: fmt.Sprintf("the request is not JSON: %v", err)})
	}
	switch req.Method {
	case "status":
		st, _ := d.Status(ctx)
		return send(Reply{Status: &st})
	case "watch":
		gone := make(chan struct{})
		go func() { // a client that hangs up must not leave its watch behind
			defer close(gone)
			c.SetReadDeadline(time.Time{})
			io.Copy(io.Discard, c)
		}()
		for {
			st, changed := d.Status(ctx)
			if err := send(Reply{Status: &st}); err != nil {
				return err
			}
			select {
			case <-changed:
			case <-gone:
				return nil
			case <-ctx.Done():
				return nil
			}
			select { // a fast download changes its progress more often than anyone can read
			case <-time.After(100 * time.Millisecond):
			case <-gone:
				return nil
			case <-ctx.Done():
				return nil
			}
		}
	case "check":
		uid, err := peer(c)
		if err != nil {
			return send(Reply{Error: err.Error()})
		}
		if uid != 0 && uid != uint32(os.Getuid()) {
			return send(Reply{Error: fmt.Sprintf("user %d may not ask for a check; root and user %d may", uid, os.Getuid()), Denied: true})
		}
		if err := d.CheckNow(ctx, fmt.Sprintf("user %d", uid), req.Forgive...); err != nil {
			return send(Reply{Error: err.Error()})
		}
		st, _ := d.Status(ctx)
		return send(Reply{Status: &st})
	}
	return send(Reply{Error: fmt.Sprintf("unknown method %q", req.Method)})
}

// peer returns the user at the other end of the socket.
func peer(c *net.UnixConn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("asking who is calling: %w", err)
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, fmt.Errorf("asking who is calling: %w", err)
	}
	if cerr != nil {
		return 0, fmt.Errorf("asking who is calling: %w", cerr)
	}
	return cred.Uid, nil
}

// Call sends one request and gives each status that comes back to yield, until it returns false, the daemon ends the answer, or
// ctx is done.
func Call(ctx context.Context, path string, req Request, yield func(updater.Status) bool) error {
	var nd net.Dialer
	c, err := nd.DialContext(ctx, "unix", path)
	if err != nil {
		if errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("%w: %w", ErrDenied, err)
		}
		return fmt.Errorf("%w: %w", ErrNotRunning, err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if err := json.NewEncoder(c).Encode(req); err != nil {
		return fmt.Errorf("asking flipsided: %w", err)
	}
	lines := bufio.NewScanner(c)
	lines.Buffer(nil, maxReply)
	for lines.Scan() {
		var r Reply
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return fmt.Errorf("the answer of flipsided cannot be read: %w", err)
		}
		if r.Denied {
			return fmt.Errorf("%w: %s", ErrDenied, r.Error)
		}
		if r.Error != "" {
			return errors.New(r.Error)
		}
		if r.Status != nil && !yield(*r.Status) {
			return nil
		}
	}
	if err := lines.Err(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("reading the answer of flipsided: %w", err)
	}
	return ctx.Err()
}
