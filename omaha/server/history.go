package server

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Sample is how many hosts ran which version on which channel at one time. It is never changed.
type Sample struct {
	At       time.Time                 `json:"at"`
	Channels map[string]map[string]int `json:"channels"` // by channel, then by version; "" is for hosts that no channel knows
}

// Activity is one host that came into another state.
type Activity struct {
	At      time.Time `json:"at"`
	Host    string    `json:"host"`
	Alias   string    `json:"alias,omitempty"`
	From    State     `json:"from"`
	To      State     `json:"to"`
	Version string    `json:"version,omitempty"` // the one it is about
	Code    int       `json:"code,omitempty"`    // of a failure
}

const (
	maxSamples  = 400
	maxActivity = 300

	// maxForeign is how many versions that no file of the directory names are counted one by one: hosts may run what was never published here, and anybody may
	// claim to run anything.
	maxForeign    = 16
	otherVersions = "other" // all others together

	sampleSoon = 10 * time.Second // after a change
	sampleIdle = 15 * time.Minute // without one
)

// history is what the dashboard shows of the past. It is bounded: old samples are thinned out, old activity is dropped. On the disk each sample is a
// row of the bucket "samples", by its time, and the activity is one value.
type history struct {
	Samples  []Sample   `json:"samples"`
	Activity []Activity `json:"activity"` // newest last

	dirty bool
}

// note records a host's change of state. Server.mu is held.
func (h *history) note(a Activity) {
	h.Activity = append(h.Activity, a)
	if n := len(h.Activity); n > maxActivity {
		h.Activity = slices.Delete(h.Activity, 0, n-maxActivity)
	}
	h.dirty = true
}

// sample records the versions if they changed or a while has passed.
func (h *history) sample(now time.Time, channels map[string]map[string]int) {
	if len(channels) == 0 {
		return
	}
	if n := len(h.Samples); n > 0 {
		last := h.Samples[n-1]
		age := now.Sub(last.At)
		if age >= 0 && (age < sampleSoon || (age < sampleIdle && maps.EqualFunc(last.Channels, channels, maps.Equal[map[string]int]))) {
			return
		}
	}
	h.Samples = append(h.Samples, Sample{At: now, Channels: channels})
	if len(h.Samples) > maxSamples { // keep every other one of the older half
		old := h.Samples[:maxSamples/2]
		kept := old[:0]
		for i, s := range old {
			if i%2 == 0 {
				kept = append(kept, s)
			}
		}
		h.Samples = append(kept, h.Samples[maxSamples/2:]...)
	}
	h.dirty = true
}

// versions counts the hosts by channel and running version. Server.mu is held.
func (s *Server) versions(c *catalog) map[string]map[string]int {
	out := map[string]map[string]int{}
	for _, h := range s.hosts {
		m := out[h.Channel]
		if m == nil {
			m = map[string]int{}
			out[h.Channel] = m
		}
		m[h.Version]++
	}
	return fold(out, c.named, maxForeign)
}

// fold bounds counts by channel and version: versions that are not named stay apart only if they are among the most frequent ones.
func fold(counts map[string]map[string]int, named map[string]bool, most int) map[string]map[string]int {
	foreign := map[string]int{}
	for _, m := range counts {
		for v, n := range m {
			if !named[v] {
				foreign[v] += n
			}
		}
	}
	if len(foreign) <= most {
		return counts
	}
	order := slices.SortedFunc(maps.Keys(foreign), func(a, b string) int { return cmp.Or(cmp.Compare(foreign[b], foreign[a]), cmp.Compare(a, b)) })
	apart := map[string]bool{}
	for _, v := range order[:most] {
		apart[v] = true
	}
	out := make(map[string]map[string]int, len(counts))
	for channel, m := range counts {
		out[channel] = map[string]int{}
		for v, n := range m {
			if !named[v] && !apart[v] {
				v = otherVersions
			}
			out[channel][v] += n
		}
	}
	return out
}

// copied returns what is to be written, nil if nothing is new. The samples are shared, the lists are not. Server.mu is held.
func (h *history) copied() *history {
	if !h.dirty {
		return nil
	}
	h.dirty = false
	return &history{Samples: slices.Clone(h.Samples), Activity: slices.Clone(h.Activity)}
}

func sampleKey(s Sample) []byte { return binary.BigEndian.AppendUint64(nil, uint64(s.At.UnixNano())) }

// write brings the rows to what the history holds. Only samples that are new are encoded.
func (h *history) write(tx *bolt.Tx) error {
	b := tx.Bucket([]byte("samples"))
	kept := make(map[string]bool, len(h.Samples))
	for _, s := range h.Samples {
		key := sampleKey(s)
		kept[string(key)] = true
		if b.Get(key) != nil {
			continue
		}
		data, err := json.Marshal(s)
		if err != nil {
			return err
		}
		if err := b.Put(key, data); err != nil {
			return err
		}
	}
	var old [][]byte
	err := b.ForEach(func(k, _ []byte) error {
		if !kept[string(k)] {
			old = append(old, bytes.Clone(k))
		}
		return nil
	})
	for _, k := range old {
		if err == nil {
			err = b.Delete(k)
		}
	}
	if err != nil {
		return err
	}
	data, err := json.Marshal(h.Activity)
	if err != nil {
		return err
	}
	return tx.Bucket([]byte("meta")).Put([]byte("activity"), data)
}

func (st *store) loadHistory() (history, error) {
	var h history
	err := st.db.View(func(tx *bolt.Tx) error {
		err := tx.Bucket([]byte("samples")).ForEach(func(_, v []byte) error {
			var s Sample
			if err := json.Unmarshal(v, &s); err != nil {
				return fmt.Errorf("a sample: %w", err)
			}
			h.Samples = append(h.Samples, s)
			return nil
		})
		if data := tx.Bucket([]byte("meta")).Get([]byte("activity")); data != nil && err == nil {
			err = json.Unmarshal(data, &h.Activity)
		}
		return err
	})
	return h, err
}
