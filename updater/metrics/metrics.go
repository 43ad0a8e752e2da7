// Package metrics tells Prometheus what a host does: in a file for node-exporter's textfile collector, or on a loopback address.
//
// Names and units follow the Prometheus convention; docs/metrics.md is the reference, and packaging/prometheus holds alert rules and a
// dashboard that use nothing else. Counters begin anew when the daemon does.
package metrics

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/expfmt"

	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
)

var phases = []updater.Phase{updater.Idle, updater.Applying, updater.Armed, updater.Rebooting, updater.Trial, updater.Failing}

// Metrics collects what a host does. Make one with [New].
type Metrics struct {
	registry *prometheus.Registry
	events   *prometheus.CounterVec

	mu sync.Mutex
	st updater.Status
}

// New makes the metrics of a host.
func New() *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry()}
	m.events = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "flipside_events_total", Help: "What happened since the daemon started, by kind; docs/journal.md lists the kinds.",
	}, []string{"kind"})
	for _, k := range []updater.Kind{updater.CheckFailed, updater.UpdateStarted, updater.UpdateFailed, updater.UpdateRefused, updater.UpdateArmed, updater.Healthy, updater.Unhealthy, updater.FellBack, updater.Halted, updater.RebootStuck} {
		m.events.WithLabelValues(string(k)) // an alert needs the zero before the one
	}
	m.registry.MustRegister(m.events, collector{m})
	return m
}

// Note counts what the engine tells.
func (m *Metrics) Note(n updater.Note) { m.events.WithLabelValues(string(n.Kind)).Inc() }

// Observe takes in what a host does now.
func (m *Metrics) Observe(st updater.Status) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.st = st
}

// Text is what the metrics are now, in the text format.
func (m *Metrics) Text() ([]byte, error) {
	families, err := m.registry.Gather()
	if err != nil {
		return nil, fmt.Errorf("gathering the metrics: %w", err)
	}
	var b bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			return nil, fmt.Errorf("writing the metrics: %w", err)
		}
	}
	return b.Bytes(), nil
}

// Replace replaces the file at path as a whole, readable by everyone. Its name must end in .prom for the textfile collector.
func Replace(path string, text []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)) // a name that the collector does not look at
	if err != nil {
		var p *fs.PathError
		if errors.As(err, &p) {
			err = p.Err // it names a file that is another one each time
		}
		return fmt.Errorf("writing the metrics: a new file beside %s: %w", path, err)
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("writing the metrics: %w", err)
	}
	return nil
}

// ErrNotLoopback refuses an address that others can reach: what a host runs and what it lacks is nobody else's business.
var ErrNotLoopback = errors.New("not a loopback address")

// Listen listens on a loopback address such as 127.0.0.1:9476.
func Listen(addr string) (net.Listener, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("listening for metrics: %w", err)
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
		return nil, fmt.Errorf("listening for metrics on %q: %w; a scraper elsewhere reads them through node-exporter", addr, ErrNotLoopback)
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listening for metrics: %w", err)
	}
	return l, nil
}

// Serve answers GET /metrics until ctx is done.
func (m *Metrics) Serve(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	s := &http.Server{Handler: mux, ReadTimeout: 10 * time.Second, WriteTimeout: 20 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 8 << 10}
	defer context.AfterFunc(ctx, func() { s.Close() })()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving metrics: %w", err)
	}
	return nil
}

// collector makes gauges of the last status, so that what is gone (a gate, a slot) is gone from the metrics too.
type collector struct{ m *Metrics }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("flipside_"+name, help, labels, nil)
}

var (
	buildInfo   = desc("build_info", "The daemon that runs.", "version")
	osInfo      = desc("os_info", "The release and the slot that run.", "version", "slot")
	phase       = desc("update_phase", "1 for the phase that the update is in, 0 for the others.", "phase")
	phaseSince  = desc("update_phase_start_timestamp_seconds", "When the phase was entered.")
	target      = desc("update_target_info", "The release that is being taken, and its slot.", "version", "slot")
	payload     = desc("update_payload_bytes", "Size of the payload that is being taken.")
	written     = desc("update_payload_written_bytes", "How much of it is in place.")
	gate        = desc("gate_open", "1 if the gate says go, 0 if it is against the next step or cannot be asked.", "stage", "gate")
	blocked     = desc("blocked", "1 if a gate is against the next step.")
	slotPrio    = desc("slot_priority", "Boot priority of the slot; 0 never boots.", "slot")
	slotTries   = desc("slot_tries_left", "Boots that the slot has left to prove itself.", "slot")
	slotGood    = desc("slot_successful", "1 if the slot is marked successful.", "slot")
	slotNext    = desc("slot_next", "1 if the boot loader would choose the slot now.", "slot")
	lastCheck   = desc("last_check_timestamp_seconds", "When the server was last asked.")
	nextCheck   = desc("next_check_timestamp_seconds", "When the server is asked next.")
	lastError   = desc("last_error_timestamp_seconds", "When something last went wrong.")
	lastUpdate  = desc("last_update_timestamp_seconds", "When the last update ended.", "version", "result")
	quarantined = desc("quarantined_releases", "Releases that failed on this host and are left alone for now.")
	unsent      = desc("unsent_reports", "Events that the server has not acknowledged.")
	keysEnd     = desc("keys_end_timestamp_seconds", "From when on the pinned keys are too few for a release to be taken; absent if they do not end.")
	verdict     = desc("unsent_verdict", "1 if the semaphore has not yet taken the verdict on the last reboot.")
)

func (collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{buildInfo, osInfo, phase, phaseSince, target, payload, written, gate, blocked, slotPrio, slotTries, slotGood, slotNext, lastCheck, nextCheck, lastError, lastUpdate, quarantined, unsent, verdict, keysEnd} {
		ch <- d
	}
}

func (c collector) Collect(ch chan<- prometheus.Metric) {
	c.m.mu.Lock()
	st := c.m.st
	c.m.mu.Unlock()
	set := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	at := func(d *prometheus.Desc, t time.Time, labels ...string) {
		if !t.IsZero() {
			set(d, float64(t.UnixMilli())/1000, labels...)
		}
	}
	set(buildInfo, 1, buildVersion())
	if st.Schema == "" {
		return // the engine has not begun
	}
	set(osInfo, 1, st.Version, st.Slot)
	at(keysEnd, st.KeysEnd)
	for _, p := range phases {
		set(phase, flag(st.Phase == p), string(p))
	}
	at(phaseSince, st.Since)
	if u := st.Update; u != nil {
		set(target, 1, u.Version, u.Slot)
		set(payload, float64(u.Size))
		done := int64(0)
		if st.Progress != nil {
			done = st.Progress.Done
		} else if st.Phase != updater.Applying {
			done = u.Size
		}
		set(written, float64(done))
	}
	seen := map[string]bool{}
	for _, a := range st.Gates {
		if !seen[a.Gate] {
			seen[a.Gate] = true
			set(gate, flag(a.Verdict == reboot.Go), string(st.Stage), a.Gate)
		}
	}
	set(blocked, flag(st.Blocked))
	seen = map[string]bool{}
	for _, s := range st.Slots {
		if seen[s.Label] {
			continue
		}
		seen[s.Label] = true
		set(slotPrio, float64(s.Priority), s.Label)
		set(slotTries, float64(s.Tries), s.Label)
		set(slotGood, flag(s.Successful), s.Label)
		set(slotNext, flag(s.Next), s.Label)
	}
	at(lastCheck, st.LastCheck)
	at(nextCheck, st.NextCheck)
	at(lastError, st.ErrorAt)
	if u := st.LastUpdate; u != nil {
		result := "good"
		if !u.Good {
			result = "failed"
		}
		at(lastUpdate, u.At, u.To, result)
	}
	q := 0
	for _, f := range st.Quarantine {
		if time.Now().Before(f.Until) {
			q++
		}
	}
	set(quarantined, float64(q))
	set(unsent, float64(st.Unsent))
	set(verdict, flag(st.Verdict != nil))
}

func flag(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

// Remove takes the file away: a host whose daemon does not run must not look like one that does.
func Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("taking the metrics away: %w", err)
	}
	return nil
}
