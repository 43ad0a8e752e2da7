package server

import (
	"context"
	"net/http"
	"sync"
	"time"
)

// RebootGroup is a group of the cluster's semaphore as the page shows it: who holds a reboot slot, and who waits for one.
// The server only shows it; whoever starts the server says where it comes from (see Options.Reboots).
type RebootGroup struct {
	Name     string       `json:"name"`
	Max      int          `json:"max"`                // hosts that may be down at once
	Halted   []string     `json:"halted,omitempty"`   // versions that the cluster has halted, and why
	Tampered []string     `json:"tampered,omitempty"` // what somebody has written into the semaphore who may not
	Holders  []RebootHost `json:"holders"`
	Queue    []RebootHost `json:"queue"` // next first
}

// RebootHost is a host that holds a slot or waits for one.
type RebootHost struct {
	Host  string    `json:"host"`
	Phase string    `json:"phase,omitempty"` // of a holder
	From  string    `json:"from,omitempty"`
	To    string    `json:"to,omitempty"`
	Late  bool      `json:"late,omitempty"` // it stays away too long
	Since time.Time `json:"since"`
}

const (
	rebootsAge     = 2 * time.Second // how old an answer may be that is shown again
	rebootsTimeout = 2 * time.Second
)

// reboots asks the semaphore, for all who look at the page at once only one time in a while.
type reboots struct {
	ask func(context.Context) ([]RebootGroup, error)

	mu     sync.Mutex
	at     time.Time
	groups []RebootGroup
	err    error
}

// get returns the groups; nil without an error means that there is no semaphore.
func (r *reboots) get(ctx context.Context) ([]RebootGroup, error) {
	if r.ask == nil {
		return nil, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.at) < rebootsAge {
		return r.groups, r.err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rebootsTimeout) // the answer is for all, whoever has asked
	defer cancel()
	r.groups, r.err = r.ask(ctx)
	r.at = time.Now()
	return r.groups, r.err
}

func (s *Server) listReboots(w http.ResponseWriter, r *http.Request) {
	groups, err := s.reboots.get(r.Context())
	if err != nil {
		s.refuse(w, http.StatusBadGateway, "the semaphore does not answer: %s", clean(err.Error()))
		return
	}
	if groups == nil {
		groups = []RebootGroup{}
	}
	s.writeJSON(w, struct {
		Schema string        `json:"schema"`
		Groups []RebootGroup `json:"groups"`
	}{"flipside.reboots/v1", groups})
}
