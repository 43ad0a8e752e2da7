package reboot

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode"
)

// FiringAlerts is the query that [Alerts] asks if no other is set.
const FiringAlerts = `ALERTS{alertstate="firing"}`

// Alerts waits while a Prometheus server has an answer to a query: each series in it is against the reboot. A server that cannot be asked,
// or that says that its answer may not be whole, leaves it unknown.
type Alerts struct {
	URL   string       // of the server, as in http://prometheus:9090
	Query string       // PromQL, an instant vector; "" is [FiringAlerts]
	HTTP  *http.Client // nil: one without a proxy
}

// Name implements [Gate].
func (Alerts) Name() string { return "alerts" }

// alertsTimeout is how long the server may take. maxAlerts bounds its answer.
const (
	alertsTimeout = 10 * time.Second
	maxAlerts     = 4 << 20
)

// The answer of GET /api/v1/query, as far as it is looked at (Prometheus HTTP API, "Instant queries").
type queryAnswer struct {
	Status   string   `json:"status"`
	Error    string   `json:"error"`
	Warnings []string `json:"warnings"` // the answer may not be whole
	Data     struct {
		Type   string          `json:"resultType"`
		Result json.RawMessage `json:"result"`
	} `json:"data"`
}

// Ask implements [Gate].
func (g Alerts) Ask(ctx context.Context, _ time.Time) Answer {
	names, err := g.query(ctx)
	switch {
	case err != nil:
		return Answer{Verdict: Unknown, Why: "Prometheus cannot be asked for alerts: " + err.Error(), Hint: "start it, or set reboot.alerts", Evidence: g.URL}
	case len(names) == 0:
		return Answer{Verdict: Go}
	}
	more := ""
	if n := len(names); n > maxNamed {
		names, more = names[:maxNamed], fmt.Sprintf(", and %d more", n-maxNamed)
	}
	return Answer{Verdict: Wait, Why: "alerts: " + strings.Join(names, ", ") + more, Hint: "resolve them, or leave them out of reboot.alerts_query", Evidence: strings.TrimRight(g.URL, "/") + "/alerts"}
}

func (g Alerts) query(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, alertsTimeout)
	defer cancel()
	q := g.Query
	if q == "" {
		q = FiringAlerts
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimRight(g.URL, "/")+"/api/v1/query?"+url.Values{"query": {q}}.Encode(), nil)
	if err != nil {
		return nil, err
	}
	client := g.HTTP
	if client == nil {
		// The environment's proxy is for what is fetched, from outside.
		client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAlerts))
	if err != nil {
		return nil, err
	}
	var a queryAnswer
	if err := json.Unmarshal(body, &a); err != nil {
		return nil, fmt.Errorf("it answers %s, %.60q", resp.Status, body)
	}
	if a.Status != "success" {
		return nil, fmt.Errorf("it answers %s: %.200q", resp.Status, a.Error)
	}
	if a.Data.Type != "vector" {
		return nil, fmt.Errorf("the query %q gives a %.20q; a vector is wanted, each series of which is against the reboot", q, a.Data.Type)
	}
	var series []struct {
		Labels map[string]string `json:"metric"`
	}
	if err := json.Unmarshal(a.Data.Result, &series); err != nil {
		return nil, fmt.Errorf("its answer cannot be read: %w", err)
	}
	if len(series) == 0 && len(a.Warnings) > 0 {
		return nil, fmt.Errorf("its answer may not be whole: %.200q", a.Warnings[0])
	}
	names := make([]string, 0, len(series))
	for _, s := range series {
		names = append(names, describeSeries(s.Labels))
	}
	return names, nil
}

// describeSeries names an alert, and where it is.
func describeSeries(labels map[string]string) string {
	name := "a series without a name"
	for _, l := range []string{"alertname", "__name__"} {
		if labels[l] != "" {
			name = labels[l]
			break
		}
	}
	if at := labels["instance"]; at != "" {
		name += " on " + at
	}
	return oneLine(name)
}

// oneLine makes a text from outside fit to be shown in a line.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsGraphic(r) { // no control characters, also those of eight bits, and no marks that turn the writing around
			return -1
		}
		return r
	}, strings.ToValidUTF8(strings.TrimSpace(s), "?"))
	if len(s) > maxReason {
		s = strings.ToValidUTF8(s[:maxReason], "") + "..."
	}
	return s
}
