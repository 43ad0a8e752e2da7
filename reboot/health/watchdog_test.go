package health

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A regular file stands for /dev/watchdog, which test machines rarely have and which would reset them: it records what is written.
func TestWatchdog(t *testing.T) {
	device := filepath.Join(t.TempDir(), "watchdog")
	if err := os.WriteFile(device, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	written := func() string {
		b, err := os.ReadFile(device)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Watchdog{Device: device, Every: time.Millisecond}.Guard(ctx) }()
	for start := time.Now(); len(written()) < 3; time.Sleep(time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			t.Fatal("no signs of life")
		}
	}
	cancel()
	if err := <-done; err != nil || !strings.HasSuffix(written(), "\x00V") {
		t.Errorf("at the end it was told %q, %v", written(), err)
	}

	os.Truncate(device, 0)
	err := Watchdog{Device: device, Every: time.Millisecond, Deadline: 5 * time.Millisecond}.Guard(t.Context())
	if err == nil || strings.Contains(written(), "V") {
		t.Errorf("after the deadline the watchdog was put to rest: %q, %v", written(), err)
	}
	if err := (Watchdog{Device: device + "x"}).Guard(t.Context()); err == nil {
		t.Error("no device, and no error")
	}
}
