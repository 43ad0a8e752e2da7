package server

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"time"
)

// Evidence is what a proof of a boot says, once it holds.
type Evidence struct {
	Slot    string            `json:"slot"`
	Version string            `json:"version"`
	PCRs    map[string]string `json:"pcrs"` // number to hexadecimal value
	Key     string            `json:"key"`  // fingerprint of the key that it is by
}

// A Prover verifies what a host sends about its boot. The proof must answer the nonce and be of the host.
type Prover func(host string, nonce, proof []byte) (Evidence, error)

// Proof is the last proof that a host gave.
type Proof struct {
	Evidence
	At      time.Time `json:"at"`
	Since   time.Time `json:"since"`             // when the host first came with this key
	By      string    `json:"by,omitempty"`      // the administrator who accepted the key; empty: it was believed at first sight
	Refused string    `json:"refused,omitempty"` // why what it sent last was not believed
	Other   string    `json:"other,omitempty"`   // the key that this was by, if that is all that speaks against it
	TriedAt time.Time `json:"tried_at,omitzero"`
}

const (
	maxProof   = 64 << 10
	nonceLife  = 5 * time.Minute
	nonceSize  = 8 + 16 + 32 // when, at random, and what shows that it is ours
	proofError = "the proof was not believed"
)

// otherKey says that a proof holds, and is by another key than the host's.
type otherKey struct {
	key, want string
	since     time.Time
}

func (e *otherKey) Error() string {
	return fmt.Sprintf("it is by key %s, and this host's is %s since %s", e.key, e.want, e.since.UTC().Format(time.DateOnly))
}

var errNonce = errors.New("the nonce is not one of this server's, or is too old")

// nonce makes a nonce for a host. The server keeps none of them: it knows its own by their MAC, and each is good for a few minutes and once, because
// a proof must be later than the last one that was taken.
func (s *Server) nonce(host string, now time.Time) []byte {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, nonceSize), uint64(now.UnixNano()))
	b = b[:24]
	rand.Read(b[8:])
	return s.sealNonce(host, b)
}

func (s *Server) sealNonce(host string, b []byte) []byte {
	mac := hmac.New(sha256.New, s.nonceKey[:])
	mac.Write(b[:24])
	mac.Write([]byte(host))
	return mac.Sum(b[:24:24])
}

func (s *Server) checkNonce(host string, nonce []byte, now time.Time) (time.Time, error) {
	if len(nonce) != nonceSize || !hmac.Equal(nonce, s.sealNonce(host, nonce)) {
		return time.Time{}, errNonce
	}
	at := time.Unix(0, int64(binary.BigEndian.Uint64(nonce)))
	if at.After(now) || now.Sub(at) > nonceLife {
		return time.Time{}, errNonce
	}
	return at, nil
}

// proofs adds what hosts prove their boots with.
func (s *Server) proofs() {
	rand.Read(s.nonceKey[:])
	s.mux.HandleFunc("GET /v1/proof/{id}", func(w http.ResponseWriter, r *http.Request) {
		id := r.PathValue("id")
		if s.asksProof(w, id) {
			return
		}
		s.writeJSON(w, struct {
			Schema string `json:"schema"`
			Nonce  []byte `json:"nonce"`
		}{"flipside.nonce/v1", s.nonce(id, s.opt.Now())})
	})
	s.mux.HandleFunc("POST /v1/proof/{id}", s.takeProof)
}

// asksProof refuses what no proof can be taken of.
func (s *Server) asksProof(w http.ResponseWriter, id string) (refused bool) {
	_, ok := s.Host(id)
	switch {
	case s.opt.Prover == nil:
		s.refuse(w, http.StatusNotFound, "this server takes no proofs")
	case !ok:
		s.refuse(w, http.StatusNotFound, "no host %q has asked here", clean(id))
	}
	return s.opt.Prover == nil || !ok
}

func (s *Server) takeProof(w http.ResponseWriter, r *http.Request) {
	id, now := r.PathValue("id"), s.opt.Now()
	if s.asksProof(w, id) {
		return
	}
	nonce, err := base64.RawURLEncoding.DecodeString(r.URL.Query().Get("nonce"))
	var at time.Time
	if err == nil {
		at, err = s.checkNonce(id, nonce, now)
	}
	if err != nil {
		s.refuse(w, http.StatusForbidden, "%s: %v", proofError, errNonce)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxProof))
	if err != nil {
		s.refuse(w, http.StatusRequestEntityTooLarge, "a proof has at most %d bytes", maxProof)
		return
	}
	ev, err := s.opt.Prover(id, nonce, body)
	if err == nil {
		err = s.proven(id, ev, at, now)
	}
	if err != nil {
		s.unproven(id, err, now)
		s.refuse(w, http.StatusForbidden, "%s: %s", proofError, clean(err.Error()))
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// proven records a proof that holds. The key of a host is the one that it came with the first time.
func (s *Server) proven(id string, ev Evidence, at, now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	h, ok := s.hosts[id]
	if !ok {
		return errors.New("the host is forgotten meanwhile")
	}
	p := Proof{Evidence: ev, At: now, Since: now}
	p.Slot, p.Version = clean(ev.Slot), clean(ev.Version)
	if old := h.Proof; old != nil && old.Key != "" {
		if old.Key != ev.Key {
			return &otherKey{ev.Key, old.Key, old.Since}
		}
		if !at.After(old.At) {
			return errors.New("a later one was taken already")
		}
		p.Since, p.By = old.Since, old.By
	}
	h.Proof = &p
	s.touch(h)
	return nil
}

// unproven records that something came that was not believed. What was believed before stays.
func (s *Server) unproven(id string, why error, now time.Time) {
	s.log.Warn(proofError, "host", id, "error", why)
	s.mu.Lock()
	defer s.mu.Unlock()
	h, ok := s.hosts[id]
	if !ok {
		return
	}
	var p Proof
	if h.Proof != nil {
		p = *h.Proof
	}
	p.Refused, p.TriedAt, p.Other = clean(why.Error()), now, ""
	var other *otherKey
	if errors.As(why, &other) {
		p.Other = other.key
	}
	h.Proof = &p
	s.touch(h)
}

var keyPattern = regexp.MustCompile("^sha256:[0-9a-f]{64}$")

// AcceptKey makes a key the one that a host proves its boots with, in the name of an administrator: another than the one that it first came with, or before it has come
// with any. What was proven by an old key is forgotten. It returns ErrUnknown for a host that has not asked here.
func (s *Server) AcceptKey(id, key, by string) error {
	if !keyPattern.MatchString(key) {
		return fmt.Errorf("key %q is not a fingerprint such as sha256:0123…, in lower case", clean(key))
	}
	p := s.as(by)
	s.mu.Lock()
	defer s.mu.Unlock()
	h, ok := s.hosts[id]
	if !ok {
		return fmt.Errorf("host %q: %w", clean(id), ErrUnknown)
	}
	was := ""
	if h.Proof != nil {
		was = h.Proof.Key
	}
	if was == key {
		return nil
	}
	if err := p.audit("accept the key of a host", map[string]any{"host": id, "key": key, "was": was}); err != nil {
		return err
	}
	h.Proof = &Proof{Evidence: Evidence{Key: key, PCRs: map[string]string{}}, Since: s.opt.Now(), By: by}
	s.touch(h)
	return nil
}

// acceptKey answers POST /v1/admin/hosts/ID/key.
func (s *Server) acceptKey(w http.ResponseWriter, r *http.Request, p Publisher) {
	var o struct {
		Key string `json:"key"`
	}
	d := json.NewDecoder(io.LimitReader(r.Body, maxRequest))
	d.DisallowUnknownFields()
	if err := d.Decode(&o); err != nil {
		s.refuse(w, http.StatusBadRequest, "the order cannot be read: %s", clean(err.Error()))
		return
	}
	switch err := s.AcceptKey(r.PathValue("id"), o.Key, p.Who); {
	case errors.Is(err, ErrUnknown):
		s.refuse(w, http.StatusNotFound, "%s", clean(err.Error()))
	case err != nil:
		s.refuse(w, http.StatusBadRequest, "%s", clean(err.Error()))
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}
