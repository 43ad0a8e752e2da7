package server

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// A channel with steps on the way is mirrored whole, over real HTTP, and only once.
func TestMirror(t *testing.T) {
	up := newLab(t)
	for i, v := range []string{"1.1.0", "1.2.0", "2.0.0"} {
		up.publishVersion(v, byte(i))
	}
	up.change(func(c *Channel) { c.Floors = []string{"1.1.0", "1.2.0"} })
	p := &Publisher{Dir: t.TempDir()}
	from := Upstream{HTTP: up.http, URL: up.url + "/v1/update/", AppID: testApp, Track: "stable"}
	for round, want := range []int{3, 0} {
		fresh, err := p.Mirror(context.Background(), from, "prod")
		if err != nil || len(fresh) != want {
			t.Fatalf("round %d: %d new releases, %v", round, len(fresh), err)
		}
	}
	ch, err := p.Channel("prod")
	if err != nil || ch.Version != "2.0.0" || strings.Join(ch.Floors, " ") != "1.1.0 1.2.0" {
		t.Errorf("channel is %+v, %v", ch, err)
	}
	p = &Publisher{Dir: t.TempDir(), Verify: func(context.Context, string, *Delta) error { return errors.New("wrong key") }}
	if _, err := p.Mirror(context.Background(), from, "prod"); err == nil || !strings.Contains(err.Error(), "wrong key") {
		t.Errorf("payloads that do not verify: %v", err)
	}
	// The mirror's payload is not what the server announced.
	path := filepath.Join(up.dir, "payloads", "1.1.0.payload")
	data, _ := os.ReadFile(path)
	data[5000] ^= 1
	os.WriteFile(path, data, 0o644)
	p = &Publisher{Dir: t.TempDir()}
	if _, err := p.Mirror(context.Background(), from, "prod"); err == nil || !strings.Contains(err.Error(), "SHA-256") {
		t.Errorf("a tampered payload: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(p.Dir, "payloads", "*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestBundle(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.publishVersion("1.2.0", 2)
	l.change(func(c *Channel) { c.Floors, c.MaxConcurrent = []string{"1.1.0"}, 3 })
	var bundle bytes.Buffer
	if err := l.publish.Export(&bundle, "stable"); err != nil {
		t.Fatal(err)
	}
	p := &Publisher{Dir: t.TempDir()}
	for range 2 {
		got, err := p.Import(context.Background(), bytes.NewReader(bundle.Bytes()))
		if err != nil || len(got) != 2 {
			t.Fatalf("%d releases, %v", len(got), err)
		}
	}
	ch, err := p.Channel("stable")
	if err != nil || ch.Version != "1.2.0" || len(ch.Floors) != 1 || ch.MaxConcurrent != 0 {
		t.Errorf("channel is %+v, %v", ch, err)
	}

	for name, spoil := range map[string]func([]byte) []byte{
		"tampered":                  func(b []byte) []byte { b[bytes.Index(b, []byte("CrAU"))+1000] ^= 1; return b },
		"truncated":                 func(b []byte) []byte { return b[:len(b)/2] },
		"foreign":                   func([]byte) []byte { return archive(t, "../../etc/passwd", "x") },
		"payload without a release": func([]byte) []byte { return archive(t, "payloads/1.1.0.payload", "x") },
		"release that leads outside": func([]byte) []byte {
			return archive(t, "releases/1.1.0.toml", "version = \"1.1.0\"\npayload = \"../x\"\nsize = 1\nsha256 = \""+strings.Repeat("ab", 32)+"\"\n")
		},
	} {
		p := &Publisher{Dir: t.TempDir()}
		if _, err := p.Import(context.Background(), bytes.NewReader(spoil(bytes.Clone(bundle.Bytes())))); err == nil {
			t.Errorf("%s: no error", name)
		}
		if _, err := p.Channel("stable"); !errors.Is(err, ErrUnknown) {
			t.Errorf("%s: the channel moved", name)
		}
	}
}

func archive(t *testing.T, name, content string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(content)), Mode: 0o644}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(content)); err != nil {
		t.Fatal(err)
	}
	w.Close()
	return b.Bytes()
}

// A server that follows another has what that one publishes, without anybody's hand, and goes on with what it has while upstream is away.
func TestFollow(t *testing.T) {
	up := newLab(t)
	up.publishVersion("1.1.0", 1)
	var away atomic.Bool
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if away.Load() {
			http.Error(w, "away", http.StatusServiceUnavailable)
			return
		}
		up.ServeHTTP(w, r)
	}))
	defer proxy.Close()
	mirror := newLab(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		mirror.Follow(ctx, Upstream{HTTP: up.http, URL: proxy.URL + "/v1/update/", AppID: testApp, Track: "ignored"}, []string{"stable"}, 20*time.Millisecond)
	}()
	has := func(version string) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
			ch, err := mirror.publish.Channel("stable")
			if err == nil && ch.Version == version {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("the mirror's channel is %+v, %v, want %s", ch, err, version)
			}
		}
	}
	has("1.1.0")
	away.Store(true)
	up.publishVersion("1.2.0", 2)
	time.Sleep(60 * time.Millisecond)
	has("1.1.0")
	away.Store(false)
	has("1.2.0")
	cancel()
	<-ended
}
