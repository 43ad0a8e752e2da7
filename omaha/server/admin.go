package server

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// Order is what an administrator asks of a channel, as the body of POST /v1/admin/channels/NAME.
type Order struct {
	Action    string   `json:"action"` // move, pause, resume, rollback, limit
	Version   string   `json:"version,omitempty"`
	Downgrade bool     `json:"downgrade,omitempty"`
	Limits    *Limits  `json:"limits,omitempty"`
	Blacklist []string `json:"blacklist,omitempty"` // versions to withdraw, with action limit
}

// Limits are the parts of a channel's policy that are numbers. Absent ones stay as they are.
type Limits struct {
	Percent       *int `json:"percent,omitempty"`
	MaxConcurrent *int `json:"max_concurrent,omitempty"`
	MaxPerPeriod  *int `json:"max_per_period,omitempty"`
	StopFailures  *int `json:"stop_after_failures,omitempty"`
	StopTimeouts  *int `json:"stop_after_timeouts,omitempty"`
}

// Apply carries out an order.
func (p *Publisher) Apply(channel string, o Order) (Channel, error) {
	switch o.Action {
	case "move":
		return p.Move(channel, o.Version)
	case "pause", "resume":
		return p.Pause(channel, o.Action == "pause")
	case "rollback":
		return p.Rollback(channel, o.Downgrade)
	case "limit":
		if _, err := p.Channel(channel); err != nil {
			return Channel{}, err
		}
		return p.Change(channel, func(c *Channel) error {
			if l := o.Limits; l != nil {
				for from, to := range map[*int]*int{l.Percent: &c.Percent, l.MaxConcurrent: &c.MaxConcurrent, l.MaxPerPeriod: &c.MaxPerPeriod,
					l.StopFailures: &c.StopFailures, l.StopTimeouts: &c.StopTimeouts} {
					if from != nil {
						*to = *from
					}
				}
			}
			if o.Blacklist != nil {
				c.Blacklist = o.Blacklist
			}
			return nil
		})
	}
	return Channel{}, fmt.Errorf("action %q is none of move, pause, resume, rollback, limit", o.Action)
}

// admin lets a handler be reached by administrators only. Without a token in the options there are none.
func (s *Server) admin(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if s.opt.AdminToken == "" {
			http.Error(w, "administration over HTTP is switched off", http.StatusForbidden)
			return
		}
		token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		got, want := sha256.Sum256([]byte(token)), sha256.Sum256([]byte(s.opt.AdminToken))
		if !ok || subtle.ConstantTimeCompare(got[:], want[:]) != 1 {
			w.Header().Set("WWW-Authenticate", `Bearer realm="flipside"`)
			http.Error(w, "a token is needed", http.StatusUnauthorized)
			return
		}
		h(w, r)
	}
}

// order answers POST /v1/admin/channels/NAME.
func (s *Server) order(w http.ResponseWriter, r *http.Request) {
	var o Order
	d := json.NewDecoder(io.LimitReader(r.Body, maxRequest))
	d.DisallowUnknownFields()
	if err := d.Decode(&o); err != nil {
		http.Error(w, "the order cannot be read", http.StatusBadRequest)
		return
	}
	p := s.publish
	p.Who = "admin token"
	name := r.PathValue("name")
	c, err := p.Apply(name, o)
	switch {
	case errors.Is(err, ErrUnknown):
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	case err != nil:
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if err := s.Reload(); err != nil {
		http.Error(w, "the change is written and cannot be read back", http.StatusInternalServerError)
		return
	}
	s.writeJSON(w, struct {
		Schema  string  `json:"schema"`
		Name    string  `json:"name"`
		Channel Channel `json:"channel"`
	}{"flipside.channel/v1", name, c})
}

// backup answers GET /v1/admin/backup with a consistent copy of the state file.
func (s *Server) backup(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Disposition", `attachment; filename="state.db"`)
	if err := s.Backup(w); err != nil {
		s.log.Error("backup", "error", err)
	}
}

func (s *Server) writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		s.log.Debug("answer not delivered", "error", err)
	}
}
