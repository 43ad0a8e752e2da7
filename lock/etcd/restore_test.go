package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
)

// restorable is an etcd whose data are put back from a copy: what a snapshot holds, with counters that go back, at the same address and with the same name of the cluster.
type restorable struct {
	*testing.T
	dir, backup string
	address     *url.URL
	stop        func()
}

func newRestorable(t *testing.T) *restorable {
	t.Helper()
	address, err := url.Parse(freeURL(t))
	if err != nil {
		t.Fatal(err)
	}
	e := &restorable{T: t, dir: filepath.Join(t.TempDir(), "etcd"), backup: filepath.Join(t.TempDir(), "backup"), address: address, stop: func() {}}
	t.Cleanup(func() { e.stop() })
	return e
}

// run starts it, and returns a client of somebody who writes what they like.
func (e *restorable) run() *clientv3.Client {
	e.Helper()
	cfg := etcdtest.Config(e.dir)
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*e.address}, []url.URL{*e.address}
	server, err := etcdtest.Start(cfg)
	if err != nil {
		e.Fatal(err)
	}
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{e.address.String()}})
	if err != nil {
		server.Close()
		e.Fatal(err)
	}
	e.stop = sync.OnceFunc(func() { c.Close(); server.Close() })
	return c
}

// save stops it and keeps a copy of its data, restore stops it and puts that copy back.
func (e *restorable) save() {
	e.Helper()
	e.stop()
	if err := os.CopyFS(e.backup, os.DirFS(e.dir)); err != nil {
		e.Fatal(err)
	}
}

func (e *restorable) restore() {
	e.Helper()
	e.stop()
	if err := os.RemoveAll(e.dir); err != nil {
		e.Fatal(err)
	}
	if err := os.CopyFS(e.dir, os.DirFS(e.backup)); err != nil {
		e.Fatal(err)
	}
}

// An etcd whose data were put back from a copy is the same cluster, and what is written there then can have all the numbers of what was written after the copy. Whoever has read the
// one does not take it for the other.
func TestRecordsOfARestoredEtcd(t *testing.T) {
	t.Parallel()
	e := newRestorable(t)
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
	c := e.run()
	for _, name := range names {
		put(c, name, name)
	}
	e.save()

	c = e.run()
	store, err := etcd.OpenStore(etcd.Config{Endpoints: []string{e.address.String()}})
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
	e.restore()

	c = e.run()
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

// Who follows a group sees what happens in an etcd that counts fewer revisions than it did, and none of it twice.
func TestFollowARestoredEtcd(t *testing.T) {
	t.Parallel()
	e := newRestorable(t)
	e.run()
	cfg := etcd.FastRecheck(etcd.Config{Endpoints: []string{e.address.String()}})
	k := open(t, cfg)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(k.SetMax(t.Context(), "g", 3))
	e.save()
	e.run()
	for i := range 20 { // far ahead of the copy
		must(k.SetMax(t.Context(), "g", 4+i))
	}
	ctx, cancel := context.WithCancel(t.Context())
	seen, done := make(chan int, 100), make(chan error, 1)
	go func() {
		done <- open(t, cfg).Follow(ctx, "g", func(s lock.State) bool { seen <- s.Policy.Max; return true })
	}()
	next := func(want int) {
		t.Helper()
		select {
		case got := <-seen:
			if got != want {
				t.Errorf("max is %d, want %d", got, want)
			}
		case err := <-done:
			t.Fatal(err)
		case <-time.After(2 * time.Minute):
			t.Fatalf("nobody says that max is %d", want)
		}
	}
	next(23)
	must(k.SetMax(t.Context(), "g", 30))
	next(30)
	e.restore()
	e.run()
	next(3)
	for i := range 5 {
		must(k.SetMax(t.Context(), "g", 40+i))
		next(40 + i)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if len(seen) > 0 {
		t.Errorf("max is %d is said again", <-seen)
	}
}
