package server

import (
	"encoding/json"
	"maps"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Sample is how many hosts ran which version on which channel at one time.
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

	sampleSoon = 10 * time.Second // after a change
	sampleIdle = 15 * time.Minute // without one
)

// history is what the dashboard shows of the past. It is bounded: old samples are thinned out, old activity is dropped.
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
func (s *Server) versions() map[string]map[string]int {
	out := map[string]map[string]int{}
	for _, h := range s.hosts {
		m := out[h.Channel]
		if m == nil {
			m = map[string]int{}
			out[h.Channel] = m
		}
		m[h.Version]++
	}
	return out
}

func (st *store) loadHistory() (history, error) {
	var h history
	err := st.db.View(func(tx *bolt.Tx) error {
		if data := tx.Bucket([]byte("meta")).Get([]byte("history")); data != nil {
			return json.Unmarshal(data, &h)
		}
		return nil
	})
	return h, err
}
