package omaha

import (
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"unicode/utf8"
)

// FuzzAnswer gives any bytes to the client as a server's answer. Whatever comes of it, an offer keeps its promises.
func FuzzAnswer(f *testing.F) {
	for _, seed := range []string{
		"", offerWith(), offerWith("1.1.0", "0.9.0"), offerWith(pkg, pkg+pkg), offerWith(urlTag, ""), offerWith(`size="8388608"`, `size="0"`),
		offerWith("a.img", "../a"), offerWith(goodSum, "x"), offerWith(`status="ok"><u`, `status="error-updatesDisabled"><u`),
		offerWith(`<updatecheck status="ok"`, `<updatecheck status="noupdate" PollInterval="5" hold="&#27;[31m"`),
		`<!DOCTYPE a [<!ENTITY b "c">]><response protocol="3.0"/>`, `<response protocol="3.0"><app x:appid="1"/></response>`,
		offerWith("</manifest>", `</manifest><manifest version="2.0.0"/>`), offerWith("</actions>", `</actions><actions/>`),
	} {
		f.Add([]byte(seed))
	}
	if dir, err := filepath.Abs(filepath.Join("..", "..", "shared", "samples", "nebraska")); err == nil {
		names, _ := filepath.Glob(filepath.Join(dir, "*.response.xml"))
		for _, name := range names {
			if data, err := os.ReadFile(name); err == nil {
				f.Add(data)
			}
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c := &Client{URL: "https://updates.example.org/", AppID: testApp, Version: "1.0.0", MachineID: "a"}
		a, err := c.decide(data, CheckRequest{})
		if err != nil {
			if a.Offer != nil {
				t.Error("an error with an offer")
			}
			return
		}
		if s := a.Reason.String(); Printable(s) != s && len(s) <= maxText {
			t.Errorf("reason %q cannot be printed", s)
		}
		if (a.Offer != nil) != (a.Reason.Kind == Offered) {
			t.Errorf("offer %v with reason %s", a.Offer != nil, a.Reason.Kind)
		}
		if a.PollInterval != 0 && (a.PollInterval < MinPoll || a.PollInterval > MaxPoll) {
			t.Errorf("PollInterval %s", a.PollInterval)
		}
		o := a.Offer
		if o == nil {
			return
		}
		if n, err := CompareVersions(o.Version, c.Version); err != nil || n <= 0 {
			t.Errorf("offered %q", o.Version)
		}
		if o.Size <= 0 || len(o.URLs) == 0 || len(o.URLs) > 16 {
			t.Errorf("offer %+v", o)
		}
		for _, raw := range o.URLs {
			u, err := url.Parse(raw)
			if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || isLocal(u.Hostname()) {
				t.Errorf("address %q", raw)
			}
		}
	})
}

// FuzzHead gives any header to the download of a payload.
func FuzzHead(f *testing.F) {
	f.Add(206, "bytes 5-9/10", `"a"`, "application/octet-stream", int64(5))
	f.Add(206, "bytes 5-9/*", `W/"a"`, "", int64(5))
	f.Add(200, "", "", "text/html", int64(0))
	f.Add(206, "bytes 9223372036854775807-9223372036854775807/0", "", "multipart/byteranges", int64(5))
	f.Fuzz(func(t *testing.T, code int, contentRange, etag, contentType string, offset int64) {
		if offset < 0 || offset >= 10 {
			return
		}
		d := &Download{offer: &Offer{Size: 10}}
		resp := &http.Response{
			StatusCode: code, ContentLength: -1, Body: http.NoBody, Request: &http.Request{URL: &url.URL{Scheme: "https", Host: "x"}},
			Header: http.Header{"Content-Range": {contentRange}, "Etag": {etag}, "Content-Type": {contentType}},
		}
		skip, _, err := d.accept(resp, offset, validator{}, false)
		if err == nil && (skip < 0 || skip > offset || (code != 200 && skip != 0)) {
			t.Errorf("skip %d at %d", skip, offset)
		}
		if err == nil && code != 200 && code != 206 {
			t.Errorf("status %d was accepted", code)
		}
	})
}

func FuzzPrintable(f *testing.F) {
	f.Add("plain")
	f.Add("\x1b[2J\u202e\u0301x\xff\n")
	f.Fuzz(func(t *testing.T, s string) {
		p := Printable(s)
		if !utf8.ValidString(p) || len(p) > maxText+8 {
			t.Errorf("%q became %q", s, p)
		}
		for _, r := range p {
			if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) {
				t.Errorf("%q became %q", s, p)
			}
		}
	})
}
