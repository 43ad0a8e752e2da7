package etcd_test

import (
	"crypto"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
)

// TestThousandEnrolled measures what signatures cost in a group of a thousand hosts, on a real etcd: a turn is a request, the word that the host goes down, and the word that it is well
// again. The same hosts take the same turns in a group that is not signed, in the same run.
func TestThousandEnrolled(t *testing.T) {
	if os.Getenv("FLIPSIDE_LONG") == "" {
		t.Skip("takes a while: FLIPSIDE_LONG=1 runs it")
	}
	const hosts, turns = 1000, 50
	endpoint, stop, err := etcdtest.StartEmbedded(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	owner := newKey(t)
	op := open(t, etcd.Config{Endpoints: []string{endpoint}, Keeper: lock.Options{Owner: owner}})
	keeper := func(opt lock.Options) *lock.Keeper {
		return open(t, etcd.Config{Endpoints: []string{endpoint}, RequestTimeout: time.Minute, Keeper: opt})
	}
	name := func(i int) string { return fmt.Sprintf("host-%04d", i) }
	plain := make([]*lock.Keeper, turns)
	signed := make([]*lock.Keeper, turns)
	if err := keeper(lock.Options{}).SetMax(t.Context(), "plain", 10); err != nil {
		t.Fatal(err)
	}
	if err := op.Sign(t.Context(), "signed"); err != nil {
		t.Fatal(err)
	}
	if err := op.SetMax(t.Context(), "signed", 10); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	for i := range hosts {
		k := keeper(lock.Options{Owners: []crypto.PublicKey{owner.Public()}, Signer: newKey(t)})
		if err := k.Enrol(t.Context(), "signed", name(i)); err != nil {
			t.Fatal(err)
		}
		if _, err := op.Accept(t.Context(), "signed", name(i), ""); err != nil {
			t.Fatal(err)
		}
		if i < turns {
			plain[i], signed[i] = keeper(lock.Options{}), k
		} else if err := k.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d hosts enrolled and accepted in %s", hosts, time.Since(begin).Round(time.Millisecond))
	turn := func(group string, keepers []*lock.Keeper) time.Duration {
		t.Helper()
		begin := time.Now()
		for i, k := range keepers {
			st, err := k.Request(t.Context(), lock.Claim{Group: group, Host: name(i), From: "1.0.0", To: "2.0.0"})
			if err != nil || !st.Granted {
				t.Fatal(st, err)
			}
			if err := k.Mark(t.Context(), group, name(i), lock.Mark{Phase: lock.Rebooting}); err != nil {
				t.Fatal(err)
			}
			if err := k.Release(t.Context(), group, name(i), lock.Verdict{Outcome: lock.Healthy}); err != nil {
				t.Fatal(err)
			}
		}
		return time.Since(begin) / time.Duration(len(keepers))
	}
	for _, when := range []string{"the first turn of each host", "later turns"} {
		a, b := turn("plain", plain), turn("signed", signed)
		t.Logf("%s: %s without signatures, %s with, %.1f times as long", when, a.Round(10*time.Microsecond), b.Round(10*time.Microsecond), float64(b)/float64(a))
	}
}

// The records of a large group are read by what has changed. Whatever somebody does to them, they are those that a client reads who has read nothing before.
func TestRecordsOfALargeGroup(t *testing.T) {
	t.Parallel()
	endpoint, _ := start(t)
	thief, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	defer thief.Close()
	openStore := func() *etcd.Store {
		t.Helper()
		s, err := etcd.OpenStore(etcd.Config{Endpoints: []string{endpoint}})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	store := openStore()
	defer store.Close()
	const prefix = etcd.DefaultPrefix + "g/record/"
	const hosts = 150
	names := []string{"/owner"}
	for i := range hosts {
		names = append(names, fmt.Sprintf("host-%03d", i))
	}
	put := func(name, value string) {
		t.Helper()
		if _, err := thief.Put(t.Context(), prefix+name, value); err != nil {
			t.Fatal(err)
		}
	}
	remove := func(name string) {
		t.Helper()
		if _, err := thief.Delete(t.Context(), prefix+name); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range names {
		put(name, name)
	}
	random := mrand.New(mrand.NewPCG(1, 2))
	same := func(after string) {
		t.Helper()
		got, err := store.Records(t.Context(), "g", names...)
		if err != nil {
			t.Fatal(err)
		}
		var want []lock.Record
		for some := range slices.Chunk(names, 50) { // so few are read as they are
			list, err := store.Records(t.Context(), "g", some...)
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, list...)
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("after %s: %d records, want %d", after, len(got), len(want))
		}
	}
	same("nothing")
	for i := range 60 {
		name := names[random.IntN(len(names))]
		switch what := random.IntN(5); what {
		case 0:
			put(name, fmt.Sprint(i))
			same("a write")
		case 1:
			remove(name)
			same("a deletion")
		case 2:
			remove(name)
			put(name, name) // what it was at the beginning
			same("a record that is made again")
		case 3:
			put(fmt.Sprintf("stranger-%d", i), "x")
			same("a stranger's")
		case 4:
			for _, name := range names[:random.IntN(len(names))] {
				put(name, fmt.Sprint(i, name))
			}
			same("many writes")
		}
	}
	put(names[7], strings.Repeat("x", 100<<10))
	same("more than any host says")
	put("/owner", strings.Repeat("x", 200<<10))
	same("much of an owner's")
	list, err := store.Records(t.Context(), "g", names...)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range list {
		if r.Name == names[7] && len(r.Data) > 0 || r.Name == "/owner" && len(r.Data) != 200<<10 {
			t.Errorf("%q has %d bytes", r.Name, len(r.Data))
		}
	}
	for i := range 3 * hosts { // so many others that they are not listed any more
		put(fmt.Sprintf("rubbish-%04d", i), "x")
	}
	same("much rubbish")
	put(names[9], "again")
	same("a write among rubbish")
}
