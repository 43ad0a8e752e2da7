package host

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/fleetlock"
	"github.com/flipside-linux/flipside/reboot"
)

// What belongs to the cluster is asked directly, also where the environment names a proxy for what is fetched from outside.
func TestNoProxyToTheCluster(t *testing.T) {
	const inner = "FLIPSIDE_TEST_NO_PROXY"
	if os.Getenv(inner) == "" { // a process reads these variables once
		cmd := exec.Command(os.Args[0], "-test.run=^TestNoProxyToTheCluster$", "-test.v")
		cmd.Env = append(os.Environ(), inner+"=1", "HTTP_PROXY=http://127.0.0.1:1", "HTTPS_PROXY=http://127.0.0.1:1", "NO_PROXY=", "no_proxy=")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "PASS: TestNoProxyToTheCluster") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	mux := http.NewServeMux()
	mux.Handle("/", &fleetlock.Server{Semaphore: lock.On(lock.NewMemory(), lock.Options{})})
	mux.HandleFunc("/api/v1/query", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"status":"success","data":{"resultType":"vector","result":[]}}`)
	})
	srv := httptest.NewServer(mux)
	defer srv.Close()
	// An address of this machine that no library takes for one: to loopback there is never a proxy.
	url := strings.Replace(srv.URL, "127.0.0.1", "0.0.0.0", 1)
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
