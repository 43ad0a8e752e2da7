package fleetlock

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/flipside-linux/flipside/lock"
)

// Server answers FleetLock clients from a semaphore. The id in a request proves nothing: who may call is for the HTTP server around it
// to decide, and for Permit.
type Server struct {
	Semaphore lock.Semaphore
	// Permit says whether a request may speak for a host, by its certificate or its address; nil permits all. Its error is told to the client.
	Permit func(r *http.Request, host string) error
	// RetryAfter is what clients are told when nothing better is known; 0 is 30 s.
	RetryAfter time.Duration
	// Now is the clock; nil is that of the machine.
	Now func() time.Time
}

// ServeHTTP implements [http.Handler].
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var do func(http.ResponseWriter, *http.Request, message)
	switch r.URL.Path {
	case pathLock:
		do = s.lock
	case pathUnlock:
		do = s.unlock
	case pathVerdict:
		do = s.verdict
	default:
		http.NotFound(w, r)
		return
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "POST only", http.StatusMethodNotAllowed)
		return
	}
	if r.Header.Get(header) != "true" {
		s.refuse(w, http.StatusBadRequest, KindIdentity, fmt.Sprintf("header %q is not \"true\"", header), time.Time{})
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	var m message
	if err == nil {
		err = json.Unmarshal(body, &m)
	}
	if err == nil {
		err = errors.Join(lock.CheckGroup(m.Client.Group), lock.CheckHost(m.Client.ID))
	}
	if err != nil {
		s.refuse(w, http.StatusBadRequest, KindIdentity, err.Error(), time.Time{})
		return
	}
	if s.Permit != nil {
		if err := s.Permit(r, m.Client.ID); err != nil {
			s.refuse(w, http.StatusForbidden, KindPermission, err.Error(), time.Time{})
			return
		}
	}
	do(w, r, m)
}

func (s *Server) lock(w http.ResponseWriter, r *http.Request, m message) {
	other := m.More == nil
	if other {
		m.More = &details{}
	}
	if m.More.Phase == string(lock.Rebooting) {
		s.mark(w, r, m) // of the slot that it holds. To ask for it again would queue, and might be a new grant, of a claim that says less
		return
	}
	st, err := s.Semaphore.Request(r.Context(), lock.Claim{
		Group: m.Client.Group, Host: m.Client.ID, BootID: m.More.BootID, From: m.More.From, To: m.More.To, Reason: m.More.Reason, Zone: m.More.Zone, Class: m.More.Class,
	})
	switch {
	case err != nil:
		s.failed(w, err)
	case st.Halted != "":
		s.refuse(w, http.StatusForbidden, KindHalted, st.Halted, time.Time{})
	case !st.Granted:
		kind, why := KindFull, fmt.Sprintf("position %d in the queue; %d of %d slots are held", st.Position, len(st.Holders), st.Max)
		switch {
		case st.Max == 0:
			kind = KindPaused
		case st.Blocked != "" && !st.Ask.IsZero():
			kind = KindWindow
		}
		if st.Blocked != "" {
			why += "; " + st.Blocked
		}
		at := st.Expected
		if !st.Ask.IsZero() {
			at = st.Ask
		}
		s.refuse(w, http.StatusConflict, kind, why, at)
	case other: // other clients have nothing more to say before they reboot: for them the grant is the mark
		s.mark(w, r, m)
	}
}

// mark notes that a holder goes down now.
func (s *Server) mark(w http.ResponseWriter, r *http.Request, m message) {
	if err := s.Semaphore.Mark(r.Context(), m.Client.Group, m.Client.ID, lock.Mark{Phase: lock.Rebooting}); err != nil {
		s.failed(w, err)
	}
}

func (s *Server) unlock(w http.ResponseWriter, r *http.Request, m message) {
	if m.More == nil {
		m.More = &details{}
	}
	outcome := lock.Outcome(m.More.Outcome)
	if outcome != lock.Cancelled && outcome != lock.Withdrawn {
		outcome = lock.Healthy
	}
	s.release(w, r, m, outcome)
}

func (s *Server) verdict(w http.ResponseWriter, r *http.Request, m message) {
	if m.More == nil {
		m.More = &details{}
	}
	s.release(w, r, m, lock.Outcome(m.More.Outcome))
}

func (s *Server) release(w http.ResponseWriter, r *http.Request, m message, outcome lock.Outcome) {
	err := s.Semaphore.Release(r.Context(), m.Client.Group, m.Client.ID, lock.Verdict{Outcome: outcome, Version: m.More.Version, Reason: m.More.Reason})
	if err != nil {
		s.failed(w, err)
	}
}

func (s *Server) failed(w http.ResponseWriter, err error) {
	for _, k := range []struct {
		is     error
		status int
		kind   string
	}{
		{os.ErrPermission, http.StatusBadGateway, KindPermission},
		{lock.ErrUnavailable, http.StatusServiceUnavailable, KindUnavailable},
		{lock.ErrConflict, http.StatusServiceUnavailable, KindConflict},
		{lock.ErrHalted, http.StatusForbidden, KindHalted},
		{lock.ErrClosed, http.StatusConflict, KindWindow},
		{lock.ErrNotHeld, http.StatusConflict, KindNotHeld},
		{lock.ErrInvalid, http.StatusBadRequest, KindIdentity},
	} {
		if errors.Is(err, k.is) {
			s.refuse(w, k.status, k.kind, err.Error(), time.Time{})
			return
		}
	}
	s.refuse(w, http.StatusInternalServerError, KindInternal, err.Error(), time.Time{})
}

// refuse answers no. again is when it may be worth asking again, if that is known.
func (s *Server) refuse(w http.ResponseWriter, status int, kind, value string, again time.Time) {
	if status == http.StatusConflict || status == http.StatusServiceUnavailable {
		wait := s.RetryAfter
		if wait <= 0 {
			wait = 30 * time.Second
		}
		now := time.Now
		if s.Now != nil {
			now = s.Now
		}
		if d := again.Sub(now()); !again.IsZero() && d > 0 {
			wait = min(d, time.Hour) // what is expected may come earlier
		}
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(refusal{kind, value})
}
