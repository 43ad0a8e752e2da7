package single

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/flipside-linux/flipside/lock"
)

// ErrBusy means that another process has the file open.
var ErrBusy = errors.New("another process keeps this semaphore")

const (
	fileName   = "semaphore.db"
	socketName = "semaphore.sock"
	// openPatience is how long a process that is just ending may keep the file.
	openPatience = 2 * time.Second
	// The names of hosts and groups are their own to choose: these bound what one client can make of that.
	maxLeft   = 10000
	maxGroups = 256
)

var (
	rootKey    = []byte("groups")
	stateKey   = []byte("state")
	signalKey  = []byte("signal")
	joinedKey  = []byte("joined")
	queueKey   = []byte("queue")
	placesKey  = []byte("places")
	historyKey = []byte("history")
	recordsKey = []byte("records")
)

// Store is a [lock.Store] in a file.
type Store struct {
	db *bolt.DB

	mu     sync.Mutex
	left   map[string]int64 // by group and host: the revision at which a host left the queue, after untold
	untold int64            // the revision up to which that is not on record: when the file was opened, or later
	change chan struct{}    // closed and replaced after every change
}

var _ lock.Store = (*Store)(nil)

// Open opens the store in a directory, which is made if there is none. Another process that has it open is [ErrBusy].
func Open(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening the semaphore: %w", err)
	}
	path := filepath.Join(dir, fileName)
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: openPatience})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("opening the semaphore in %s: %w", dir, ErrBusy)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the semaphore in %s: %w", path, err)
	}
	s := &Store{db: db, left: map[string]int64{}, change: make(chan struct{})}
	err = db.Update(func(tx *bolt.Tx) error {
		root, err := tx.CreateBucketIfNotExists(rootKey)
		if err == nil {
			s.untold = int64(root.Sequence())
		}
		return err
	})
	if err != nil {
		db.Close()
		return nil, fmt.Errorf("opening the semaphore in %s: %w", path, err)
	}
	return s, nil
}

// Attach returns the store in a directory: lent by the process that has it open, or else opened by this one. Unlike [Open] it does not
// make one.
func Attach(ctx context.Context, dir string) (lock.Store, error) {
	if _, err := os.Stat(filepath.Join(dir, fileName)); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no semaphore in %s: %w", dir, err)
	}
	c, err := Dial(ctx, dir)
	if err == nil {
		return c, nil
	}
	s, openErr := Open(dir)
	if openErr != nil {
		return nil, errors.Join(openErr, err)
	}
	return s, nil
}

// Close implements [lock.Store].
func (s *Store) Close() error { return s.db.Close() }

func number(b []byte) int64 {
	if len(b) < 8 {
		return 0
	}
	return int64(binary.BigEndian.Uint64(b))
}

func key(n int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(n)) }

// read runs f on a group's bucket, which is nil for a group that nobody has used.
func (s *Store) read(ctx context.Context, group string, f func(rev int64, g *bolt.Bucket) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return unavailable(s.db.View(func(tx *bolt.Tx) error {
		root := tx.Bucket(rootKey)
		return f(int64(root.Sequence()), root.Bucket([]byte(group)))
	}))
}

// write runs f on a group's bucket, with the next revision, and wakes those who watch.
func (s *Store) write(ctx context.Context, group string, f func(rev int64, g *bolt.Bucket) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	err := s.db.Update(func(tx *bolt.Tx) error {
		root := tx.Bucket(rootKey)
		if root.Bucket([]byte(group)) == nil && count(root) >= maxGroups {
			return fmt.Errorf("%w group %q: there are %d already", lock.ErrInvalid, group, maxGroups)
		}
		g, err := root.CreateBucketIfNotExists([]byte(group))
		if err != nil {
			return err
		}
		for _, k := range [][]byte{queueKey, placesKey, historyKey, recordsKey} {
			if _, err := g.CreateBucketIfNotExists(k); err != nil {
				return err
			}
		}
		rev, err := root.NextSequence()
		if err != nil {
			return err
		}
		return f(int64(rev), g)
	})
	if err != nil {
		return unavailable(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.change)
	s.change = make(chan struct{})
	return nil
}

// unavailable marks what the file says; what is not of the file is passed on.
func unavailable(err error) error {
	if err == nil || errors.Is(err, lock.ErrConflict) || errors.Is(err, lock.ErrInvalid) {
		return err
	}
	return fmt.Errorf("%w: %w", lock.ErrUnavailable, err)
}

// view reads a group. What it returns outlives the transaction.
func view(rev int64, g *bolt.Bucket, host string, limit int) lock.View {
	v := lock.View{Rev: rev}
	if g == nil {
		return v
	}
	if b := g.Get(stateKey); len(b) >= 8 {
		v.StateRev, v.State = number(b), bytes.Clone(b[8:])
	}
	if host != "" {
		v.Own = place(g, host)
	}
	if limit == 0 {
		return v
	}
	c := g.Bucket(queueKey).Cursor()
	for k, b := c.First(); k != nil; k, b = c.Next() {
		if limit > 0 && len(v.Queue) == limit {
			v.More = true
			break
		}
		v.Queue = append(v.Queue, item(k, b))
	}
	return v
}

func item(k, b []byte) lock.Item {
	host, data, _ := bytes.Cut(b, []byte{0})
	return lock.Item{Host: string(host), Data: bytes.Clone(data), Arrival: number(k)}
}

func place(g *bolt.Bucket, host string) *lock.Item {
	at := g.Bucket(placesKey).Get([]byte(host))
	if at == nil {
		return nil
	}
	it := item(at, g.Bucket(queueKey).Get(at))
	return &it
}

// Read implements [lock.Store].
func (s *Store) Read(ctx context.Context, group, host string, limit int) (v lock.View, err error) {
	err = s.read(ctx, group, func(rev int64, g *bolt.Bucket) error {
		v = view(rev, g, host, limit)
		return nil
	})
	return v, err
}

// Enqueue implements [lock.Store].
func (s *Store) Enqueue(ctx context.Context, group, host string, data []byte) (v lock.View, err error) {
	err = s.write(ctx, group, func(rev int64, g *bolt.Bucket) error {
		queue, places := g.Bucket(queueKey), g.Bucket(placesKey)
		at := bytes.Clone(places.Get([]byte(host)))
		if at == nil {
			at = key(rev)
			if err := errors.Join(places.Put([]byte(host), at), g.Put(joinedKey, at)); err != nil {
				return err
			}
		}
		if err := queue.Put(at, slices.Concat([]byte(host), []byte{0}, data)); err != nil {
			return err
		}
		v = view(rev, g, host, 0)
		v.Length = count(queue)
		return nil
	})
	return v, err
}

// count counts the keys of a bucket, with those that this transaction has put there.
func count(b *bolt.Bucket) (n int) {
	c := b.Cursor()
	for k, _ := c.First(); k != nil; k, _ = c.Next() {
		n++
	}
	return n
}

// Ahead implements [lock.Store].
func (s *Store) Ahead(ctx context.Context, group string, arrival int64) (n int, err error) {
	err = s.read(ctx, group, func(_ int64, g *bolt.Bucket) error {
		if g == nil {
			return nil
		}
		c := g.Bucket(queueKey).Cursor()
		for k, _ := c.First(); k != nil && number(k) < arrival; k, _ = c.Next() {
			n++
		}
		return nil
	})
	return n, err
}

// Commit implements [lock.Store].
func (s *Store) Commit(ctx context.Context, group, host string, limit int, v lock.View, c lock.Change) (rev int64, now lock.View, err error) {
	var left []string
	err = s.write(ctx, group, func(next int64, g *bolt.Bucket) error {
		if number(g.Get(stateKey)) != v.StateRev || c.Exclusive && number(g.Get(joinedKey)) > v.Rev {
			now = view(next-1, g, host, limit)
			return lock.ErrConflict
		}
		rev = next
		if err := putRecords(g.Bucket(recordsKey), rev, c.Records); errors.Is(err, lock.ErrConflict) {
			now = view(next-1, g, host, limit)
			return err
		} else if err != nil {
			return err
		}
		if err := g.Put(stateKey, slices.Concat(key(rev), c.State)); err != nil {
			return err
		}
		if c.Signal {
			if err := g.Put(signalKey, key(rev)); err != nil {
				return err
			}
		}
		queue, places, history := g.Bucket(queueKey), g.Bucket(placesKey), g.Bucket(historyKey)
		for _, host := range c.Remove {
			at := bytes.Clone(places.Get([]byte(host)))
			if at == nil {
				continue
			}
			if err := errors.Join(queue.Delete(at), places.Delete([]byte(host))); err != nil {
				return err
			}
			left = append(left, host)
		}
		for n, entry := range c.Audit {
			if err := history.Put(key(int64(n)), entry); err != nil {
				return err
			}
		}
		// Watchers look at this map only after the change has been told.
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, host := range left {
			if len(s.left) >= maxLeft {
				clear(s.left)
				s.untold = rev
			}
			s.left[group+"/"+host] = rev
		}
		return nil
	})
	if err != nil {
		rev = 0
	}
	return rev, now, err
}

// wait returns when done does, asked now and after every change.
func (s *Store) wait(ctx context.Context, group string, done func(g *bolt.Bucket) bool) error {
	for {
		s.mu.Lock()
		change := s.change
		s.mu.Unlock()
		ok := false
		if err := s.read(ctx, group, func(_ int64, g *bolt.Bucket) error { ok = done(g); return nil }); err != nil {
			return err
		}
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-change:
		}
	}
}

// Watch implements [lock.Store].
func (s *Store) Watch(ctx context.Context, group, host string, after int64) error {
	return s.wait(ctx, group, func(g *bolt.Bucket) bool {
		if g == nil {
			return false
		}
		s.mu.Lock()
		left, untold := s.left[group+"/"+host], s.untold
		s.mu.Unlock()
		// Who has no place, and may have left it when that was not put on record, looks again once.
		return number(g.Get(signalKey)) > after || left > after || after < untold && place(g, host) == nil
	})
}

// Follow implements [lock.Store].
func (s *Store) Follow(ctx context.Context, group string, after int64, changed func(int64) bool) error {
	for {
		err := s.wait(ctx, group, func(g *bolt.Bucket) bool {
			if g == nil {
				return false
			}
			rev := number(g.Get(stateKey))
			if rev > after {
				after = rev
				return true
			}
			return false
		})
		if err != nil {
			return err
		}
		if !changed(after) {
			return nil
		}
	}
}

// record reads what is kept under a name: the revision at which it was made, how often it was written, and its data.
func record(name, b []byte) lock.Record {
	if len(b) < 16 {
		return lock.Record{Name: string(name)}
	}
	return lock.Record{Name: string(name), Born: number(b), Version: number(b[8:]), Data: bytes.Clone(b[16:])}
}

func putRecords(b *bolt.Bucket, rev int64, records []lock.Record) error {
	for _, r := range records {
		if old := record([]byte(r.Name), b.Get([]byte(r.Name))); old.Born != r.Born || old.Version != r.Version {
			return lock.ErrConflict // what was put already goes with the transaction
		}
		if r.Version++; r.Version == 1 {
			r.Born = rev
		}
		if err := b.Put([]byte(r.Name), slices.Concat(key(r.Born), key(r.Version), r.Data)); err != nil {
			return err
		}
	}
	return nil
}

// Records implements [lock.Store].
func (s *Store) Records(ctx context.Context, group string, names ...string) (list []lock.Record, err error) {
	err = s.read(ctx, group, func(_ int64, g *bolt.Bucket) error {
		if g == nil || g.Bucket(recordsKey) == nil { // a file of an earlier version has none
			return nil
		}
		for _, name := range names {
			if b := g.Bucket(recordsKey).Get([]byte(name)); b != nil {
				list = append(list, record([]byte(name), b))
			}
		}
		if len(names) > 0 {
			return nil
		}
		return g.Bucket(recordsKey).ForEach(func(k, b []byte) error {
			list = append(list, record(k, b))
			return nil
		})
	})
	return list, err
}

// History implements [lock.Store].
func (s *Store) History(ctx context.Context, group string) (entries [][]byte, err error) {
	err = s.read(ctx, group, func(_ int64, g *bolt.Bucket) error {
		if g == nil {
			return nil
		}
		return g.Bucket(historyKey).ForEach(func(_, v []byte) error {
			entries = append(entries, bytes.Clone(v))
			return nil
		})
	})
	return entries, err
}

// Groups implements [lock.Store].
func (s *Store) Groups(ctx context.Context) (names []string, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	err = s.db.View(func(tx *bolt.Tx) error {
		root := tx.Bucket(rootKey)
		return root.ForEachBucket(func(name []byte) error {
			if root.Bucket(name).Get(stateKey) != nil {
				names = append(names, string(name))
			}
			return nil
		})
	})
	return names, unavailable(err)
}
