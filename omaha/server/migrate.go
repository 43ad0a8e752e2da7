package server

import (
	"encoding/json"
	"fmt"
	"time"

	bolt "go.etcd.io/bbolt"
)

// migrations carry the state file from one layout to the next: the first makes layout 1 of an empty file, the second
// makes 2 of 1, and so on. All that are needed run in one transaction, so that a crash leaves the old layout or the new.
// They are never changed once released; a newer layout is another entry.
func migrations() []func(*bolt.Tx) error {
	return []func(*bolt.Tx) error{
		func(tx *bolt.Tx) error { return buckets(tx, "hosts", "rollouts") },
		// Each host has a record of what it did, and the fleet's past is kept by channel.
		func(tx *bolt.Tx) error {
			if err := buckets(tx, "events"); err != nil {
				return err
			}
			return historyByChannel(tx.Bucket([]byte("meta")))
		},
		// Each sample of the past is a row of its own, and bounded.
		func(tx *bolt.Tx) error {
			if err := buckets(tx, "samples"); err != nil {
				return err
			}
			return historyInRows(tx)
		},
	}
}

func buckets(tx *bolt.Tx, names ...string) error {
	for _, name := range names {
		if _, err := tx.CreateBucketIfNotExists([]byte(name)); err != nil {
			return err
		}
	}
	return nil
}

// historyByChannel rewrites the samples of layout 1, which knew no channels.
func historyByChannel(meta *bolt.Bucket) error {
	data := meta.Get([]byte("history"))
	if data == nil {
		return nil
	}
	var old struct {
		Samples []struct {
			At       time.Time      `json:"at"`
			Versions map[string]int `json:"versions"`
		} `json:"samples"`
		Activity []Activity `json:"activity"`
	}
	if err := json.Unmarshal(data, &old); err != nil {
		return meta.Delete([]byte("history")) // a picture of the past, that nothing depends on
	}
	h := history{Activity: old.Activity}
	for _, s := range old.Samples {
		h.Samples = append(h.Samples, Sample{At: s.At, Channels: map[string]map[string]int{"": s.Versions}})
	}
	data, err := json.Marshal(h)
	if err != nil {
		return err
	}
	return meta.Put([]byte("history"), data)
}

// historyInRows takes apart what layout 2 kept as one value, with all versions that hosts ever claimed to run.
func historyInRows(tx *bolt.Tx) error {
	meta := tx.Bucket([]byte("meta"))
	data := meta.Get([]byte("history"))
	if data == nil {
		return nil
	}
	var h history
	if json.Unmarshal(data, &h) == nil { // or it was a picture of the past, that nothing depends on
		for i, s := range h.Samples {
			h.Samples[i].Channels = fold(s.Channels, nil, 4*maxForeign)
		}
		if err := h.write(tx); err != nil {
			return err
		}
	}
	return meta.Delete([]byte("history"))
}

// migrate brings the file to the newest layout. One that is newer than this program is refused and left alone.
func (st *store) migrate() error {
	steps := migrations()
	return st.db.Update(func(tx *bolt.Tx) error {
		meta, err := tx.CreateBucketIfNotExists([]byte("meta"))
		if err != nil {
			return err
		}
		version := 0
		if v := meta.Get([]byte("version")); v != nil {
			if err := json.Unmarshal(v, &version); err != nil || version < 1 || version > len(steps) {
				return fmt.Errorf("it has layout %q, and this program knows up to %d", v, len(steps))
			}
		}
		for _, step := range steps[version:] {
			version++
			if err := step(tx); err != nil {
				return fmt.Errorf("carry the state over to layout %d: %w", version, err)
			}
		}
		return meta.Put([]byte("version"), []byte(fmt.Sprint(version)))
	})
}
