package server

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Stop is what the server decided by itself: a version goes to no further host on a channel. It is kept with the rollout, and holds in memory before
// it is on any disk.
type Stop struct {
	Version string    `toml:"version" json:"version"`
	Why     string    `toml:"why" json:"why"`
	At      time.Time `toml:"at" json:"at"`
	Resumed time.Time `toml:"resumed,omitempty" json:"resumed,omitzero"` // the channel's at that time: a later one lifts the stop
}

// holds says whether the stop is in force on a channel. What lifts it is that somebody moved the channel or resumed the rollout since, and nothing else.
func (s Stop) holds(ch Channel) bool {
	return s.Why != "" && s.Version == ch.Version && !ch.Resumed.After(s.Resumed)
}

// on returns the channel as it stands under the stop.
func (s Stop) on(ch Channel) Channel {
	if s.holds(ch) {
		ch.Stopped = s.Why
	}
	return ch
}

// resume lets a rollout that the server has stopped, or will have stopped before it reads this, go on.
func (c *Channel) resume(now time.Time) {
	now = now.UTC().Truncate(time.Second)
	if !now.After(c.Resumed) { // in the same second, or the clock was set back
		now = c.Resumed.Add(time.Second)
	}
	c.Resumed, c.Stopped = now, ""
}

const (
	stopFile = "stopped.toml"
	stopHead = "# Rollouts that the release server has stopped by itself. It writes this file for whoever looks; to go on: flipside release resume CHANNEL\n\n"
)

// readStops reads what a server has written down of its stops, by channel.
func readStops(dir string) (map[string]Stop, error) {
	stops := map[string]Stop{}
	if err := readTOML(filepath.Join(dir, stopFile), &stops); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return stops, nil
}

func writeStops(dir string, stops map[string]Stop) error {
	path := filepath.Join(dir, stopFile)
	if len(stops) > 0 {
		return writeTOML(path, stops, stopHead)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// stopped returns a channel's file with what the server has written down of its stop.
func (p *Publisher) stopped(name string, c Channel) (Channel, error) {
	stops, err := readStops(p.Dir)
	return stops[name].on(c), err
}

// recall takes up the stops that were written down, where the state does not know of them: it may be lost, or come from an older backup.
func (s *Server) recall() {
	stops, err := readStops(s.dir)
	if err != nil {
		s.log.Error("what was written down of stopped rollouts cannot be read", "error", err)
	}
	c := s.catalog.Load()
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, st := range stops {
		ch, ok := c.channels[name]
		if !ok || !st.holds(ch) {
			continue
		}
		if r := s.of(name, ch); r.Stop.Why == "" {
			r.Stop = st
			s.touchRollout(name)
		}
	}
	for name, ch := range c.channels {
		if ch.Stopped != "" { // by an older server
			s.of(name, ch)
		}
	}
	s.touchStops()
}

// channels returns all channels as they stand, with the server's stops.
func (s *Server) channels(c *catalog) map[string]Channel {
	out := maps.Clone(c.channels)
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, r := range s.rollouts {
		if ch, ok := out[name]; ok {
			out[name] = r.Stop.on(ch)
		}
	}
	return out
}

// tell writes down for people which rollouts are stopped, and in the audit log which are so newly. What cannot be written is tried again with the next
// commit; the stops hold all the same.
func (s *Server) tell(stops map[string]Stop, fresh []map[string]any) {
	var err error
	if stops != nil {
		err = writeStops(s.dir, stops)
	}
	var lost error
	entries := len(fresh)
	for len(fresh) > 0 && lost == nil {
		if lost = s.publish.audit("stop", fresh[0]); lost == nil {
			fresh = fresh[1:]
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if stops != nil {
		s.trouble("stops", err)
	}
	s.store.stops = s.store.stops || err != nil
	s.store.fresh = append(fresh, s.store.fresh...)
	s.store.fresh = s.store.fresh[max(0, len(s.store.fresh)-maxUnwritten):]
	if entries > 0 {
		s.trouble("audit", lost)
	}
}

// trouble notes what keeps the server from a part of its work, or with nil that it can do it. Server.mu is held.
func (s *Server) trouble(part string, err error) {
	if err == nil {
		delete(s.troubles, part)
		return
	}
	if said := s.troubles[part]; said != err.Error() {
		s.log.Error("a part of the server's work cannot be done", "error", err)
	}
	s.troubles[part] = err.Error()
}

// problems lists what people have to look after: files that cannot be used, and what the server cannot write.
func (s *Server) problems(c *catalog) []string {
	out := append([]string{}, c.problems...)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, words := range s.troubles {
		out = append(out, words)
	}
	return out
}

// inspect looks whether the server may write what it has to: root may have made files that a server of its own user cannot touch.
func (s *Server) inspect() {
	s.mu.Lock()
	changes := s.changes
	s.mu.Unlock()
	err := s.publish.writable("audit.jsonl")
	if changes && err == nil {
		err = s.publish.usable()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trouble("files", err)
}

// usable says whether this process could publish and move channels.
func (p *Publisher) usable() error {
	f, err := p.lockFile()
	if err != nil {
		return err
	}
	f.Close()
	for _, sub := range folders() {
		if err := p.writable(sub); err != nil {
			return err
		}
	}
	return nil
}

// writable says whether this process may write to something in the directory, if it is there.
func (p *Publisher) writable(name string) error {
	path := filepath.Join(p.Dir, name)
	err := unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK, unix.AT_EACCESS)
	switch {
	case err == nil, errors.Is(err, os.ErrNotExist):
		return nil
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%s cannot be written: give it to the user of the server: chown -R --reference=%s %s", name, p.Dir, path)
	}
	return fmt.Errorf("%s cannot be written: %w", name, err)
}
