package server

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/google/renameio/v2"
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
	meta, err := toml.Decode(string(data), v)
	if err != nil {
		return fmt.Errorf("%s: %w", filepath.Base(path), err)
	}
	if extra := meta.Undecoded(); len(extra) > 0 {
		return fmt.Errorf("%s: unknown key %q", filepath.Base(path), extra[0].String())
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
	http.ServeContent(&countingWriter{w, s}, r, "", rel.Published, f)
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
	c := s.catalog.Load()
	st := Status{
		Schema: "flipside.serve-status/v1", Time: s.opt.Now().UTC(), Channels: s.channels(c),
		Hosts: s.Hosts(), Failures: []Failure{}, Problems: s.problems(c),
	}
	s.mu.Lock()
	st.Activity = append([]Activity{}, s.history.Activity...)
	s.mu.Unlock()
	slices.Reverse(st.Activity)
	st.Releases, st.Deltas = c.sorted(), c.changes()
	for _, h := range st.Hosts {
		if h.Failed != "" && h.Failed != h.Version {
			st.Failures = append(st.Failures, Failure{Host: h.ID, Alias: h.Alias, Version: h.Failed, Code: h.ErrorCode, Words: codeWords(h.ErrorCode), At: h.FailedAt})
		}
	}
	return st
}

// countingWriter counts what is sent of payloads.
type countingWriter struct {
	http.ResponseWriter
	s *Server
}

func (w *countingWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.s.metrics.payload.Add(float64(n))
	return n, err
}

// ReadFrom lets the kernel copy the file to the connection.
func (w *countingWriter) ReadFrom(r io.Reader) (int64, error) {
	n, err := io.Copy(w.ResponseWriter, r)
	w.s.metrics.payload.Add(float64(n))
	return n, err
}
