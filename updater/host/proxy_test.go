package host

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/fleetlock"
	"github.com/flipside-linux/flipside/lock/locktest"
	"github.com/flipside-linux/flipside/reboot"
)

// A FleetLock server that only a proxy reaches is asked through it.
func TestFleetLockBehindProxy(t *testing.T) {
	var asked atomic.Value
	semaphores := &fleetlock.Server{Semaphore: lock.On(lock.NewMemory(), lock.Options{})}
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.URL.Host)
		semaphores.ServeHTTP(w, r)
	}))
	defer proxy.Close()
	c := parse(t, fmt.Sprintf("[lock]\ngroup = \"web\"\nfleetlock = \"http://semaphore.invalid:3333\"\nproxy = %q\n", proxy.URL))
	sem, closer, err := semaphore(c.Lock, "")
	if err != nil {
		t.Fatal(err)
	}
	defer closer()
	if s, err := sem.Request(t.Context(), lock.Claim{Group: "web", Host: "a"}); err != nil || !s.Granted || asked.Load() != "semaphore.invalid:3333" {
		t.Errorf("%+v, %v; the proxy was asked for %v", s, err, asked.Load())
	}
}

// What belongs to the cluster is asked directly, also where the environment names a proxy for what is fetched from outside.
func TestNoProxyToTheCluster(t *testing.T) {
	if !locktest.BehindProxy(t) {
		return
	}
	mux := http.NewServeMux()
	mux.Handle("/", &fleetlock.Server{Semaphore: lock.On(lock.NewMemory(), lock.Options{})})
	mux.HandleFunc("/api/v1/query", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"status":"success","data":{"resultType":"vector","result":[]}}`)
	})
	srv := httptest.NewServer(mux)
	defer srv.Close()
	url := locktest.Elsewhere(srv.URL)
	c := parse(t, fmt.Sprintf("[lock]\ngroup = \"web\"\nfleetlock = %q\n[reboot]\nalerts = %q\n", url, url))
	sem, closer, err := semaphore(c.Lock, "")
	if err != nil {
		t.Fatal(err)
	}
	defer closer()
	if s, err := sem.Request(t.Context(), lock.Claim{Group: "web", Host: "a"}); err != nil || !s.Granted {
		t.Errorf("FleetLock: %+v, %v", s, err)
	}
	if a := (reboot.Alerts{URL: c.Reboot.Alerts}).Ask(t.Context(), time.Now()); a.Verdict != reboot.Go {
		t.Errorf("alerts: %+v", a)
	}
}
