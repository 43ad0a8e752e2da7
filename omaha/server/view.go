package server

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// maxRows is how many hosts one page lists; the search narrows them down.
const maxRows = 200

// view is what the page about the fleet shows.
type view struct {
	Now       time.Time
	Title     string
	Admin     bool
	Cert      bool // the browser shows an administrator's certificate: no token is needed
	Uploads   bool
	Message   string
	Error     string
	Query     string
	Filter    string // what narrows the list down, in words
	Keep      map[string]string
	Tiles     []tile
	Channels  []channelView
	Chart     chart
	Holds     []hold
	Hosts     []hostView
	More      int // hosts that match and are not listed
	Semaphore bool
	Reboots   []RebootGroup
	RebootErr string
	Failures  []Failure
	Activity  []Activity
	Releases  []Release
	Deltas    map[string][]Release // by the version that they make
	Audit     []AuditEntry
	Problems  []string
}

type tile struct {
	Label, Class, Link string
	Count              int
}

type channelView struct {
	Name                                  string
	Channel                               Channel
	Rollout, Halted                       string
	Back                                  string // where a rollback would go
	Hosts, Done, Active, Failed, Waiting  int
	Newer                                 int // hosts that run a newer one than the channel holds now
	DonePercent, ActivePercent, FailedPct int
	FailedX                               int // where the failed part of the bar begins
	Chart                                 chart
}

type hostView struct {
	Host
	Why   string
	Class string // its colour group
	Label string
}

// hold is one reason that keeps hosts back, and how many.
type hold struct {
	Who   string // server or host
	Why   string
	Count int
	Link  string
}

// rank puts those that somebody may want to look at first.
func rank(class string) int {
	return slices.Index([]string{"bad", "busy", "held", "newer", "good"}, class)
}

func (s *Server) view(r *http.Request, now time.Time) view {
	q := r.URL.Query()
	c := s.catalog.Load()
	f := filter{channel: clean(q.Get("channel")), class: clean(q.Get("class")), text: strings.ToLower(clean(q.Get("q"))), boot: clean(q.Get("boot"))}
	_, isAdmin := s.opt.Admins.who("", r)
	v := view{
		Now: now, Admin: s.opt.Admins.any(), Cert: isAdmin, Uploads: s.opt.Verify != nil, Query: clean(q.Get("q")),
		Releases: c.sorted(), Problems: s.problems(c), Semaphore: s.reboots.ask != nil, Keep: map[string]string{}, Deltas: map[string][]Release{},
	}
	v.Message, v.Error = s.said(r)
	for key, value := range map[string]string{"channel": f.channel, "class": f.class, "boot": f.boot} {
		if value != "" {
			v.Keep[key] = value
		}
	}
	v.Filter = strings.TrimSpace(strings.Join([]string{classLabel(f.class), on(f.channel), bootLabel(f.boot)}, " "))
	slices.Reverse(v.Releases)
	for _, d := range c.changes() {
		v.Deltas[d.Version] = append(v.Deltas[d.Version], d)
	}

	channels := map[string]*channelView{}
	for name, ch := range s.channels(c) {
		channels[name] = &channelView{Name: name, Channel: ch, Rollout: ch.Words(), Halted: ch.Halted()}
	}
	samples := s.look(&v, c, f, channels, now)
	colours := palette(samples)
	v.Chart = newChart(levels(samples, f.channel), colours)
	for _, cv := range channels {
		cv.percent()
		if v.Admin {
			if i, err := s.publish.back(cv.Channel); err == nil {
				cv.Back = cv.Channel.Previous[i]
			}
		}
		if len(channels) > 1 {
			cv.Chart = newChart(levels(samples, cv.Name), colours)
		}
		v.Channels = append(v.Channels, *cv)
	}
	slices.SortFunc(v.Channels, func(a, b channelView) int { return cmp.Compare(a.Name, b.Name) })
	v.Title = fmt.Sprintf("%d hosts on %d channels", v.Tiles[0].Count, len(v.Channels))

	var err error
	if v.Reboots, err = s.reboots.get(r.Context()); err != nil {
		v.RebootErr = clean(err.Error())
	}
	if v.Audit, err = s.audits(r.Context(), 15); err != nil {
		s.log.Error("the audit log cannot be read", "error", err)
	}
	return v
}

// look goes through the hosts once, with the lock held, and copies no more of them than the page lists.
func (s *Server) look(v *view, c *catalog, f filter, channels map[string]*channelView, now time.Time) []Sample {
	counts, holds, listed, matched := map[string]int{}, map[hold]int{}, top{}, 0
	known, differ := order{}, 0
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire(now)
	for _, h := range s.hosts {
		class := h.class(c, known)
		counts[class]++
		if cv := channels[h.Channel]; cv != nil {
			cv.count(h, known)
		}
		if class != "good" {
			if w := h.holdWords(); w != (hold{}) {
				holds[w]++
			}
		}
		if f, ok := h.failure(); ok {
			v.Failures = append(v.Failures, f)
		}
		if h.Proof != nil {
			if verdict, _ := c.verdict(h.Proof); verdict == Differs {
				differ++
			}
		}
		if f.match(c, h, class) {
			matched++
			listed.add(h, class)
		}
	}
	for _, row := range listed.rows {
		h := *row.host
		c.judge(&h)
		v.Hosts = append(v.Hosts, hostView{Host: h, Why: h.why(), Class: row.class, Label: hostLabel(h.State, row.class)})
	}
	v.More = matched - len(v.Hosts)
	v.Tiles = []tile{{"hosts", "all", "/", len(s.hosts)}}
	for _, t := range []tile{{Label: "up to date", Class: "good"}, {Label: "updating", Class: "busy"}, {Label: "waiting", Class: "held"}, {Label: "failed", Class: "bad"}} {
		t.Count, t.Link = counts[t.Class], "/?class="+t.Class+"#hosts"
		v.Tiles = append(v.Tiles, t)
	}
	if n := counts["newer"]; n > 0 {
		v.Tiles = append(v.Tiles, tile{classLabel("newer"), "newer", "/?class=newer#hosts", n})
	}
	if differ > 0 {
		v.Tiles = append(v.Tiles, tile{"boots differ from their release", "bad", "/?boot=" + Differs + "#hosts", differ})
	}
	for w, n := range holds {
		w.Count = n
		v.Holds = append(v.Holds, w)
	}
	slices.SortFunc(v.Holds, func(a, b hold) int { return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Why, b.Why)) })
	v.Holds = v.Holds[:min(len(v.Holds), 12)]
	slices.SortFunc(v.Failures, func(a, b Failure) int { return b.At.Compare(a.At) })
	v.Failures = v.Failures[:min(len(v.Failures), 50)]
	v.Activity = slices.Clone(s.history.Activity[max(0, len(s.history.Activity)-20):])
	slices.Reverse(v.Activity)
	return append(slices.Clone(s.history.Samples), Sample{At: now, Channels: s.versions(c)})
}

// top keeps the first maxRows hosts by rank and name.
type top struct{ rows []row }

type row struct {
	host  *Host
	class string
}

func (t *top) add(h *Host, class string) {
	r := row{h, class}
	less := func(a, b row) int {
		return cmp.Or(cmp.Compare(rank(a.class), rank(b.class)), cmp.Compare(a.host.name(), b.host.name()), cmp.Compare(a.host.ID, b.host.ID))
	}
	if n := len(t.rows); n == maxRows && less(r, t.rows[n-1]) > 0 {
		return
	}
	i, _ := slices.BinarySearchFunc(t.rows, r, less)
	t.rows = slices.Insert(t.rows, i, r)
	t.rows = t.rows[:min(len(t.rows), maxRows)]
}

// order remembers how versions compare: a hundred thousand hosts run few of them.
type order map[[2]string]int

func (o order) compare(a, b string) int {
	key := [2]string{a, b}
	n, ok := o[key]
	if !ok {
		n = compareVersions(a, b)
		o[key] = n
	}
	return n
}

// name is what people call the host.
func (h *Host) name() string { return cmp.Or(h.Alias, h.ID) }

// why is the reason that counts most: the host's own if it gives one.
func (h *Host) why() string { return cmp.Or(h.Waits, h.Why) }

// class is the host's colour group: bad, busy, held, newer or good.
func (h *Host) class(c *catalog, known order) string {
	class := stateClass(h.State)
	if class == "good" {
		if ch, ok := c.channels[h.Channel]; ok && ch.Version != "" {
			switch order := known.compare(h.Version, ch.Version); {
			case order < 0:
				return "held" // it has not asked since the channel moved
			case order > 0:
				return "newer" // the channel went back, and it did not, or not yet
			}
		}
	}
	return class
}

// holdWords says what keeps the host back, so that equal reasons are equal: hosts name the gate before a colon, and
// the times in the server's own reasons are left out.
func (h *Host) holdWords() hold {
	if h.Waits != "" {
		gate, _, ok := strings.Cut(h.Waits, ":")
		if !ok || len(gate) > 40 {
			gate = h.Waits
		}
		return hold{Who: "the hosts", Why: gate, Link: "/?" + url.Values{"q": {gate}}.Encode() + "#hosts"}
	}
	why, _, _ := strings.Cut(h.Why, ", it may try again")
	if why == "" {
		return hold{}
	}
	return hold{Who: "this server", Why: why, Link: "/?" + url.Values{"q": {why}}.Encode() + "#hosts"}
}

func (h *Host) matches(query string) bool {
	for _, s := range []string{h.ID, h.Alias, h.Version, h.Channel, h.Target, string(h.State), h.Waits, h.Why} {
		if strings.Contains(strings.ToLower(s), query) {
			return true
		}
	}
	return false
}

func (c *channelView) count(h *Host, known order) {
	c.Hosts++
	if c.Channel.Version == "" {
		return
	}
	switch order := known.compare(h.Version, c.Channel.Version); {
	case order == 0:
		c.Done++
	case h.Failed == c.Channel.Version:
		c.Failed++
	case h.State.active():
		c.Active++
	case order > 0:
		c.Newer++
	default:
		c.Waiting++
	}
}

func (c *channelView) percent() {
	if c.Hosts > 0 {
		c.DonePercent, c.ActivePercent, c.FailedPct = c.Done*100/c.Hosts, c.Active*100/c.Hosts, c.Failed*100/c.Hosts
		c.FailedX = c.DonePercent + c.ActivePercent
	}
}

func stateClass(s State) string {
	switch s {
	case Current, Complete:
		return "good"
	case Granted, Downloading, Downloaded, Installed:
		return "busy"
	case Failed, TimedOut:
		return "bad"
	}
	return "held"
}

// stateLabel says a state in a word or two that needs no explanation.
func stateLabel(s State) string {
	switch s {
	case Seen:
		return "new here"
	case Current:
		return "up to date"
	case Complete:
		return "updated"
	case Installed:
		return "waits for reboot"
	case TimedOut:
		return "not heard of"
	}
	return string(s)
}

func hostLabel(s State, class string) string {
	if class == "newer" {
		return classLabel(class)
	}
	if class == "held" && (s == Current || s == Complete) {
		return "has not asked yet"
	}
	return stateLabel(s)
}

func classLabel(class string) string {
	return map[string]string{"good": "up to date", "busy": "updating", "held": "waiting", "newer": "on a newer release", "bad": "failed"}[class]
}

func bootLabel(boot string) string {
	switch boot {
	case Differs:
		return "whose boot differs from the release"
	case AsReleased:
		return "whose boot is as released"
	}
	return ""
}

func on(channel string) string {
	if channel == "" {
		return ""
	}
	return "on " + channel
}

// auditWords says in a few words what an entry of the audit log changed.
func auditWords(e AuditEntry) string {
	var d struct {
		Version, From, SHA256, Channel, Why string
		Size                                int64
		State                               Channel
	}
	if json.Unmarshal(e.Detail, &d) != nil {
		return ""
	}
	if e.What == "publish" && d.From != "" {
		return fmt.Sprintf("release %s as a delta from %s, %s", d.Version, d.From, sizeWords(d.Size))
	}
	if e.What == "publish" {
		return fmt.Sprintf("release %s, %s", d.Version, sizeWords(d.Size))
	}
	if e.What == "stop" {
		return fmt.Sprintf("%s: %s goes no further: %s", d.Channel, d.Version, d.Why)
	}
	words := fmt.Sprintf("%s: %s, %s", d.Channel, cmp.Or(d.State.Version, "no release"), d.State.Words())
	if h := d.State.Halted(); h != "" {
		words += ", " + h
	}
	return words
}
