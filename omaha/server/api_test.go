package server

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"

	"github.com/flipside-linux/flipside/omaha"
)

// contract holds every exchange of a test against the OpenAPI document that the server itself serves.
type contract struct {
	t      *testing.T
	l      *lab
	router routers.Router
	seen   map[string]bool // "GET /v1/hosts 200"
}

func newContract(t *testing.T, l *lab) *contract {
	t.Helper()
	_, doc := l.get("/v1/openapi.yaml")
	spec, err := openapi3.NewLoader().LoadFromData([]byte(doc))
	if err != nil {
		t.Fatal(err)
	}
	if err := spec.Validate(context.Background()); err != nil {
		t.Fatalf("the document itself: %v", err)
	}
	router, err := gorillamux.NewRouter(spec)
	if err != nil {
		t.Fatal(err)
	}
	return &contract{t, l, router, map[string]bool{}}
}

// do sends a request and returns the status and body, both checked against the document.
func (c *contract) do(method, path, token, kind, body string) (int, string) {
	c.t.Helper()
	req, err := http.NewRequest(method, c.l.url+path, strings.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	if kind != "" {
		req.Header.Set("Content-Type", kind)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		c.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	relative := req.Clone(context.Background())
	relative.URL.Scheme, relative.URL.Host, relative.Host = "", "", ""
	route, params, err := c.router.FindRoute(relative)
	if err != nil {
		c.t.Errorf("%s %s is not in the document: %v", method, path, err)
		return resp.StatusCode, string(data)
	}
	c.seen[fmt.Sprintf("%s %s %d", method, route.Path, resp.StatusCode)] = true
	in := &openapi3filter.RequestValidationInput{Request: relative, PathParams: params, Route: route}
	out := &openapi3filter.ResponseValidationInput{
		RequestValidationInput: in, Status: resp.StatusCode, Header: resp.Header,
		Options: &openapi3filter.Options{IncludeResponseStatus: true, ExcludeResponseBody: !strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json")},
	}
	out.SetBodyBytes(data)
	if err := openapi3filter.ValidateResponse(context.Background(), out); err != nil {
		c.t.Errorf("%s %s: the answer is not what the document says: %v", method, path, err)
	}
	return resp.StatusCode, string(data)
}

// TestOpenAPI holds the handlers against the document: every path and status in it is visited, every JSON answer has
// the shape that is written there and no member more, and no handler is left out.
func TestOpenAPI(t *testing.T) {
	l := fleetLab(t)
	c := newContract(t, l)
	host := fmt.Sprintf("%032x", 5)
	get := func(want int, path string) string {
		t.Helper()
		code, body := c.do("GET", path, "", "", "")
		if code != want {
			t.Errorf("GET %s: %d, want %d: %s", path, code, want, body)
		}
		return body
	}
	get(200, "/")
	get(200, "/?channel=beta&class=bad")
	get(200, "/hosts/"+host)
	get(404, "/hosts/nobody")
	get(200, "/metrics")
	get(200, "/v1/openapi.yaml")
	get(200, "/v1/status")
	get(200, "/v1/channels")
	get(200, "/v1/channels/beta")
	get(404, "/v1/channels/nightly")
	get(200, "/v1/channels/stable/plan?version=1.0.0&machine="+host)
	get(400, "/v1/channels/stable/plan?version=one")
	get(404, "/v1/channels/nightly/plan?version=1.0.0")
	get(200, "/v1/releases")
	get(200, "/v1/hosts?channel=beta&limit=3")
	get(400, "/v1/hosts?limit=0")
	get(200, "/v1/hosts/"+host)
	get(404, "/v1/hosts/nobody")
	get(404, "/v1/proof/"+host) // takes no proofs
	key := func(n string) string { return "sha256:" + strings.Repeat(n, 64) }
	hostKey := key("1")
	l.opt.Prover = func(_ string, _, proof []byte) (Evidence, error) {
		if string(proof) != `{"good":1}` {
			return Evidence{}, errors.New("not good")
		}
		return Evidence{Slot: "USR-B", Version: "2.0.0", Key: hostKey}, nil
	}
	prove := func(want int, id, body string) {
		t.Helper()
		var q struct{ Nonce []byte }
		if err := json.Unmarshal([]byte(get(200, "/v1/proof/"+host)), &q); err != nil {
			t.Fatal(err)
		}
		code, answer := c.do("POST", "/v1/proof/"+id+"?nonce="+base64.RawURLEncoding.EncodeToString(q.Nonce), "", "application/json", body)
		if code != want {
			t.Errorf("a proof of %s: %d, want %d: %s", id, code, want, answer)
		}
	}
	prove(403, host, `{}`)
	prove(204, host, `{"good":1}`)
	prove(404, "nobody", `{"good":1}`)
	prove(403, fmt.Sprintf("%032x", 6), `{"good":1}`) // the nonce is another host's
	prove(413, host, strings.Repeat(" ", 65<<10))
	get(200, "/v1/hosts/"+host)
	get(200, "/hosts/"+host)
	// The host comes with another key. An administrator accepts it, and then it counts.
	hostKey = key("2")
	prove(403, host, `{"good":1}`)
	if h, _ := l.Host(host); h.Proof.Key != key("1") || h.Proof.Other != hostKey {
		t.Errorf("with another key: %+v", h.Proof)
	}
	if _, page := l.get("/hosts/" + host); !strings.Contains(page, "accept-key "+host+" --key "+hostKey) {
		t.Error("the page does not say how the key is accepted")
	}
	accept := func(want int, id, token, body string) {
		t.Helper()
		if code, answer := c.do("POST", "/v1/admin/hosts/"+id+"/key", token, "application/json", body); code != want {
			t.Errorf("accepting %s for %s: %d, want %d: %s", body, id, code, want, answer)
		}
	}
	accept(401, host, "", `{"key":"`+hostKey+`"}`)
	accept(400, host, "secret", `{"key":"sha256:2"}`)
	accept(400, host, "secret", `{"keys":1}`)
	accept(404, "nobody", "secret", `{"key":"`+hostKey+`"}`)
	accept(204, host, "secret", `{"key":"`+hostKey+`"}`)
	accept(204, host, "secret", `{"key":"`+hostKey+`"}`)
	if h, _ := l.Host(host); h.Proof.Key != hostKey || h.Proof.By == "" || !h.Proof.At.IsZero() || h.Proof.Version != "" {
		t.Errorf("accepted: %+v", h.Proof)
	}
	get(200, "/hosts/"+host)
	get(200, "/v1/hosts/"+host)
	prove(204, host, `{"good":1}`)
	if h, _ := l.Host(host); h.Proof.Version != "2.0.0" || h.Proof.By == "" || h.Proof.Other != "" {
		t.Errorf("proven by the accepted key: %+v", h.Proof)
	}
	hostKey = key("1") // the old one counts no more
	prove(403, host, `{"good":1}`)
	// In whose TPM is the key?
	endorse := func(want int, id, body string) {
		t.Helper()
		var q struct{ Nonce []byte }
		if err := json.Unmarshal([]byte(get(200, "/v1/proof/"+host+"?key="+hostKey)), &q); err != nil {
			t.Fatal(err)
		}
		path := "/v1/proof/" + id + "/endorsement?nonce=" + base64.RawURLEncoding.EncodeToString(q.Nonce)
		if code, answer := c.do("POST", path, "", "application/json", body); code != want {
			t.Errorf("an endorsement of %s: %d, want %d: %s", id, code, want, answer)
		}
	}
	endorse(404, host, `{"good":1}`) // asks for none
	l.opt.Endorser = func(_, request []byte) ([]byte, error) {
		if string(request) != `{"good":1}` {
			return nil, errors.New("not good")
		}
		return []byte(`{"schema":"flipside.challenge/v1","certificate":0,"credential":"AAAA","secret":"AAAA"}`), nil
	}
	endorse(200, host, `{"good":1}`)
	endorse(403, host, `{}`)
	endorse(403, fmt.Sprintf("%032x", 6), `{"good":1}`) // the nonce is another host's
	endorse(413, host, strings.Repeat(" ", 65<<10))
	if body := get(200, "/v1/proof/"+host); !strings.Contains(body, `"endorsement": true`) {
		t.Errorf("it does not ask: %s", body)
	}
	// What must a boot have measured?
	if _, err := l.publish.Measure("1.1.0", func(PCRs) (PCRs, error) { return PCRs{"11": {strings.Repeat("a", 64)}}, nil }); err != nil {
		t.Fatal(err)
	}
	if err := l.Reload(); err != nil {
		t.Fatal(err)
	}
	l.opt.Prover = func(string, []byte, []byte) (Evidence, error) {
		return Evidence{Slot: "USR-B", Version: "1.1.0", Key: key("2"), PCRs: map[string]string{"11": strings.Repeat("b", 64)},
			TPM: &TPM{Maker: "IFX", Model: "SLB9670", Issuer: "Muster", Key: key("e")}}, nil
	}
	l.clock.Add(time.Second)
	prove(204, host, `{}`)
	get(200, "/v1/hosts/"+host)
	get(200, "/v1/hosts?boot=differs")
	get(200, "/v1/releases")
	get(200, "/?boot=differs")
	get(200, "/metrics")
	get(200, "/v1/reboots")
	get(200, "/v1/audit")
	get(200, "/payloads/1.1.0.payload")
	get(404, "/payloads/9.9.9.payload")
	c.do("POST", "/v1/update", "", "text/xml", "nonsense")
	c.do("POST", "/v1/update", "", "text/xml", string(benchBody(900, "1.0.0")))
	const order, js = "/v1/admin/channels/stable", "application/json"
	c.do("POST", order, "", js, `{"action":"pause"}`)
	c.do("POST", order, "secret", js, `{"action":"explode"}`)
	c.do("POST", order, "secret", js, `{"action":"pause"}`)
	c.do("POST", "/v1/admin/channels/nightly", "secret", js, `{"action":"pause"}`)
	payload := func(seed byte) string {
		data, err := os.ReadFile(fakePayload(t, seed, 5000))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	const upload, octets = "/v1/admin/releases/1.3.0?channel=edge", "application/octet-stream"
	c.do("PUT", upload, "", octets, "x")
	if code, body := c.do("PUT", upload, "secret", octets, "no payload"); code != 400 || strings.Contains(body, ".upload-") {
		t.Errorf("an upload that is no payload: %d %s", code, body)
	}
	if code, body := c.do("PUT", upload, "secret", octets, payload(7)); code != 200 {
		t.Errorf("an upload: %d %s", code, body)
	}
	c.do("PUT", upload, "secret", octets, payload(8))
	unlock, err := l.publish.lock()
	if err != nil {
		t.Fatal(err)
	}
	l.publish.patience = time.Millisecond
	c.do("POST", order, "secret", js, `{"action":"pause"}`)
	c.do("PUT", upload, "secret", octets, payload(7))
	l.publish.patience = 0
	unlock()
	c.do("GET", "/v1/admin/backup", "", "", "")
	c.do("GET", "/v1/admin/backup", "secret", "", "")
	if ch, ok := l.catalog.Load().channels["edge"]; !ok || ch.Version != "1.3.0" {
		t.Errorf("the upload moved its channel to %+v", ch)
	}
	l.publish.Verify = func(context.Context, string, *Delta) error { return errors.New("nobody signed it") }
	if code, body := c.do("PUT", "/v1/admin/releases/1.4.0", "secret", octets, payload(9)); code != 400 || !strings.Contains(body, "nobody signed it") {
		t.Errorf("an upload that nobody signed: %d %s", code, body)
	}
	l.publish.Verify = nil
	c.do("PUT", "/v1/admin/releases/1.4.0", "secret", octets, payload(9))
	l.reboots.ask, l.reboots.at = func(context.Context) ([]RebootGroup, error) { return nil, errors.New("etcd is away") }, time.Time{}
	get(502, "/v1/reboots")
	l.opt.Admins = Admins{}
	accept(403, host, "secret", `{"key":"`+hostKey+`"}`)
	c.do("POST", order, "secret", js, `{"action":"resume"}`)
	c.do("GET", "/v1/admin/backup", "secret", "", "")
	left, err := filepath.Glob(filepath.Join(l.dir, "payloads", ".*"))
	if err != nil || len(left) > 0 {
		t.Errorf("uploads left %q, %v", left, err)
	}

	// Nothing in the document is without a visit, but what needs a broken disk, and the ranges that have their own test.
	elsewhere := []string{"POST /v1/update 503", "GET /v1/audit 500", "GET /v1/admin/backup 500", "POST /v1/admin/channels/{name} 500", "GET /payloads/{name} 206", "GET /payloads/{name} 304", "GET /payloads/{name} 416"}
	_, doc := l.get("/v1/openapi.yaml")
	spec, err := openapi3.NewLoader().LoadFromData([]byte(doc))
	if err != nil {
		t.Fatal(err)
	}
	for path, item := range spec.Paths.Map() {
		for method, op := range item.Operations() {
			for code := range op.Responses.Map() {
				if visit := fmt.Sprintf("%s %s %s", method, path, code); !c.seen[visit] && !slices.Contains(elsewhere, visit) {
					t.Errorf("no request of this test led to %s", visit)
				}
			}
		}
	}
	// And no handler is missing in the document.
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	pattern := regexp.MustCompile(`"(GET|POST|PUT) (/[^"]*)"`)
	for _, file := range files {
		source, err := os.ReadFile(file)
		if err != nil || strings.HasSuffix(file, "_test.go") {
			continue
		}
		for _, m := range pattern.FindAllSubmatch(source, -1) {
			path := strings.TrimSuffix(string(m[2]), "{$}")
			if strings.HasPrefix(path, "/ui/") || path == "/v1/update/" {
				continue
			}
			if item := spec.Paths.Value(path); item == nil || item.GetOperation(string(m[1])) == nil {
				t.Errorf("%s: %s %s is not in the document", file, m[1], path)
			}
		}
	}
}

// TestPlan asks for plans with the client, and sees that asking changes nothing.
func TestPlan(t *testing.T) {
	l := newLab(t)
	for i, v := range []string{"1.1.0", "1.2.0", "1.3.0"} {
		l.publishVersion(v, byte(i+1))
	}
	l.change(func(c *Channel) { c.Floors = []string{"1.1.0", "1.2.0"} })
	if _, err := l.publish.Move("old", "1.1.0"); err != nil {
		t.Fatal(err)
	}
	if _, err := l.publish.Change("late", func(c *Channel) error { c.Version, c.Paused = "1.3.0", true; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := l.publish.Change("back", func(c *Channel) error { c.Version, c.Downgrade = "1.1.0", true; return nil }); err != nil {
		t.Fatal(err)
	}
	if err := l.Reload(); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	for _, tc := range []struct {
		track, running, prefix, steps, hold string
		down                                bool
	}{
		{"stable", "1.0.0", "", "1.1.0 1.2.0 1.3.0", "", false},
		{"stable", "1.1.5", "", "1.2.0 1.3.0", "", false},
		{"stable", "1.3.0", "", "", "", false},
		{"stable", "1.0.0", "1.3", "1.1.0 1.2.0 1.3.0", "the host asks for 1.3 only", false},
		{"old", "1.2.0", "", "", "", false},
		{"late", "1.2.0", "", "1.3.0", "the rollout is paused", false},
		{"back", "1.3.0", "", "1.1.0", "this host takes no older version", true},
	} {
		p, err := l.client(1, tc.running).Plan(ctx, tc.track, omaha.CheckRequest{VersionPrefix: tc.prefix})
		if err != nil {
			t.Errorf("%+v: %v", tc, err)
			continue
		}
		if strings.Join(p.Steps, " ") != tc.steps || !strings.Contains(p.Hold, tc.hold) || (tc.hold == "") != (p.Hold == "") || p.Downgrade != tc.down {
			t.Errorf("%s from %s: %+v", tc.track, tc.running, p)
		}
	}
	if _, err := l.client(1, "1.0.0").Plan(ctx, "nightly", omaha.CheckRequest{}); !errors.Is(err, omaha.ErrUnknownChannel) {
		t.Errorf("a channel that is not there: %v", err)
	}
	channels, err := l.client(1, "1.0.0").Channels(ctx)
	if err != nil || len(channels) != 4 || channels[3].Name != "stable" || channels[3].Version != "1.3.0" || channels[1].Halted != "paused" {
		t.Errorf("channels: %+v, %v", channels, err)
	}
	if hosts := l.Hosts(); len(hosts) != 0 {
		t.Errorf("asking for plans made %d hosts", len(hosts))
	}
}

// TestFailureRate lets a rollout go on as long as few fail, and stops it when too large a share does.
func TestFailureRate(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.change(func(c *Channel) { c.StopFailurePercent = 20 })
	through := func(n int, well bool) bool {
		c := l.client(n, "1.0.0")
		if l.check(c).Offer == nil {
			return false
		}
		if !well {
			l.report(c, omaha.Failed(omaha.CodeRollback))
			return true
		}
		c.Version = "1.1.0"
		l.check(c, omaha.Booted("1.0.0"))
		l.check(c) // a second look must not count twice
		return true
	}
	for n := range 9 { // one of nine failed: more than a fifth only while there were few
		if !through(n, n != 2) {
			t.Fatalf("it stopped before host %d", n)
		}
	}
	if !through(9, false) || through(10, true) {
		t.Error("two of ten failed, and the rollout goes on")
	}
	if ch, err := l.publish.Channel("stable"); err != nil || ch.Stopped != "2 of 10 hosts failed with 1.1.0" {
		t.Errorf("channel is %+v, %v", ch, err)
	}
}

// TestHostEvents keeps what a host did over a restart, bounded, and forgets it with the host.
func TestHostEvents(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	c := l.client(1, "1.0.0")
	for range maxEvents {
		l.check(c)
		l.report(c, omaha.DownloadStarted(), omaha.Failed(omaha.CodeTransfer))
	}
	other := l.client(2, "1.1.0")
	l.check(other)
	l.Close()
	l.start()
	d, ok := l.detail(c.MachineID)
	if !ok || len(d.Events) != maxEvents || d.Events[0].To != Failed || d.Events[0].Code != omaha.CodeTransfer || d.Events[1].To != Downloading {
		t.Errorf("%d events, the newest %+v", len(d.Events), d.Events[0])
	}
	if d, _ := l.detail(other.MachineID); len(d.Events) != 1 {
		t.Errorf("the other host did %+v", d.Events)
	}
	l.clock.Add(100 * 24 * time.Hour)
	l.commit(true)
	if events := l.events(c.MachineID); len(events) != 0 {
		t.Errorf("a forgotten host still has %d events", len(events))
	}
}

// TestAdmins lets the holder of a token give orders, and no page of another site in their name.
func TestAdmins(t *testing.T) {
	a := Admins{Tokens: map[string]string{"ops": "secret", "none": ""}}
	for token, want := range map[string]string{"secret": "token ops", "": "", "secre": "", "secrets": ""} {
		if who, ok := a.who(token, &http.Request{}); who != want || ok != (want != "") {
			t.Errorf("token %q is %q, %v", token, who, ok)
		}
	}
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.opt.Admins = a
	req, err := http.NewRequest("POST", l.url+"/v1/admin/channels/stable", strings.NewReader(`{"action":"pause"}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer secret")
	req.Header.Set("Sec-Fetch-Site", "cross-site")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("an order from another site: %s", resp.Status)
	}
	var out struct{ Entries []AuditEntry }
	_, body := l.get("/v1/audit")
	if err := json.NewDecoder(bytes.NewReader([]byte(body))).Decode(&out); err != nil || len(out.Entries) != 2 || out.Entries[0].Who != "server" {
		t.Errorf("audit: %+v, %v", out, err)
	}
}
