package host

import (
	"net/http"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/updater"
)

// stopTimeout is TimeoutStopSec= of the unit: after it systemd kills the daemon.
const stopTimeout = 30 * time.Second

// slowWriter takes its time for every piece.
type slowWriter struct{ http.ResponseWriter }

func (w slowWriter) Write(b []byte) (n int, err error) {
	for err == nil && n < len(b) {
		var m int
		m, err = w.ResponseWriter.Write(b[n:min(len(b), n+16<<10)])
		n += m
		w.ResponseWriter.(http.Flusher).Flush()
		time.Sleep(20 * time.Millisecond)
	}
	return n, err
}

// A daemon that is told to end in the middle of a download ends by itself before systemd would kill it, and the next one goes on from there.
func TestStopsWhileDownloading(t *testing.T) {
	r := newRig(t)
	var slow atomic.Bool
	slow.Store(true)
	r.wrap = func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if slow.Load() && req.Method == http.MethodGet {
				w = slowWriter{w}
			}
			h.ServeHTTP(w, req)
		})
	}
	r.publish("2.0.0", r.payload("2.0.0", r.image("2.0.0"), r.key))
	slot, _ := r.boot()
	var asked time.Time
	_, rebooted := r.run(slot, func(st updater.Status) bool {
		asked = time.Now()
		return st.Phase == updater.Applying && st.Progress != nil && st.Progress.Done > st.Progress.Total*9/10
	})
	if rebooted {
		t.Fatal("it was through before it was told to end")
	}
	took := time.Since(asked)
	t.Logf("it ended after %s", took.Round(time.Millisecond))
	if took > stopTimeout {
		t.Errorf("it took %s to end; systemd would have killed it", took)
	}
	if r.slot("USR-B").Bootable() {
		t.Error("half a release is bootable")
	}
	st, err := (updater.Store{Path: filepath.Join(r.dir, "state", "state.json")}).Load()
	if err != nil || st.Update == nil || len(st.Update.Checkpoint) == 0 {
		t.Errorf("what was brought is not remembered: %+v, %v", st.Update, err)
	}
	slow.Store(false)
	if _, rebooted = r.run(slot, func(updater.Status) bool { return false }); !rebooted {
		t.Error("the next one is not through")
	}
}
