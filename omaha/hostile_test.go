package omaha

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// hostile is one thing that a server does and what has to come of it. The numbers are those of the list of hostile
// responses in the protocol's facts.
type hostile struct {
	name   string
	answer http.HandlerFunc
	want   error  // errors.Is
	code   int    // of the event about it; 0 does not look
	says   string // is part of the message
}

func body(s string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "text/xml")
		io.WriteString(w, s)
	}
}

func page(s string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		io.WriteString(w, s)
	}
}

func status(code int, s string, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
		io.WriteString(w, s)
	}
}

const (
	pkg    = `<package name="a.img" hash="u3ACDTiI5OxaMM5C8Nnj9GNTAqY=" size="8388608" required="true"></package>`
	urlTag = `<url codebase="http://127.0.0.1:1/p/"></url>`
)

func hostiles() []hostile {
	invalid := func(name string, replace ...string) hostile {
		return hostile{name: name, answer: body(offerWith(replace...)), want: ErrResponse}
	}
	size := func(s string) hostile { return invalid("09 size "+s, `size="8388608"`, s) }
	sum := func(name, s string) hostile { return invalid("10 "+name, `sha256="`+goodSum+`"`, s) }
	base := func(s string) hostile { return invalid("08 address "+s, "http://127.0.0.1:1/p/", s) }
	file := func(name, s string) hostile { return invalid("11 name "+name, `name="a.img"`, `name="`+s+`"`) }
	return []hostile{
		{name: "01 nothing", answer: body(""), want: ErrResponse, code: CodeEmptyResponse},
		{name: "01 XML declaration only", answer: body(`<?xml version="1.0" encoding="UTF-8"?>` + "\n"), want: ErrResponse, code: CodeEmptyResponse},
		{name: "01 login page", answer: page("<!DOCTYPE html><title>Hotel Wi-Fi</title>"), want: ErrHTML, says: "Hotel Wi-Fi"},
		{name: "01 page with the wrong type", answer: body("<html><body>please log in"), want: ErrHTML, says: "please log in"},
		{name: "01 truncated", answer: body(offerWith()[:400]), want: ErrResponse, code: CodeXMLParse},
		{name: "01 not XML", answer: body(`{"response":{}}`), want: ErrResponse},
		{name: "01 connection closed in the body", answer: cut, want: io.ErrUnexpectedEOF},
		{name: "02 entity bomb", answer: body(`<?xml version="1.0"?><!DOCTYPE r [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><response protocol="3.0">&b;</response>`), want: ErrResponse, says: "directive"},
		{name: "02 external entity", answer: body(`<!DOCTYPE r SYSTEM "file:///etc/passwd"><response protocol="3.0"/>`), want: ErrResponse, says: "directive"},
		{name: "02 parameter entity", answer: body(`<!DOCTYPE r [<!ENTITY % p SYSTEM "http://127.0.0.1:1/x"> %p;]><response protocol="3.0"/>`), want: ErrResponse, says: "directive"},
		{name: "02 entity without a declaration", answer: body(`<response protocol="3.0" server="&x;"/>`), want: ErrResponse},
		{name: "03 nesting", answer: body(`<response protocol="3.0">` + strings.Repeat("<a>", 20000) + strings.Repeat("</a>", 20000) + `</response>`), want: ErrResponse, says: "deeper"},
		{name: "03 attributes", answer: body(`<response protocol="3.0"` + many(" a%d=''", 15000) + `/>`), want: ErrResponse, says: "attributes"},
		{name: "03 addresses", answer: body(offerWith(urlTag, strings.Repeat(urlTag, 17))), want: ErrResponse, says: "<url>"},
		{name: "03 packages", answer: body(offerWith(pkg, strings.Repeat(pkg, 65))), want: ErrResponse, says: "<package>"},
		{name: "03 manifests", answer: body(offerWith("</manifest>", "</manifest>"+strings.Repeat(`<manifest version="1.1.0"/>`, 16))), want: ErrResponse, says: "<manifest>"},
		{name: "03 long attribute", answer: body(offerWith(`name="a.img"`, `name="`+strings.Repeat("a", 3000)+`"`)), want: ErrResponse, says: "longer than"},
		{name: "03 many elements", answer: body(`<response protocol="3.0">` + strings.Repeat("<a/>", 5000) + `</response>`), want: ErrResponse, says: "elements"},
		{name: "04 endless body", answer: endless("<response>"), want: ErrResponse, says: "larger than"},
		{name: "04 endless white space behind the root", answer: endless(offerWith()), want: ErrResponse, says: "larger than"},
		{name: "05 gzip bomb", answer: gzipBomb, want: ErrResponse, says: "gzip"},
		{name: "06 one byte now and then", answer: drip, want: context.DeadlineExceeded},
		{name: "06 a head that never ends", answer: silent, want: context.DeadlineExceeded},
		{name: "07 redirect loop", answer: redirect(307, func(r *http.Request) string { return r.URL.Path }), want: ErrRedirect, says: "in a row"},
		{name: "07 redirect that loses the request", answer: redirect(302, func(*http.Request) string { return "/elsewhere" }), want: ErrRedirect, says: "302"},
		{name: "07 redirect to another server", answer: redirect(307, func(*http.Request) string { return "http://127.0.0.1:1/" }), want: ErrRedirect, says: "another server"},
		base("file:///etc/passwd"), base("ftp://example.org/"), base("http://user:secret@example.org/"), base("//example.org/"),
		base("http:///p/"), base("http://example.org/?x="), base("javascript:alert(1)"), base(""), base("http://[::1/"),
		invalid("08 no address", urlTag, ""),
		size(``), size(`size="0"`), size(`size="-1"`), size(`size="9223372036854775809"`), size(`size="99999999999999999999999"`), size(`size="1e6"`), size(`size="80000000000"`),
		sum("no digest", ``), sum("empty digest", `sha256=""`), sum("short digest", `sha256="731DdRoruXehRo3bCDUq"`),
		sum("63 hexadecimal digits", `sha256="`+strings.Repeat("a", 63)+`"`), sum("64 letters that are not hexadecimal", `sha256="`+strings.Repeat("z", 64)+`"`),
		sum("44 characters that are not base64", `sha256="`+strings.Repeat("!", 43)+`="`),
		invalid("10 two digests that differ", `hash="u3ACDTiI5OxaMM5C8Nnj9GNTAqY="`, `hash_sha256="`+strings.Repeat("ab", 32)+`"`),
		invalid("10 two postinstall actions", `<actions>`, `<actions><action event="postinstall" sha256="`+goodSum+`"/>`),
		file("with dots", "../../x"), file("absolute", "/etc/passwd"), file("address", "http://evil/x"), file("empty", ""), file("escaped dots", "%2e%2e"),
		file("NUL", "a\x00b"), file("backslash", `a\b`), file("just dots", ".."), file("line break", "a&#10;b"),
		invalid("11 the same name twice", pkg, pkg+pkg),
		invalid("12 four numbers", `manifest version="1.1.0"`, `manifest version="1.1.0.0"`),
		invalid("12 no version", `manifest version="1.1.0"`, `manifest version=""`),
		invalid("12 version with a line break", `manifest version="1.1.0"`, `manifest version="1.1.0&#10;"`),
		invalid("14 two answers for our app", `</app>`, `</app><app appid="`+testApp+`" status="ok"/>`),
		invalid("14 only another app", testApp, "org.example.other"),
		invalid("14 app id in another spelling", testApp, strings.ToUpper(testApp)),
		invalid("14 two update checks", `</updatecheck>`, `</updatecheck><updatecheck status="noupdate"/>`),
		invalid("14 attribute twice", `manifest version="1.1.0"`, `manifest version="1.0.0" version="1.1.0"`),
		invalid("14 attribute of a name space", `manifest version="1.1.0"`, `manifest version="1.0.0" x:version="1.1.0"`),
		invalid("14 element of a name space", `<packages>`, `<x:packages/><packages>`),
		invalid("14 default name space", `<response `, `<response xmlns="urn:x" `),
		invalid("14 two lists of packages", `</packages>`, `</packages><packages/>`),
		invalid("15 offer without a manifest", `<manifest version="1.1.0">`, `<m>`, `</manifest>`, `</m>`),
		invalid("15 offer without packages", pkg, ""),
		{name: "15 HTTP error with a valid offer", answer: status(500, offerWith()), code: 2500, says: "500"},
		invalid("15 unknown application status", `status="ok"><updatecheck`, `status="fine"><updatecheck`),
		invalid("15 unknown update check status", `<updatecheck status="ok"`, `<updatecheck status="yes"`),
		invalid("15 no update check", `<updatecheck status="ok">`, `<other>`, `</updatecheck>`, `</other>`),
		invalid("15 protocol 3.1", `protocol="3.0"`, `protocol="3.1"`),
		invalid("16 PollInterval that is no number", `<updatecheck status="ok"`, `<updatecheck status="ok" PollInterval="soon"`),
		{name: "16 too many requests", answer: status(429, "", "Retry-After", "1000000000000"), code: 2429, says: "429"},
		{name: "20 UTF-16", answer: body("\xff\xfe<\x00r\x00"), want: ErrResponse, says: "UTF-8"},
		{name: "20 ISO-8859-1", answer: body(offerWith("UTF-8", "ISO-8859-1")), want: ErrResponse},
		{name: "20 byte order mark", answer: body("\ufeff" + offerWith()), want: ErrResponse},
		{name: "20 invalid UTF-8", answer: body(offerWith("test", "te\xffst")), want: ErrResponse, says: "UTF-8"},
		{name: "20 text behind the root", answer: body(offerWith() + "x"), want: ErrResponse},
		{name: "20 a second root", answer: body(offerWith() + "<response/>"), want: ErrResponse},
		{name: "20 processing instruction", answer: body(offerWith("<app ", `<?php evil ?><app `)), want: ErrResponse},
	}
}

// TestHostileAnswers gives each hostile answer to a check. It must end in an error that says what was wrong, with
// nothing in it that disturbs a terminal, and cost little.
func TestHostileAnswers(t *testing.T) {
	for _, h := range hostiles() {
		t.Run(h.name, func(t *testing.T) {
			s := httptest.NewServer(h.answer)
			defer s.Close()
			defer s.CloseClientConnections()
			c := newClient(t, s.URL+"/v1/update/")
			c.Timeout = 10 * time.Second
			if strings.HasPrefix(h.name, "06") {
				c.Timeout = 300 * time.Millisecond
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			a, err := c.Check(context.Background(), CheckRequest{})
			runtime.ReadMemStats(&after)
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("got %+v, %v; want an error", a, err)
			}
			if h.want != nil && !errors.Is(err, h.want) {
				t.Errorf("error %q is not %q", err, h.want)
			}
			if h.code != 0 && e.Code != h.code {
				t.Errorf("code %d, want %d (%v)", e.Code, h.code, err)
			}
			if !strings.Contains(err.Error(), h.says) {
				t.Errorf("error %q does not say %q", err, h.says)
			}
			for _, r := range err.Error() {
				if r < ' ' || r == 0x7f || r == 0x1b {
					t.Errorf("error %q holds a control character", err)
				}
			}
			if spent := after.TotalAlloc - before.TotalAlloc; spent > 16<<20 {
				t.Errorf("it cost %d bytes", spent)
			}
		})
	}
}

func many(format string, n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, format, i)
	}
	return b.String()
}

func cut(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Length", "5000")
	io.WriteString(w, offerWith()[:300])
}

func endless(start string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/xml")
		io.WriteString(w, start)
		blank := bytes.Repeat([]byte(" \n"), 32<<10)
		for range 1 << 14 { // a gigabyte, if somebody takes it
			if _, err := w.Write(blank); err != nil {
				return
			}
		}
	}
}

func gzipBomb(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/xml")
	w.Header().Set("Content-Encoding", "gzip")
	z := gzip.NewWriter(w)
	blank := make([]byte, 1<<20)
	for range 64 {
		if _, err := z.Write(blank); err != nil {
			return
		}
	}
	z.Close()
}

// drip sends an answer one byte at a time, for as long as somebody listens.
func drip(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/xml")
	for {
		if _, err := io.WriteString(w, " "); err != nil {
			return
		}
		w.(http.Flusher).Flush()
		select {
		case <-r.Context().Done():
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// silent begins a header and never ends it.
func silent(w http.ResponseWriter, r *http.Request) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	for {
		if _, err := io.WriteString(conn, "HTTP/1.1 200 OK\r\nX: "); err != nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func redirect(code int, to func(*http.Request) string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, to(r), code)
	}
}

// 07: what is allowed is followed.
func TestRedirectToTheSameServer(t *testing.T) {
	var method string
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/update" {
			http.Redirect(w, r, "/v1/update/", http.StatusPermanentRedirect)
			return
		}
		method = r.Method
		body(offerWith())(w, r)
	}))
	defer s.Close()
	a, err := newClient(t, s.URL+"/v1/update").Check(context.Background(), CheckRequest{})
	if err != nil || a.Offer == nil || method != http.MethodPost {
		t.Errorf("got %v, %v by %s", a, err, method)
	}
}

// 08: what a server may name depends on where the server is.
func TestAddressRules(t *testing.T) {
	for _, tc := range []struct {
		control, codebase string
		plain, ok         bool
	}{
		{"https://up.example.org/", "https://cdn.example.org/p/", false, true},
		{"https://up.example.org/", "http://cdn.example.org/p/", false, false},
		{"https://up.example.org/", "http://cdn.example.org/p/", true, true},
		{"http://up.example.org/", "http://cdn.example.org/p/", false, true},
		{"https://up.example.org/", "https://127.0.0.1/p/", false, false},
		{"https://up.example.org/", "https://localhost/p/", false, false},
		{"https://up.example.org/", "https://x.localhost./p/", false, false},
		{"https://up.example.org/", "https://[::1]/p/", false, false},
		{"https://up.example.org/", "https://[::ffff:127.0.0.1]/p/", false, false},
		{"https://up.example.org/", "https://169.254.169.254/latest/", false, false},
		{"https://up.example.org/", "https://[fe80::1]/p/", false, false},
		{"https://up.example.org/", "https://0.0.0.0/p/", false, false},
		{"https://up.example.org/", "https://127.1/p/", false, false},
		{"https://up.example.org/", "https://2130706433/p/", false, false},
		{"https://up.example.org/", "https://0x7f000001/p/", false, false},
		{"https://up.example.org/", "https://ｌｏｃａｌｈｏｓｔ/p/", false, false}, // net/http makes ASCII of each of these
		{"https://up.example.org/", "https://①②⑦.⓪.⓪.①/p/", false, false},
		{"https://up.example.org/", "https://127。0。0。1/p/", false, false},
		{"https://up.example.org/", "https://local\u00adhost/p/", false, false},
		{"https://up.example.org/", "https://bücher.example/p/", false, false},
		{"https://up.example.org/", "https://xn--bcher-kva.example/p/", false, true},
		{"https://up.example.org/", "https://10.0.0.1/p/", false, true},
		{"https://up.example.org/", "https://123.de/p/", false, true},
		{"http://127.0.0.1:1/", "http://127.0.0.1:2/p/", false, true},
	} {
		c := newClient(t, tc.control)
		c.AllowPlainHTTP = tc.plain
		a, err := c.decide([]byte(offerWith("http://127.0.0.1:1/p/", tc.codebase)), CheckRequest{})
		if (err == nil && a.Offer != nil) != tc.ok {
			t.Errorf("%s names %s: %v", tc.control, tc.codebase, err)
		}
	}
}

// 10: both spellings of a digest, in both places.
func TestDigestSpellings(t *testing.T) {
	const hexSum = "ef7d43751a2bb977a1468ddb08352a6e12939d54a9f4bc68632eed1e12026ee3"
	for _, inPackage := range []string{"", hexSum, strings.ToUpper(hexSum), goodSum} {
		for _, inAction := range []string{"", hexSum, goodSum} {
			if inPackage+inAction == "" {
				continue
			}
			got, err := digest("a", inPackage, inAction)
			if err != nil || fmt.Sprintf("%x", got) != hexSum {
				t.Errorf("%q, %q: %x, %v", inPackage, inAction, got, err)
			}
		}
	}
}

// 12: older and equal versions make no offer; consent makes one of an older version.
func TestVersionRules(t *testing.T) {
	for _, tc := range []struct {
		running, offered string
		req              CheckRequest
		kind             Kind
	}{
		{"1.0.0", "1.1.0", CheckRequest{}, Offered},
		{"1.1.0", "1.1.0", CheckRequest{}, UpToDate},
		{"1.1.0", "1.1.0+other.build", CheckRequest{}, UpToDate},
		{"1.2.0", "1.1.0", CheckRequest{}, Downgrade},
		{"1.2.0", "1.1.0", CheckRequest{AllowDowngrade: true}, Offered},
		{"1.10.0", "1.9.0", CheckRequest{}, Downgrade},
		{"1.1.0", "1.1.0-rc.1", CheckRequest{}, Downgrade},
		{"1.1.0-rc.1", "1.1.0", CheckRequest{}, Offered},
		{"1.1.0", "1.2.0", CheckRequest{VersionPrefix: "1.1"}, UpToDate},
		{"1.1.0", "1.10.0", CheckRequest{VersionPrefix: "1.1"}, UpToDate},
		{"1.1.0", "1.1.7", CheckRequest{VersionPrefix: "1.1."}, Offered},
		{"1.1.0", "1.1.7", CheckRequest{VersionPrefix: "1.1.*"}, Offered},
	} {
		c := newClient(t, "http://127.0.0.1:1/")
		c.Version = tc.running
		a, err := c.decide([]byte(offerWith(`manifest version="1.1.0"`, `manifest version="`+tc.offered+`"`)), tc.req)
		if err != nil || a.Reason.Kind != tc.kind || (a.Offer != nil) != (tc.kind == Offered) {
			t.Errorf("%s offered %s with %+v: %s, %v", tc.running, tc.offered, tc.req, a.Reason, err)
		}
		if a.Offer != nil && a.Offer.Downgrade != (tc.kind == Offered && tc.req.AllowDowngrade) {
			t.Errorf("%s offered %s: downgrade %v", tc.running, tc.offered, a.Offer.Downgrade)
		}
	}
}

// 13 and 14: several addresses keep their order without the bad ones, several manifests give the first step.
func TestSeveralAddressesAndManifests(t *testing.T) {
	c := newClient(t, "http://127.0.0.1:1/")
	a, err := c.decide([]byte(offerWith(urlTag, `<url codebase="gopher://x/"/>`+urlTag+`<url codebase="http://mirror.example.org/a%2fb"/>`, "a.img", "a b+c.img")), CheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(a.Offer.URLs, " "); got != "http://127.0.0.1:1/p/a%20b+c.img http://mirror.example.org/a%2fb/a%20b+c.img" {
		t.Errorf("addresses are %s", got)
	}
	manifest := func(v string) string {
		return `<manifest version="` + v + `"><packages>` + pkg + `</packages><actions><action event="postinstall" sha256="` + goodSum + `"/></actions></manifest>`
	}
	c.Version = "1.1.0"
	a, err = c.decide([]byte(offerWith("</manifest>", "</manifest>"+manifest("1.2.0")+manifest("1.3.0"))), CheckRequest{})
	if err != nil || a.Offer == nil || a.Offer.Version != "1.2.0" {
		t.Errorf("got %+v, %v", a, err)
	}
}

// 15: an application's error goes before an offer, and a noupdate before a manifest.
func TestContradictions(t *testing.T) {
	c := newClient(t, "http://127.0.0.1:1/")
	a, err := c.decide([]byte(offerWith(`status="ok"><updatecheck`, `status="error-updatesDisabled"><updatecheck`)), CheckRequest{})
	if err != nil || a.Offer != nil || a.Reason.Kind != Deferred {
		t.Errorf("application error with an offer: %+v, %v", a, err)
	}
	a, err = c.decide([]byte(offerWith(`<updatecheck status="ok"`, `<updatecheck status="noupdate"`)), CheckRequest{})
	if err != nil || a.Offer != nil || a.Reason.Kind != UpToDate {
		t.Errorf("noupdate with an offer: %+v, %v", a, err)
	}
}

// 16: whatever a server asks for, a host waits at least a minute and at most a day.
func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"": 0, "0": MinPoll, "-7": MinPoll, "120": 2 * time.Minute, "1000000000000": MaxPoll, "99999999999999999999999": MaxPoll,
		"Mon, 23 Nov 2026 13:00:00 GMT": time.Hour, "Mon, 23 Nov 2020 13:00:00 GMT": MinPoll, "tomorrow": MinPoll,
	} {
		h := http.Header{}
		if value != "" {
			h.Set("Retry-After", value)
		}
		if got := retryAfter(h, now); got != want {
			t.Errorf("Retry-After %q: %s, want %s", value, got, want)
		}
	}
	s := httptest.NewServer(status(503, "", "X-Retry-After", "600"))
	defer s.Close()
	_, err := newClient(t, s.URL).Check(context.Background(), CheckRequest{})
	var e *Error
	if !errors.As(err, &e) || e.RetryAfter != 10*time.Minute || e.Code != 2503 {
		t.Errorf("got %v", err)
	}
}

// 18: a certificate that does not hold is an error, and nothing is sent in the clear instead.
func TestTLS(t *testing.T) {
	s := httptest.NewTLSServer(body(offerWith()))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	defer s.Close()
	check := func(opt HTTPOptions, address string) error {
		opt.Proxy = "direct"
		h, err := NewHTTP(opt)
		if err != nil {
			t.Fatal(err)
		}
		defer h.CloseIdle()
		c := newClient(t, address)
		c.HTTP, c.AllowPlainHTTP = h, true
		_, err = c.Check(context.Background(), CheckRequest{})
		return err
	}
	var unknown x509.UnknownAuthorityError
	if err := check(HTTPOptions{}, s.URL); !errors.As(err, &unknown) {
		t.Errorf("unknown authority: %v", err)
	}
	ca := filepath.Join(t.TempDir(), "ca.pem")
	os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o644)
	if err := check(HTTPOptions{CAFiles: []string{ca}, CAOnly: true}, s.URL); err != nil {
		t.Errorf("with the server's own authority: %v", err)
	}
	var host x509.HostnameError
	if err := check(HTTPOptions{CAFiles: []string{ca}}, strings.Replace(s.URL, "127.0.0.1", "localhost", 1)); !errors.As(err, &host) {
		t.Errorf("wrong host: %v", err)
	}

	cert, certPEM := certificate(t, time.Now().Add(-time.Hour))
	old := httptest.NewUnstartedServer(body(offerWith()))
	old.Config.ErrorLog = log.New(io.Discard, "", 0)
	old.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	old.StartTLS()
	defer old.Close()
	os.WriteFile(ca, certPEM, 0o644)
	var expired x509.CertificateInvalidError
	if err := check(HTTPOptions{CAFiles: []string{ca}}, old.URL); !errors.As(err, &expired) || expired.Reason != x509.Expired {
		t.Errorf("expired: %v", err)
	}
}

// certificate makes a self-signed certificate for 127.0.0.1.
func certificate(t *testing.T, until time.Time) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: until.Add(-24 * time.Hour), NotAfter: until,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// 20: what a server says reaches a person without its control characters.
func TestReasonsArePrintable(t *testing.T) {
	c := newClient(t, "http://127.0.0.1:1/")
	a, err := c.decide([]byte(offerWith(`<updatecheck status="ok"`, `<updatecheck status="noupdate" hold="later&#10;&#9;&#x85;&#x202e;gpj.exe"`)), CheckRequest{})
	if err != nil || a.Reason.Kind != Deferred {
		t.Fatalf("got %+v, %v", a, err)
	}
	if s := a.Reason.String(); s != Printable(s) || !strings.Contains(s, "later") || strings.ContainsAny(s, "\n\t\u0085\u202e") {
		t.Errorf("reason is %q", s)
	}
	if got := Printable("a\x1b[31m\r\n\u200bb\xff" + strings.Repeat("x", 500)); strings.ContainsAny(got, "\x1b\r\n\u200b") || len(got) > maxText+10 {
		t.Errorf("got %q", got)
	}
}
