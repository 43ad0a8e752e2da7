package omaha

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A configured proxy is used, and only the configured one.
func TestProxy(t *testing.T) {
	var asked []string
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.String())
		body(offerWith("127.0.0.1:1", "payloads.example.org"))(w, r)
	}))
	defer proxy.Close()
	h, err := NewHTTP(HTTPOptions{Proxy: proxy.URL})
	if err != nil {
		t.Fatal(err)
	}
	defer h.CloseIdle()
	c := newClient(t, "http://updates.example.org/v1/update/")
	c.HTTP = h
	if a, err := c.Check(context.Background(), CheckRequest{}); err != nil || a.Offer == nil {
		t.Fatalf("%v, %v", a, err)
	}
	if len(asked) != 1 || asked[0] != "http://updates.example.org/v1/update/" {
		t.Errorf("the proxy was asked for %q", asked)
	}
	for _, bad := range []string{"ftp://proxy:1", "proxy:1", "http://", "\x00"} {
		if _, err := NewHTTP(HTTPOptions{Proxy: bad}); err == nil {
			t.Errorf("proxy %q was accepted", bad)
		}
	}
}

// A server that wants to know its clients gets the configured certificate.
func TestClientCertificate(t *testing.T) {
	cert, certPEM := certificate(t, time.Now().Add(time.Hour))
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(certPEM)
	s := httptest.NewUnstartedServer(body(offerWith("http://127.0.0.1:1", "https://127.0.0.1:1")))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	defer s.Close()

	dir := t.TempDir()
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	certFile, keyFile := write("cert.pem", certPEM), write("key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
	for _, with := range []bool{true, false} {
		opt := HTTPOptions{Proxy: "direct", CAFiles: []string{certFile}, Retries: -1}
		if with {
			opt.CertFile, opt.KeyFile = certFile, keyFile
		}
		h, err := NewHTTP(opt)
		if err != nil {
			t.Fatal(err)
		}
		c := newClient(t, s.URL)
		c.HTTP = h
		_, err = c.Check(context.Background(), CheckRequest{})
		if (err == nil) != with {
			t.Errorf("with certificate %v: %v", with, err)
		}
		h.CloseIdle()
	}
	nothing := write("nothing.pem", []byte("nothing"))
	for name, opt := range map[string]HTTPOptions{
		"authority file that is not there":   {CAFiles: []string{filepath.Join(dir, "none")}},
		"authority file without certificate": {CAFiles: []string{nothing}},
		"certificate without key":            {CertFile: certFile},
		"key that is none":                   {CertFile: certFile, KeyFile: nothing},
	} {
		if _, err := NewHTTP(opt); err == nil || !strings.Contains(err.Error(), dir) && opt.KeyFile != "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A connection that fails is tried again at once; an answer, whatever it says, is not.
func TestControlRetries(t *testing.T) {
	asked := 0
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked++
		switch asked {
		case 1:
			panic(http.ErrAbortHandler)
		case 2:
			body(offerWith())(w, r)
		default:
			http.Error(w, "trouble", http.StatusServiceUnavailable)
		}
	}))
	defer s.Close()
	c := newClient(t, s.URL)
	if _, err := c.Check(context.Background(), CheckRequest{}); err != nil || asked != 2 {
		t.Errorf("after a lost connection: %v, asked %d times", err, asked)
	}
	if _, err := c.Check(context.Background(), CheckRequest{}); err == nil || asked != 3 {
		t.Errorf("a server in trouble: %v, asked %d times", err, asked)
	}
}

func TestUptime(t *testing.T) {
	a, err := Uptime()
	if err != nil || a <= 0 {
		t.Fatal(a, err)
	}
	if b, _ := Uptime(); b < a {
		t.Errorf("the time since boot went from %s to %s", a, b)
	}
}

// What is not of the protocol goes the same way: through the proxy, and again when the connection was lost.
func TestDoUsesTheProxyAndTriesAgain(t *testing.T) {
	var got []string
	asked := 0
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked++; asked == 1 {
			panic(http.ErrAbortHandler)
		}
		body, _ := io.ReadAll(r.Body)
		got = append(got, r.Method+" "+r.URL.String()+" "+string(body))
	}))
	defer proxy.Close()
	h, err := NewHTTP(HTTPOptions{Proxy: proxy.URL, RetryWait: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest(http.MethodPost, "http://releases.invalid/policy", strings.NewReader("policy"))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := h.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if len(got) != 1 || got[0] != "POST http://releases.invalid/policy policy" {
		t.Errorf("the proxy got %q", got)
	}
}
