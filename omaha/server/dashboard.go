package server

import (
	"bytes"
	"cmp"
	"embed"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

//go:embed web
var web embed.FS

// maxRows is how many hosts one page lists; the search narrows them down.
const maxRows = 200

// dashboard adds the page for people. It is made here, whole, on each request: it needs no JavaScript, and a small
// script that fetches it again keeps it live.
func (s *Server) dashboard() {
	page := template.Must(template.New("dashboard.html").Funcs(template.FuncMap{
		"bytes": sizeWords, "ago": ago, "words": codeWords,
	}).ParseFS(web, "web/dashboard.html"))
	s.mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) { s.page(w, r, page) })
	s.mux.HandleFunc("POST /ui/channels/{name}", s.form)
	for path, kind := range map[string]string{
		"/ui/style.css": "text/css; charset=utf-8", "/ui/live.js": "text/javascript; charset=utf-8", "/v1/openapi.yaml": "application/yaml",
	} {
		data, err := web.ReadFile("web" + path[strings.LastIndexByte(path, '/'):])
		if err != nil {
			continue // cannot be: the files are part of the program
		}
		s.mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", kind)
			w.Header().Set("Cache-Control", "max-age=300")
			w.Write(data)
		})
	}
}

// view is what the page shows.
type view struct {
	Now      time.Time
	Admin    bool
	Message  string
	Query    string
	Tiles    []tile
	Channels []channelView
	Chart    chart
	Hosts    []hostView
	More     int // hosts that match and are not listed
	Failures []Failure
	Activity []Activity
	Releases []Release
	Problems []string
}

type tile struct {
	Label, Class string
	Count        int
}

type channelView struct {
	Name                                  string
	Channel                               Channel
	Rollout                               string
	Halted                                string
	Hosts, Done, Active, Failed, Waiting  int
	DonePercent, ActivePercent, FailedPct int
	FailedX                               int // where the failed part of the bar begins
}

type hostView struct {
	Host
	Why   string
	Class string // its colour group
}

func (s *Server) page(w http.ResponseWriter, r *http.Request, page *template.Template) {
	now := s.opt.Now().UTC()
	v := s.view(now, strings.ToLower(clean(r.URL.Query().Get("q"))))
	v.Message = clean(r.URL.Query().Get("m"))
	var b bytes.Buffer
	if err := page.Execute(&b, v); err != nil {
		s.log.Error("the page could not be made", "error", err)
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
	w.Write(b.Bytes())
}

func (s *Server) view(now time.Time, query string) view {
	st := s.Status()
	v := view{Now: now, Admin: s.opt.AdminToken != "", Query: query, Failures: st.Failures, Releases: st.Releases, Problems: st.Problems}
	v.Activity = st.Activity[:min(len(st.Activity), 25)]
	slices.SortFunc(v.Failures, func(a, b Failure) int { return b.At.Compare(a.At) })
	v.Failures = v.Failures[:min(len(v.Failures), 50)]
	slices.Reverse(v.Releases)

	counts := map[string]int{}
	perChannel := map[string]*channelView{}
	for name, c := range st.Channels {
		perChannel[name] = &channelView{Name: name, Channel: c, Rollout: policyWords(c), Halted: haltWords(c)}
	}
	for _, h := range st.Hosts {
		view := hostView{Host: h, Why: h.Waits, Class: stateClass(h.State)}
		if view.Why == "" {
			view.Why = h.Why
		}
		if view.Class == "good" && compareVersions(h.Version, st.Channels[h.Channel].Version) < 0 {
			view.Class = "held" // it has not asked since the channel moved
		}
		counts[view.Class]++
		if c := perChannel[h.Channel]; c != nil {
			c.count(h)
		}
		if query != "" && !matches(h, query) {
			continue
		}
		v.Hosts = append(v.Hosts, view)
	}
	// Those that somebody may want to look at come first.
	rank := map[string]int{"bad": 0, "busy": 1, "held": 2, "good": 3}
	slices.SortStableFunc(v.Hosts, func(a, b hostView) int { return cmp.Compare(rank[a.Class], rank[b.Class]) })
	if v.More = max(len(v.Hosts)-maxRows, 0); v.More > 0 {
		v.Hosts = v.Hosts[:maxRows]
	}
	v.Tiles = []tile{
		{"hosts", "all", len(st.Hosts)}, {"up to date", "good", counts["good"]}, {"updating", "busy", counts["busy"]},
		{"waiting", "held", counts["held"]}, {"failed", "bad", counts["bad"]},
	}
	for _, c := range perChannel {
		c.percent()
		v.Channels = append(v.Channels, *c)
	}
	slices.SortFunc(v.Channels, func(a, b channelView) int { return cmp.Compare(a.Name, b.Name) })
	s.mu.Lock()
	samples, current := slices.Clone(s.history.Samples), s.versions()
	s.mu.Unlock()
	v.Chart = newChart(append(samples, Sample{At: now, Versions: current}))
	return v
}

func (c *channelView) count(h Host) {
	c.Hosts++
	switch {
	case compareVersions(h.Version, c.Channel.Version) >= 0:
		c.Done++
	case h.Failed == c.Channel.Version:
		c.Failed++
	case h.State.active():
		c.Active++
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

func matches(h Host, query string) bool {
	for _, s := range []string{h.ID, h.Alias, h.Version, h.Channel, h.Target, string(h.State)} {
		if strings.Contains(strings.ToLower(s), query) {
			return true
		}
	}
	return false
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

// form carries out an order that was given on the page. The token comes with the order and is kept nowhere, so no other
// site can give orders in an administrator's name.
func (s *Server) form(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, 8<<10)
	if err := r.ParseForm(); err != nil {
		http.Error(w, "the form cannot be read", http.StatusBadRequest)
		return
	}
	r.Header.Set("Authorization", "Bearer "+r.PostForm.Get("token"))
	s.admin(func(w http.ResponseWriter, r *http.Request) {
		name, action := r.PathValue("name"), r.PostForm.Get("action")
		p := s.publish
		p.Who = "dashboard"
		message := fmt.Sprintf("%s: %s", name, action)
		if _, err := p.Apply(name, Order{Action: action, Version: r.PostForm.Get("version")}); err != nil {
			message = err.Error()
		}
		if err := s.Reload(); err != nil {
			message = err.Error()
		}
		http.Redirect(w, r, "/?m="+url.QueryEscape(message), http.StatusSeeOther)
	})(w, r)
}

func policyWords(c Channel) string {
	words := []string{"all hosts"}
	if c.Percent > 0 && c.Percent < 100 {
		words[0] = fmt.Sprintf("%d %% of the hosts", c.Percent)
	}
	if c.MaxConcurrent > 0 {
		words = append(words, fmt.Sprintf("%d at once", c.MaxConcurrent))
	}
	if c.MaxPerPeriod > 0 {
		words = append(words, fmt.Sprintf("%d per %s", c.MaxPerPeriod, c.period()))
	}
	if c.StopFailures > 0 {
		words = append(words, fmt.Sprintf("stops after %d failures", c.StopFailures))
	}
	return strings.Join(words, ", ")
}

func haltWords(c Channel) string {
	switch {
	case c.Stopped != "":
		return "stopped: " + c.Stopped
	case c.Paused:
		return "paused"
	}
	return ""
}

func sizeWords(n int64) string {
	switch {
	case n < 1<<10:
		return fmt.Sprintf("%d B", n)
	case n < 1<<20:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	case n < 1<<30:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%.2f GiB", float64(n)/(1<<30))
}

// ago says how long before now t was.
func ago(now, t time.Time) string {
	d := now.Sub(t)
	switch {
	case d < 0:
		return "just now"
	case d < time.Minute:
		return fmt.Sprintf("%d s ago", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(d.Hours()))
	}
	return fmt.Sprintf("%d days ago", int(d.Hours()/24))
}
