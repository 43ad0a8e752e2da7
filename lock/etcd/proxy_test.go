package etcd_test

import (
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
)

// etcd is asked directly, also where the environment names a proxy for what is fetched from outside.
func TestNoProxy(t *testing.T) {
	const inner = "FLIPSIDE_TEST_NO_PROXY"
	if os.Getenv(inner) == "" { // a process reads these variables once
		cmd := exec.Command(os.Args[0], "-test.run=^TestNoProxy$", "-test.v")
		cmd.Env = append(os.Environ(), inner+"=1", "HTTP_PROXY=http://127.0.0.1:1", "HTTPS_PROXY=http://127.0.0.1:1", "NO_PROXY=", "no_proxy=")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "PASS: TestNoProxy") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	endpoint, stop, err := etcdtest.StartEmbedded(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	// An address of this machine that no library takes for one: to loopback there is never a proxy.
	elsewhere := func(url string) string { return strings.Replace(url, "127.0.0.1", "0.0.0.0", 1) }
	k, err := etcd.New(etcd.Config{Endpoints: []string{elsewhere(endpoint)}})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if _, err := k.State(t.Context(), "web"); err != nil {
		t.Errorf("etcd: %v", err)
	}
	v2 := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNotFound)
		w.Write([]byte(`{"errorCode":100,"message":"Key not found"}`))
	}))
	defer v2.Close()
	p, err := etcd.NewLocksmith(etcd.Config{Endpoints: []string{elsewhere(v2.URL)}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Read(t.Context(), "web"); err != nil {
		t.Errorf("etcd v2: %v", err)
	}
}
