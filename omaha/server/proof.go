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
	TPM     *TPM              `json:"tpm,omitempty"`

	Unendorsed string `json:"-"` // why TPM is nil
}

// TPM says in whose TPM a key is, as the maker's certificate says it.
type TPM struct {
	Maker  string `json:"maker,omitempty"` // such as IFX
	Model  string `json:"model,omitempty"`
	Issuer string `json:"issuer"` // of the certificate
	Key    string `json:"key"`    // fingerprint of the endorsement key, which stays when the TPM is cleared
}

// A Prover verifies what a host sends about its boot. The proof must answer the nonce and be of the host.
type Prover func(host string, nonce, proof []byte) (Evidence, error)

// An Endorser makes the challenge by which a host shows in whose TPM its key is. The answer comes with the proof, to the Prover.
type Endorser func(nonce, request []byte) (challenge []byte, err error)

// Proof is the last proof that a host gave.
type Proof struct {
	Evidence
	At      time.Time `json:"at"`
	Since   time.Time `json:"since"`             // when the host first came with this key
	By      string    `json:"by,omitempty"`      // the administrator who accepted the key; empty: it was believed at first sight
	Refused string    `json:"refused,omitempty"` // why what it sent last was not believed
	Other   string    `json:"other,omitempty"`   // the key that this was by, if that is all that speaks against it
	Boot    string    `json:"boot,omitempty"`    // AsReleased or Differs, if somebody has said what the release must measure; never saved
	Differs []string  `json:"differs,omitempty"` // the PCRs that differ
	TriedAt time.Time `json:"tried_at,omitzero"`
}

const (
	maxProof   = 64 << 10
	nonceLife  = 5 * time.Minute
	nonceSize  = 8 + 16 + 32 // when, at random, and what shows that it is ours
	proofError = "the proof was not believed"
)

// otherKey says that a proof holds, and is by another key than the host's, or by one that is not known here.
type otherKey struct {
	key, want string
	since     time.Time
	why       string // want is empty: why the key is not believed at first sight
}

func (e *otherKey) Error() string {
	if e.want == "" {
		return "no key is believed at first sight here: " + e.why
	}
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
			Schema      string `json:"schema"`
			Nonce       []byte `json:"nonce"`
			Endorsement bool   `json:"endorsement,omitempty"` // show in whose TPM the key is
		}{"flipside.nonce/v1", s.nonce(id, s.opt.Now()), s.asksEndorsement(id, r.URL.Query().Get("key"))})
	})
	s.mux.HandleFunc("POST /v1/proof/{id}", s.takeProof)
	s.mux.HandleFunc("POST /v1/proof/{id}/endorsement", s.challenge)
}

// asksEndorsement says whether a host is to show in whose TPM a key is.
func (s *Server) asksEndorsement(id, key string) bool {
	h, _ := s.Host(id)
	return s.opt.Endorser != nil && (h.Proof == nil || h.Proof.TPM == nil || h.Proof.Key != key)
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
	nonce, at, body, ok := s.readProof(w, r, id, now)
	if !ok {
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

// readProof reads what a host sends in answer to a nonce, or refuses it.
func (s *Server) readProof(w http.ResponseWriter, r *http.Request, id string, now time.Time) (nonce []byte, at time.Time, body []byte, ok bool) {
	if s.asksProof(w, id) {
		return nil, at, nil, false
	}
	nonce, err := base64.RawURLEncoding.DecodeString(r.URL.Query().Get("nonce"))
	if err == nil {
		at, err = s.checkNonce(id, nonce, now)
	}
	if err != nil {
		s.refuse(w, http.StatusForbidden, "%s: %v", proofError, errNonce)
		return nil, at, nil, false
	}
	body, err = io.ReadAll(http.MaxBytesReader(w, r.Body, maxProof))
	if err != nil {
		s.refuse(w, http.StatusRequestEntityTooLarge, "a proof has at most %d bytes", maxProof)
		return nil, at, nil, false
	}
	return nonce, at, body, true
}

// challenge answers POST /v1/proof/ID/endorsement. Nothing is kept of it.
func (s *Server) challenge(w http.ResponseWriter, r *http.Request) {
	nonce, _, body, ok := s.readProof(w, r, r.PathValue("id"), s.opt.Now())
	if !ok {
		return
	}
	if s.opt.Endorser == nil {
		s.refuse(w, http.StatusNotFound, "this server knows no makers of TPMs")
		return
	}
	c, err := s.opt.Endorser(nonce, body)
	if err != nil {
		s.log.Warn("a TPM's endorsement was not believed", "host", r.PathValue("id"), "error", err)
		s.refuse(w, http.StatusForbidden, "%s", clean(err.Error()))
		return
	}
	s.writeJSON(w, json.RawMessage(c))
}

// proven records a proof that holds. The key of a host is the one that it came with the first time; a server that knows the makers of TPMs believes only one that is in
// a TPM of theirs, and believes another one of the same TPM, which was cleared.
func (s *Server) proven(id string, ev Evidence, at, now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	h, ok := s.hosts[id]
	if !ok {
		return errors.New("the host is forgotten meanwhile")
	}
	p := Proof{Evidence: ev, At: now, Since: now}
	p.Slot, p.Version = clean(ev.Slot), clean(ev.Version)
	if ev.TPM != nil {
		p.TPM = &TPM{Maker: clean(ev.TPM.Maker), Model: clean(ev.TPM.Model), Issuer: clean(ev.TPM.Issuer), Key: ev.TPM.Key}
	}
	switch old := h.Proof; {
	// A key that was believed at sight, before the makers were known, is worth no more than none.
	case old == nil || old.Key == "" || s.opt.Endorser != nil && old.TPM == nil && old.By == "":
		if s.opt.Endorser != nil && p.TPM == nil {
			return &otherKey{key: ev.Key, why: ev.Unendorsed}
		}
	case old.Key != ev.Key && (p.TPM == nil || old.TPM == nil || p.TPM.Key != old.TPM.Key):
		return &otherKey{key: ev.Key, want: old.Key, since: old.Since}
	case !at.After(old.At):
		return errors.New("a later one was taken already")
	case old.Key == ev.Key:
		p.Since, p.By = old.Since, old.By
		if p.TPM == nil {
			p.TPM = old.TPM
		}
	default:
		s.log.Info("a host's TPM has a new key: it was cleared", "host", id, "key", ev.Key, "was", old.Key)
	}
	h.Proof = &p
	s.touch(h)
	if ch, ok := s.catalog.Load().channels[h.Channel]; ok {
		r := s.of(h.Channel, ch)
		s.measured(h)
		s.stop(h.Channel, ch, r)
	}
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
