package server

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Admins says who may change channels over HTTP. The zero value lets nobody.
type Admins struct {
	Tokens map[string]string // the secret of each administrator, by a name for the audit log
	// Certs are the common names of client certificates that count as administrators. The listener's TLS configuration
	// has to have verified the certificate.
	Certs []string
}

// any says whether there is an administrator at all.
func (a Admins) any() bool { return len(a.Tokens) > 0 || len(a.Certs) > 0 }

// who returns the administrator behind a token or the connection's certificate.
func (a Admins) who(token string, r *http.Request) (string, bool) {
	got := sha256.Sum256([]byte(token))
	name, found := "", false
	for n, secret := range a.Tokens { // all of them, so that the time does not tell which one was nearly right
		want := sha256.Sum256([]byte(secret))
		if secret != "" && subtle.ConstantTimeCompare(got[:], want[:]) == 1 {
			name, found = "token "+n, true
		}
	}
	if found {
		return name, true
	}
	if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		if cn := r.TLS.VerifiedChains[0][0].Subject.CommonName; cn != "" && slices.Contains(a.Certs, cn) {
			return "certificate " + cn, true
		}
	}
	return "", false
}

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
	Percent            *int `json:"percent,omitempty"`
	MaxConcurrent      *int `json:"max_concurrent,omitempty"`
	MaxPerPeriod       *int `json:"max_per_period,omitempty"`
	StopFailures       *int `json:"stop_after_failures,omitempty"`
	StopTimeouts       *int `json:"stop_after_timeouts,omitempty"`
	StopDiffers        *int `json:"stop_after_differing_boots,omitempty"`
	StopFailurePercent *int `json:"stop_failure_percent,omitempty"`
}

// Withdraw lets no host on a channel get a version any more, or with undo lets them get it again. It may be one that is not published here, yet: known says
// whether it is.
func (p *Publisher) Withdraw(channel, version string, undo bool) (c Channel, known bool, err error) {
	if err := checkVersion(version); err != nil && !undo { // what is on the list for whatever reason can be taken off
		return c, false, err
	}
	if _, err := p.Channel(channel); err != nil {
		return c, false, err
	}
	c, err = p.Change(channel, func(c *Channel) error {
		c.Blacklist = slices.DeleteFunc(c.Blacklist, func(v string) bool { return v == version })
		if !undo {
			c.Blacklist = append(c.Blacklist, version)
		}
		return nil
	})
	return c, err == nil && p.published(version) == nil, err
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
				if l.Percent != nil {
					c.Percent = l.Percent
				}
				for from, to := range map[*int]*int{l.MaxConcurrent: &c.MaxConcurrent, l.MaxPerPeriod: &c.MaxPerPeriod,
					l.StopFailures: &c.StopFailures, l.StopTimeouts: &c.StopTimeouts, l.StopDiffers: &c.StopDiffers,
					l.StopFailurePercent: &c.StopFailurePercent} {
					if from != nil {
						*to = *from
					}
				}
			}
			for _, version := range o.Blacklist {
				if err := checkVersion(version); err != nil {
					return err
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

// admins adds what only administrators may do.
func (s *Server) admins() {
	s.mux.HandleFunc("POST /v1/admin/channels/{name}", s.admin(s.order))
	s.mux.HandleFunc("PUT /v1/admin/releases/{version}", s.admin(s.upload))
	s.mux.HandleFunc("POST /v1/admin/hosts/{id}/key", s.admin(s.acceptKey))
	s.mux.HandleFunc("GET /v1/admin/backup", s.admin(s.backup))
}

// admin lets a handler be reached by administrators only, with a publisher that signs its changes with their name.
func (s *Server) admin(h func(http.ResponseWriter, *http.Request, Publisher)) http.HandlerFunc {
	var foreign http.CrossOriginProtection // a page elsewhere must not use a certificate that the browser shows by itself
	return func(w http.ResponseWriter, r *http.Request) {
		if err := foreign.Check(r); err != nil {
			s.refuse(w, http.StatusForbidden, "a request from another site is not obeyed")
			return
		}
		if !s.opt.Admins.any() {
			s.refuse(w, http.StatusForbidden, "administration over HTTP is switched off")
			return
		}
		token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		who, ok := s.opt.Admins.who(token, r)
		if !ok {
			w.Header().Set("WWW-Authenticate", `Bearer realm="flipside"`)
			s.refuse(w, http.StatusUnauthorized, "a token or a certificate of an administrator is needed")
			return
		}
		h(w, r, s.as(who))
	}
}

// as is the server's publisher in somebody's name.
func (s *Server) as(who string) Publisher {
	p := s.publish
	p.Who = who
	return p
}

// order answers POST /v1/admin/channels/NAME.
func (s *Server) order(w http.ResponseWriter, r *http.Request, p Publisher) {
	var o Order
	d := json.NewDecoder(io.LimitReader(r.Body, maxRequest))
	d.DisallowUnknownFields()
	if err := d.Decode(&o); err != nil {
		s.refuse(w, http.StatusBadRequest, "the order cannot be read: %s", clean(err.Error()))
		return
	}
	name := r.PathValue("name")
	_, err := p.Apply(name, o)
	switch {
	case errors.Is(err, ErrLocked):
		s.refuse(w, http.StatusServiceUnavailable, "%s", clean(err.Error()))
		return
	case errors.Is(err, ErrUnknown):
		s.refuse(w, http.StatusNotFound, "%s", clean(err.Error()))
		return
	case errors.Is(err, errUnlogged):
		s.refuse(w, http.StatusInternalServerError, "%s", clean(errors.Join(err, s.Reload()).Error()))
		return
	case err != nil:
		s.refuse(w, http.StatusBadRequest, "%s", clean(err.Error()))
		return
	}
	if err := s.Reload(); err != nil {
		s.refuse(w, http.StatusInternalServerError, "the change is written and cannot be read back")
		return
	}
	s.writeJSON(w, NewChannelDoc(name, s.channels(s.catalog.Load())[name]))
}

const (
	maxPayload  = 16 << 30
	uploadGrace = 6 * time.Hour // for the slowest upload that is waited for
)

// upload answers PUT /v1/admin/releases/VERSION: its body is a payload, with ?from=VERSION a delta. With ?channel=NAME the channel moves to it.
func (s *Server) upload(w http.ResponseWriter, r *http.Request, p Publisher) {
	channel := r.URL.Query().Get("channel")
	rel, err := s.receive(w, r, p, Release{Version: r.PathValue("version"), From: r.URL.Query().Get("from")}, channel, r.Body)
	if err != nil {
		s.refuse(w, uploadStatus(err), "%s", clean(err.Error()))
		return
	}
	s.writeJSON(w, struct {
		Schema  string  `json:"schema"`
		Release Release `json:"release"`
		Channel string  `json:"channel,omitempty"`
	}{"flipside.release/v1", rel, channel})
}

// errUnverified is why an upload is refused by a server that cannot check signatures.
var errUnverified = errors.New("this server has no key to check an upload with")

func uploadStatus(err error) int {
	switch {
	case errors.Is(err, errUnverified):
		return http.StatusForbidden
	case errors.Is(err, ErrExists):
		return http.StatusConflict
	case errors.Is(err, ErrLocked):
		return http.StatusServiceUnavailable
	}
	return http.StatusBadRequest
}

// receive takes a payload from body, checks and publishes it. Without a way to check signatures nothing is taken: who
// holds the token must not be able to give hosts what nobody signed.
func (s *Server) receive(w http.ResponseWriter, r *http.Request, p Publisher, rel Release, channel string, body io.Reader) (Release, error) {
	if p.Verify == nil {
		return Release{}, errUnverified
	}
	if err := checkVersion(rel.Version); err != nil {
		return Release{}, err
	}
	if channel != "" {
		if err := checkChannel(channel); err != nil {
			return Release{}, err
		}
	}
	rc := http.NewResponseController(w)
	if err := rc.SetReadDeadline(time.Now().Add(uploadGrace)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return Release{}, err
	}
	defer func() { rc.SetWriteDeadline(time.Now().Add(s.patience)) }() // the time for the answer begins when there is one
	f, err := os.CreateTemp(filepath.Join(s.dir, "payloads"), ".upload-")
	if err != nil {
		return Release{}, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	n, err := io.Copy(f, io.LimitReader(body, maxPayload+1))
	if err != nil {
		return Release{}, fmt.Errorf("the upload broke off after %d bytes", n)
	}
	if n > maxPayload {
		return Release{}, fmt.Errorf("the upload is larger than %d bytes", int64(maxPayload))
	}
	if rel, _, err = p.Publish(r.Context(), rel, f.Name(), channel); err != nil {
		// The name of a temporary file means nothing to whoever sent it.
		return Release{}, renamed{err, f.Name()}
	}
	return rel, s.Reload()
}

// renamed hides a temporary file's name in an error's words.
type renamed struct {
	error
	name string
}

func (e renamed) Error() string {
	return strings.ReplaceAll(e.error.Error(), fmt.Sprintf("%q", e.name), "the upload")
}
func (e renamed) Unwrap() error { return e.error }

// backup answers GET /v1/admin/backup with a consistent copy of the state file.
func (s *Server) backup(w http.ResponseWriter, r *http.Request, _ Publisher) {
	f, err := s.copied(r.Context())
	if err != nil {
		s.log.Error("backup", "error", err)
		s.refuse(w, http.StatusInternalServerError, "%s", clean(err.Error()))
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		s.refuse(w, http.StatusInternalServerError, "%s", clean(err.Error()))
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Disposition", `attachment; filename="state.db"`)
	w.Header().Set("Content-Length", strconv.FormatInt(info.Size(), 10)) // so that nobody takes half a copy for a whole one
	if _, err := io.Copy(&rolling{ResponseWriter: w, patience: s.patience}, f); err != nil {
		s.log.Warn("a backup was not taken whole", "error", err)
	}
}
