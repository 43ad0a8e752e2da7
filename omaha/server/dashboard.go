package server

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"embed"
	"encoding/base64"
	"errors"
	"fmt"
	"html/template"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"
)

//go:embed web
var web embed.FS

// dashboard adds the pages for people. They are made here, whole, on each request: they need no JavaScript, and a small
// script that fetches them again keeps them live.
func (s *Server) dashboard() {
	pages := template.Must(template.New("pages").Funcs(template.FuncMap{
		"bytes": sizeWords, "ago": ago, "words": codeWords, "duration": span, "label": stateLabel, "class": stateClass,
		"detail": auditWords, "word": shellWord, "hostPath": func(id string) string { return "/hosts/" + url.PathEscape(id) }, "channelQuery": func(name string) string { return "/?" + url.Values{"channel": {name}}.Encode() },
	}).ParseFS(web, "web/*.html"))
	s.mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		v := s.view(r, s.opt.Now().UTC())
		s.page(w, pages.Lookup("dashboard.html"), http.StatusOK, v)
	})
	s.mux.HandleFunc("GET /hosts/{id}", func(w http.ResponseWriter, r *http.Request) {
		d, ok := s.detail(r.PathValue("id"))
		v := hostPage{Now: s.opt.Now().UTC(), Title: d.Host.name(), Detail: d, ID: clean(r.PathValue("id"))}
		code := http.StatusOK
		if !ok {
			v.Title, code = "unknown host", http.StatusNotFound
		} else {
			c := s.catalog.Load()
			v.Channel, v.Holds, v.Class = s.channels(c)[d.Host.Channel], d.Host.Channel != "", d.Host.class(c, order{})
			v.Label = hostLabel(d.Host.State, v.Class)
		}
		s.page(w, pages.Lookup("host.html"), code, v)
	})
	var foreign http.CrossOriginProtection
	s.mux.Handle("POST /ui/channels/{name}", foreign.Handler(http.HandlerFunc(s.form)))
	s.mux.Handle("POST /ui/publish", foreign.Handler(http.HandlerFunc(s.publishForm)))
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

// hostPage is what the page about one host shows.
type hostPage struct {
	Now     time.Time
	Title   string
	ID      string
	Detail  HostDetail
	Channel Channel
	Holds   bool // Channel is the host's

	Class, Label string // of where the host stands
}

func (s *Server) page(w http.ResponseWriter, page *template.Template, code int, v any) {
	var b bytes.Buffer
	if err := page.Execute(&b, v); err != nil {
		s.log.Error("the page could not be made", "error", err)
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	h.Set("Referrer-Policy", "same-origin")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
	w.WriteHeader(code)
	w.Write(b.Bytes())
}

// form carries out an order that was given on the page. The token comes with the order and is kept nowhere.
func (s *Server) form(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, 8<<10)
	if err := r.ParseForm(); err != nil {
		http.Error(w, "the form cannot be read", http.StatusBadRequest)
		return
	}
	p, ok := s.formAdmin(w, r, r.PostForm.Get("token"))
	if !ok {
		return
	}
	name, o := r.PathValue("name"), Order{Action: r.PostForm.Get("action"), Version: r.PostForm.Get("version")}
	if text := r.PostForm.Get("percent"); o.Action == "limit" && text != "" {
		var n int
		if _, err := fmt.Sscanf(text, "%d", &n); err != nil {
			s.say(w, r, fmt.Errorf("percent %q is not a number", clean(text)), "")
			return
		}
		o.Limits = &Limits{Percent: &n}
	}
	_, err := p.Apply(name, o)
	done := map[string]string{
		"move": "moved to " + o.Version, "pause": "paused", "resume": "goes on", "rollback": "moved back", "limit": "changed",
	}[o.Action]
	s.say(w, r, errors.Join(err, s.Reload()), fmt.Sprintf("Channel %s: %s.", name, done))
}

// formAdmin says on whose behalf a form acts, or answers that it is nobody's.
func (s *Server) formAdmin(w http.ResponseWriter, r *http.Request, token string) (Publisher, bool) {
	if !s.opt.Admins.any() {
		http.Error(w, "administration over HTTP is switched off", http.StatusForbidden)
		return Publisher{}, false
	}
	who, ok := s.opt.Admins.who(token, r)
	if !ok {
		http.Error(w, "the token is not one of an administrator; go back and try again", http.StatusUnauthorized)
		return Publisher{}, false
	}
	p := s.as(who)
	p.Who += ", on the page"
	return p, true
}

// saidCookie holds what the page is to say, for a minute. It is sealed, and in no address: nobody else can let the page say something in the server's name.
const saidCookie = "flipside-said"

// say goes back to the page with what became of a form.
func (s *Server) say(w http.ResponseWriter, r *http.Request, err error, done string) {
	text := "m" + clean(done)
	if err != nil {
		text = "e" + clean(err.Error())
	}
	http.SetCookie(w, &http.Cookie{
		Name: saidCookie, Value: base64.RawURLEncoding.EncodeToString(append(s.sealSaid(text), text...)), Path: "/", MaxAge: 60,
		HttpOnly: true, Secure: r.TLS != nil, SameSite: http.SameSiteStrictMode,
	})
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

// said reads what say has sent along.
func (s *Server) said(r *http.Request) (message, failure string) {
	c, err := r.Cookie(saidCookie)
	if err != nil {
		return "", ""
	}
	data, err := base64.RawURLEncoding.DecodeString(c.Value)
	if err != nil || len(data) <= sha256.Size {
		return "", ""
	}
	text := string(data[sha256.Size:])
	if !hmac.Equal(data[:sha256.Size], s.sealSaid(text)) {
		return "", ""
	}
	if text[0] == 'e' {
		return "", text[1:]
	}
	return text[1:], ""
}

func (s *Server) sealSaid(text string) []byte {
	mac := hmac.New(sha256.New, s.nonceKey[:])
	mac.Write([]byte("what the page says: " + text))
	return mac.Sum(nil)
}

// publishForm takes a payload from the page. The fields come in the order of the form, the file last, and it is never
// held in memory.
func (s *Server) publishForm(w http.ResponseWriter, r *http.Request) {
	parts, err := r.MultipartReader()
	if err != nil {
		http.Error(w, "the form cannot be read", http.StatusBadRequest)
		return
	}
	fields := map[string]string{}
	for {
		part, err := parts.NextPart()
		if err != nil {
			s.say(w, r, errors.New("the form holds no payload"), "")
			return
		}
		if part.FormName() != "payload" {
			data, err := io.ReadAll(io.LimitReader(part, 4<<10))
			if err != nil || len(fields) > 8 {
				http.Error(w, "the form cannot be read", http.StatusBadRequest)
				return
			}
			fields[part.FormName()] = strings.TrimSpace(string(data))
			continue
		}
		p, ok := s.formAdmin(w, r, fields["token"])
		if !ok {
			return
		}
		rel, err := s.receive(w, r, p, Release{Version: fields["version"], From: fields["from"]}, fields["channel"], part)
		done := fmt.Sprintf("Release %s is published.", rel.Version)
		if rel.From != "" {
			done = fmt.Sprintf("The delta from %s to release %s is published.", rel.From, rel.Version)
		}
		if fields["channel"] != "" {
			done = fmt.Sprintf("Release %s is published, and channel %s moved to it.", rel.Version, fields["channel"])
		}
		s.say(w, r, err, done)
		return
	}
}

// shellWord writes a word so that a shell takes it for just that, in a command that somebody may copy from the page.
func shellWord(s string) string {
	if bare.MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

var bare = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:-]*$`)

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
	if now.Before(t) {
		return "just now"
	}
	return span(now, t) + " ago"
}

// span says how much time lies between t and now.
func span(now, t time.Time) string {
	d := now.Sub(t)
	switch {
	case d < 0:
		return "0 s"
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}
