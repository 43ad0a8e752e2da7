package omaha

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-retryablehttp"
)

const (
	readChunk = 64 << 10 // what one Read asks for at most, and the burst of the rate limit

	// enoughProgress is how much a connection has to bring before it counts as one that works: from then on the number
	// of failed attempts starts again.
	enoughProgress = 1 << 20
)

// DownloadOptions tune a download. The zero value is what a host on the internet wants.
type DownloadOptions struct {
	MinRate  int64         // bytes per second below which a connection is given up, default 1 KiB/s; negative none
	Window   time.Duration // over which the rate is measured, default 60 s
	Open     time.Duration // for an address to begin to deliver, over all its redirects, or to say why it does not; default 2 min
	Attempts int           // per URL and without progress, default the offer's, at most 10
	Rounds   int           // how often the whole list of URLs is gone through without progress, default 2

	AllowPlainHTTP bool // accept a redirect from http to http (an https address never leads to http)

	// Failed is told of each address that is given up, so that somebody can remember it (see [Failures]); nil for nobody.
	Failed func(address string, err error)

	Wait func(ctx context.Context, d time.Duration) error // sleeps between attempts; nil for the real thing
	Now  func() time.Time                                 // measures waiting times; nil for the real clock
}

// Download is a payload on one or more servers. It has the shape of a source that can be opened at any offset.
// Nothing that it delivers is believed: it cares for getting the bytes, whoever reads them checks the hashes.
type Download struct {
	http   *HTTP
	offer  *Offer
	opt    DownloadOptions
	policy addressPolicy

	mu      sync.Mutex
	current int               // index of the URL in use
	marks   map[int]validator // what each URL said to identify the file
}

// validator is what a server says to identify one state of a file.
type validator struct{ etag, modified string }

// NewDownload makes a download of an offer's payload.
func NewDownload(h *HTTP, offer *Offer, opt DownloadOptions) *Download {
	if opt.MinRate == 0 {
		opt.MinRate = 1 << 10
	}
	opt.Window = orDuration(opt.Window, 60*time.Second)
	opt.Open = orDuration(opt.Open, 2*time.Minute)
	if opt.Attempts <= 0 {
		opt.Attempts = max(offer.MaxFailures, 1)
	}
	opt.Attempts = min(opt.Attempts, 10)
	if opt.Rounds <= 0 {
		opt.Rounds = 2
	}
	if opt.Wait == nil {
		opt.Wait = wait
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	d := &Download{http: h, offer: offer, opt: opt, marks: make(map[int]validator)}
	for _, raw := range offer.URLs {
		if u, err := url.Parse(raw); err == nil {
			d.policy.plainHTTP = d.policy.plainHTTP || u.Scheme == "http" || opt.AllowPlainHTTP
			d.policy.loopback = d.policy.loopback || isLocal(u.Hostname())
		}
	}
	return d
}

// Size returns the payload's size as the offer announced it.
func (d *Download) Size() int64 { return d.offer.Size }

// URL returns the address in use, without credentials, and its place in the offer's list.
func (d *Download) URL() (string, int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.offer.URLs) == 0 {
		return "", 0
	}
	return redact(d.offer.URLs[d.current]), d.current
}

// Address returns the address in use as the offer has it.
func (d *Download) Address() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.offer.URLs) == 0 {
		return ""
	}
	return d.offer.URLs[d.current]
}

// NextURL gives up the address in use: what it delivered turned out to be wrong.
func (d *Download) NextURL() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := len(d.offer.URLs); n > 0 {
		d.current = (d.current + 1) % n
	}
}

// giveUp goes on to the next address and tells of the one that failed.
func (d *Download) giveUp(err error) {
	if d.opt.Failed != nil {
		d.opt.Failed(d.Address(), err)
	}
	d.NextURL()
}

// Open starts reading at offset. The reader delivers exactly Size()-offset bytes or an error: it reconnects, resumes and
// changes the address by itself, a bounded number of times. An error that wraps [ErrChanged] means that the bytes read
// so far and the ones to come are of different files: start again from 0.
func (d *Download) Open(ctx context.Context, offset int64) (io.ReadCloser, error) {
	if offset < 0 || offset > d.offer.Size {
		return nil, fmt.Errorf("omaha: open payload at %d of %d bytes: %w", offset, d.offer.Size, ErrSize)
	}
	if len(d.offer.URLs) == 0 {
		return nil, fmt.Errorf("omaha: open payload: %w", invalid("the offer names no address"))
	}
	ctx, cancel := context.WithCancelCause(ctx)
	r := &downloadReader{d: d, ctx: ctx, cancel: cancel, at: offset, good: offset}
	if offset == d.offer.Size {
		return r, nil
	}
	// The first connection is made here, so that a payload that cannot be had is an error of Open.
	if err := r.connect(); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

type downloadReader struct {
	d      *Download
	ctx    context.Context
	cancel context.CancelCauseFunc

	body *meteredBody // nil when not connected
	at   int64        // offset of the next byte
	good int64        // offset at which the failures were last forgotten
	err  error        // sticky

	failures int // on the address in use, since the last progress
	moves    int // changes of address, since the last progress
}

func (r *downloadReader) Close() error {
	r.disconnect()
	r.cancel(context.Canceled)
	if r.err == nil {
		r.err = errors.New("omaha: read of a closed download")
	}
	return nil
}

func (r *downloadReader) disconnect() {
	if r.body != nil {
		r.body.Close()
		r.body = nil
	}
}

func (r *downloadReader) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if r.at == r.d.offer.Size {
			r.disconnect()
			r.err = io.EOF
			return 0, io.EOF
		}
		if r.body == nil {
			if err := r.connect(); err != nil {
				r.err = err
				return 0, err
			}
		}
		n, err := r.body.Read(p[:min(int64(len(p)), readChunk, r.d.offer.Size-r.at)])
		r.at += int64(n)
		if r.at-r.good >= enoughProgress {
			r.good, r.failures, r.moves = r.at, 0, 0
		}
		if r.at == r.d.offer.Size {
			if err := r.body.ended(); err != nil {
				r.err = fmt.Errorf("omaha: payload at %q: %w", r.body.url, err)
				return 0, r.err
			}
		} else if err != nil {
			if err == io.EOF {
				err = fmt.Errorf("it ends after %d of %d bytes: %w", r.at, r.d.offer.Size, io.ErrUnexpectedEOF)
			}
			if fatal := r.failed(fmt.Errorf("omaha: payload at %q: %w", r.body.url, err), false, 0); fatal != nil {
				r.err = fatal
			}
		}
		if n > 0 {
			return n, nil
		}
		if r.err != nil {
			return 0, r.err
		}
	}
}

// connect opens the address in use, or the next one that can be opened.
func (r *downloadReader) connect() error {
	for {
		r.d.mu.Lock()
		index := r.d.current
		r.d.mu.Unlock()
		body, pause, next, err := r.d.get(r.ctx, index, r.at)
		if err == nil {
			r.body = body
			return nil
		}
		if fatal := r.failed(err, next, pause); fatal != nil {
			return fatal
		}
	}
}

// failed counts a failure and waits. It returns the error when there is no further attempt.
// next says that this address will not get better by asking again.
func (r *downloadReader) failed(err error, next bool, pause time.Duration) error {
	r.disconnect()
	if cause := context.Cause(r.ctx); cause != nil {
		return cause
	}
	if r.failures++; next || r.failures >= r.d.opt.Attempts {
		r.failures = 0
		r.d.giveUp(err)
		if r.moves++; r.moves >= r.d.opt.Rounds*len(r.d.offer.URLs) {
			return err
		}
		pause = 0
		if r.moves < len(r.d.offer.URLs) {
			r.d.http.log.Warn("payload: next address", "error", err.Error(), "offset", r.at)
			return nil // another server is likely to be well
		}
	}
	d := min(500*time.Millisecond<<min(r.failures+r.moves, 6), maxInlineWait)
	d = max(d/2+rand.N(d/2+1), min(pause, maxInlineWait))
	r.d.http.log.Warn("payload: another attempt", "error", err.Error(), "offset", r.at, "wait", d)
	if err := r.d.opt.Wait(r.ctx, d); err != nil {
		return err
	}
	return nil
}

// get asks one address for the bytes from offset on and checks that the answer is what was asked for.
// next says that asking this address again is useless.
func (d *Download) get(ctx context.Context, index int, offset int64) (body *meteredBody, pause time.Duration, next bool, err error) {
	address := d.offer.URLs[index]
	ctx, cancel := context.WithCancelCause(context.WithValue(ctx, addressKey{}, d.policy))
	defer func() {
		if err != nil {
			cancel(err)
			err = fmt.Errorf("omaha: payload at %q: %w", redact(address), err)
		}
	}()
	req, err := retryablehttp.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, 0, true, err
	}
	req.Header.Set("Accept-Encoding", "identity")
	d.mu.Lock()
	mark, known := d.marks[index]
	d.mu.Unlock()
	if offset > 0 {
		req.Header.Set("Range", "bytes="+strconv.FormatInt(offset, 10)+"-")
		if cond := mark.ifRange(); known && cond != "" {
			req.Header.Set("If-Range", cond)
		}
	}
	// What a redirect or a refusal brings along is read too, and no rate is measured of that.
	watch := time.AfterFunc(d.opt.Open, func() { cancel(ErrTooSlow) })
	defer watch.Stop()
	resp, err := d.http.client.Do(req)
	if err != nil {
		if errors.Is(context.Cause(ctx), ErrTooSlow) {
			return nil, 0, false, fmt.Errorf("%w: it did not begin within %s", ErrTooSlow, d.opt.Open)
		}
		return nil, 0, permanent(err), transportError(err)
	}
	skip, next, err := d.accept(resp, offset, mark, known)
	if err != nil {
		pause = rawRetryAfter(resp.Header, d.http.now())
		resp.Body.Close()
		return nil, pause, next, err
	}
	if !watch.Stop() {
		resp.Body.Close()
		return nil, 0, false, fmt.Errorf("%w: it did not begin within %s", ErrTooSlow, d.opt.Open)
	}
	body = &meteredBody{d: d, ctx: ctx, cancel: cancel, body: resp.Body, buf: bufio.NewReaderSize(resp.Body, readChunk), url: redact(resp.Request.URL.String())}
	if offset == 0 || skip > 0 {
		if head, _ := body.peek(512); isHTML("", head) {
			body.Close()
			return nil, 0, true, fmt.Errorf("%w: %q answered %q", ErrHTML, body.url, snippet(head))
		}
	}
	if skip > 0 { // a server without ranges: read up to where we were
		if _, err := io.CopyN(io.Discard, body, skip); err != nil {
			body.Close()
			return nil, 0, false, fmt.Errorf("skip the first %d bytes: %w", skip, err)
		}
	}
	d.mu.Lock()
	d.marks[index] = validatorOf(resp.Header)
	d.mu.Unlock()
	return body, 0, false, nil
}

// accept looks at the head of an answer. skip is how many bytes of the body come before offset.
func (d *Download) accept(resp *http.Response, offset int64, mark validator, known bool) (skip int64, next bool, err error) {
	size := d.offer.Size
	switch resp.StatusCode {
	case http.StatusOK, http.StatusPartialContent:
	case http.StatusRequestedRangeNotSatisfiable:
		return 0, true, fmt.Errorf("%w: the server has no byte %d", ErrSize, offset)
	case http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return 0, false, fmt.Errorf("the server answers %s%s", Printable(resp.Status), firstBytes(resp))
	default:
		return 0, true, fmt.Errorf("the server answers %s%s", Printable(resp.Status), firstBytes(resp))
	}
	if enc := resp.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		return 0, true, fmt.Errorf("it is packed with %q, which was not asked for", Printable(enc))
	}
	contentType := strings.ToLower(resp.Header.Get("Content-Type"))
	if isHTML(contentType, nil) {
		data, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
		return 0, true, fmt.Errorf("%w: %q answered %q", ErrHTML, redact(resp.Request.URL.String()), snippet(data))
	}
	if strings.HasPrefix(contentType, "multipart/") {
		return 0, true, fmt.Errorf("several ranges (%q) instead of one", Printable(contentType))
	}
	if now := validatorOf(resp.Header); known && offset > 0 && mark.differs(now) {
		return 0, true, fmt.Errorf("%w: it was %s and is %s", ErrChanged, mark, now)
	}
	if resp.StatusCode == http.StatusOK {
		if resp.ContentLength >= 0 && resp.ContentLength != size {
			return 0, true, fmt.Errorf("%w: %d bytes instead of %d", ErrSize, resp.ContentLength, size)
		}
		return offset, false, nil
	}
	if offset == 0 {
		return 0, true, fmt.Errorf("a part of the payload where all of it was asked for")
	}
	start, end, total, err := contentRange(resp.Header.Get("Content-Range"))
	switch {
	case err != nil:
		return 0, true, err
	case start != offset || end != size-1 || (total >= 0 && total != size):
		return 0, true, fmt.Errorf("%w: range %q where bytes %d-%d/%d were asked for", ErrSize, Printable(resp.Header.Get("Content-Range")), offset, size-1, size)
	case resp.ContentLength >= 0 && resp.ContentLength != size-offset:
		return 0, true, fmt.Errorf("%w: %d bytes in a range of %d", ErrSize, resp.ContentLength, size-offset)
	}
	return 0, false, nil
}

// contentRange reads "bytes 5-9/10"; total is -1 for "*".
func contentRange(s string) (start, end, total int64, err error) {
	bad := fmt.Errorf("content range %q cannot be read", Printable(s))
	rest, ok := strings.CutPrefix(s, "bytes ")
	span, all, ok2 := strings.Cut(rest, "/")
	first, last, ok3 := strings.Cut(span, "-")
	if !ok || !ok2 || !ok3 {
		return 0, 0, 0, bad
	}
	if start, err = strconv.ParseInt(first, 10, 64); err != nil || start < 0 {
		return 0, 0, 0, bad
	}
	if end, err = strconv.ParseInt(last, 10, 64); err != nil || end < start {
		return 0, 0, 0, bad
	}
	if all == "*" {
		return start, end, -1, nil
	}
	if total, err = strconv.ParseInt(all, 10, 64); err != nil || total <= end {
		return 0, 0, 0, bad
	}
	return start, end, total, nil
}

func validatorOf(h http.Header) validator {
	return validator{etag: h.Get("ETag"), modified: h.Get("Last-Modified")}
}

// ifRange returns what may stand in If-Range: a strong entity tag, or a date.
func (v validator) ifRange() string {
	if v.etag != "" && !strings.HasPrefix(v.etag, "W/") {
		return v.etag
	}
	if v.etag != "" {
		return ""
	}
	return v.modified
}

// differs says whether two answers are certainly about different files.
func (v validator) differs(w validator) bool {
	if v.etag != "" && w.etag != "" {
		return v.etag != w.etag
	}
	return v.modified != "" && w.modified != "" && v.modified != w.modified
}

func (v validator) String() string {
	if v.etag != "" {
		return fmt.Sprintf("%q", Printable(v.etag))
	}
	return fmt.Sprintf("%q", Printable(v.modified))
}

// wait sleeps until d has passed or ctx ends.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
