package fleetlock

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/flipside-linux/flipside/lock"
)

// Client is the semaphore of a FleetLock server. The protocol has no watch: [Client.Wait] only waits as long as the server asks it to.
type Client struct {
	base    string
	http    *http.Client
	timeout time.Duration
	pause   func(ctx context.Context, d time.Duration) error

	mu     sync.Mutex
	after  time.Duration         // what the server last asked us to wait
	claims map[string]lock.Claim // by group and host: what was asked for last, until it is given back
}

var _ lock.Semaphore = (*Client)(nil)

// Options of a client. The zero value is that of a host.
type Options struct {
	HTTP    *http.Client                                     // for TLS and proxies; nil: the default transport
	Timeout time.Duration                                    // of one call; 0: 10 s
	Pause   func(ctx context.Context, d time.Duration) error // nil: waits
}

// New returns a client of the server at a base URL.
func New(base string, opt Options) (*Client, error) {
	u, err := url.Parse(base)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("%w FleetLock server %q: want an http or https URL", lock.ErrInvalid, base)
	}
	c := &Client{base: strings.TrimRight(base, "/"), http: &http.Client{}, timeout: opt.Timeout, pause: opt.Pause, claims: map[string]lock.Claim{}}
	if opt.HTTP != nil {
		*c.http = *opt.HTTP
	}
	// A redirect is never the answer: whatever is at its end, such as a page to log in at, would be asked with another method and would say 200 to anything.
	c.http.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	if c.timeout <= 0 {
		c.timeout = 10 * time.Second
	}
	if c.pause == nil {
		c.pause = func(ctx context.Context, d time.Duration) error {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(d):
				return nil
			}
		}
	}
	return c, nil
}

// Error is a refusal of the server.
type Error struct {
	Status      int
	Kind, Value string
	kind        error // of package lock
}

func (e *Error) Error() string {
	return fmt.Sprintf("the FleetLock server says %s: %s (HTTP %d)", e.Kind, e.Value, e.Status)
}

func (e *Error) Unwrap() error { return e.kind }

// Request implements [lock.Semaphore]. The position in a queue is not known over this protocol.
func (c *Client) Request(ctx context.Context, cl lock.Claim) (lock.Standing, error) {
	if err := errors.Join(lock.CheckGroup(cl.Group), lock.CheckHost(cl.Host)); err != nil {
		return lock.Standing{}, err
	}
	c.mu.Lock()
	c.claims[cl.Group+"/"+cl.Host] = cl
	c.mu.Unlock()
	err := c.ask(ctx, cl, "")
	var e *Error
	switch {
	case err == nil:
		return lock.Standing{Granted: true}, nil
	case errors.As(err, &e) && e.Kind == KindHalted:
		return lock.Standing{Halted: e.Value}, nil
	case errors.As(err, &e) && e.waits():
		return lock.Standing{Blocked: e.Value}, nil
	}
	return lock.Standing{}, fmt.Errorf("requesting a reboot slot of group %q: %w", cl.Group, err)
}

func (c *Client) ask(ctx context.Context, cl lock.Claim, phase lock.Phase) error {
	return c.post(ctx, pathLock, message{clientParams{cl.Host, cl.Group}, &details{
		Phase: string(phase), BootID: cl.BootID, From: cl.From, To: cl.To, Reason: cl.Reason, Zone: cl.Zone, Class: cl.Class,
	}})
}

// waits reports whether a refusal means that the slot may come later.
func (e *Error) waits() bool {
	return e.Kind == KindFull || e.Kind == KindWindow || e.Kind == KindPaused ||
		e.Kind == "failed_lock" && strings.Contains(e.Value, "currently locked") // airlock has one kind for everything
}

// Wait implements [lock.Semaphore]: it waits as long as the server asked, or about half a minute, more or less by chance.
func (c *Client) Wait(ctx context.Context, _ lock.Claim) error {
	c.mu.Lock()
	d := c.after
	c.mu.Unlock()
	if d <= 0 {
		d = 30 * time.Second
	}
	return c.pause(ctx, d+time.Duration(rand.Int64N(int64(d)/5+1)))
}

// Mark implements [lock.Semaphore]. Before the reboot it asks for the slot once more, in the same words: other servers only know that, and may grant it anew. This
// package's own server makes no new grant of it.
func (c *Client) Mark(ctx context.Context, group, host string, m lock.Mark) error {
	if m.Phase != lock.Rebooting {
		return nil // the protocol has no word for it
	}
	c.mu.Lock()
	cl, ok := c.claims[group+"/"+host]
	c.mu.Unlock()
	if !ok {
		cl = lock.Claim{Group: group, Host: host}
	}
	if m.BootID != "" {
		cl.BootID = m.BootID
	}
	err := c.ask(ctx, cl, lock.Rebooting)
	var e *Error
	if errors.As(err, &e) && e.waits() && !errors.Is(err, lock.ErrClosed) {
		err = fmt.Errorf("%w: %w", lock.ErrNotHeld, err)
	}
	if err != nil {
		return fmt.Errorf("marking %q as rebooting: %w", host, err)
	}
	return nil
}

// Release implements [lock.Semaphore].
func (c *Client) Release(ctx context.Context, group, host string, v lock.Verdict) error {
	if err := errors.Join(lock.CheckGroup(group), lock.CheckHost(host)); err != nil {
		return err
	}
	path := pathUnlock
	if v.Outcome == lock.Failed {
		path = pathVerdict
	}
	err := c.post(ctx, path, message{clientParams{host, group}, &details{Outcome: string(v.Outcome), Version: v.Version, Reason: v.Reason}})
	var e *Error
	if errors.As(err, &e) && path == pathVerdict && (e.Status == http.StatusNotFound || e.Status == http.StatusMethodNotAllowed) {
		err = ErrNoVerdict
	}
	if err != nil {
		return fmt.Errorf("releasing the reboot slot of %q: %w", host, err)
	}
	c.mu.Lock()
	delete(c.claims, group+"/"+host)
	c.mu.Unlock()
	return nil
}

func (c *Client) post(ctx context.Context, path string, m message) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+path, bytes.NewReader(data))
	if err != nil {
		return err
	}
	req.Header.Set(header, "true")
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("%w: %w", lock.ErrUnavailable, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return fmt.Errorf("%w: reading the answer of %s: %w", lock.ErrUnavailable, path, err)
	}
	switch {
	case resp.StatusCode == http.StatusOK && isPage(resp.Header.Get("Content-Type"), body):
		return fmt.Errorf("%w: %s answers with a web page, not as a FleetLock server: is it a proxy, or a page to log in at?", lock.ErrUnavailable, c.base+path)
	case resp.StatusCode == http.StatusOK:
		return nil
	case resp.StatusCode/100 == 3:
		return fmt.Errorf("%w: %s redirects (HTTP %d) to %.200q, which is not followed; lock.fleetlock has to name the server itself", lock.ErrUnavailable, c.base+path, resp.StatusCode,
			resp.Header.Get("Location"))
	}
	after, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
	c.mu.Lock()
	c.after = min(time.Duration(max(after, 0))*time.Second, time.Hour)
	c.mu.Unlock()
	return understand(resp.StatusCode, body)
}

// isPage recognises a page for people: that of something between us and the server, and no grant.
func isPage(contentType string, body []byte) bool {
	kind, _, _ := strings.Cut(contentType, ";")
	return strings.EqualFold(strings.TrimSpace(kind), "text/html") || bytes.HasPrefix(bytes.TrimLeft(body, "\ufeff \t\r\n"), []byte("<"))
}

// understand makes an error of a refusal. The text comes from outside: it is bounded and quoted where it is not JSON.
func understand(status int, body []byte) *Error {
	var r refusal
	if err := json.Unmarshal(body, &r); err != nil || r.Kind == "" {
		r = refusal{"unknown", fmt.Sprintf("%.100q", body)}
	}
	if len(r.Value) > 500 {
		r.Value = strings.ToValidUTF8(r.Value[:500], "") + "..."
	}
	if len(r.Kind) > 100 {
		r.Kind = strings.ToValidUTF8(r.Kind[:100], "")
	}
	e := &Error{Status: status, Kind: r.Kind, Value: r.Value, kind: lock.ErrUnavailable}
	switch {
	case r.Kind == KindIdentity, r.Kind == "unknown_group", status == http.StatusBadRequest:
		e.kind = lock.ErrInvalid
	case r.Kind == KindConflict, strings.Contains(r.Value, "conflict on semaphore"):
		e.kind = lock.ErrConflict
	case r.Kind == KindPermission, status == http.StatusUnauthorized, status == http.StatusForbidden && r.Kind != KindHalted:
		e.kind = fmt.Errorf("%w: %w", lock.ErrUnavailable, os.ErrPermission)
	case r.Kind == KindHalted:
		e.kind = lock.ErrHalted
	case r.Kind == KindWindow:
		e.kind = lock.ErrClosed
	case r.Kind == KindNotHeld:
		e.kind = lock.ErrNotHeld
	}
	return e
}
