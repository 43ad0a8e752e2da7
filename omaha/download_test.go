package omaha

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// mirror is a server with one payload, whose answers a test can spoil.
type mirror struct {
	*httptest.Server
	data []byte

	mu    sync.Mutex
	asked []string // "bytes=5- if-range" per request
	spoil func(n int, w http.ResponseWriter, r *http.Request) bool
}

func newMirror(t testing.TB, data []byte, spoil func(n int, w http.ResponseWriter, r *http.Request) bool) *mirror {
	m := &mirror{data: data, spoil: spoil}
	m.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m.mu.Lock()
		m.asked = append(m.asked, strings.TrimSpace(r.Header.Get("Range")+" "+r.Header.Get("If-Range")))
		n := len(m.asked)
		m.mu.Unlock()
		if m.spoil != nil && m.spoil(n, w, r) {
			return
		}
		w.Header().Set("ETag", fmt.Sprintf(`"%x"`, sha256.Sum256(m.data)))
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(m.data))
	}))
	t.Cleanup(m.Close)
	return m
}

func (m *mirror) requests() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]string(nil), m.asked...)
}

// some returns bytes that do not look like anything.
func some(n int) []byte {
	data := make([]byte, n)
	src := rand.NewChaCha8([32]byte{1})
	src.Read(data)
	return data
}

// fetch makes a download over the mirrors that never sleeps.
func fetch(t testing.TB, data []byte, urls ...string) *Download {
	return NewDownload(newHTTP(t), &Offer{Version: "1.1.0", Size: int64(len(data)), SHA256: sha256.Sum256(data), URLs: urls, MaxFailures: 3},
		DownloadOptions{Wait: func(ctx context.Context, _ time.Duration) error { return ctx.Err() }})
}

func readFrom(t testing.TB, d *Download, offset int64) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r, err := d.Open(ctx, offset)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

// cutAfter sends the beginning of the right answer and breaks the connection.
func cutAfter(data []byte, n int) func(int, http.ResponseWriter, *http.Request) bool {
	return func(_ int, w http.ResponseWriter, r *http.Request) bool {
		start := 0
		if s, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok {
			start, _ = strconv.Atoi(strings.TrimSuffix(s, "-"))
		}
		if len(data)-start <= n {
			return false
		}
		w.Header().Set("ETag", fmt.Sprintf(`"%x"`, sha256.Sum256(data)))
		w.Header().Set("Content-Length", strconv.Itoa(len(data)-start))
		if start > 0 {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", start, len(data)-1, len(data)))
			w.WriteHeader(http.StatusPartialContent)
		}
		w.Write(data[start : start+n])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
}

func TestDownload(t *testing.T) {
	data := some(3 << 20)
	m := newMirror(t, data, nil)
	d := fetch(t, data, m.URL+"/x")
	for _, offset := range []int64{0, 1, 1 << 20, int64(len(data)) - 1, int64(len(data))} {
		got, err := readFrom(t, d, offset)
		if err != nil || !bytes.Equal(got, data[offset:]) {
			t.Errorf("from %d: %d bytes, %v", offset, len(got), err)
		}
	}
	if _, err := d.Open(context.Background(), int64(len(data))+1); err == nil {
		t.Error("an offset behind the end was accepted")
	}
	if asked := m.requests(); len(asked) != 4 || asked[1] != fmt.Sprintf(`bytes=1- "%x"`, sha256.Sum256(data)) {
		t.Errorf("requests were %q", asked)
	}
}

// A connection that breaks again and again is resumed where it broke, protected by If-Range.
func TestDownloadResumes(t *testing.T) {
	data := some(5 << 20)
	m := newMirror(t, data, cutAfter(data, 1<<20))
	got, err := readFrom(t, fetch(t, data, m.URL), 0)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	for i, asked := range m.requests()[1:] {
		if want := fmt.Sprintf(`bytes=%d- "%x"`, (i+1)<<20, sha256.Sum256(data)); asked != want {
			t.Errorf("request %d was %q, want %q", i+1, asked, want)
		}
	}
}

// 13: dead addresses, wrong ones and pages for people are passed over, in order.
func TestDownloadSeveralAddresses(t *testing.T) {
	data := some(200_000)
	html := newMirror(t, data, func(_ int, w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Type", "text/html")
		io.WriteString(w, "<html>log in, please")
		return true
	})
	gone := newMirror(t, data, func(_ int, w http.ResponseWriter, _ *http.Request) bool {
		http.Error(w, "gone", http.StatusNotFound)
		return true
	})
	short := newMirror(t, data[:100], nil)
	good := newMirror(t, data, nil)
	d := fetch(t, data, "http://127.0.0.1:1/dead", html.URL, gone.URL, short.URL, good.URL)
	var memory Failures
	now := time.Unix(0, 0)
	d.opt.Failed = func(address string, err error) {
		memory = memory.With(address, now, err.Error(), AddressBackoff())
	}
	got, err := readFrom(t, d, 0)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if _, i := d.URL(); i != 4 {
		t.Errorf("address %d is in use, want 4", i)
	}
	if order := memory.Order(d.offer.URLs, now); order[0] != good.URL || len(order) != 5 {
		t.Errorf("next time the order is %q", order)
	}
	d = fetch(t, data, html.URL)
	if _, err = readFrom(t, d, 0); !errors.Is(err, ErrHTML) || !strings.Contains(err.Error(), html.URL) || !strings.Contains(err.Error(), "log in, please") {
		t.Errorf("only a page: %v", err)
	}
}

// A mirror that dies in the middle is left for the next one, at the same offset.
func TestDownloadChangesAddressInTheMiddle(t *testing.T) {
	data := some(500_000)
	dying := newMirror(t, data, func(n int, w http.ResponseWriter, r *http.Request) bool {
		if n == 1 {
			return cutAfter(data, 100_000)(n, w, r)
		}
		http.Error(w, "out of order", http.StatusServiceUnavailable)
		return true
	})
	good := newMirror(t, data, nil)
	got, err := readFrom(t, fetch(t, data, dying.URL, good.URL), 0)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if asked := good.requests(); len(asked) != 1 || asked[0] != "bytes=100000-" {
		t.Errorf("the second mirror was asked for %q", asked)
	}
}

// A server that is down for good is asked a bounded number of times.
func TestDownloadGivesUp(t *testing.T) {
	data := some(1000)
	m := newMirror(t, data, func(_ int, w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Retry-After", "1000000000000")
		http.Error(w, "overload", http.StatusServiceUnavailable)
		return true
	})
	_, err := readFrom(t, fetch(t, data, m.URL), 0)
	if err == nil || !strings.Contains(err.Error(), "503") || !strings.Contains(err.Error(), "overload") {
		t.Errorf("got %v", err)
	}
	if n := len(m.requests()); n != 6 { // 3 attempts, 2 rounds
		t.Errorf("it was asked %d times", n)
	}
}

// 9 and 17: answers that are not what was asked for.
func TestDownloadHostile(t *testing.T) {
	data := some(300_000)
	answer := func(code int, content []byte, header ...string) func(int, http.ResponseWriter, *http.Request) bool {
		return func(_ int, w http.ResponseWriter, _ *http.Request) bool {
			for i := 0; i < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			w.WriteHeader(code)
			w.Write(content)
			return true
		}
	}
	long := append(bytes.Clone(data), some(100)...)
	for _, tc := range []struct {
		name   string
		offset int64
		spoil  func(int, http.ResponseWriter, *http.Request) bool
		want   error
		says   string
	}{
		{"content longer than announced", 0, answer(200, long, "Content-Length", strconv.Itoa(len(long))), ErrSize, ""},
		{"content shorter than announced", 0, answer(200, data[:100], "Content-Length", "100"), ErrSize, ""},
		{"stream goes on behind the end", 0, func(_ int, w http.ResponseWriter, _ *http.Request) bool {
			w.Write(data)
			w.(http.Flusher).Flush()
			w.Write([]byte("more"))
			return true
		}, ErrSize, "goes on"},
		{"stream ends early", 0, func(_ int, w http.ResponseWriter, _ *http.Request) bool {
			w.Write(data[:1000])
			w.(http.Flusher).Flush()
			return true
		}, io.ErrUnexpectedEOF, "ends after 1000"},
		{"part where all was asked for", 0, answer(206, data[:100], "Content-Range", "bytes 0-99/300000"), nil, "part"},
		{"another range", 1000, answer(206, data[2000:], "Content-Range", "bytes 2000-299999/300000"), ErrSize, ""},
		{"range that ends early", 1000, answer(206, data[1000:2000], "Content-Range", "bytes 1000-1999/300000"), ErrSize, ""},
		{"range of another file", 1000, answer(206, data[1000:], "Content-Range", "bytes 1000-299999/400000"), ErrSize, ""},
		{"no range", 1000, answer(206, data[1000:]), nil, "content range"},
		{"silly range", 1000, answer(206, data[1000:], "Content-Range", "bytes -5--1/x"), nil, "content range"},
		{"range behind the end", 1000, answer(416, nil), ErrSize, "no byte 1000"},
		{"several ranges", 1000, answer(206, data[1000:], "Content-Type", "multipart/byteranges; boundary=x"), nil, "several ranges"},
		{"packed", 0, answer(200, data, "Content-Encoding", "gzip"), nil, "gzip"},
		{"page with status 200", 0, answer(200, []byte("<!doctype html><title>Portal</title>"+strings.Repeat(" ", 300_000-36))), ErrHTML, "Portal"},
		{"redirect loop", 0, func(_ int, w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "/again", http.StatusFound)
			return true
		}, ErrRedirect, "in a row"},
		{"redirect to a file", 0, answer(302, nil, "Location", "file:///etc/passwd"), nil, ""},
		{"redirect with a password", 0, answer(302, nil, "Location", "http://a:b@127.0.0.1:1/"), ErrRedirect, "user name"},
		{"nothing there", 0, answer(404, []byte("not \x1b[31mhere")), nil, "404"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newMirror(t, data, tc.spoil)
			got, err := readFrom(t, fetch(t, data, m.URL), tc.offset)
			if err == nil {
				t.Fatalf("%d bytes and no error", len(got))
			}
			if tc.want != nil && !errors.Is(err, tc.want) {
				t.Errorf("error %q is not %q", err, tc.want)
			}
			if !strings.Contains(err.Error(), tc.says) || strings.ContainsAny(err.Error(), "\x1b\n") {
				t.Errorf("error %q", err)
			}
			if n := len(m.requests()); n > 20 {
				t.Errorf("%d requests", n)
			}
		})
	}
}

// 17: a server without ranges sends everything again, and what was read is skipped.
func TestDownloadWithoutRanges(t *testing.T) {
	data := some(300_000)
	m := newMirror(t, data, func(_ int, w http.ResponseWriter, _ *http.Request) bool {
		w.Write(data)
		return true
	})
	got, err := readFrom(t, fetch(t, data, m.URL), 123_456)
	if err != nil || !bytes.Equal(got, data[123_456:]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// 17 and 19: a payload that is replaced during the download is noticed, instead of being glued to the old one.
func TestDownloadChanged(t *testing.T) {
	data := some(300_000)
	other := bytes.Repeat([]byte("other"), 60_000)
	m := newMirror(t, data, func(n int, w http.ResponseWriter, r *http.Request) bool {
		if n == 1 {
			return cutAfter(data, 100_000)(n, w, r)
		}
		w.Header().Set("ETag", `"other"`)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(other))
		return true
	})
	if _, err := readFrom(t, fetch(t, data, m.URL), 0); !errors.Is(err, ErrChanged) {
		t.Errorf("got %v", err)
	}
}

// 6: a connection below the minimum rate is given up, also one that sends nothing at all.
func TestDownloadTooSlow(t *testing.T) {
	data := some(300_000)
	for name, pause := range map[string]time.Duration{"drips": 5 * time.Millisecond, "hangs": time.Hour} {
		t.Run(name, func(t *testing.T) {
			m := newMirror(t, data, func(_ int, w http.ResponseWriter, r *http.Request) bool {
				for i := range data {
					w.Write(data[i : i+1])
					w.(http.Flusher).Flush()
					select {
					case <-r.Context().Done():
						return true
					case <-time.After(pause):
					}
				}
				return true
			})
			d := fetch(t, data, m.URL)
			d.opt.Window, d.opt.MinRate, d.opt.Attempts, d.opt.Rounds = 100*time.Millisecond, 100_000, 1, 1
			if _, err := readFrom(t, d, 0); !errors.Is(err, ErrTooSlow) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// Also what an answer brings that is no payload has an end: a mirror that says it is broken, or elsewhere, and then says no more, is left for the next one.
func TestDownloadStallsInARefusal(t *testing.T) {
	data := some(300_000)
	good := newMirror(t, data, nil)
	for name, head := range map[string]func(http.ResponseWriter){
		"broken":    func(w http.ResponseWriter) { w.WriteHeader(http.StatusServiceUnavailable) },
		"not there": func(w http.ResponseWriter) { w.WriteHeader(http.StatusNotFound) },
		"a page":    func(w http.ResponseWriter) { w.Header().Set("Content-Type", "text/html") },
		"elsewhere": func(w http.ResponseWriter) {
			w.Header().Set("Location", good.URL)
			w.WriteHeader(http.StatusFound)
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMirror(t, data, func(_ int, w http.ResponseWriter, r *http.Request) bool {
				w.Header().Set("Content-Length", "400")
				head(w)
				w.(http.Flusher).Flush()
				<-r.Context().Done()
				return true
			})
			d := fetch(t, data, m.URL, good.URL)
			d.opt.Open, d.opt.Attempts, d.opt.Rounds = 500*time.Millisecond, 1, 20 // of which a busy machine may need some
			var told error
			d.opt.Failed = func(_ string, err error) {
				if told == nil {
					told = err
				}
			}
			if got, err := readFrom(t, d, 0); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			if told == nil {
				t.Error("the first address was not given up")
			}
		})
	}
}

// Only waiting for the network counts: whoever reads slowly is not punished.
func TestSlowReaderIsNotSlowServer(t *testing.T) {
	data := some(300_000)
	m := newMirror(t, data, nil)
	now := time.Unix(0, 0)
	d := fetch(t, data, m.URL)
	d.opt.Now = func() time.Time { return now }
	r, err := d.Open(context.Background(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	buf := make([]byte, 4096)
	for {
		now = now.Add(time.Hour)
		if _, err := r.Read(buf); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

func TestDownloadRateLimit(t *testing.T) {
	data := some(400_000)
	m := newMirror(t, data, nil)
	d := fetch(t, data, m.URL)
	h, err := NewHTTP(HTTPOptions{Proxy: "direct", RateLimit: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer h.CloseIdle()
	d.http = h
	start := time.Now()
	got, err := readFrom(t, d, 0)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	// The first 64 KiB are free; the rest takes a third of a second at a mebibyte per second. A lower bound cannot flake.
	if took := time.Since(start); took < 200*time.Millisecond {
		t.Errorf("it took %s only", took)
	}
}

// An ended context ends a download at once, whatever it waits for.
func TestDownloadCancelled(t *testing.T) {
	data := some(300_000)
	m := newMirror(t, data, func(_ int, w http.ResponseWriter, r *http.Request) bool {
		w.Write(data[:1000])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return true
	})
	ctx, cancel := context.WithCancel(context.Background())
	r, err := fetch(t, data, m.URL).Open(ctx, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := io.ReadAll(r); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
