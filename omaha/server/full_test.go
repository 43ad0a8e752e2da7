package server

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/omaha"
)

// small puts a small file system beneath what is in dir. fill lets no byte more be written to it, and room makes room again.
func small(t *testing.T, dir string) (fill, room func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a small file system takes root")
	}
	was := t.TempDir()
	if err := os.CopyFS(was, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Skip("mounting a small file system: ", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := os.CopyFS(dir, os.DirFS(was)); err != nil {
		t.Fatal(err)
	}
	filling := filepath.Join(dir, "filling")
	fill = func() {
		t.Helper()
		f, err := os.Create(filling)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for err == nil {
			_, err = f.Write(make([]byte, 4096))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
	}
	return fill, func() {
		t.Helper()
		if err := os.Remove(filling); err != nil {
			t.Fatal(err)
		}
	}
}

// Nothing at all can be written: whatever of the reports is on the disk, nobody is granted the release that they speak against, by this server or the next. When there is room
// again and the hosts have repeated what was not acknowledged, the rollout is stopped.
func TestStopOnAFullDisk(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.change(func(c *Channel) { c.StopFailures = 2 })
	for i := range 2 {
		l.wants(l.client(i, "1.0.0"), "1.1.0", "")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	fill, room := small(t, l.dir)
	l.start()
	fill()
	taken := map[int]bool{}
	report := func() {
		for i := range 2 {
			if !taken[i] {
				taken[i] = l.client(i, "1.0.0").Report(t.Context(), omaha.Failed(omaha.CodeRollback)) == nil
			}
		}
	}
	nobody := func(when string, n int) {
		t.Helper()
		for i := range n {
			a, err := l.client(10+i, "1.0.0").Check(t.Context(), omaha.CheckRequest{})
			if err == nil && a.Offer != nil {
				t.Errorf("%s: host %d is granted %s", when, 10+i, a.Offer.Version)
			}
		}
	}
	report()
	nobody("the disk is full", 5)
	if err := l.Close(); err != nil {
		t.Log(err) // what could not be written
	}
	l.start()
	report()
	nobody("the disk is full still", 5)
	t.Logf("reports that were acknowledged: %v", taken)
	room()
	l.clock.Add(2 * time.Second)
	report()
	if !taken[0] || !taken[1] {
		t.Fatalf("there is room, and reports are not acknowledged: %v", taken)
	}
	l.wants(l.client(10, "1.0.0"), "", "stopped: 2 hosts failed with 1.1.0")
}
