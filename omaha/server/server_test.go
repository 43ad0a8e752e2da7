package server

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/omaha"
)

const testApp = "32f1acea-08a3-4ed8-982c-538d8a47e253"

// fakePayload writes a file that begins like a payload of major version 2.
func fakePayload(t testing.TB, seed byte, size int) string {
	t.Helper()
	data := bytes.Repeat([]byte{seed}, size)
	copy(data, "CrAU")
	binary.BigEndian.PutUint64(data[4:], 2)
	binary.BigEndian.PutUint64(data[12:], 100)
	binary.BigEndian.PutUint32(data[20:], 16)
	path := filepath.Join(t.TempDir(), fmt.Sprintf("%d.payload", seed))
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// clock is a time that a test moves.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return c.now }
func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func newClock() *clock { return &clock{now: time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)} }

// lab is a server that answers, and the clients that ask it.
type lab struct {
	*Server
	t     testing.TB
	dir   string
	url   string
	clock *clock
	http  *omaha.HTTP
}

func newLab(t testing.TB) *lab {
	t.Helper()
	l := &lab{t: t, dir: t.TempDir(), clock: newClock()}
	l.start()
	return l
}

func (l *lab) start() {
	l.t.Helper()
	s, err := New(l.dir, Options{Now: l.clock.Now, AppID: testApp})
	if err != nil {
		l.t.Fatal(err)
	}
	web := httptest.NewServer(s)
	h, err := omaha.NewHTTP(omaha.HTTPOptions{Proxy: "direct"})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { h.CloseIdle(); web.Close(); s.Close() })
	l.Server, l.url, l.http = s, web.URL, h
}

func (l *lab) client(n int, version string) *omaha.Client {
	return &omaha.Client{
		URL: l.url + "/v1/update/", AppID: testApp, Version: version, Track: "stable", Board: "amd64-usr",
		MachineID: fmt.Sprintf("%032x", n), HTTP: l.http,
	}
}

func (l *lab) check(c *omaha.Client, events ...omaha.Event) omaha.Answer {
	l.t.Helper()
	a, err := c.Check(context.Background(), omaha.CheckRequest{Events: events})
	if err != nil {
		l.t.Fatal(err)
	}
	return a
}

func (l *lab) report(c *omaha.Client, events ...omaha.Event) {
	l.t.Helper()
	for _, e := range events {
		if err := c.Report(context.Background(), e); err != nil {
			l.t.Fatal(err)
		}
	}
}

func (l *lab) state(c *omaha.Client) State {
	l.t.Helper()
	h, ok := l.Host(c.MachineID)
	if !ok {
		l.t.Fatalf("host %s is not known", c.MachineID)
	}
	return h.State
}

func (l *lab) publishVersion(version string, seed byte) Release {
	l.t.Helper()
	r, err := l.Publish(context.Background(), "stable", version, fakePayload(l.t, seed, 300_000))
	if err != nil {
		l.t.Fatal(err)
	}
	return r
}

// TestOneUpdate follows one host through a whole update, against the client of this repository.
func TestOneUpdate(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	c := l.client(1, "1.0.0")

	a := l.check(c)
	if a.Offer == nil {
		t.Fatalf("no offer: %s", a.Reason)
	}
	if a.Offer.Version != "1.1.0" || a.Offer.Size != 300_000 || a.Offer.MetadataSize != 124 {
		t.Errorf("offer is %+v", a.Offer)
	}
	if again := l.check(c); again.Offer == nil || again.Offer.Version != "1.1.0" {
		t.Errorf("the same check again: %+v", again)
	}
	for _, step := range []struct {
		event omaha.Event
		want  State
	}{
		{omaha.DownloadStarted(), Downloading},
		{omaha.DownloadFinished(), Downloaded},
		{omaha.Installed(), Installed},
	} {
		l.report(c, step.event)
		if got := l.state(c); got != step.want {
			t.Errorf("after event %d/%d the host is %s, want %s", step.event.Type, step.event.Result, got, step.want)
		}
	}
	c.Version = "1.1.0"
	if a := l.check(c, omaha.Booted("1.0.0")); a.Reason.Kind != omaha.UpToDate {
		t.Errorf("after the boot: %s", a.Reason)
	}
	if h, _ := l.Host(c.MachineID); h.State != Complete || h.Previous != "1.0.0" || h.Version != "1.1.0" {
		t.Errorf("host is %+v", h)
	}

	d := omaha.NewDownload(l.http, a.Offer, omaha.DownloadOptions{})
	r, err := d.Open(context.Background(), 100_000)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if data, err := io.ReadAll(r); err != nil || len(data) != 200_000 {
		t.Errorf("read %d bytes: %v", len(data), err)
	}
}

func TestPayloadRangesAndETag(t *testing.T) {
	l := newLab(t)
	rel := l.publishVersion("1.1.0", 1)
	get := func(method, path string, header ...string) *http.Response {
		req, _ := http.NewRequest(method, l.url+path, nil)
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		io.Copy(io.Discard, resp.Body)
		return resp
	}
	etag := `"` + rel.SHA256 + `"`
	if r := get("HEAD", "/payloads/1.1.0.payload"); r.StatusCode != 200 || r.ContentLength != 300_000 || r.Header.Get("ETag") != etag {
		t.Errorf("HEAD: %s, %d bytes, %s", r.Status, r.ContentLength, r.Header.Get("ETag"))
	}
	if r := get("GET", "/payloads/1.1.0.payload", "Range", "bytes=10-19", "If-Range", etag); r.StatusCode != 206 || r.Header.Get("Content-Range") != "bytes 10-19/300000" {
		t.Errorf("range: %s, %s", r.Status, r.Header.Get("Content-Range"))
	}
	if r := get("GET", "/payloads/1.1.0.payload", "Range", "bytes=10-19", "If-Range", `"other"`); r.StatusCode != 200 {
		t.Errorf("range of another file: %s", r.Status)
	}
	for _, path := range []string{"/payloads/nothing", "/payloads/..%2freleases%2f1.1.0.toml", "/payloads/", "/releases/1.1.0.toml"} {
		if r := get("GET", path); r.StatusCode != 404 {
			t.Errorf("%s: %s", path, r.Status)
		}
	}
}

// A release server that believed the Host header would let whoever forges one lead hosts elsewhere.
func TestAddressesDoNotComeFromTheRequest(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	body := `<request protocol="3.0"><app appid="` + testApp + `" version="1.0.0" track="stable" machineid="a"><updatecheck/></app></request>`
	req, _ := http.NewRequest("POST", l.url+"/v1/update/", bytes.NewReader([]byte(body)))
	req.Host = "evil.example.org"
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, _ := io.ReadAll(resp.Body)
	if bytes.Contains(data, []byte("evil")) || !bytes.Contains(data, []byte(l.url+"/payloads/")) {
		t.Errorf("answer is %s", data)
	}
}

// post sends any bytes as an update request.
func (l *lab) post(body string) (int, string) {
	l.t.Helper()
	resp, err := http.Post(l.url+"/v1/update/", "text/xml", bytes.NewReader([]byte(body)))
	if err != nil {
		l.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		l.t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

func TestAdmin(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.publishVersion("1.2.0", 2)
	do := func(token, method, path, body string) (int, string) {
		req, _ := http.NewRequest(method, l.url+path, strings.NewReader(body))
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		data, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(data)
	}
	const path = "/v1/admin/channels/stable"
	if code, _ := do("", "POST", path, `{"action":"pause"}`); code != 403 {
		t.Errorf("without a token in the options: %d", code)
	}
	l.opt.Admins.Tokens = map[string]string{"ops": "secret"}
	for _, tc := range []struct {
		token, body string
		code        int
	}{
		{"", `{"action":"pause"}`, 401}, {"wrong", `{"action":"pause"}`, 401}, {"secret", `{"action":"explode"}`, 400},
		{"secret", `{"actoin":"pause"}`, 400}, {"secret", `{`, 400}, {"secret", `{"action":"move","version":"9.9.9"}`, 404},
		{"secret", `{"action":"limit","limits":{"percent":101}}`, 400}, {"secret", `{"action":"pause"}`, 200},
	} {
		if code, body := do(tc.token, "POST", path, tc.body); code != tc.code {
			t.Errorf("%q with token %q: %d %s", tc.body, tc.token, code, body)
		}
	}
	l.wants(l.client(1, "1.0.0"), "", "paused")
	for _, body := range []string{`{"action":"resume"}`, `{"action":"limit","limits":{"percent":100,"max_concurrent":7},"blacklist":["1.2.0"]}`, `{"action":"rollback"}`} {
		if code, answer := do("secret", "POST", path, body); code != 200 {
			t.Errorf("%s: %d %s", body, code, answer)
		}
	}
	l.wants(l.client(1, "1.0.0"), "1.1.0", "")
	if ch, err := l.publish.Channel("stable"); err != nil || ch.MaxConcurrent != 7 || ch.Version != "1.1.0" {
		t.Errorf("channel is %+v, %v", ch, err)
	}
	code, data := do("secret", "GET", "/v1/admin/backup", "")
	if code != 200 || len(data) < 4096 {
		t.Errorf("backup: %d, %d bytes", code, len(data))
	}
	copied := t.TempDir()
	if err := os.WriteFile(filepath.Join(copied, "state.db"), []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := New(copied, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if hosts := s.Hosts(); len(hosts) != 1 || hosts[0].Target != "1.1.0" {
		t.Errorf("the backup holds %+v", hosts)
	}
}

func TestMetrics(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.check(l.client(1, "1.0.0"))
	l.check(l.client(2, "1.1.0"))
	l.post("nonsense")
	resp, err := http.Get(l.url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, _ := io.ReadAll(resp.Body)
	for _, want := range []string{
		`flipside_hosts{channel="stable",state="granted",version="other"} 1`,
		`flipside_hosts{channel="stable",state="current",version="1.1.0"} 1`,
		`flipside_checks_total{answer="offer",channel="stable"} 1`,
		`flipside_channel_halted{channel="stable",version="1.1.0"} 0`,
		`flipside_requests_refused_total 1`,
		`flipside_host_state_changes_total{state="granted"} 1`,
	} {
		if !strings.Contains(string(data), want+"\n") {
			t.Errorf("no %s", want)
		}
	}
}

// What a host says about itself is shown, bounded and without control characters.
func TestHostsOwnWords(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	c := l.client(1, "1.1.0")
	c.MachineAlias = "web-1"
	if err := c.Ping(context.Background(), "window: opens at 22:00"); err != nil {
		t.Fatal(err)
	}
	if h, _ := l.Host(c.MachineID); h.Waits != "window: opens at 22:00" || h.Alias != "web-1" {
		t.Errorf("host is %+v", h)
	}
	l.check(c)
	if h, _ := l.Host(c.MachineID); h.Waits != "" {
		t.Errorf("it still waits: %q", h.Waits)
	}
	resp, err := http.Get(l.url + "/v1/status")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var st Status
	if err := json.NewDecoder(resp.Body).Decode(&st); err != nil || st.Schema != "flipside.serve-status/v1" || len(st.Hosts) != 1 || st.Channels["stable"].Version != "1.1.0" {
		t.Errorf("status is %+v, %v", st, err)
	}
}
