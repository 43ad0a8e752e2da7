package etcd_test

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
)

// An etcd whose data were put back from a copy is the same cluster, and what is written there then can have all the numbers of what was written after the copy. Whoever has read the
// one does not take it for the other.
func TestRecordsOfARestoredEtcd(t *testing.T) {
	t.Parallel()
	dir, backup := filepath.Join(t.TempDir(), "etcd"), filepath.Join(t.TempDir(), "backup")
	address, err := url.Parse(freeURL(t))
	if err != nil {
		t.Fatal(err)
	}
	run := func() (*clientv3.Client, func()) {
		t.Helper()
		cfg := etcdtest.Config(dir)
		cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*address}, []url.URL{*address}
		e, err := etcdtest.Start(cfg)
		if err != nil {
			t.Fatal(err)
		}
		c, err := clientv3.New(clientv3.Config{Endpoints: []string{address.String()}})
		if err != nil {
			e.Close()
			t.Fatal(err)
		}
		stop := sync.OnceFunc(func() { c.Close(); e.Close() })
		t.Cleanup(stop)
		return c, stop
	}
	const prefix = etcd.DefaultPrefix + "g/record/"
	var names []string
	for i := range 100 {
		names = append(names, fmt.Sprintf("host-%03d", i))
	}
	put := func(c *clientv3.Client, name, value string) int64 {
		t.Helper()
		resp, err := c.Put(t.Context(), prefix+name, value)
		if err != nil {
			t.Fatal(err)
		}
		return resp.Header.Revision
	}
	c, stop := run()
	for _, name := range names {
		put(c, name, name)
	}
	stop()
	if err := os.CopyFS(backup, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}

	c, stop = run()
	store, err := etcd.OpenStore(etcd.Config{Endpoints: []string{address.String()}})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	read := func() []lock.Record {
		t.Helper()
		list, err := store.Records(t.Context(), "g", names...)
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	first := put(c, names[7], "is well")
	for range 3 { // until it is known over this connection
		if list := read(); len(list) != len(names) || string(list[7].Data) != "is well" {
			t.Fatalf("%d records, %q", len(list), list[7].Data)
		}
	}
	was := read()
	stop()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(dir, os.DirFS(backup)); err != nil {
		t.Fatal(err)
	}

	c, _ = run()
	if again := put(c, names[7], "goes down"); again != first {
		t.Fatalf("the restored etcd counts %d, not %d", again, first)
	}
	is := read()
	if string(is[7].Data) != "goes down" {
		t.Errorf("the record of %s is %q still", names[7], is[7].Data)
	}
	for _, list := range [][]lock.Record{was, is} {
		list[7].Data = nil
	}
	if !reflect.DeepEqual(was, is) { // else the test would show nothing
		t.Errorf("the records differ in more than what they say: %+v, %+v", was[7], is[7])
	}
}
