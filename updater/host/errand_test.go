package host

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/reboot/health"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/wire"
)

// errandsFor lets this process do what comes, for the agent that it returns. What confines it is left out: no program is run.
func errandsFor(t *testing.T, c config.Config, own func(config.Config) error) errands {
	t.Helper()
	return errands{func() (*net.UnixConn, error) {
		near, conn, err := wire.Ends()
		if err != nil {
			return nil, err
		}
		go Errand(context.Background(), conn, func() (config.Config, error) { return c, nil }, own)
		return near, nil
	}}
}

func TestErrands(t *testing.T) {
	dir := t.TempDir()
	c := config.Default()
	c.Metrics.Textfile, c.Reboot.Method = filepath.Join(dir, "flipside.prom"), "exit"
	var owned atomic.Int32
	s := errandsFor(t, c, func(config.Config) error { owned.Add(1); return nil })
	text := strings.Repeat("flipside_up 1\n", 1000)
	if err := s.do(t.Context(), errand{Do: doMetrics, Text: text}); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(c.Metrics.Textfile); err != nil || string(data) != text {
		t.Errorf("the metrics: %d bytes, %v", len(data), err)
	}
	if err := s.do(t.Context(), errand{Do: doMetrics}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(c.Metrics.Textfile); err == nil {
		t.Error("the metrics are still there")
	}
	if err := s.do(t.Context(), errand{Do: doOwn}); err != nil || owned.Load() != 1 {
		t.Errorf("own: %d times, %v", owned.Load(), err)
	}
	if err := s.Reboot(t.Context(), "an update"); err == nil || !strings.Contains(err.Error(), `reboot.method is "exit"`) {
		t.Errorf("a reboot that the configuration does not know: %v", err)
	}
	if err := s.do(t.Context(), errand{Do: "sh -c true"}); err == nil || !strings.Contains(err.Error(), "no errand") {
		t.Errorf("what there is not: %v", err)
	}
	if err := s.do(t.Context(), errand{Do: doMetrics, Text: strings.Repeat("x", maxErrand)}); err == nil {
		t.Error("more than there may be is taken")
	}
	tries := 0
	none := errands{func() (*net.UnixConn, error) { tries++; return nil, net.ErrClosed }}
	if err := none.do(t.Context(), errand{Do: doOwn}); !errors.Is(err, errUnasked) || !errors.Is(err, net.ErrClosed) || tries != 1 {
		t.Errorf("nobody to ask: %d tries, %v", tries, err)
	}
	tries = 0
	slow := errands{func() (*net.UnixConn, error) {
		if tries++; tries > 1 {
			return s.connect()
		}
		near, far, err := wire.Pair()
		if err == nil {
			far.Close()
		}
		return near, err
	}}
	if err := slow.do(t.Context(), errand{Do: doOwn}); err != nil || tries != 2 || owned.Load() != 2 {
		t.Errorf("ended on the way: %d tries, %d times, %v", tries, owned.Load(), err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.do(ended, errand{Do: doOwn}); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
}

// What a check says comes across whole, whatever bytes it prints.
func TestErrandOutcome(t *testing.T) {
	a, b := net.Pipe()
	want := &health.Failure{Program: "10-x", Reason: "no \xff network", Output: strings.Repeat("\x00\xff\n", 16<<10/3)}
	go send(a, anOutcome, outcome{Failed: true, Text: want.Error(), Check: want})
	var o outcome
	if err := receive(b, anOutcome, maxOutcome, &o); err != nil {
		t.Fatal(err)
	}
	if o.Check == nil || o.Check.Program != want.Program || !strings.Contains(o.Check.Reason, "network") || len(o.Check.Output) < len(want.Output) {
		t.Errorf("%+v", o)
	}
}

// Rubbish instead of an errand ends it, and reserves no memory that it claims.
func TestErrandRubbish(t *testing.T) {
	framed := func(h wire.Head, body string) string {
		h.Size = max(h.Size, uint32(len(body)))
		return string(h.Append(nil)) + body
	}
	for _, rubbish := range []string{
		"", "\x00", strings.Repeat("\xff", 100),
		framed(wire.Head{Kind: anErrand, Size: 1<<32 - 1}, ""), framed(wire.Head{Kind: anErrand, Size: 2}, "{"),
		framed(wire.Head{Kind: anErrand}, "[]"), framed(wire.Head{Kind: anErrand}, "null"), framed(wire.Head{Kind: anErrand}, `{"do": "own", "as": "root"}`),
		framed(wire.Head{Kind: anOutcome}, `{"do": "own"}`),
	} {
		near, conn, err := wire.Ends()
		if err != nil {
			t.Fatal(err)
		}
		near.Write([]byte(rubbish))
		near.CloseWrite()
		done := make(chan error, 1)
		go func() {
			done <- Errand(context.Background(), conn, func() (config.Config, error) { return config.Default(), nil }, func(config.Config) error {
				t.Errorf("%q: it does something", rubbish)
				return nil
			})
		}()
		select {
		case <-done:
		case <-time.After(time.Minute):
			t.Fatalf("%q: it does not end", rubbish)
		}
		near.Close()
	}
}
