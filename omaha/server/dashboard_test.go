package server

import (
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/omaha"
)

// fleetLab is a server with some history: 40 hosts, a rollout that is half way, failures.
func fleetLab(t *testing.T) *lab {
	l := newLab(t)
	l.publishVersion("1.0.0", 1)
	step := func(d time.Duration) { l.clock.Add(d); l.commit(true) }
	hosts := make([]*omaha.Client, 40)
	for i := range hosts {
		hosts[i] = l.client(i, "1.0.0")
		hosts[i].MachineAlias = fmt.Sprintf("node-%02d", i)
		if i >= 36 {
			hosts[i].Version = "0.9.0"
		}
		l.check(hosts[i])
		step(20 * time.Second)
	}
	l.publishVersion("1.1.0", 2)
	l.change(func(c *Channel) { c.MaxConcurrent, c.StopFailures, c.Percent = 6, 3, new(80) })
	for i, c := range hosts[:30] {
		step(2 * time.Minute)
		a := l.check(c)
		if a.Offer == nil {
			continue
		}
		l.report(c, omaha.DownloadStarted(), omaha.DownloadFinished())
		switch {
		case i%13 == 5:
			l.report(c, omaha.Failed(omaha.CodeRollback))
		case i > 26:
		default:
			l.report(c, omaha.Installed())
			c.Version = "1.1.0"
			l.check(c, omaha.Booted("1.0.0"))
		}
	}
	for i, hold := range map[int]string{35: "window: opens at 22:00", 34: "window: opens at 22:00", 33: "semaphore: place 2 in the queue of workers"} {
		if err := hosts[i].Ping(context.Background(), hold); err != nil {
			t.Fatal(err)
		}
	}
	l.betaLab(step)
	now := l.clock.Now()
	l.reboots.ask = func(context.Context) ([]RebootGroup, error) {
		return []RebootGroup{{Name: "workers", Max: 2,
			Holders: []RebootHost{{Host: "node-12", Phase: "rebooting", From: "1.0.0", To: "1.1.0", Since: now.Add(-90 * time.Second)}, {Host: "node-19", Phase: "rebooting", From: "1.0.0", To: "1.1.0", Since: now.Add(-47 * time.Minute), Late: true}},
			Queue:   []RebootHost{{Host: "node-33", From: "1.0.0", To: "1.1.0", Since: now.Add(-4 * time.Minute)}, {Host: "node-27", From: "1.0.0", To: "1.1.0", Since: now.Add(-3 * time.Minute)}},
		}}, nil
	}
	l.opt.Admins.Tokens = map[string]string{"ops": "secret"}
	l.opt.Verify = func(context.Context, string, *Delta) error { return nil }
	l.publish.Verify = l.opt.Verify
	step(time.Minute)
	return l
}

// betaLab adds a second channel with a rollout that its policy stopped.
func (l *lab) betaLab(step func(time.Duration)) {
	if _, err := l.Publish(context.Background(), "beta", "1.2.0-rc.1", fakePayload(l.t, 3, 250_000)); err != nil {
		l.t.Fatal(err)
	}
	if _, err := l.publish.Change("beta", func(c *Channel) error { c.StopFailures = 2; return nil }); err != nil {
		l.t.Fatal(err)
	}
	if err := l.Reload(); err != nil {
		l.t.Fatal(err)
	}
	for i := 60; i < 68; i++ {
		c := l.client(i, "1.1.0")
		c.Track, c.MachineAlias = "beta", fmt.Sprintf("canary-%d", i-59)
		if l.check(c).Offer == nil {
			continue
		}
		l.report(c, omaha.DownloadStarted())
		step(30 * time.Second)
		switch i {
		case 61, 64:
			l.report(c, omaha.Failed(omaha.CodePayloadHash+2))
		case 62:
		default:
			l.report(c, omaha.DownloadFinished(), omaha.Installed())
			c.Version = "1.2.0-rc.1"
			l.check(c, omaha.Booted("1.1.0"))
		}
	}
}

func (l *lab) get(path string) (*http.Response, string) {
	l.t.Helper()
	resp, err := http.Get(l.url + path)
	if err != nil {
		l.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		l.t.Fatal(err)
	}
	return resp, string(data)
}

func TestDashboard(t *testing.T) {
	l := newLab(t)
	if resp, page := l.get("/"); resp.StatusCode != 200 || !strings.Contains(page, "No host has asked yet") {
		t.Errorf("an empty server: %s", resp.Status)
	}
	l = fleetLab(t)
	resp, page := l.get("/")
	for _, want := range []string{"node-07", "stable", "window: opens at 22:00", "went back (code 44)", "polygon", "80 % of the hosts", "stops after 3 failures",
		"canary-2", "stopped: 2 hosts failed with 1.2.0-rc.1", "say the hosts", "node-19", "stays away too long", "2 of 2 slots taken, 2 in the queue",
		"Publish a release", "What people changed"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not show %q", want)
		}
	}
	if csp := resp.Header.Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'none'") {
		t.Errorf("content security policy %q", csp)
	}
	wellFormed(t, page)
	if _, page := l.get("/?q=node-07"); !strings.Contains(page, "node-07") || strings.Contains(page, `/hosts/00000000000000000000000000000008"`) {
		t.Error("the search does not narrow the list")
	}
	if resp, page := l.get("/hosts/" + fmt.Sprintf("%032x", 5)); resp.StatusCode != 200 || !strings.Contains(page, "went back (code 44)") || !strings.Contains(page, "What it did") {
		t.Errorf("the page of one host: %s", resp.Status)
	} else {
		wellFormed(t, page)
	}
	if resp, page := l.get("/hosts/nobody"); resp.StatusCode != 404 || !strings.Contains(page, "nobody") {
		t.Errorf("the page of a host that is not there: %s", resp.Status)
	}
	if _, page := l.get("/?class=bad&channel=beta"); !strings.Contains(page, ">canary-2<") || strings.Contains(page, `">node-05<`) && strings.Contains(page, `title="`+fmt.Sprintf("%032x", 5)+`"`) {
		t.Error("the filter does not narrow the list")
	}
	for _, asset := range []string{"/ui/style.css", "/ui/live.js", "/v1/openapi.yaml"} {
		if resp, _ := l.get(asset); resp.StatusCode != 200 {
			t.Errorf("%s: %s", asset, resp.Status)
		}
	}
}

// What hosts say about themselves is text on the page, and never markup.
func TestDashboardEscapes(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	c := l.client(1, "1.1.0")
	c.MachineAlias, c.OEM = `<script>alert(1)</script>`, `"><img src=x>`
	if err := c.Ping(context.Background(), `<b onmouseover="x">`); err != nil {
		t.Fatal(err)
	}
	_, page := l.get("/?q=" + url.QueryEscape("<i>hello</i>"))
	for _, bad := range []string{"<script>alert", "<img", "<b on", "<i>"} {
		if strings.Contains(page, bad) {
			t.Errorf("the page holds %q", bad)
		}
	}
	wellFormed(t, page)
}

// The button that goes back names the version that it goes back to, and is not there when there is none.
func TestDashboardBack(t *testing.T) {
	l := newLab(t)
	l.opt.Admins.Tokens = map[string]string{"ops": "secret"}
	for i, version := range []string{"1.0.0", "1.1.0", "1.2.0", "1.3.0"} {
		l.publishVersion(version, byte(i))
	}
	button := regexp.MustCompile(`>Back to ([^<]*)<`)
	for _, tt := range []struct {
		change func(*Channel)
		want   string
	}{
		{func(*Channel) {}, "1.2.0"},
		{func(c *Channel) { c.Blacklist = []string{"1.2.0"} }, "1.1.0"},
		{func(*Channel) { os.Remove(filepath.Join(l.dir, "payloads", "1.1.0.payload")) }, "1.0.0"},
		{func(c *Channel) { c.Blacklist = []string{"1.0.0", "1.2.0"} }, ""},
	} {
		l.change(tt.change)
		_, page := l.get("/")
		shown := ""
		if m := button.FindStringSubmatch(page); m != nil {
			shown = m[1]
		}
		if shown != tt.want {
			t.Errorf("the page would go back to %q, want %q", shown, tt.want)
		}
	}
}

// The page's buttons need the token each time, so a foreign page cannot press them.
func TestDashboardForms(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.opt.Admins.Tokens = map[string]string{"ops": "secret"}
	press := func(token, action string) int {
		resp, err := http.PostForm(l.url+"/ui/channels/stable", url.Values{"token": {token}, "action": {action}})
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		return resp.StatusCode
	}
	if code := press("", "pause"); code != 401 {
		t.Errorf("without the token: %d", code)
	}
	if code := press("secret", "pause"); code != 200 {
		t.Errorf("with the token: %d", code)
	}
	if _, page := l.get("/"); !strings.Contains(page, "paused") || !strings.Contains(page, ">Resume<") {
		t.Error("the page does not show the pause")
	}
	press("secret", "resume")
	if ch, err := l.publish.Channel("stable"); err != nil || ch.Paused {
		t.Errorf("channel is %+v, %v", ch, err)
	}
}

// wellFormed reads the page with a decoder that knows which elements HTML leaves open.
func wellFormed(t *testing.T, page string) {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(strings.Replace(page, "<!doctype html>", "", 1)))
	d.Strict, d.AutoClose, d.Entity = false, []string{"meta", "link", "input", "br"}, xml.HTMLEntity
	for {
		_, err := d.Token()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Errorf("the page is not well-formed: %v", err)
			return
		}
	}
}

// TestScreenshots has a real browser draw the page, light and dark, wide and narrow. It needs Debian's chromium and a
// folder for the pictures in FLIPSIDE_SCREENSHOTS.
func TestScreenshots(t *testing.T) {
	browser, err := exec.LookPath("chromium")
	dir := os.Getenv("FLIPSIDE_SCREENSHOTS")
	if err != nil || dir == "" {
		t.Skip("no chromium, or FLIPSIDE_SCREENSHOTS names no folder")
	}
	l := fleetLab(t)
	host := fmt.Sprintf("/hosts/%032x", 5)
	for name, shot := range map[string]struct {
		path string
		args []string
	}{
		"light":     {"/", []string{"--window-size=1280,2400"}},
		"dark":      {"/", []string{"--window-size=1280,2400", "--blink-settings=preferredColorScheme=0"}},
		"narrow":    {"/", []string{"--window-size=500,2400"}},
		"host":      {host, []string{"--window-size=1280,800"}},
		"host-dark": {host, []string{"--window-size=1280,800", "--blink-settings=preferredColorScheme=0"}},
	} {
		path := filepath.Join(dir, name+".png")
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		args := append(shot.args, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--screenshot="+path,
			"--user-data-dir="+t.TempDir(), l.url+shot.path)
		out, err := exec.CommandContext(ctx, browser, args...).CombinedOutput()
		cancel()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if info, err := os.Stat(path); err != nil || info.Size() < 20_000 {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestLivePage has a real browser run the page's script: a host that appears after the page was loaded is on it a little
// later, without a reload. The browser's own clock is made to run fast.
func TestLivePage(t *testing.T) {
	browser, err := exec.LookPath("chromium")
	if err != nil || os.Getenv("FLIPSIDE_SCREENSHOTS") == "" {
		t.Skip("no chromium, or FLIPSIDE_SCREENSHOTS is not set")
	}
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	var pages, reloads atomic.Int64
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		l.ServeHTTP(w, r)
		if r.URL.Path != "/" {
			return
		}
		if r.Header.Get("Sec-Fetch-Mode") == "navigate" {
			reloads.Add(1)
		}
		if pages.Add(1) == 1 {
			c := l.client(7, "1.0.0")
			c.MachineAlias = "latecomer"
			if err := c.Ping(context.Background(), ""); err != nil {
				t.Error(err)
			}
		}
	}))
	defer web.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	page, err := exec.CommandContext(ctx, browser, "--headless", "--no-sandbox", "--disable-gpu", "--user-data-dir="+t.TempDir(),
		"--virtual-time-budget=15000", "--dump-dom", web.URL+"/").Output()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(page), "latecomer") || pages.Load() < 2 || reloads.Load() != 1 {
		t.Errorf("the page was asked for %d times, %d of them reloads, and shows the new host: %v", pages.Load(), reloads.Load(), strings.Contains(string(page), "latecomer"))
	}
}

// TestContrast holds every colour that text is written in against what it is written on: at least 4.5 to 1, as WCAG 2.1
// asks for (1.4.3), in the light and in the dark.
func TestContrast(t *testing.T) {
	css, err := web.ReadFile("web/style.css")
	if err != nil {
		t.Fatal(err)
	}
	light, dark, ok := strings.Cut(string(css), "prefers-color-scheme: dark")
	if !ok {
		t.Fatal("there is no dark scheme")
	}
	variable := regexp.MustCompile(`--([a-z0-9]+): #([0-9a-f]{3}|[0-9a-f]{6});`)
	luminance := func(hex string) float64 {
		if len(hex) == 3 {
			hex = string([]byte{hex[0], hex[0], hex[1], hex[1], hex[2], hex[2]})
		}
		n, err := strconv.ParseUint(hex, 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		part := func(shift int) float64 {
			c := float64(n>>shift&0xff) / 255
			if c <= 0.04045 {
				return c / 12.92
			}
			return math.Pow((c+0.055)/1.055, 2.4)
		}
		return 0.2126*part(16) + 0.7152*part(8) + 0.0722*part(0)
	}
	for scheme, part := range map[string]string{"light": light, "dark": dark} {
		colour := map[string]string{}
		for _, m := range variable.FindAllStringSubmatch(part, -1) {
			colour[m[1]] = m[2]
		}
		for _, text := range []string{"ink", "quiet", "good", "busy", "held", "bad"} {
			for _, ground := range []string{"bg", "card"} {
				a, b := luminance(colour[text]), luminance(colour[ground])
				if ratio := (max(a, b) + 0.05) / (min(a, b) + 0.05); ratio < 4.5 {
					t.Errorf("%s: %s on %s has a contrast of %.2f", scheme, text, ground, ratio)
				}
			}
		}
	}
}
