package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// ErrBusy is returned when another server runs on the same directory.
var ErrBusy = errors.New("another server runs on this directory")

// store keeps the hosts and rollouts in DIR/state.db.
//
// A grant or an event is on the disk before its answer leaves the server, so that no host goes on with something that
// a restarted server has forgotten. Requests that arrive while a commit runs share the next one. That a host was seen
// again changes nothing that anybody relies on: it is written with the next commit, or after a while.
type store struct {
	db *bolt.DB

	kick chan struct{} // somebody waits for a commit
	quit chan struct{} // closed by Close
	done chan struct{} // closed when the last commit is through

	// Below Server.mu:
	dirty    map[string]bool  // hosts
	seen     map[string]bool  // hosts of which nothing but the time of their last check is new
	looked   time.Time        // when those were last written
	rollouts map[string]bool  // channels
	gone     []string         // hosts that were forgotten, and are to go from the disk
	events   []Activity       // what hosts did
	stops    bool             // which rollouts are stopped has changed since it was written down
	fresh    []map[string]any // stops that are not in the audit log yet
	waiting  *commit          // the commit that the next waiters share
	err      error            // of the last commit
}

// commit is one write of everything that is dirty. done is closed when it is on the disk, or err is set.
type commit struct {
	done chan struct{}
	err  error
}

const (
	lazy     = 5 * time.Second // how long a host's or the server's words may be in memory only
	lazySeen = 5 * time.Minute // and the time at which a host was last seen
)

// maxUnwritten bounds the events that wait for a disk that takes nothing.
const maxUnwritten = 10_000

func openStore(dir string) (*store, error) {
	db, err := bolt.Open(filepath.Join(dir, "state.db"), 0o600, &bolt.Options{Timeout: 500 * time.Millisecond, FreelistType: bolt.FreelistMapType})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("open the state in %q: %w", dir, ErrBusy)
	}
	if err != nil {
		return nil, fmt.Errorf("open the state in %q: %w", dir, err)
	}
	st := &store{
		db: db, kick: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{}),
		dirty: map[string]bool{}, seen: map[string]bool{}, rollouts: map[string]bool{}, waiting: newCommit(),
	}
	if err := st.migrate(); err != nil {
		db.Close()
		return nil, fmt.Errorf("open the state in %q: %w", dir, err)
	}
	return st, nil
}

func newCommit() *commit { return &commit{done: make(chan struct{})} }

// load reads everything back.
func (st *store) load() (map[string]*Host, map[string]*rollout, error) {
	hosts, rollouts := make(map[string]*Host), make(map[string]*rollout)
	err := st.db.View(func(tx *bolt.Tx) error {
		err := tx.Bucket([]byte("hosts")).ForEach(func(k, v []byte) error {
			h := new(Host)
			if err := json.Unmarshal(v, h); err != nil {
				return fmt.Errorf("host %q: %w", k, err)
			}
			if plainID(h.ID) {
				hosts[h.ID] = h.intern()
			} else { // from a server that took more for an id
				st.gone = append(st.gone, string(k))
			}
			return nil
		})
		if err != nil {
			return err
		}
		return tx.Bucket([]byte("rollouts")).ForEach(func(k, v []byte) error {
			r := new(rollout)
			if err := json.Unmarshal(v, r); err != nil {
				return fmt.Errorf("rollout of %q: %w", k, err)
			}
			rollouts[string(k)] = r.filled()
			return nil
		})
	})
	for _, h := range hosts {
		if r := rollouts[h.Channel]; r != nil && h.State.active() && h.Target != "" {
			r.active[h.ID] = true
		}
	}
	return hosts, rollouts, err
}

// run commits until quit. It is the only writer.
func (s *Server) run() {
	defer close(s.store.done)
	ticker := time.NewTicker(lazy)
	defer ticker.Stop()
	for {
		select {
		case <-s.store.kick:
			s.commit(false)
		case <-ticker.C:
			s.commit(true)
		case <-s.store.quit:
			s.mu.Lock()
			s.store.looked = time.Time{} // everything, now
			s.mu.Unlock()
			s.commit(true)
			return
		}
	}
}

// commit writes what is dirty in one transaction, with the history when sample is set.
func (s *Server) commit(sample bool) {
	st := s.store
	s.mu.Lock()
	c := st.waiting
	st.waiting = newCommit()
	if now := s.opt.Now(); sample && now.Sub(st.looked).Abs() >= lazySeen {
		st.looked = now
		for id := range st.seen {
			st.dirty[id] = true
		}
		clear(st.seen)
	}
	dirty := make([]Host, 0, len(st.dirty)) // copies: they are encoded when requests may go on
	for id := range st.dirty {
		if h := s.hosts[id]; h != nil { // or it was forgotten meanwhile
			dirty = append(dirty, *h)
		}
	}
	var err error
	rollouts := make(map[string][]byte, len(st.rollouts))
	for name := range st.rollouts {
		if err == nil {
			rollouts[name], err = json.Marshal(s.rollouts[name])
		}
	}
	clear(st.dirty)
	clear(st.rollouts)
	events := st.events
	st.events = nil
	var stops map[string]Stop
	if st.stops {
		stops = map[string]Stop{}
		for name, r := range s.rollouts {
			if r.Stop.Why != "" {
				stops[name] = r.Stop
			}
		}
	}
	fresh := st.fresh
	st.stops, st.fresh = false, nil
	var past *history
	if sample {
		st.gone = append(st.gone, s.forget(s.opt.Now())...)
		s.history.sample(s.opt.Now(), s.versions(s.catalog.Load()))
		past = s.history.copied()
	}
	gone := slices.DeleteFunc(st.gone, func(id string) bool { return s.hosts[id] != nil }) // one that came back stays
	st.gone = nil
	s.mu.Unlock()
	hosts := make(map[string][]byte, len(dirty))
	for i := range dirty {
		if err == nil {
			hosts[dirty[i].ID], err = json.Marshal(&dirty[i])
		}
	}
	if err == nil && (past != nil || len(hosts)+len(rollouts)+len(events)+len(gone) > 0) {
		err = st.write(hosts, rollouts, events, past, gone)
	}
	if err != nil {
		s.mu.Lock()
		for i := range dirty { // to be tried again with the next commit
			st.dirty[dirty[i].ID] = true
		}
		for name := range rollouts {
			st.rollouts[name] = true
		}
		s.history.dirty = s.history.dirty || past != nil
		st.gone = append(gone, st.gone...)
		st.events = append(events, st.events...)
		st.events = st.events[max(0, len(st.events)-maxUnwritten):]
		s.mu.Unlock()
	}
	s.tell(stops, fresh)
	if sample {
		s.inspect()
	}
	s.mu.Lock()
	st.err = err
	if err != nil {
		err = fmt.Errorf("the state cannot be written, so hosts are told nothing new: %w", err)
	}
	s.trouble("state", err)
	err = st.err
	s.mu.Unlock()
	c.err = err
	close(c.done)
}

// forget drops hosts that have not been seen for long, and returns their ids. Server.mu is held.
func (s *Server) forget(now time.Time) []string {
	if d := now.Sub(s.forgot); d >= 0 && d < time.Hour {
		return nil
	}
	s.forgot = now
	var gone []string
	for id, h := range s.hosts {
		if now.Sub(h.LastSeen) > s.opt.Forget {
			gone = append(gone, id)
			delete(s.hosts, id)
			if r := s.rollouts[h.Channel]; r != nil {
				delete(r.active, id)
			}
		}
	}
	return gone
}

func (st *store) write(hosts, rollouts map[string][]byte, events []Activity, past *history, gone []string) error {
	return st.db.Update(func(tx *bolt.Tx) error {
		if past != nil {
			if err := past.write(tx); err != nil {
				return err
			}
		}
		b := tx.Bucket([]byte("hosts"))
		for id, data := range hosts {
			if err := b.Put([]byte(id), data); err != nil {
				return err
			}
		}
		for _, id := range gone {
			if err := b.Delete([]byte(id)); err != nil {
				return err
			}
			if err := dropEvents(tx, id); err != nil {
				return err
			}
		}
		if err := writeEvents(tx, events); err != nil {
			return err
		}
		b = tx.Bucket([]byte("rollouts"))
		for name, data := range rollouts {
			if err := b.Put([]byte(name), data); err != nil {
				return err
			}
		}
		return nil
	})
}

// durable returns what to wait for until everything that is dirty now is on the disk. Server.mu is held.
func (s *Server) durable() *commit {
	if s.store == nil {
		return nil
	}
	select {
	case s.store.kick <- struct{}{}:
	default: // a commit is due anyway
	}
	return s.store.waiting
}

// saved waits until c is on the disk, or for as long as anybody wants to know. Server.mu is not held.
func (s *Server) saved(ctx context.Context, c *commit) error {
	select {
	case <-c.done:
		return c.err
	case <-ctx.Done():
		return ctx.Err()
	case <-s.store.done:
	}
	select { // the last commit may have been this one
	case <-c.done:
		return c.err
	default:
		return errors.New("the server is closed")
	}
}

// touch marks a host as changed. Server.mu is held.
func (s *Server) touch(h *Host) {
	if s.store != nil {
		s.store.dirty[h.ID] = true
	}
}

// sighted marks a host as seen again, which is worth writing only now and then: a fleet does little else. Server.mu is held.
func (s *Server) sighted(h *Host) {
	if s.store != nil {
		s.store.seen[h.ID] = true
	}
}

// touchRollout marks a rollout as changed. Server.mu is held.
func (s *Server) touchRollout(name string) {
	if s.store != nil {
		s.store.rollouts[name] = true
	}
}

// touchStops lets the next commit write down which rollouts are stopped. Server.mu is held.
func (s *Server) touchStops() {
	if s.store != nil {
		s.store.stops = true
	}
}

// Backup writes a consistent copy of the state to w while the server runs. For a while it takes as much room in the directory again as the state.
func (s *Server) Backup(ctx context.Context, w io.Writer) error {
	f, err := s.copied(ctx)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, &ctxReader{ctx, f})
	return err
}

// copied returns a copy of the state, in a file that has no name any more and goes when it is closed. Who takes a backup may be slow, or stop: while the state itself is
// read, no commit can make its file larger, and no host is told anything.
func (s *Server) copied(ctx context.Context) (f *os.File, err error) {
	if s.store == nil {
		return nil, errors.New("the server keeps no state")
	}
	s.mu.Lock()
	c := s.durable()
	s.mu.Unlock()
	if err := s.saved(ctx, c); err != nil {
		return nil, fmt.Errorf("save the state before it is copied: %w", err)
	}
	if f, err = os.CreateTemp(s.dir, ".backup-"); err != nil {
		return nil, fmt.Errorf("copy the state: %w", err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("copy the state, which takes as much room in %q again: %w", s.dir, err)
			f.Close()
		}
	}()
	if err := os.Remove(f.Name()); err != nil {
		return nil, err
	}
	err = s.store.db.View(func(tx *bolt.Tx) error {
		_, err := tx.WriteTo(f)
		return err
	})
	if err != nil {
		return nil, err
	}
	_, err = f.Seek(0, io.SeekStart)
	return f, err
}
