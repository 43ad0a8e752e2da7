package omaha

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-retryablehttp"
	"golang.org/x/time/rate"
)

const (
	maxRedirects  = 5
	maxInlineWait = 30 * time.Second // the longest Retry-After that is waited for inside one exchange
)

// HTTPOptions configure the one HTTP client that checks, reports and downloads share.
type HTTPOptions struct {
	Proxy    string   // "" takes the environment's, "direct" none, else a proxy's URL
	CAFiles  []string // PEM files with authorities to trust besides the system's
	CAOnly   bool     // trust only CAFiles
	CertFile string   // client certificate, PEM
	KeyFile  string   // its key, PEM
	// Certificate, if set, brings the client certificate instead, such as one whose key cannot leave a TPM. It is called for every handshake.
	Certificate func() (*tls.Certificate, error)
	RateLimit   int64         // bytes per second of all payload downloads together; 0 is unlimited
	Retries     int           // attempts after the first for a connection that fails, default 2; negative none
	RetryWait   time.Duration // before the first retry, doubling; default 500 ms
	HeaderWait  time.Duration // for the head of an answer, default 30 s
	Logger      *slog.Logger  // nil logs nothing
	Now         func() time.Time
}

// HTTP is the client that everything goes through: one set of connections, one set of rules.
type HTTP struct {
	client  *retryablehttp.Client
	limiter *rate.Limiter // nil without a limit
	now     func() time.Time
	log     *slog.Logger
}

// NewHTTP builds the client. An error names the file or address that cannot be used.
func NewHTTP(opt HTTPOptions) (*HTTP, error) {
	h := &HTTP{now: opt.Now, log: opt.Logger}
	if h.now == nil {
		h.now = time.Now
	}
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
	}
	if opt.RateLimit > 0 {
		h.limiter = rate.NewLimiter(rate.Limit(opt.RateLimit), readChunk)
	}
	tlsConfig, err := opt.tls()
	if err != nil {
		return nil, err
	}
	proxy, err := opt.proxy()
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{
		Proxy:                  proxy,
		DialContext:            (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:        tlsConfig,
		TLSHandshakeTimeout:    30 * time.Second,
		ResponseHeaderTimeout:  orDuration(opt.HeaderWait, 30*time.Second),
		ExpectContinueTimeout:  time.Second,
		IdleConnTimeout:        90 * time.Second,
		MaxIdleConnsPerHost:    2,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true, // nobody can send a small answer that unpacks into a large one
		ForceAttemptHTTP2:      true,
	}
	retries := opt.Retries
	if retries == 0 {
		retries = 2
	}
	h.client = &retryablehttp.Client{
		HTTPClient:   &http.Client{Transport: transport, CheckRedirect: checkRedirect},
		Logger:       h.log,
		RetryWaitMin: orDuration(opt.RetryWait, 500*time.Millisecond),
		RetryWaitMax: maxInlineWait,
		RetryMax:     max(retries, 0),
		CheckRetry:   checkRetry,
		Backoff:      backoff,
		ErrorHandler: retryablehttp.PassthroughErrorHandler,
	}
	return h, nil
}

// Do sends a request that is not of the protocol and belongs to the same server, by the rules of the control channel: the same proxy, authorities
// and certificate, and a connection that fails is tried again. The caller bounds it with its context, and closes the body of the answer.
func (h *HTTP) Do(req *http.Request) (*http.Response, error) {
	r, err := retryablehttp.FromRequest(req)
	if err != nil {
		return nil, fmt.Errorf("omaha: read what is to be sent: %w", err)
	}
	return h.client.Do(r)
}

// CloseIdle closes the connections that are not in use.
func (h *HTTP) CloseIdle() { h.client.HTTPClient.CloseIdleConnections() }

func (opt HTTPOptions) tls() (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(opt.CAFiles) > 0 || opt.CAOnly {
		pool := x509.NewCertPool()
		if !opt.CAOnly {
			system, err := x509.SystemCertPool()
			if err != nil {
				return nil, fmt.Errorf("omaha: read the system's certificate authorities: %w", err)
			}
			pool = system
		}
		for _, name := range opt.CAFiles {
			pem, err := os.ReadFile(name)
			if err != nil {
				return nil, fmt.Errorf("omaha: read certificate authorities: %w", err)
			}
			if !pool.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("omaha: %q holds no certificate in PEM form", name)
			}
		}
		cfg.RootCAs = pool
	}
	if opt.Certificate != nil {
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return opt.Certificate() }
	} else if opt.CertFile != "" || opt.KeyFile != "" {
		cert, err := tls.LoadX509KeyPair(opt.CertFile, opt.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("omaha: read the client certificate %q and its key %q: %w", opt.CertFile, opt.KeyFile, err)
		}
		cfg.Certificates = []tls.Certificate{cert}
	}
	return cfg, nil
}

func (opt HTTPOptions) proxy() (func(*http.Request) (*url.URL, error), error) {
	switch opt.Proxy {
	case "":
		return http.ProxyFromEnvironment, nil
	case "direct":
		return nil, nil
	}
	u, err := url.Parse(opt.Proxy)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https" && u.Scheme != "socks5") {
		return nil, fmt.Errorf("omaha: proxy %q is not an http://, https:// or socks5:// address", redact(opt.Proxy))
	}
	return http.ProxyURL(u), nil
}

// addressKey is where a payload request carries its addressPolicy, so that a redirect is held to it as well.
type addressKey struct{}

// checkRedirect: the control channel follows only a 307 or 308 (which keep the method) to the same place; payloads may
// be anywhere that the offer could have named, and never at a lower scheme than the one before.
func checkRedirect(req *http.Request, via []*http.Request) error {
	last := via[len(via)-1]
	if len(via) > maxRedirects {
		return fmt.Errorf("%w: more than %d in a row", ErrRedirect, maxRedirects)
	}
	if last.URL.Scheme == "https" && req.URL.Scheme != "https" {
		return fmt.Errorf("%w: from https to %q", ErrRedirect, Printable(req.URL.Scheme))
	}
	if policy, payload := last.Context().Value(addressKey{}).(addressPolicy); payload {
		if err := policy.check(req.URL); err != nil {
			return fmt.Errorf("%w: to %q: %w", ErrRedirect, Printable(req.URL.Redacted()), err)
		}
		return nil
	}
	if code := req.Response.StatusCode; code != http.StatusTemporaryRedirect && code != http.StatusPermanentRedirect {
		return fmt.Errorf("%w: status %d would lose the request", ErrRedirect, code)
	}
	if req.URL.Scheme != last.URL.Scheme || req.URL.Host != last.URL.Host {
		return fmt.Errorf("%w: to another server, %q", ErrRedirect, Printable(req.URL.Redacted()))
	}
	return nil
}

// checkRetry says which failures are worth another attempt at once: a control connection that did not come about. A
// check that was answered is never asked again here: the caller's schedule decides, so that a server in trouble is not
// asked three times by each of ten thousand hosts. Downloads make their own attempts, over several addresses.
func checkRetry(ctx context.Context, _ *http.Response, err error) (bool, error) {
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	_, payload := ctx.Value(addressKey{}).(addressPolicy)
	return err != nil && !payload && !permanent(err), nil
}

// permanent recognises failures that the next attempt would only repeat.
func permanent(err error) bool {
	var (
		authority x509.UnknownAuthorityError
		host      x509.HostnameError
		cert      x509.CertificateInvalidError
		verify    *tls.CertificateVerificationError
		record    tls.RecordHeaderError
	)
	return errors.Is(err, ErrRedirect) || errors.As(err, &authority) || errors.As(err, &host) || errors.As(err, &cert) ||
		errors.As(err, &verify) || errors.As(err, &record)
}

// backoff waits twice as long each time, with jitter.
func backoff(minWait, maxWait time.Duration, attempt int, _ *http.Response) time.Duration {
	d := min(minWait<<min(attempt, 16), maxWait)
	return d/2 + rand.N(d/2+1)
}

// retryAfter reads how long a server asks to be left alone, clamped to [MinPoll, MaxPoll]; 0 when it does not.
func retryAfter(header http.Header, now time.Time) time.Duration {
	if header.Get("Retry-After") == "" && header.Get("X-Retry-After") == "" {
		return 0
	}
	return min(max(rawRetryAfter(header, now), MinPoll), MaxPoll)
}

// rawRetryAfter reads Retry-After, seconds or a date, or Google's X-Retry-After. What cannot be read is 0.
func rawRetryAfter(header http.Header, now time.Time) time.Duration {
	for _, name := range []string{"Retry-After", "X-Retry-After"} {
		value := strings.TrimSpace(header.Get(name))
		if value == "" {
			continue
		}
		if seconds, err := strconv.ParseInt(value, 10, 64); err == nil {
			return time.Duration(min(max(seconds, 0), int64(MaxPoll/time.Second))) * time.Second
		}
		if strings.Trim(value, "0123456789") == "" {
			return MaxPoll // a number too large for 64 bits
		}
		if at, err := http.ParseTime(value); err == nil {
			return min(max(at.Sub(now), 0), MaxPoll)
		}
	}
	return 0
}

// transportError keeps what a redirect or time-out meant, without the request's address in front of it once more.
func transportError(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("no complete answer in time: %w", err)
	}
	return err
}

// isHTML recognises a page for people: a login page, a proxy's refusal, a web server's index.
func isHTML(contentType string, body []byte) bool {
	if strings.HasPrefix(strings.ToLower(strings.TrimSpace(contentType)), "text/html") {
		return true
	}
	return strings.HasPrefix(http.DetectContentType(body), "text/html")
}

// snippet is the beginning of something unexpected, to be quoted.
func snippet(data []byte) string {
	data = bytes.TrimSpace(data)
	if len(data) > 80 {
		data = data[:80]
	}
	return Printable(string(data))
}

// firstBytes quotes how an unexpected body begins, as the end of a sentence.
func firstBytes(resp *http.Response) string {
	data, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
	if len(bytes.TrimSpace(data)) == 0 {
		return ""
	}
	return fmt.Sprintf(": %q", snippet(data))
}

func orDuration(d, fallback time.Duration) time.Duration {
	if d <= 0 {
		return fallback
	}
	return d
}
