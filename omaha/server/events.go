package server

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"

	bolt "go.etcd.io/bbolt"
)

// What each host did is kept on the disk only, in the bucket "events": the host's id, a zero byte, and a number that
// counts up. Ids hold no zero byte, so a host's entries stand together and in order.

// maxEvents is how many entries are kept for each host.
const maxEvents = 40

func eventPrefix(host string) []byte { return append([]byte(host), 0) }

// writeEvents appends entries and drops the oldest of hosts that have too many.
func writeEvents(tx *bolt.Tx, events []Activity) error {
	b := tx.Bucket([]byte("events"))
	for _, e := range events {
		data, err := json.Marshal(e)
		if err != nil {
			return fmt.Errorf("event of host %q: %w", e.Host, err)
		}
		prefix := eventPrefix(e.Host)
		seq, err := b.NextSequence()
		if err != nil {
			return err
		}
		if err := b.Put(binary.BigEndian.AppendUint64(slices.Clone(prefix), seq), data); err != nil {
			return err
		}
		var keys [][]byte
		for c, k := b.Cursor(), []byte(nil); ; {
			if k == nil {
				k, _ = c.Seek(prefix)
			} else {
				k, _ = c.Next()
			}
			if k == nil || !bytes.HasPrefix(k, prefix) {
				break
			}
			keys = append(keys, k)
		}
		for _, k := range keys[:max(0, len(keys)-maxEvents)] {
			if err := b.Delete(k); err != nil {
				return err
			}
		}
	}
	return nil
}

// dropEvents forgets what a host did.
func dropEvents(tx *bolt.Tx, host string) error {
	b, prefix := tx.Bucket([]byte("events")), eventPrefix(host)
	var keys [][]byte
	c := b.Cursor()
	for k, _ := c.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, _ = c.Next() {
		keys = append(keys, k)
	}
	for _, k := range keys {
		if err := b.Delete(k); err != nil {
			return err
		}
	}
	return nil
}

// events returns what a host did, newest first, with what is not on the disk yet.
func (s *Server) events(host string) []Activity {
	out := []Activity{}
	if s.store == nil {
		return out
	}
	err := s.store.db.View(func(tx *bolt.Tx) error {
		prefix := eventPrefix(host)
		c := tx.Bucket([]byte("events")).Cursor()
		for k, v := c.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, v = c.Next() {
			var a Activity
			if err := json.Unmarshal(v, &a); err != nil {
				return fmt.Errorf("event of host %q: %w", host, err)
			}
			out = append(out, a)
		}
		return nil
	})
	if err != nil {
		s.log.Error("the events of a host cannot be read", "error", err)
	}
	s.mu.Lock()
	for _, a := range s.store.events {
		if a.Host == host {
			out = append(out, a)
		}
	}
	s.mu.Unlock()
	slices.Reverse(out)
	return out[:min(len(out), maxEvents)]
}
