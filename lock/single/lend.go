package single

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/flipside-linux/flipside/lock"
)

// The socket speaks HTTP with one JSON object each way: POST /<method>, as the methods of [lock.Store] are called.

// maxMessage bounds a message: a state with its queue, of a group of a hundred thousand hosts.
const maxMessage = 64 << 20

type question struct {
	Group   string      `json:"group,omitempty"`
	Host    string      `json:"host,omitempty"`
	Names   []string    `json:"names,omitempty"`
	Limit   int         `json:"limit,omitempty"`
	Data    []byte      `json:"data,omitempty"`
	Arrival int64       `json:"arrival,omitempty"`
	After   int64       `json:"after,omitempty"`
	View    lock.View   `json:"view,omitzero"`
	Change  lock.Change `json:"change,omitzero"`
}

type answer struct {
	View     lock.View     `json:"view,omitzero"`
	Rev      int64         `json:"rev,omitempty"`
	N        int           `json:"n,omitempty"`
	Lines    [][]byte      `json:"lines,omitempty"`
	Names    []string      `json:"names,omitempty"`
	Records  []lock.Record `json:"records,omitempty"`
	Conflict bool          `json:"conflict,omitempty"`
	Error    string        `json:"error,omitempty"`
}

// Serve lends the store to programs of this user until ctx ends. dir is where it was opened.
func (s *Store) Serve(ctx context.Context, dir string) error {
	path := filepath.Join(dir, socketName)
	// Whoever has the file has the socket: what is here was left behind by a process that is gone.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("lending the semaphore: %w", err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("lending the semaphore: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return fmt.Errorf("lending the semaphore: %w", err)
	}
	srv := &http.Server{Handler: s, ReadHeaderTimeout: 5 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx }}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(l); ctx.Err() == nil {
		return fmt.Errorf("lending the semaphore: %w", err)
	}
	return nil
}

// ServeHTTP answers what a store that was dialled asks.
func (s *Store) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var q question
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxMessage)).Decode(&q); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	ctx := r.Context()
	var a answer
	var err error
	switch r.URL.Path {
	case "/read":
		a.View, err = s.Read(ctx, q.Group, q.Host, q.Limit)
	case "/enqueue":
		a.View, err = s.Enqueue(ctx, q.Group, q.Host, q.Data)
	case "/ahead":
		a.N, err = s.Ahead(ctx, q.Group, q.Arrival)
	case "/commit":
		a.Rev, a.View, err = s.Commit(ctx, q.Group, q.Host, q.Limit, q.View, q.Change)
		if a.Conflict = errors.Is(err, lock.ErrConflict); a.Conflict {
			err = nil
		}
	case "/watch":
		err = s.Watch(ctx, q.Group, q.Host, q.After)
	case "/follow":
		err = s.Follow(ctx, q.Group, q.After, func(rev int64) bool { a.Rev = rev; return false })
	case "/records":
		a.Records, err = s.Records(ctx, q.Group, q.Names...)
	case "/history":
		a.Lines, err = s.History(ctx, q.Group)
	case "/groups":
		a.Names, err = s.Groups(ctx)
	default:
		http.NotFound(w, r)
		return
	}
	if err != nil {
		a = answer{Error: err.Error()}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(a) // a program that is gone does not want it any more
}

// Lent is a [lock.Store] that another process has open.
type Lent struct{ http *http.Client }

var _ lock.Store = (*Lent)(nil)

// Dial returns the store that a process has open in a directory.
func Dial(ctx context.Context, dir string) (*Lent, error) {
	path := filepath.Join(dir, socketName)
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Timeout: openPatience}).DialContext(ctx, "unix", path)
	}
	conn, err := dial(ctx, "", "")
	if err != nil {
		return nil, fmt.Errorf("%w: asking the process that keeps the semaphore: %w", lock.ErrUnavailable, err)
	}
	conn.Close()
	return &Lent{&http.Client{Transport: &http.Transport{DialContext: dial}}}, nil
}

// callTimeout bounds what does not wait for something to happen.
const callTimeout = 10 * time.Second

func (l *Lent) call(ctx context.Context, method string, q question) (answer, error) {
	if method != "watch" && method != "follow" {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTimeout)
		defer cancel()
	}
	fail := func(err error) (answer, error) {
		return answer{}, fmt.Errorf("%w: asking the process that keeps the semaphore: %w", lock.ErrUnavailable, err)
	}
	body, err := json.Marshal(q)
	if err != nil {
		return fail(err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://semaphore/"+method, bytes.NewReader(body))
	if err != nil {
		return fail(err)
	}
	resp, err := l.http.Do(req)
	if err != nil {
		return fail(err)
	}
	defer resp.Body.Close()
	var a answer
	if resp.StatusCode != http.StatusOK {
		return fail(fmt.Errorf("it answers %s", resp.Status))
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxMessage)).Decode(&a); err != nil {
		return fail(err)
	}
	if a.Error != "" {
		return fail(errors.New(a.Error))
	}
	if a.Conflict {
		return a, lock.ErrConflict
	}
	return a, nil
}

// Read implements [lock.Store].
func (l *Lent) Read(ctx context.Context, group, host string, limit int) (lock.View, error) {
	a, err := l.call(ctx, "read", question{Group: group, Host: host, Limit: limit})
	return a.View, err
}

// Enqueue implements [lock.Store].
func (l *Lent) Enqueue(ctx context.Context, group, host string, data []byte) (lock.View, error) {
	a, err := l.call(ctx, "enqueue", question{Group: group, Host: host, Data: data})
	return a.View, err
}

// Ahead implements [lock.Store].
func (l *Lent) Ahead(ctx context.Context, group string, arrival int64) (int, error) {
	a, err := l.call(ctx, "ahead", question{Group: group, Arrival: arrival})
	return a.N, err
}

// Commit implements [lock.Store].
func (l *Lent) Commit(ctx context.Context, group, host string, limit int, v lock.View, c lock.Change) (int64, lock.View, error) {
	// Of the view only the revisions are compared.
	a, err := l.call(ctx, "commit", question{Group: group, Host: host, Limit: limit, View: lock.View{Rev: v.Rev, StateRev: v.StateRev}, Change: c})
	return a.Rev, a.View, err
}

// Watch implements [lock.Store].
func (l *Lent) Watch(ctx context.Context, group, host string, after int64) error {
	_, err := l.call(ctx, "watch", question{Group: group, Host: host, After: after})
	return err
}

// Follow implements [lock.Store].
func (l *Lent) Follow(ctx context.Context, group string, after int64, changed func(int64) bool) error {
	for {
		a, err := l.call(ctx, "follow", question{Group: group, After: after})
		if err != nil {
			return errors.Join(ctx.Err(), err)
		}
		if after = a.Rev; !changed(after) {
			return nil
		}
	}
}

// Records implements [lock.Store].
func (l *Lent) Records(ctx context.Context, group string, names ...string) ([]lock.Record, error) {
	a, err := l.call(ctx, "records", question{Group: group, Names: names})
	return a.Records, err
}

// History implements [lock.Store].
func (l *Lent) History(ctx context.Context, group string) ([][]byte, error) {
	a, err := l.call(ctx, "history", question{Group: group})
	return a.Lines, err
}

// Groups implements [lock.Store].
func (l *Lent) Groups(ctx context.Context) ([]string, error) {
	a, err := l.call(ctx, "groups", question{})
	return a.Names, err
}

// Close implements [lock.Store].
func (l *Lent) Close() error {
	l.http.CloseIdleConnections()
	return nil
}
