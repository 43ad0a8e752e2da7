package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Options configure a server. The zero value serves any application id with payload addresses on the address that the
// client has connected to.
type Options struct {
	AppID     string        // the application that is served; empty for any
	PublicURL string        // where clients find this server, such as https://updates.example.org; never taken from a request
	Admins    Admins        // who may change channels over HTTP; the zero value: nobody
	MaxHosts  int           // no more hosts than this are known at once, default 500 000: ids cost nothing to invent
	Forget    time.Duration // a host that was not seen for this long is forgotten, default 90 days
	Refresh   time.Duration // how often the directory is looked at, default 1 s
	ReadOnly  bool          // look at the releases only: nothing is made or written, and no host is known

	// Verify looks at a payload before it is published over HTTP, such as at its signature. Without it no upload is taken.
	Verify func(ctx context.Context, path string, of *Delta) error // as that of a Publisher
	// Reboots asks the cluster's semaphore who reboots and who waits, to be shown beside the hosts; nil: there is none.
	Reboots func(ctx context.Context) ([]RebootGroup, error)

	Prover Prover // verifies the proofs of boots; nil: none are taken
	// Endorser challenges hosts to show in whose TPM their keys are. With it no key is believed at first sight any more.
	Endorser Endorser

	Logger *slog.Logger // nil logs nothing
	Now    func() time.Time
}

// Server is a release server on one directory. It is an [http.Handler].
type Server struct {
	dir     string
	opt     Options
	log     *slog.Logger
	publish Publisher
	mux     *http.ServeMux
	public  atomic.Pointer[string]
	closing sync.Once
	metrics *metrics

	patience time.Duration // with who takes nothing of an answer: answerTime, but in tests
	nonceKey [32]byte      // of this process: a nonce does not outlive it
	reboots  *reboots

	loadMu  sync.Mutex // reading the directory
	loaded  time.Time
	catalog atomic.Pointer[catalog]

	written struct {
		sync.Mutex
		answers map[current][]byte
	}

	mu       sync.Mutex // everything below: one request is decided at a time
	hosts    map[string]*Host
	rollouts map[string]*rollout // by channel
	history  history
	canaries map[string]canary
	expired  time.Time // when expire last looked
	forgot   time.Time // when forget last looked
	store    *store    // nil when read-only

	measuredBy *catalog          // by which remeasure last looked
	troubles   map[string]string // what the server cannot do, by its part
	changes    bool              // it publishes or moves channels, for administrators or from upstream
}

// New opens the directory dir, which is made when it does not exist.
func New(dir string, opt Options) (*Server, error) {
	if opt.Refresh <= 0 {
		opt.Refresh = time.Second
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.MaxHosts <= 0 {
		opt.MaxHosts = 500_000
	}
	if opt.Forget <= 0 {
		opt.Forget = 90 * 24 * time.Hour
	}
	s := &Server{
		dir: dir, opt: opt, log: opt.Logger, publish: Publisher{Dir: dir, Now: opt.Now, Who: "server", Verify: opt.Verify}, reboots: &reboots{ask: opt.Reboots},
		hosts: make(map[string]*Host), rollouts: make(map[string]*rollout), canaries: make(map[string]canary),
		troubles: map[string]string{}, changes: opt.Admins.any(), patience: answerTime,
	}
	s.written.answers = make(map[current][]byte)
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if err := s.SetPublicURL(opt.PublicURL); err != nil {
		return nil, err
	}
	if !opt.ReadOnly {
		if err := makeDirs(dir); err != nil {
			return nil, fmt.Errorf("open release directory: %w", err)
		}
	}
	if err := s.reload(opt.Now()); err != nil {
		return nil, err
	}
	if !opt.ReadOnly {
		if err := s.open(); err != nil {
			return nil, err
		}
	}
	s.mux = http.NewServeMux()
	s.mux.HandleFunc("POST /v1/update", s.update)
	s.mux.HandleFunc("POST /v1/update/{$}", s.update)
	s.mux.HandleFunc("GET /payloads/{name}", s.payload)
	s.readers()
	s.admins()
	s.metrics = newMetrics(s)
	s.dashboard()
	s.proofs()
	s.recall()
	s.mu.Lock()
	s.remeasure(s.catalog.Load())
	s.mu.Unlock()
	if s.store != nil {
		s.commit(true) // what was found at the start, such as a release that measures something else
		go s.run()
	}
	return s, nil
}

// open reads the saved state and begins to save.
func (s *Server) open() error {
	st, err := openStore(s.dir)
	if err != nil {
		return err
	}
	hosts, rollouts, err := st.load()
	if err != nil {
		st.db.Close()
		return fmt.Errorf("read the state in %q: %w", s.dir, err)
	}
	if s.history, err = st.loadHistory(); err != nil {
		s.log.Error("the history cannot be read and begins anew", "error", err)
		s.history = history{}
	}
	s.store, s.hosts, s.rollouts = st, hosts, rollouts
	s.rewind(s.opt.Now())
	s.sweep()
	return nil
}

// Close writes what is not on the disk yet and ends the server's use of its directory. Calls after the first do nothing.
func (s *Server) Close() error {
	if s.store == nil {
		return nil
	}
	var err error
	s.closing.Do(func() {
		close(s.store.quit)
		<-s.store.done
		s.mu.Lock()
		err = s.store.err
		s.mu.Unlock()
		err = errors.Join(err, s.store.db.Close())
	})
	return err
}

// SetPublicURL sets the address under which clients find this server; empty means the address they have connected to.
func (s *Server) SetPublicURL(raw string) error {
	raw = strings.TrimSuffix(raw, "/")
	if raw != "" {
		u, err := url.Parse(raw)
		if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return fmt.Errorf("public address %q is not a plain http:// or https:// address", raw)
		}
	}
	s.public.Store(&raw)
	return nil
}

// Publish stores the payload file at path as version and moves channel to it. Hosts get it from their next check on.
func (s *Server) Publish(ctx context.Context, channel, version, path string) (Release, error) {
	rel, _, err := s.publish.Publish(ctx, Release{Version: version}, path, channel)
	return rel, errors.Join(err, s.Reload())
}

// Reload reads the directory now instead of at the next look.
func (s *Server) Reload() error {
	s.loadMu.Lock()
	defer s.loadMu.Unlock()
	return s.reload(s.opt.Now())
}

// Hosts returns what is known about every host, by id.
func (s *Server) Hosts() []Host {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire(s.opt.Now())
	out := make([]Host, 0, len(s.hosts))
	c := s.catalog.Load()
	for _, h := range s.hosts {
		out = append(out, *h)
		c.judge(&out[len(out)-1])
	}
	slices.SortFunc(out, func(a, b Host) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// Host returns what is known about one host.
func (s *Server) Host(id string) (Host, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h, ok := s.hosts[id]; ok {
		out := *h
		s.catalog.Load().judge(&out)
		return out, true
	}
	return Host{}, false
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if err := s.refresh(s.opt.Now()); err != nil {
		s.log.Error("the release directory cannot be read", "error", err)
	}
	s.mux.ServeHTTP(w, r)
}

// Serve answers connections on l until ctx ends, with the limits that a server in the open needs.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second, // requests are small
		WriteTimeout:      s.patience,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			srv.Close()
		}
	})
	defer stop()
	err := srv.Serve(l)
	if errors.Is(err, http.ErrServerClosed) && ctx.Err() != nil {
		return nil
	}
	return err
}

// base returns the address below which this server's payloads are. The request's Host header has no say in it: who
// forges one could otherwise send a host elsewhere.
func (s *Server) base(r *http.Request) string {
	if public := *s.public.Load(); public != "" {
		return public + "/payloads/"
	}
	scheme := "http"
	if r.TLS != nil {
		scheme = "https"
	}
	addr, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if !ok {
		return scheme + "://127.0.0.1/payloads/"
	}
	return scheme + "://" + addr.String() + "/payloads/"
}

// leftAfter is when the file of another program that does not grow any more is taken for one that was killed.
const leftAfter = 24 * time.Hour

// sweep removes what was left behind by this server and by programs that publish, mirror or import, when they were killed.
func (s *Server) sweep() {
	for pattern, age := range map[string]time.Duration{
		"payloads/.upload-*": 0, ".backup-*": 0, // only this server makes them
		"payloads/.mirror-*": leftAfter, "payloads/.import-*": leftAfter, "payloads/.*.payload[0-9]*": leftAfter,
		"releases/.*.toml[0-9]*": leftAfter, "deltas/.*.toml[0-9]*": leftAfter, "channels/.*.toml[0-9]*": leftAfter, "pcrs/.*.toml[0-9]*": leftAfter,
	} {
		left, err := filepath.Glob(filepath.Join(s.dir, filepath.FromSlash(pattern)))
		if err != nil {
			return // cannot be: the patterns are fine
		}
		for _, path := range left {
			if info, err := os.Stat(path); err != nil || time.Since(info.ModTime()) < age {
				continue
			}
			if err := os.Remove(path); err != nil {
				s.log.Warn("what is left of a program that was killed cannot be removed", "error", err)
			}
		}
	}
}
