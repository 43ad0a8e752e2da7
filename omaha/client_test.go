package omaha

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

const testApp = "32f1acea-08a3-4ed8-982c-538d8a47e253"

// newHTTP makes a client that does not wait between attempts.
func newHTTP(t testing.TB) *HTTP {
	t.Helper()
	h, err := NewHTTP(HTTPOptions{Proxy: "direct", RetryWait: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.CloseIdle)
	return h
}

func newClient(t testing.TB, address string) *Client {
	return &Client{
		URL: address, AppID: testApp, Version: "1.0.0", Track: "stable", Board: "amd64-usr",
		MachineID: "abce671d61774703ac7be60715220b01", BootID: "11111111-2222-3333-4444-555555555555",
		OEM: "qemu", OEMVersion: "0.1", AlephVersion: "1.0.0", UserAgent: "update_engine-0.4.10", HTTP: newHTTP(t),
		Timeout: 5 * time.Second,
	}
}

// serve answers every request with body, as a server would that knows its status and type.
func serve(t testing.TB, body string) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "text/xml")
		io.WriteString(w, body)
	}))
	t.Cleanup(s.Close)
	return s
}

const goodSum = "731DdRoruXehRo3bCDUqbhKTnVSp9LxoYy7tHhICbuM="

// offerWith builds an answer and lets a test replace any part of it.
func offerWith(replace ...string) string {
	const base = `<?xml version="1.0" encoding="UTF-8"?>
<response protocol="3.0" server="test"><app appid="` + testApp + `" status="ok"><updatecheck status="ok"><urls><url codebase="http://127.0.0.1:1/p/"></url></urls><manifest version="1.1.0"><packages><package name="a.img" hash="u3ACDTiI5OxaMM5C8Nnj9GNTAqY=" size="8388608" required="true"></package></packages><actions><action event="postinstall" sha256="` + goodSum + `"></action></actions></manifest></updatecheck></app></response>`
	return strings.NewReplacer(replace...).Replace(base)
}

func TestCheckOffer(t *testing.T) {
	s := serve(t, offerWith())
	a, err := newClient(t, s.URL).Check(context.Background(), CheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if a.Offer == nil || a.Reason.Kind != Offered {
		t.Fatalf("no offer: %v", a.Reason)
	}
	if o := a.Offer; o.Version != "1.1.0" || o.Size != 8388608 || o.URLs[0] != "http://127.0.0.1:1/p/a.img" || o.SHA256[0] != 0xef {
		t.Errorf("offer is %+v", o)
	}
}

func TestPollIntervalIsClamped(t *testing.T) {
	for in, want := range map[string]time.Duration{"1": MinPoll, "-5": MinPoll, "3600": time.Hour, "1000000000": MaxPoll} {
		s := serve(t, offerWith(`<updatecheck status="ok"`, `<updatecheck status="ok" PollInterval="`+in+`"`))
		a, err := newClient(t, s.URL).Check(context.Background(), CheckRequest{})
		if err != nil || a.PollInterval != want {
			t.Errorf("PollInterval %q: %v, %v; want %v", in, a.PollInterval, err, want)
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	for name, spoil := range map[string]func(*Client){
		"no machine id":       func(c *Client) { c.MachineID = "" },
		"51 characters":       func(c *Client) { c.MachineID = strings.Repeat("a", 51) },
		"braced machine id":   func(c *Client) { c.MachineID = "{11111111-2222-3333-4444-555555555555}" },
		"four part version":   func(c *Client) { c.Version = "1.0.0.0" },
		"version with v":      func(c *Client) { c.Version = "v1.2.3" },
		"no app":              func(c *Client) { c.AppID = "" },
		"ftp":                 func(c *Client) { c.URL = "ftp://example.org/" },
		"control characters":  func(c *Client) { c.Track = "sta\nble" },
		"no http client":      func(c *Client) { c.HTTP = nil },
		"address of no host":  func(c *Client) { c.URL = "http:///x" },
		"unreadable address":  func(c *Client) { c.URL = "http://[::1" },
		"not a server at all": func(c *Client) { c.URL = "disabled" },
	} {
		t.Run(name, func(t *testing.T) {
			c := newClient(t, "http://127.0.0.1:1/")
			spoil(c)
			if _, err := c.Check(context.Background(), CheckRequest{}); !errors.Is(err, ErrConfig) {
				t.Errorf("got %v", err)
			}
		})
	}
	c := newClient(t, "http://127.0.0.1:1/")
	if err := c.Report(context.Background(), Booted("")); !errors.Is(err, ErrConfig) {
		t.Errorf("event 3/2 without a previous version: %v", err)
	}
}

func TestUnreachableServer(t *testing.T) {
	c := newClient(t, "http://127.0.0.1:1/v1/update/")
	_, err := c.Check(context.Background(), CheckRequest{})
	var e *Error
	if !errors.As(err, &e) || e.Code != CodeTransfer || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("got %v", err)
	}
}
