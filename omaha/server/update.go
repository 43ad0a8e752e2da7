package server

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/blang/semver/v4"
	wire "github.com/flatcar/go-omaha/omaha"

	"github.com/flipside-linux/flipside/omaha/internal/strict"
)

// maxRequest bounds a request; update_engine's are below 1 KiB.
const maxRequest = 64 << 10

func requestLimits() strict.Limits {
	return strict.Limits{
		Bytes: maxRequest, Depth: 8, Elements: 256, Attributes: 40, Value: 1 << 10, Text: 4 << 10,
		Children: map[string]int{"request/app": 16, "request/os": 1, "app/ping": 1, "app/updatecheck": 1, "app/event": 32},
	}
}

// responseDoc is go-omaha's response with the two attributes of an update check that it does not know.
type responseDoc struct {
	wire.Response
	Apps []appDoc `xml:"app"`
}

type appDoc struct {
	*wire.AppResponse
	UpdateCheck *checkDoc `xml:"updatecheck"`
}

type checkDoc struct {
	wire.UpdateResponse
	PollInterval int    `xml:"PollInterval,attr,omitempty"` // seconds
	Hold         string `xml:"hold,attr,omitempty"`         // why a noupdate is a "not yet"
}

// requestDoc is go-omaha's request with what our own client says beyond the protocol.
type requestDoc struct {
	wire.Request
	Apps []appReport `xml:"app"`
}

type appReport struct {
	wire.AppRequest
	Hold *string `xml:"hold,attr"` // why the host does not move
}

// update answers POST /v1/update.
func (s *Server) update(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	defer func() { s.metrics.seconds.Observe(time.Since(start).Seconds()) }()
	data, err := strict.Read(r.Body, maxRequest)
	if err != nil {
		s.metrics.refused.Inc()
		http.Error(w, "the request cannot be read", http.StatusBadRequest)
		return
	}
	var req requestDoc
	if err := strict.Decode(data, "request", requestLimits(), &req); err != nil || req.Protocol != "3.0" {
		s.metrics.refused.Inc()
		http.Error(w, "the request is not an Omaha 3.0 document", http.StatusBadRequest)
		return
	}
	doc := responseDoc{Response: wire.Response{Protocol: "3.0", Server: "flipside", DayStart: wire.DayStart{ElapsedSeconds: "0"}}}
	for i := range req.Apps {
		part, saved := s.app(&req.Apps[i].AppRequest, req.Apps[i].Hold, s.base(r))
		if saved != nil {
			if err := s.saved(r.Context(), saved); err != nil {
				http.Error(w, "the server cannot save its state", http.StatusServiceUnavailable)
				return
			}
		}
		doc.Apps = append(doc.Apps, part)
	}
	body, err := s.write(doc)
	if err != nil {
		s.log.Error("an answer could not be written", "error", err)
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/xml; charset=utf-8")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.Header().Set("Cache-Control", "no-store")
	w.Write(body)
}

// current is what one host in its right place is told, and so are nearly all of a fleet: it is written once.
type current struct {
	id     string
	ping   wire.PingResponse
	status wire.UpdateStatus
	poll   int
}

// maxCurrent bounds how many such answers are kept; hosts choose how they spell the id of the application.
const maxCurrent = 64

// write writes an answer.
func (s *Server) write(doc responseDoc) ([]byte, error) {
	var key current
	plain := false
	if len(doc.Apps) == 1 {
		a := doc.Apps[0]
		if c := a.UpdateCheck; a.Status == wire.AppOK && a.Ping != nil && len(a.Events) == 0 && c != nil && c.Status == wire.NoUpdate && c.Hold == "" {
			key, plain = current{a.ID, *a.Ping, c.Status, c.PollInterval}, true
		}
	}
	if plain {
		s.written.Lock()
		body, ok := s.written.answers[key]
		s.written.Unlock()
		if ok {
			return body, nil
		}
	}
	body, err := xml.Marshal(doc)
	if err != nil {
		return nil, err
	}
	body = append([]byte(xml.Header), body...)
	if plain {
		s.written.Lock()
		defer s.written.Unlock()
		if len(s.written.answers) < maxCurrent {
			s.written.answers[key] = body
		}
	}
	return body, nil
}

// app answers for one application. Events come first: they may change what the check may answer. The answer must not
// leave before saved is done.
func (s *Server) app(req *wire.AppRequest, waits *string, base string) (out appDoc, saved *commit) {
	out = appDoc{AppResponse: &wire.AppResponse{ID: req.ID, Status: wire.AppOK}}
	refuse := func(status wire.AppStatus) {
		out.Status = status
		if req.UpdateCheck != nil {
			out.UpdateCheck = &checkDoc{UpdateResponse: wire.UpdateResponse{Status: wire.UpdateInternalError}}
		}
	}
	if s.opt.AppID != "" && !sameApp(req.ID, s.opt.AppID) {
		refuse(wire.AppUnknownID)
		return out, nil
	}
	running, err := semver.Parse(req.Version)
	if err != nil || checkVersion(req.Version) != nil || !plainID(req.MachineID) {
		refuse("error-instanceRegistrationFailed")
		return out, nil
	}
	if req.Ping != nil {
		out.AddPing()
	}
	for range req.Events {
		out.AddEvent()
	}

	now := s.opt.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.catalog.Load()
	s.expire(now)
	if _, known := s.hosts[req.MachineID]; !known && len(s.hosts) >= s.opt.MaxHosts {
		s.log.Error("too many hosts: a new one is refused", "limit", s.opt.MaxHosts)
		refuse("error-instanceRegistrationFailed")
		return out, nil
	}
	var prior Host // what was known before this request
	if known := s.hosts[req.MachineID]; known != nil {
		prior = *known
	}
	h := s.register(req, waits, now)
	before := *h
	defer func() {
		h.intern()
		prior.LastSeen = h.LastSeen
		if *h == prior {
			s.sighted(h)
			return
		}
		s.touch(h)
		if h.State != before.State {
			s.changed(h, before.State, now)
		}
		if h.State != before.State || h.Target != before.Target || h.Failures != before.Failures || h.Failed != before.Failed {
			saved = s.durable()
		}
	}()
	name, ch, known := c.channel(req.Track, req.Board)
	if known {
		h.Channel = name
	}
	for _, e := range req.Events {
		s.event(c, h, e, now)
	}
	if req.UpdateCheck == nil {
		return out, nil
	}
	if !known {
		h.Why = fmt.Sprintf("there is no channel %q", req.Track)
		refuse("error-unknownApplicationOrGroup")
		return out, nil
	}
	check := &checkDoc{PollInterval: int(duration(ch.PollInterval, 0) / time.Second)}
	out.UpdateCheck = check
	rel, why := s.decide(c, h, name, ch, running, req.UpdateCheck.TargetVersionPrefix, now)
	h.Why = why
	answer := "current"
	switch {
	case rel != nil:
		answer = "offer"
	case why != "":
		answer = "hold"
	}
	s.metrics.checks.WithLabelValues(name, answer).Inc()
	if rel == nil {
		check.Status, check.Hold = wire.NoUpdate, why
		return out, nil
	}
	check.Status = wire.UpdateOK
	check.fill(c.payload(*rel, req.Version, req.DeltaOK), base)
	return out, nil
}

// fill writes an offer in the places where all clients look, with SHA-256 in both spellings.
func (check *checkDoc) fill(rel Release, base string) {
	for _, u := range rel.URLs {
		check.AddURL(u)
	}
	check.AddURL(base)
	sum, _ := hex.DecodeString(rel.SHA256) // the catalog holds only releases whose digest can be read
	m := check.AddManifest(rel.Version)
	p := m.AddPackage()
	p.Name, p.Size, p.SHA256, p.SHA1, p.Required = rel.Payload, uint64(rel.Size), rel.SHA256, rel.SHA1, true
	a := m.AddAction("postinstall")
	a.SHA256, a.DisablePayloadBackoff = base64.StdEncoding.EncodeToString(sum), true
	a.IsDeltaPayload = rel.From != ""
	if rel.MetadataSize > 0 {
		a.MetadataSize = strconv.FormatInt(rel.MetadataSize, 10)
	}
}

// changed notes that a host came into another state.
func (s *Server) changed(h *Host, from State, now time.Time) {
	s.metrics.events.WithLabelValues(string(h.State)).Inc()
	a := Activity{At: now.UTC(), Host: h.ID, Alias: h.Alias, From: from, To: h.State, Version: h.Target}
	switch h.State {
	case Failed:
		a.Version, a.Code = h.Failed, h.ErrorCode
	case Complete, Current:
		a.Version = h.Version
	}
	s.history.note(a)
	if s.store != nil {
		s.store.events = append(s.store.events, a)
	}
}

// register notes that a host was here.
func (s *Server) register(req *wire.AppRequest, waits *string, now time.Time) *Host {
	h, ok := s.hosts[req.MachineID]
	if !ok {
		h = &Host{ID: req.MachineID, FirstSeen: now, State: Seen, ChangedAt: now}
		s.hosts[req.MachineID] = h
	}
	h.LastSeen = now
	h.Version, h.Track, h.Board = req.Version, clean(req.Track), clean(req.Board)
	h.Alias, h.OEM = clean(req.MachineAlias), clean(req.OEM)
	if waits != nil {
		h.Waits = clean(*waits)
	} else if req.UpdateCheck != nil || req.Ping != nil {
		h.Waits = ""
	}
	return h
}

// sameApp compares application ids as clients write them: with or without braces, in any case.
func sameApp(a, b string) bool {
	return strings.EqualFold(strings.Trim(a, "{}"), strings.Trim(b, "{}"))
}

// idPattern is what may identify a machine: the digits of a machine id, a UUID in braces or without, a plain name. Ids stand in addresses and in commands that the page
// shows, and who asks chooses them.
var idPattern = regexp.MustCompile(`^[A-Za-z0-9{][A-Za-z0-9._:{}-]{0,49}$`)

func plainID(id string) bool { return idPattern.MatchString(id) }

// clean bounds a text from a host and takes away what could disturb a terminal or page.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
	if len(s) > 200 {
		s = strings.ToValidUTF8(s[:200], "")
	}
	return s
}

// compareVersions puts what is no version before all that are.
func compareVersions(a, b string) int {
	x, xErr := semver.Parse(a)
	y, yErr := semver.Parse(b)
	switch {
	case xErr != nil && yErr != nil:
		return strings.Compare(a, b)
	case xErr != nil:
		return -1
	case yErr != nil:
		return 1
	}
	return x.Compare(y)
}
