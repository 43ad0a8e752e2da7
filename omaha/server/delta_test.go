package server

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/omaha"
)

// A delta is offered to hosts that run the version it changes and take deltas, and to nobody else; it travels with its release.
func TestDeltas(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	p := &Publisher{Dir: l.dir}
	delta := fakePayload(t, 9, 5000)
	if _, err := p.AddDelta(ctx, "1.2.0", "1.1.0", delta); !errors.Is(err, ErrUnknown) {
		t.Errorf("before its whole payload: %v", err)
	}
	l.publishVersion("1.2.0", 2)
	for _, from := range []string{"1.2.0", "", "../1.1.0", "one"} {
		if _, err := p.AddDelta(ctx, "1.2.0", from, delta); from != "" && err == nil {
			t.Errorf("from %q went through", from)
		}
	}
	var of Delta
	p.Verify = func(_ context.Context, _ string, d *Delta) error { of = *d; return nil }
	d, err := p.AddDelta(ctx, "1.2.0", "1.1.0", delta)
	if err != nil || d.Size != 5000 || of != (Delta{Whole: filepath.Join(l.dir, "payloads", "1.2.0.payload")}) {
		t.Fatalf("%+v, %v, checked against %+v", d, err, of)
	}
	if again, err := p.AddDelta(ctx, "1.2.0", "1.1.0", delta); err != nil || again.Published != d.Published {
		t.Errorf("the same again: %v", err)
	}
	if _, err := p.AddDelta(ctx, "1.2.0", "1.1.0", fakePayload(t, 8, 5001)); !errors.Is(err, ErrExists) {
		t.Errorf("another one: %v", err)
	}
	if err := l.Reload(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		version string
		deltas  bool
		size    int64
	}{{"1.1.0", true, 5000}, {"1.1.0", false, 300_000}, {"1.0.0", true, 300_000}} {
		c := l.client(1, tt.version)
		a, err := c.Check(ctx, omaha.CheckRequest{Deltas: tt.deltas})
		if err != nil || a.Offer == nil {
			t.Fatalf("%+v: %+v, %v", tt, a, err)
		}
		if a.Offer.Version != "1.2.0" || a.Offer.Size != tt.size || a.Offer.Delta != (tt.size == 5000) {
			t.Errorf("%+v: %+v", tt, a.Offer)
		}
		plan, err := c.Plan(ctx, "stable", omaha.CheckRequest{Deltas: tt.deltas})
		if err != nil || plan.Size != tt.size {
			t.Errorf("%+v: plan of %d bytes, %v", tt, plan.Size, err)
		}
		if tt.size != 5000 {
			continue
		}
		r, err := omaha.NewDownload(l.http, a.Offer, omaha.DownloadOptions{}).Open(ctx, 0)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		r.Close()
		want, _ := os.ReadFile(delta)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes were served, %v", len(got), err)
		}
	}
	_, page := l.get("/")
	if !strings.Contains(page, "from 1.1.0") {
		t.Error("the page does not speak of the delta")
	}

	// Over an air gap, with what its boots must measure.
	pcrs := PCRs{"11": {strings.Repeat("ab", 32)}}
	if _, err := p.Measure("1.2.0", func(PCRs) (PCRs, error) { return pcrs, nil }); err != nil {
		t.Fatal(err)
	}
	var bundle bytes.Buffer
	if err := p.Export(&bundle, "stable"); err != nil {
		t.Fatal(err)
	}
	far := &Publisher{Dir: t.TempDir()}
	if got, err := far.Import(ctx, bytes.NewReader(bundle.Bytes())); err != nil || len(got) != 2 {
		t.Fatalf("imported %+v, %v", got, err)
	}
	c, err := load(far.Dir, nil)
	if err != nil || len(c.problems) > 0 || c.payload(c.releases["1.2.0"], "1.1.0", true).SHA256 != d.SHA256 || !reflect.DeepEqual(c.releases["1.2.0"].PCRs, pcrs) {
		t.Errorf("what came over: %+v, %v", c, err)
	}

	// A delta that is lost or changed is not offered; the release is.
	if err := os.Truncate(filepath.Join(l.dir, "payloads", d.Payload), 100); err != nil {
		t.Fatal(err)
	}
	now := time.Now().Add(time.Hour)
	if err := os.Chtimes(filepath.Join(l.dir, "deltas", "1.2.0_from_1.1.0.toml"), now, now); err != nil {
		t.Fatal(err)
	}
	if err := l.Reload(); err != nil {
		t.Fatal(err)
	}
	if a, err := l.client(1, "1.1.0").Check(ctx, omaha.CheckRequest{Deltas: true}); err != nil || a.Offer == nil || a.Offer.Size != 300_000 {
		t.Errorf("with a delta that is cut short: %+v, %v", a, err)
	}
}

// A host whose first attempt broke off, and that has come up with the release after all, is as healthy as any other.
func TestFailureIsForgottenByTheBoot(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	c := l.client(1, "1.0.0")
	l.check(c)
	l.check(c, omaha.Failed(omaha.CodeTransfer))
	if h, _ := l.Host(c.MachineID); h.Failed != "1.1.0" {
		t.Fatalf("%+v", h)
	}
	c.Version = "1.1.0"
	l.check(c, omaha.Booted("1.0.0"))
	if h, _ := l.Host(c.MachineID); h.State != Complete || h.Failed != "" || h.Failures != 0 {
		t.Errorf("%+v", h)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := l.healthy("stable", "1.1.0", l.clock.Now()); n != 1 {
		t.Errorf("%d hosts are healthy", n)
	}
}
