package server

import (
	"bufio"
	"cmp"
	"context"
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

	"github.com/blang/semver/v4"
)

// The interface for programs that only read. web/openapi.yaml describes it, and a test holds the two together.
func (s *Server) readers() {
	s.mux.HandleFunc("GET /v1/status", s.showStatus)
	s.mux.HandleFunc("GET /v1/channels", s.listChannels)
	s.mux.HandleFunc("GET /v1/channels/{name}", s.showChannel)
	s.mux.HandleFunc("GET /v1/channels/{name}/plan", s.plan)
	s.mux.HandleFunc("GET /v1/releases", s.listReleases)
	s.mux.HandleFunc("GET /v1/hosts", s.listHosts)
	s.mux.HandleFunc("GET /v1/hosts/{id}", s.showHost)
	s.mux.HandleFunc("GET /v1/reboots", s.listReboots)
	s.mux.HandleFunc("GET /v1/audit", s.listAudit)
}

// writeJSON answers with v.
func (s *Server) writeJSON(w http.ResponseWriter, v any) { s.answerJSON(w, http.StatusOK, v) }

func (s *Server) answerJSON(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		s.log.Debug("answer not delivered", "error", err)
	}
}

// refuse answers with an error in words.
func (s *Server) refuse(w http.ResponseWriter, code int, format string, args ...any) {
	s.answerJSON(w, code, struct {
		Error string `json:"error"`
	}{fmt.Sprintf(format, args...)})
}

// channelInfo is a channel as hosts and people see it.
type channelInfo struct {
	Name    string    `json:"name"`
	Version string    `json:"version,omitempty"`
	Size    int64     `json:"size,omitempty"`
	Moved   time.Time `json:"moved,omitzero"`
	Floors  []string  `json:"floors,omitempty"`
	Rollout string    `json:"rollout"`
	Halted  string    `json:"halted,omitempty"`
	Hosts   int       `json:"hosts"`
}

func (s *Server) listChannels(w http.ResponseWriter, _ *http.Request) {
	c := s.catalog.Load()
	channels := s.channels(c)
	hosts := map[string]int{}
	s.mu.Lock()
	for _, h := range s.hosts {
		hosts[h.Channel]++
	}
	s.mu.Unlock()
	out := []channelInfo{}
	for name, ch := range channels {
		out = append(out, channelInfo{
			Name: name, Version: ch.Version, Size: c.releases[ch.Version].Size, Moved: ch.Moved, Floors: ch.Floors,
			Rollout: ch.Words(), Halted: ch.Halted(), Hosts: hosts[name],
		})
	}
	slices.SortFunc(out, func(a, b channelInfo) int { return cmp.Compare(a.Name, b.Name) })
	s.writeJSON(w, struct {
		Schema   string        `json:"schema"`
		Channels []channelInfo `json:"channels"`
	}{"flipside.channels/v1", out})
}

// ChannelDoc is a channel with everything in its file, for programs.
type ChannelDoc struct {
	Schema  string  `json:"schema"`
	Name    string  `json:"name"`
	Channel Channel `json:"channel"`
}

// NewChannelDoc makes the document of a channel.
func NewChannelDoc(name string, c Channel) ChannelDoc {
	return ChannelDoc{"flipside.channel/v1", name, c}
}

func (s *Server) showChannel(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	ch, ok := s.channels(s.catalog.Load())[name]
	if !ok {
		s.refuse(w, http.StatusNotFound, "there is no channel %q", clean(name))
		return
	}
	s.writeJSON(w, NewChannelDoc(name, ch))
}

// Plan is what a host would get on a channel.
type Plan struct {
	Schema    string   `json:"schema"`
	Channel   string   `json:"channel"` // the one that decides, such as stable@arm64-usr for stable
	Running   string   `json:"running"`
	Steps     []string `json:"steps"` // versions in the order in which the host would take them
	Size      int64    `json:"size,omitempty"`
	Downgrade bool     `json:"downgrade,omitempty"`
	Hold      string   `json:"hold,omitempty"` // why the first step would have to wait now
}

// plan answers GET /v1/channels/NAME/plan: what would this host get on that channel? Nothing is granted and no host is noted.
func (s *Server) plan(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	running, err := semver.Parse(q.Get("version"))
	if err != nil {
		s.refuse(w, http.StatusBadRequest, "version is not SemVer 2: three numbers with an optional -pre and +build")
		return
	}
	machine := q.Get("machine")
	if machine != "" && !plainID(machine) {
		s.refuse(w, http.StatusBadRequest, "machine is not 1 to 50 letters, digits or any of . _ : - { }")
		return
	}
	c := s.catalog.Load()
	name, ch, ok := c.channel(r.PathValue("name"), q.Get("board"))
	if !ok {
		s.refuse(w, http.StatusNotFound, "there is no channel %q", clean(r.PathValue("name")))
		return
	}
	p := Plan{Schema: "flipside.channel-plan/v1", Channel: name, Running: running.String(), Steps: []string{}}
	for at := running; ch.Version != "" && len(p.Steps) <= len(ch.Floors); {
		next, err := ch.next(at)
		if err != nil {
			s.refuse(w, http.StatusInternalServerError, "%v", err)
			return
		}
		if order := next.Compare(at); order == 0 || order < 0 && (!ch.Downgrade || len(p.Steps) > 0) {
			break
		}
		p.Steps = append(p.Steps, next.String())
		at = next
	}
	switch {
	case ch.Version == "":
		p.Hold = fmt.Sprintf("channel %s holds no release", name)
	case len(p.Steps) > 0:
		rel := c.releases[p.Steps[0]]
		first, _ := semver.Parse(p.Steps[0])
		p.Size, p.Downgrade = c.payload(rel, running.String(), q.Get("deltas") == "true").Size, first.LT(running)
		now := s.opt.Now()
		s.mu.Lock()
		h := Host{ID: machine}
		if known := s.hosts[machine]; known != nil {
			h = *known
		}
		ro := s.rollouts[name]
		if ro == nil || ro.Version != ch.Version {
			ro = (&rollout{Version: ch.Version}).filled()
		}
		p.Hold = s.held(&h, ro.Stop.on(ch), ro, rel, q.Get("prefix"), now)
		s.mu.Unlock()
	}
	s.writeJSON(w, p)
}

func (s *Server) listReleases(w http.ResponseWriter, _ *http.Request) {
	c := s.catalog.Load()
	s.writeJSON(w, struct {
		Schema   string    `json:"schema"`
		Releases []Release `json:"releases"`
		Deltas   []Release `json:"deltas,omitempty"`
	}{"flipside.releases/v1", c.sorted(), c.changes()})
}

// filter chooses hosts. Empty fields choose all.
type filter struct {
	channel, version, text string
	state                  State
	class                  string // good, behind, busy, held, bad
	boot                   string // AsReleased or Differs
}

func (f filter) match(c *catalog, h *Host, class string) bool {
	if f.boot != "" {
		if h.Proof == nil {
			return false
		}
		if v, _ := c.verdict(h.Proof); v != f.boot {
			return false
		}
	}
	return (f.channel == "" || h.Channel == f.channel) && (f.version == "" || h.Version == f.version) &&
		(f.state == "" || h.State == f.state) && (f.class == "" || class == f.class) && (f.text == "" || h.matches(f.text))
}

const (
	defaultPage = 1000
	maxPage     = 10_000
)

// listHosts answers GET /v1/hosts, one page at a time, by id.
func (s *Server) listHosts(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	f := filter{channel: q.Get("channel"), version: q.Get("version"), state: State(q.Get("state")), text: strings.ToLower(clean(q.Get("q"))), boot: q.Get("boot")}
	limit := defaultPage
	if text := q.Get("limit"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > maxPage {
			s.refuse(w, http.StatusBadRequest, "limit is not a number from 1 to %d", maxPage)
			return
		}
		limit = n
	}
	after, total := q.Get("after"), 0
	var ids []string
	s.mu.Lock()
	s.expire(s.opt.Now())
	c := s.catalog.Load()
	for id, h := range s.hosts {
		if !f.match(c, h, "") {
			continue
		}
		total++
		if id > after {
			ids = append(ids, id)
		}
	}
	s.mu.Unlock()
	slices.Sort(ids)
	next := ""
	if len(ids) > limit {
		ids = slices.Clone(ids[:limit]) // the rest is not kept for as long as the answer takes
		next = ids[limit-1]
	}
	d := s.document(w)
	d.member("schema", "flipside.hosts/v1")
	d.member("total", total)
	list(d, "hosts", ids, func(h Host) (Host, bool) { return h, true })
	if next != "" {
		d.member("next", next)
	}
	d.end()
}

// document is a JSON object that is written one member after the other. Anybody may ask for the hosts, and take nothing of the answer: so no more than a few of them are
// in memory at once.
type document struct {
	s   *Server
	out *bufio.Writer
	err error
	any bool
}

func (s *Server) document(w http.ResponseWriter) *document {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	d := &document{s: s, out: bufio.NewWriterSize(w, 16<<10)}
	d.write("{")
	return d
}

func (d *document) write(text string) {
	if d.err == nil {
		_, d.err = d.out.WriteString(text)
	}
}

func (d *document) key(key string) {
	if d.any {
		d.write(",")
	}
	d.any = true
	d.write("\n  \"" + key + "\": ")
}

func (d *document) value(v any, indent string) {
	data, err := json.MarshalIndent(v, indent, "  ")
	if d.err == nil {
		d.err = err
	}
	d.write(string(data))
}

func (d *document) member(key string, v any) {
	d.key(key)
	d.value(v, "  ")
}

// atOnce is how many hosts are copied at once, with the lock held.
const atOnce = 100

// list writes what of makes of the hosts, but of those that are forgotten meanwhile.
func list[T any](d *document, key string, ids []string, of func(Host) (T, bool)) {
	d.key(key)
	d.write("[")
	before := "\n    "
	for some := range slices.Chunk(ids, atOnce) {
		if d.err != nil {
			return
		}
		hosts := make([]Host, 0, len(some))
		d.s.mu.Lock()
		c := d.s.catalog.Load()
		for _, id := range some {
			if h := d.s.hosts[id]; h != nil {
				hosts = append(hosts, *h)
			}
		}
		d.s.mu.Unlock()
		for i := range hosts {
			c.judge(&hosts[i])
			if v, ok := of(hosts[i]); ok {
				d.write(before)
				d.value(v, "    ")
				before = ",\n    "
			}
		}
	}
	if before != "\n    " {
		d.write("\n  ")
	}
	d.write("]")
}

// end writes what is left. An answer that broke off is no JSON, and nobody takes it for a whole one.
func (d *document) end() {
	d.write("\n}\n")
	if d.err == nil {
		d.err = d.out.Flush()
	}
	if d.err != nil {
		d.s.log.Debug("answer not delivered", "error", d.err)
	}
}

// HostDetail is one host with what it did.
type HostDetail struct {
	Schema string     `json:"schema"`
	Host   Host       `json:"host"`
	Words  string     `json:"failure,omitempty"` // its last failure, in words
	Events []Activity `json:"events"`            // newest first
}

func (s *Server) detail(id string) (HostDetail, bool) {
	h, ok := s.Host(id)
	if !ok {
		return HostDetail{}, false
	}
	d := HostDetail{Schema: "flipside.host/v1", Host: h, Events: s.events(id)}
	if h.Failed != "" {
		d.Words = codeWords(h.ErrorCode)
	}
	return d, true
}

func (s *Server) showHost(w http.ResponseWriter, r *http.Request) {
	d, ok := s.detail(r.PathValue("id"))
	if !ok {
		s.refuse(w, http.StatusNotFound, "no host %q has asked here", clean(r.PathValue("id")))
		return
	}
	s.writeJSON(w, d)
}

// AuditEntry is one line of audit.jsonl.
type AuditEntry struct {
	At     time.Time       `json:"at"`
	Who    string          `json:"who"`
	What   string          `json:"what"`
	Detail json.RawMessage `json:"detail"`
}

func (s *Server) listAudit(w http.ResponseWriter, r *http.Request) {
	entries, err := s.audits(r.Context(), 200)
	if err != nil {
		s.refuse(w, http.StatusInternalServerError, "the audit log cannot be read")
		s.log.Error("the audit log cannot be read", "error", err)
		return
	}
	s.writeJSON(w, struct {
		Schema  string       `json:"schema"`
		Entries []AuditEntry `json:"entries"`
	}{"flipside.audit/v1", entries})
}

// auditTail is how much of the end of the audit log is looked at.
const auditTail = 512 << 10

// audits returns the last n entries of the audit log, newest first. A line that was cut off by a crash is left out.
func (s *Server) audits(ctx context.Context, n int) ([]AuditEntry, error) {
	out := []AuditEntry{}
	f, err := os.Open(filepath.Join(s.dir, "audit.jsonl"))
	if errors.Is(err, os.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(max(0, info.Size()-auditTail), io.SeekStart); err != nil {
		return nil, err
	}
	lines := bufio.NewScanner(&ctxReader{ctx, f})
	lines.Buffer(nil, auditTail)
	for lines.Scan() {
		var e AuditEntry
		if json.Unmarshal(lines.Bytes(), &e) == nil {
			out = append(out, e)
		}
	}
	slices.Reverse(out)
	return out[:min(n, len(out))], lines.Err()
}
