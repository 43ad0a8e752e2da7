package server

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/google/renameio/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/flipside-linux/flipside/omaha/shallow"
)

// folders are what a release directory is made of.
func folders() []string { return []string{"channels", "releases", "deltas", "payloads"} }

func makeDirs(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, sub := range folders() {
		if err := makeDir(filepath.Join(dir, sub)); err != nil {
			return err
		}
	}
	return nil
}

// makeDir makes a folder that belongs to whom the one above belongs.
func makeDir(path string) error {
	err := os.Mkdir(path, 0o755)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return inherit(f, filepath.Dir(path))
}

func readTOML(path string, v any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := decodeTOML(data, v); err != nil {
		return fmt.Errorf("%s: %w", filepath.Base(path), err)
	}
	return nil
}

func decodeTOML(data []byte, v any) error {
	meta, err := shallow.Decode(data, v)
	if err != nil {
		return err
	}
	if extra := meta.Undecoded(); len(extra) > 0 {
		return fmt.Errorf("unknown key %q", extra[0].String())
	}
	return nil
}

// What the files say about themselves to whoever opens one.
const (
	channelHead = "# What hosts on this channel get, and how fast. Edit it as you like: a running server notices.\n# Commands that change the channel write this file anew, without other comments.\n\n"
	releaseHead = "# One published release. It never changes.\n\n"
)

// writeTOML replaces a file whole: flushed, renamed, and its directory flushed as well.
func writeTOML(path string, v any, head string) error {
	var b bytes.Buffer
	b.WriteString(head)
	if err := toml.NewEncoder(&b).Encode(v); err != nil {
		return err
	}
	f, err := pending(path)
	if err != nil {
		return err
	}
	defer f.Cleanup()
	if _, err := f.Write(b.Bytes()); err != nil {
		return err
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// pending begins a file that takes its place whole.
func pending(path string) (*renameio.PendingFile, error) {
	folder := filepath.Dir(path)
	f, err := renameio.NewPendingFile(path, renameio.WithPermissions(0o644), renameio.WithTempDir(folder))
	if err != nil {
		return nil, err
	}
	if err := inherit(f.File, folder); err != nil {
		return nil, errors.Join(err, f.Cleanup())
	}
	return f, nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// payload serves the file of a published release, whole or in ranges. Only names from the catalog reach the file system.
func (s *Server) payload(w http.ResponseWriter, r *http.Request) {
	rel, ok := s.catalog.Load().payloads[r.PathValue("name")]
	if !ok {
		http.Error(w, "no such payload", http.StatusNotFound)
		return
	}
	f, err := os.Open(filepath.Join(s.dir, "payloads", rel.Payload))
	if err != nil {
		s.log.Error("a published payload cannot be read", "error", err)
		http.Error(w, "the payload cannot be read", http.StatusInternalServerError)
		return
	}
	defer f.Close()
	w.Header().Set("ETag", `"`+rel.SHA256+`"`)
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Cache-Control", "public, max-age=31536000, immutable") // a published version never changes
	http.ServeContent(&rolling{w, s.patience, s.metrics.payload}, r, "", rel.Published, f)
}

// Status is the document of GET /v1/status.
type Status struct {
	Schema   string             `json:"schema"`
	Time     time.Time          `json:"time"`
	Channels map[string]Channel `json:"channels"`
	Releases []Release          `json:"releases"`
	Deltas   []Release          `json:"deltas,omitempty"`
	Hosts    []Host             `json:"hosts"`
	Failures []Failure          `json:"failures"`
	Activity []Activity         `json:"activity"` // what hosts did last, newest first
	Problems []string           `json:"problems"` // files of the directory that cannot be used, and what cannot be written
}

// Failure is a host's last failed update, in words.
type Failure struct {
	Host    string    `json:"host"`
	Alias   string    `json:"alias,omitempty"`
	Version string    `json:"version"`
	Code    int       `json:"code"`
	Words   string    `json:"words"`
	At      time.Time `json:"at"`
}

// Status returns everything that the server knows.
func (s *Server) Status() Status {
	st := s.summary()
	st.Hosts, st.Failures = s.Hosts(), []Failure{}
	for _, h := range st.Hosts {
		if f, ok := h.failure(); ok {
			st.Failures = append(st.Failures, f)
		}
	}
	return st
}

// summary is the status without what there is of each host.
func (s *Server) summary() Status {
	c := s.catalog.Load()
	st := Status{Schema: "flipside.serve-status/v1", Time: s.opt.Now().UTC(), Channels: s.channels(c), Problems: s.problems(c)}
	s.mu.Lock()
	st.Activity = append([]Activity{}, s.history.Activity...)
	s.mu.Unlock()
	slices.Reverse(st.Activity)
	st.Releases, st.Deltas = c.sorted(), c.changes()
	return st
}

// failure is the host's last failed update, if there is one that it did not get over.
func (h *Host) failure() (Failure, bool) {
	return Failure{Host: h.ID, Alias: h.Alias, Version: h.Failed, Code: h.ErrorCode, Words: codeWords(h.ErrorCode), At: h.FailedAt}, h.Failed != "" && h.Failed != h.Version
}

// showStatus answers GET /v1/status with what Status returns.
func (s *Server) showStatus(w http.ResponseWriter, _ *http.Request) {
	st := s.summary()
	s.mu.Lock()
	s.expire(s.opt.Now())
	ids := slices.AppendSeq(make([]string, 0, len(s.hosts)), maps.Keys(s.hosts))
	s.mu.Unlock()
	slices.Sort(ids)
	d := s.document(w)
	d.member("schema", st.Schema)
	d.member("time", st.Time)
	d.member("channels", st.Channels)
	d.member("releases", st.Releases)
	if len(st.Deltas) > 0 {
		d.member("deltas", st.Deltas)
	}
	list(d, "hosts", ids, func(h Host) (Host, bool) { return h, true })
	list(d, "failures", ids, func(h Host) (Failure, bool) { return h.failure() })
	d.member("activity", st.Activity)
	d.member("problems", st.Problems)
	d.end()
}

// answerTime is how long any answer may take, but a payload and a backup: those may take long, and not stand still for long. Nobody has to say who they are to ask.
const answerTime = time.Minute

// piece is what has to get on its way within the patience, at least.
const piece = 64 << 10

// rolling sends a long answer for as long as something of it is taken, and counts what is.
type rolling struct {
	http.ResponseWriter
	patience time.Duration
	sent     prometheus.Counter // nil counts nothing
}

func (w *rolling) Write(p []byte) (int, error) {
	err := w.wait()
	if err != nil {
		return 0, err
	}
	n, err := w.ResponseWriter.Write(p)
	w.count(int64(n))
	return n, err
}

// ReadFrom lets the kernel copy the file to the connection.
func (w *rolling) ReadFrom(r io.Reader) (n int64, err error) {
	src, left := r, int64(math.MaxInt64)
	limited, ok := r.(*io.LimitedReader)
	if ok { // the kernel's way is not found behind two limits
		src, left = limited.R, limited.N
	}
	for left > 0 && err == nil {
		if err = w.wait(); err != nil {
			break
		}
		var m int64
		m, err = io.CopyN(w.ResponseWriter, src, min(piece, left))
		n, left = n+m, left-m
		w.count(m)
	}
	if ok {
		limited.N = left
	}
	if err == io.EOF {
		err = nil
	}
	return n, err
}

// wait begins the time for the next piece anew.
func (w *rolling) wait() error {
	err := http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Now().Add(w.patience))
	if errors.Is(err, http.ErrNotSupported) {
		return nil
	}
	return err
}

func (w *rolling) count(n int64) {
	if w.sent != nil {
		w.sent.Add(float64(n))
	}
}
