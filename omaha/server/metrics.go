package server

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are what GET /metrics shows, in a registry of this server's own.
type metrics struct {
	registry *prometheus.Registry
	checks   *prometheus.CounterVec // by channel and answer
	events   *prometheus.CounterVec // by type and result
	refused  prometheus.Counter
	payload  prometheus.Counter
	seconds  prometheus.Histogram
	mirrored prometheus.Gauge
}

func newMetrics(s *Server) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		checks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "flipside_checks_total", Help: "Update checks, by channel and by what they were answered."}, []string{"channel", "answer"}),
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "flipside_host_state_changes_total", Help: "Hosts that came into a state."}, []string{"state"}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "flipside_requests_refused_total", Help: "Requests that were no Omaha 3.0 document."}),
		payload: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "flipside_payload_sent_bytes_total", Help: "Bytes of payloads that were sent."}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "flipside_check_duration_seconds", Help: "Time for one update request, with saving.",
			Buckets: []float64{.0001, .0003, .001, .003, .01, .03, .1, .3, 1}}),
	}
	m.mirrored = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "flipside_mirror_last_success_timestamp_seconds", Help: "When all channels were last brought up to what upstream holds; 0 is never."})
	m.registry.MustRegister(m.checks, m.events, m.refused, m.payload, m.seconds, m.mirrored, fleet{s}, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	s.mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	return m
}

// fleet counts the hosts when it is asked.
type fleet struct{ s *Server }

func hostsDesc() *prometheus.Desc {
	return prometheus.NewDesc("flipside_hosts", "Hosts that are known, by channel, running version and state. Versions that no file of the directory names are other.", []string{"channel", "version", "state"}, nil)
}

func stoppedDesc() *prometheus.Desc {
	return prometheus.NewDesc("flipside_channel_halted", "1 for a channel whose rollout is paused or was stopped.", []string{"channel", "version"}, nil)
}

func problemsDesc() *prometheus.Desc {
	return prometheus.NewDesc("flipside_problems", "What somebody has to look after: files that cannot be used, and what the server cannot write. The page names them.", nil, nil)
}

func bootsDesc() *prometheus.Desc {
	return prometheus.NewDesc("flipside_host_boots",
		"Hosts by what the TPM's proof of their last boot says: as_released, differs, unjudged (nobody has said what the release measures), refused, unproven.",
		[]string{"channel", "verdict"}, nil)
}

// Describe is part of prometheus.Collector.
func (f fleet) Describe(ch chan<- *prometheus.Desc) {
	ch <- hostsDesc()
	ch <- stoppedDesc()
	ch <- bootsDesc()
	ch <- problemsDesc()
}

// Collect is part of prometheus.Collector.
func (f fleet) Collect(ch chan<- prometheus.Metric) {
	type key struct {
		channel, version string
		state            State
	}
	counts, boots := map[key]int{}, map[[2]string]int{}
	c := f.s.catalog.Load()
	f.s.mu.Lock()
	for _, h := range f.s.hosts {
		version := h.Version
		if !c.named[version] {
			version = otherVersions
		}
		counts[key{h.Channel, version, h.State}]++
		if f.s.opt.Prover != nil {
			boots[[2]string{h.Channel, c.bootLabel(h)}]++
		}
	}
	f.s.mu.Unlock()
	for k, n := range counts {
		ch <- prometheus.MustNewConstMetric(hostsDesc(), prometheus.GaugeValue, float64(n), k.channel, k.version, string(k.state))
	}
	for k, n := range boots {
		ch <- prometheus.MustNewConstMetric(bootsDesc(), prometheus.GaugeValue, float64(n), k[0], k[1])
	}
	ch <- prometheus.MustNewConstMetric(problemsDesc(), prometheus.GaugeValue, float64(len(f.s.problems(c))))
	for name, c := range f.s.channels(c) {
		halted := 0.0
		if c.Halted() != "" {
			halted = 1
		}
		ch <- prometheus.MustNewConstMetric(stoppedDesc(), prometheus.GaugeValue, halted, name, c.Version)
	}
}

// bootLabel is what a metric says about a host's last boot.
func (c *catalog) bootLabel(h *Host) string {
	switch p := h.Proof; {
	case p == nil || p.Refused == "" && p.At.IsZero():
		return "unproven"
	case p.Refused != "":
		return "refused"
	default:
		switch v, _ := c.verdict(p); v {
		case AsReleased:
			return "as_released"
		case Differs:
			return "differs"
		}
	}
	return "unjudged"
}
