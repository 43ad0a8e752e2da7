package etcd_test

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
	"github.com/flipside-linux/flipside/lock/locktest"
)

// etcd is asked directly, also where the environment names a proxy for what is fetched from outside.
func TestNoProxy(t *testing.T) {
	if !locktest.BehindProxy(t) {
		return
	}
	endpoint, stop, err := etcdtest.StartEmbedded(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	k, err := etcd.New(etcd.Config{Endpoints: []string{locktest.Elsewhere(endpoint)}})
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
	p, err := etcd.NewLocksmith(etcd.Config{Endpoints: []string{locktest.Elsewhere(v2.URL)}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Read(t.Context(), "web"); err != nil {
		t.Errorf("etcd v2: %v", err)
	}
}
