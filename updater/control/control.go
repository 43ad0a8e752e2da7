// Package control is the daemon's control socket: how the flipside command talks to flipsided on hosts and in
// places where there is no message bus (early boot, containers, rescue systems).
//
// The protocol is one JSON object per line over a Unix stream socket. The client sends one [Request]; the daemon answers
// with [Reply] lines, one for most methods and one for each change for "watch", and closes. Everyone who may
// connect may read; only root and the daemon's own user may change something, which the kernel's peer credentials decide. They have places of
// their own, so that nobody else can keep them out; each other user has a few.
package control

import (
	"bufio"
	"cmp"
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
	Method  string   `json:"method"`            // status, watch, plan or do
	Channel string   `json:"channel,omitempty"` // of a plan
	Do      *Command `json:"do,omitempty"`
	Follow  bool     `json:"follow,omitempty"` // do: go on as watch does, from the status after the command on
}

// Reply is one line of an answer.
type Reply struct {
	Status *updater.Status `json:"status,omitempty"`
	Plan   *updater.Plan   `json:"plan,omitempty"`
	Error  string          `json:"error,omitempty"`
	Kind   string          `json:"kind,omitempty"` // of the error, if a program may want to know: denied, busy, nothing, under-way, below-floor, bad-command
}

// kinds are the errors that a program may want to tell apart, as the socket names them.
var kinds = map[string]error{
	"denied": ErrDenied, "busy": ErrBusy, "nothing": updater.ErrNothing, "under-way": updater.ErrUnderWay, "below-floor": updater.ErrBelowFloor, "bad-command": ErrBadCommand,
}

func failure(err error) Reply {
	r := Reply{Error: err.Error()}
	for name, kind := range kinds {
		if errors.Is(err, kind) {
			r.Kind = name
		}
	}
	return r
}

// Errors of the client.
var (
	// ErrNotRunning means that no daemon listens on the socket.
	ErrNotRunning = errors.New("flipsided is not running")
	// ErrDenied means that the daemon refuses this user.
	ErrDenied = errors.New("not permitted")
	// ErrBusy means that this user has as many connections to the daemon as one may have.
	ErrBusy = errors.New("too many clients of flipsided's control socket")
	// ErrNoAnswer means that the daemon took the request and was gone before it answered. Whether it did what it was told is not known.
	ErrNoAnswer = errors.New("flipsided ended before it answered")
)

const (
	maxRequest = 64 << 10
	maxReply   = 4 << 20
	maxClients = 32 // of root and of the daemon's user, each; more than people have hands
	maxOthers  = 32 // of everybody else together
	maxOther   = 4  // of one of them
	// patience bounds how long a client may take to send its request or to take a line.
	patience = 10 * time.Second
	// asking is how long a client has for its request once the daemon ends, or reads its configuration again.
	asking = time.Second
)

// Listener is the control socket. It outlives the daemons that answer on it one after another: who calls between two of them is answered by the second.
type Listener struct {
	path string
	unix *net.UnixListener
}

// Listen makes the socket at path, replacing one that nobody listens on. It comes into its place when it can be called; the kernel's lists go on to name it as it was
// made, path with ".new".
func Listen(path string) (*Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("making the control socket: %w", err)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("making the control socket: another flipsided listens on %s", path)
	}
	making := path + ".new"
	if err := os.Remove(making); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("making the control socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: making, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("making the control socket: %w", err)
	}
	if err := cmp.Or(os.Chmod(making, 0o666), os.Rename(making, path)); err != nil {
		l.Close()
		return nil, fmt.Errorf("making the control socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	return &Listener{path, l}, nil
}

// Path is where the socket is.
func (l *Listener) Path() string { return l.path }

// Close takes the socket away.
func (l *Listener) Close() error {
	err := os.Remove(l.path)
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, l.unix.Close())
}

// Serve answers clients until ctx is done. The socket stays: whoever calls then waits for the next Serve.
func Serve(ctx context.Context, l *Listener, d Daemon, log *slog.Logger) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := l.unix.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	interrupted := make(chan struct{})
	defer func() { cancel(); <-interrupted }() // before another Serve lifts the deadline
	context.AfterFunc(ctx, func() {
		defer close(interrupted)
		l.unix.SetDeadline(time.Now())
	})
	var wg sync.WaitGroup
	defer wg.Wait()
	places := places{of: map[uint32]int{}}
	for {
		c, err := l.unix.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("control socket: %w", err)
		}
		uid, err := peer(c)
		if err == nil && !places.take(uid) {
			c.SetWriteDeadline(time.Now().Add(time.Second)) // a line always fits into a new socket
			json.NewEncoder(c).Encode(failure(fmt.Errorf("%w: user %d has others that wait or watch", ErrBusy, uid)))
			c.Close()
			continue
		}
		if err != nil {
			log.Debug("control client", "error", err)
			c.Close()
			continue
		}
		wg.Go(func() {
			defer c.Close()
			defer places.free(uid) // before the client can see the end
			// Whoever has asked already gets an answer, also to the order that ends this, and who is about to ask; who says nothing is not waited for.
			defer context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Now().Add(asking)) })()
			if err := serve(ctx, c, uid, d, log); err != nil {
				log.Debug("control client", "error", err)
			}
		})
	}
}

// places counts the clients of each user.
type places struct {
	mu     sync.Mutex
	of     map[uint32]int
	others int // of all but the trusted
}

// take gives a client of this user a place, if there is one.
func (p *places) take(uid uint32) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if trusted(uid) {
		if p.of[uid] == maxClients {
			return false
		}
	} else {
		if p.of[uid] == maxOther || p.others == maxOthers {
			return false
		}
		p.others++
	}
	p.of[uid]++
	return true
}

func (p *places) free(uid uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !trusted(uid) {
		p.others--
	}
	if p.of[uid]--; p.of[uid] == 0 {
		delete(p.of, uid)
	}
}

func serve(ctx context.Context, c *net.UnixConn, uid uint32, d Daemon, log *slog.Logger) error {
	c.SetReadDeadline(time.Now().Add(patience))
	line, err := bufio.NewReader(io.LimitReader(c, maxRequest)).ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("reading a request: %w", err)
	}
	var req Request
	send := func(r Reply) error {
		data, cannot := json.Marshal(r)
		if cannot != nil { // the client must not take it for the end of the daemon
			cannot = fmt.Errorf("flipsided has an answer that it cannot write as JSON: %w", cannot)
			log.Error("control client", "method", req.Method, "error", cannot)
			if data, err = json.Marshal(failure(cannot)); err != nil {
				return err
			}
		}
		c.SetWriteDeadline(time.Now().Add(patience))
		_, err := c.Write(append(data, '\n'))
		return cmp.Or(err, cannot)
	}
	if err := json.Unmarshal(line, &req); err != nil {
		return send(failure(fmt.Errorf("%w: the request is not JSON: %w", ErrBadCommand, err)))
	}
	switch req.Method {
	case "status":
		st, err := status(ctx, d)
		if err != nil {
			if ctx.Err() != nil {
				return err // the next engine is asked
			}
			return send(failure(err))
		}
		return send(Reply{Status: &st})
	case "watch":
		return watch(ctx, c, d, send)
	case "plan":
		// The server is asked, which is not for everybody to make this host do.
		if err := permitted(uid); err != nil {
			return send(failure(err))
		}
		p, err := d.Plan(ctx, req.Channel)
		if err != nil {
			return send(failure(err))
		}
		return send(Reply{Plan: &p})
	case "do":
		if err := permitted(uid); err != nil {
			return send(failure(err))
		}
		if req.Do == nil {
			return send(failure(fmt.Errorf("%w: it does not say what to do", ErrBadCommand)))
		}
		if err := d.Do(ctx, fmt.Sprintf("user %d", uid), *req.Do); err != nil {
			return send(failure(err))
		}
		if req.Follow {
			return watch(ctx, c, d, send)
		}
		st, _ := d.Status(ctx)
		return send(Reply{Status: &st})
	}
	return send(failure(fmt.Errorf("%w: unknown method %q", ErrBadCommand, req.Method)))
}

// status is what d has to say once it has looked at the host, which one that has just started has still to do.
func status(ctx context.Context, d Daemon) (updater.Status, error) {
	wait, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		st, changed := d.Status(wait)
		if st.Schema != "" {
			return st, nil
		}
		select {
		case <-changed:
		case <-wait.Done():
			return st, errors.New("flipsided has just started, and still looks at the host: ask again")
		}
	}
}

// watch sends a status for each change until the client hangs up or ctx is done.
func watch(ctx context.Context, c *net.UnixConn, d Daemon, send func(Reply) error) error {
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
		case <-ctx.Done():
		}
		select { // a fast download changes its progress more often than anyone can read
		case <-time.After(100 * time.Millisecond):
		case <-gone:
		case <-ctx.Done():
		}
		select {
		case <-ctx.Done(): // which looks as if the client had gone, too; what the daemon ends with, such as the reboot that somebody waits for, is still told
			st, _ := d.Status(context.WithoutCancel(ctx))
			return send(Reply{Status: &st})
		default:
		}
		select {
		case <-gone:
			return nil
		default:
		}
	}
}

// trusted reports whether a user is root or the daemon's own.
func trusted(uid uint32) bool { return uid == 0 || uid == uint32(os.Getuid()) }

// permitted is nil, or [ErrDenied] for a user who may only look.
func permitted(uid uint32) error {
	if !trusted(uid) {
		return fmt.Errorf("%w to user %d; root and user %d may, and on the message bus whom polkit lets", ErrDenied, uid, os.Getuid())
	}
	return nil
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
// ctx is done. An answer that ends before it began is [ErrNoAnswer]; who only wants to know is asked again then, as the daemon may have read its configuration anew.
func Call(ctx context.Context, path string, req Request, yield func(updater.Status) bool) error {
	for try := 0; ; try++ {
		err := call(ctx, path, req, func(r Reply) bool { return r.Status == nil || yield(*r.Status) })
		if !errors.Is(err, ErrNoAnswer) || req.Method != "status" || try == tries {
			return err
		}
	}
}

// tries are how often an engine may end before it answers.
const tries = 5

// Do tells the daemon at path to do something and returns the status after it.
func Do(ctx context.Context, path string, c Command) (st updater.Status, err error) {
	err = Call(ctx, path, Request{Method: "do", Do: &c}, func(s updater.Status) bool { st = s; return true })
	return st, err
}

// Follow tells the daemon at path to do something and gives the status after it, and each that comes then, to yield, until that returns false, the daemon ends,
// or ctx is done. A daemon that is older than this package gives only the first.
func Follow(ctx context.Context, path string, c Command, yield func(updater.Status) bool) error {
	return Call(ctx, path, Request{Method: "do", Do: &c, Follow: true}, yield)
}

// Plan asks the daemon at path what would happen with the offers of a channel.
func Plan(ctx context.Context, path, channel string) (p updater.Plan, err error) {
	err = call(ctx, path, Request{Method: "plan", Channel: channel}, func(r Reply) bool {
		if r.Plan != nil {
			p = *r.Plan
		}
		return true
	})
	return p, err
}

func call(ctx context.Context, path string, req Request, yield func(Reply) bool) error {
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
	asked := json.NewEncoder(c).Encode(req) // a daemon that has no place for us has closed already, and said so
	answered := false
	lines := bufio.NewScanner(c)
	lines.Buffer(nil, maxReply)
	for lines.Scan() {
		var r Reply
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return fmt.Errorf("the answer of flipsided cannot be read: %w", err)
		}
		if r.Error != "" {
			return &Refusal{text: r.Error, kind: kinds[r.Kind]}
		}
		answered = true
		if !yield(r) {
			return nil
		}
	}
	err = cmp.Or(asked, lines.Err())
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case !answered && (err == nil || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET)):
		return ErrNoAnswer
	case err != nil:
		return fmt.Errorf("asking flipsided: %w", err)
	}
	return nil
}

// Refusal is an error that the daemon answered with. It is one of [ErrDenied], [ErrBusy], [ErrBadCommand], updater.ErrNothing, updater.ErrUnderWay and
// updater.ErrBelowFloor, or none that has a name.
type Refusal struct {
	text string
	kind error
}

func (r *Refusal) Error() string { return r.text }
func (r *Refusal) Unwrap() error { return r.kind }
