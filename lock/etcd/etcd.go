// Package etcd keeps the reboot semaphore in etcd v3.
//
// # Keys
//
// Below the prefix ("/flipside/lock/" unless another is set), for each group G:
//
//	G/state          the policy, the holders, the failures and the halts, as JSON; changed by compare-and-swap
//	G/queue/HOST     a claim that waits; its create revision is its place; it has a lease, so that a host that is gone for good
//	                 leaves the queue. A slot that was granted has none: only a verdict frees it
//	G/history/NNN    the audit trail, a ring
//	G/record/HOST    what a host has signed about itself, in groups that ask for it; G/record//owner what an owner has signed. etcd's own
//	                 create revision and version of the key show that it is the last one
//	G/signal         written when everybody who waits should look again: a halt, a resume, a new policy
//
// # Contention
//
// Joining the queue is one put and competes with nobody. A slot changes hands in the one transaction by which it is given
// back; only those who give back at the same moment compete. A host that waits watches its own key and the signal, so that a change of
// hands wakes one host, not all.
package etcd

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"github.com/flipside-linux/flipside/lock"
)

// Config says where etcd is and how to speak with it.
type Config struct {
	Endpoints []string
	// CA is a PEM file of the authorities that are trusted, the system's if empty. Cert and Key are this client's own; both or neither.
	CA, Cert, Key string
	// Certificate, if set, brings the client certificate instead, such as one whose key cannot leave a TPM. It is called for every handshake.
	Certificate    func() (*tls.Certificate, error)
	User, Password string
	Prefix         string        // "" is /flipside/lock/
	DialTimeout    time.Duration // 0: 5 s
	RequestTimeout time.Duration // of one call, with all its attempts; 0: 10 s
	WaiterTTL      time.Duration // how long a place in the queue outlives its host; 0: 5 minutes
	Keeper         lock.Options  // of the semaphore that New returns

	recheck time.Duration // 0: recheck
}

// DefaultPrefix is where the keys are.
const DefaultPrefix = "/flipside/lock/"

// New returns the semaphore in etcd. It does not wait for etcd to answer: the calls that need it do, for a bounded time.
func New(cfg Config) (*lock.Keeper, error) {
	s, err := OpenStore(cfg)
	if err != nil {
		return nil, err
	}
	return lock.On(s, cfg.Keeper), nil
}

// Store is a [lock.Store] in etcd.
type Store struct {
	c   *clientv3.Client
	cfg Config

	mu    sync.Mutex
	lease clientv3.LeaseID // of this client's places in the queue
	gone  <-chan *clientv3.LeaseKeepAliveResponse
	stop  context.CancelFunc // of keeping the lease alive

	conns atomic.Int64     // connections to etcd so far
	read  map[string]known // by group: the records of large groups as they were read last
}

var _ lock.Store = (*Store)(nil)

// OpenStore returns the store alone.
func OpenStore(cfg Config) (*Store, error) {
	if len(cfg.Endpoints) == 0 {
		return nil, fmt.Errorf("opening etcd: %w configuration: no endpoints", lock.ErrInvalid)
	}
	if (cfg.User == "") != (cfg.Password == "") {
		return nil, fmt.Errorf("opening etcd: %w configuration: user and password belong together", lock.ErrInvalid)
	}
	cfg.Prefix = cmp.Or(cfg.Prefix, DefaultPrefix)
	if !strings.HasSuffix(cfg.Prefix, "/") {
		cfg.Prefix += "/"
	}
	cfg.DialTimeout = cmp.Or(cfg.DialTimeout, 5*time.Second)
	cfg.RequestTimeout = cmp.Or(cfg.RequestTimeout, 10*time.Second)
	cfg.WaiterTTL = cmp.Or(cfg.WaiterTTL, 5*time.Minute)
	conf, err := cfg.tls()
	if err != nil {
		return nil, fmt.Errorf("opening etcd: %w", err)
	}
	s := &Store{cfg: cfg, read: map[string]known{}}
	s.c, err = clientv3.New(clientv3.Config{
		Endpoints: cfg.Endpoints, TLS: conf, Username: cfg.User, Password: cfg.Password,
		DialTimeout: cfg.DialTimeout, DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 3 * time.Second,
		RejectOldCluster: false, Logger: zap.NewNop(),
		// The environment's proxy is for what is fetched, from outside; the semaphore belongs to the cluster.
		DialOptions: []grpc.DialOption{grpc.WithStatsHandler(connCounter{&s.conns}), grpc.WithNoProxy()},
	})
	if err != nil {
		return nil, fmt.Errorf("opening etcd at %s: %w", strings.Join(cfg.Endpoints, ", "), kind(err))
	}
	return s, nil
}

// connCounter counts a client's connections, each before anything is asked over it.
type connCounter struct{ n *atomic.Int64 }

func (c connCounter) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (c connCounter) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (c connCounter) HandleRPC(context.Context, stats.RPCStats)                         {}
func (c connCounter) HandleConn(_ context.Context, s stats.ConnStats) {
	if _, ok := s.(*stats.ConnBegin); ok {
		c.n.Add(1)
	}
}

// tls returns nil if nothing asks for TLS.
func (cfg Config) tls() (*tls.Config, error) {
	if (cfg.Cert == "") != (cfg.Key == "") {
		return nil, fmt.Errorf("%w configuration: a client certificate and its key belong together", lock.ErrInvalid)
	}
	secure := cfg.CA != "" || cfg.Cert != "" || cfg.Certificate != nil
	for _, e := range cfg.Endpoints {
		secure = secure || strings.HasPrefix(e, "https://")
	}
	if !secure {
		return nil, nil
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CA != "" {
		pem, err := os.ReadFile(cfg.CA)
		if err != nil {
			return nil, fmt.Errorf("reading the certificate authority: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%w configuration: %s holds no certificate", lock.ErrInvalid, cfg.CA)
		}
	}
	switch {
	case cfg.Certificate != nil:
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cfg.Certificate() }
	case cfg.Cert != "":
		// Read at every handshake: certificates are renewed while the daemon runs.
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(cfg.Cert, cfg.Key)
			if err != nil {
				return nil, fmt.Errorf("reading the client certificate: %w", err)
			}
			return &pair, nil
		}
		if _, err := conf.GetClientCertificate(nil); err != nil {
			return nil, err
		}
	}
	return conf, nil
}

// kind wraps what etcd says in the errors of package lock.
func kind(err error) error {
	switch {
	case err == nil, errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, rpctypes.ErrPermissionDenied), errors.Is(err, rpctypes.ErrUserEmpty), errors.Is(err, rpctypes.ErrAuthFailed):
		return fmt.Errorf("%w: %w: %w", lock.ErrUnavailable, os.ErrPermission, err)
	}
	return fmt.Errorf("%w: %w", lock.ErrUnavailable, err)
}

// try does one call in bounded time. It is tried again, on another member, if this one does not answer; what it does must bear that.
func (s *Store) try(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.RequestTimeout)
	defer cancel()
	each := s.cfg.RequestTimeout
	if len(s.cfg.Endpoints) > 1 {
		each /= 3 // a member that hangs must not use up all the time
	}
	for try := 1; ; try++ {
		one, cancel := context.WithTimeout(ctx, each)
		err := f(one)
		cancel()
		if err == nil || ctx.Err() != nil || !again(err) {
			return kind(err)
		}
		select {
		case <-ctx.Done():
			return kind(err)
		case <-time.After(min(time.Duration(try)*20*time.Millisecond, 500*time.Millisecond)):
		}
	}
}

func again(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, rpctypes.ErrInvalidAuthToken) || errors.Is(err, rpctypes.ErrAuthOldRevision) {
		return true
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted:
		return true
	}
	var etcd rpctypes.EtcdError
	return errors.As(err, &etcd) && (etcd.Code() == codes.Unavailable || etcd.Code() == codes.DeadlineExceeded)
}

func (s *Store) state(group string) string   { return s.cfg.Prefix + group + "/state" }
func (s *Store) signal(group string) string  { return s.cfg.Prefix + group + "/signal" }
func (s *Store) queue(group string) string   { return s.cfg.Prefix + group + "/queue/" }
func (s *Store) history(group string) string { return s.cfg.Prefix + group + "/history/" }
func (s *Store) record(group string) string  { return s.cfg.Prefix + group + "/record/" }

// reads are the operations whose answers make a view.
func (s *Store) reads(group, host string, limit int) []clientv3.Op {
	ops := []clientv3.Op{clientv3.OpGet(s.state(group))}
	if host != "" {
		ops = append(ops, clientv3.OpGet(s.queue(group)+host))
	}
	if limit != 0 {
		opts := []clientv3.OpOption{clientv3.WithPrefix(), clientv3.WithSort(clientv3.SortByCreateRevision, clientv3.SortAscend)}
		if limit > 0 {
			opts = append(opts, clientv3.WithLimit(int64(limit)))
		}
		ops = append(ops, clientv3.OpGet(s.queue(group), opts...))
	}
	return ops
}

func view(resp *clientv3.TxnResponse, host string, limit int) lock.View {
	v := lock.View{Rev: resp.Header.Revision}
	rest := resp.Responses
	if kvs := rest[0].GetResponseRange().Kvs; len(kvs) > 0 {
		v.State, v.StateRev = kvs[0].Value, kvs[0].ModRevision
	}
	rest = rest[1:]
	if host != "" {
		if kvs := rest[0].GetResponseRange().Kvs; len(kvs) > 0 {
			v.Own = &lock.Item{Host: host, Data: kvs[0].Value, Arrival: kvs[0].CreateRevision}
		}
		rest = rest[1:]
	}
	if limit != 0 {
		r := rest[0].GetResponseRange()
		v.More = r.More
		for _, kv := range r.Kvs {
			v.Queue = append(v.Queue, lock.Item{Host: path.Base(string(kv.Key)), Data: kv.Value, Arrival: kv.CreateRevision})
		}
	}
	return v
}

// Read implements [lock.Store].
func (s *Store) Read(ctx context.Context, group, host string, limit int) (lock.View, error) {
	ops := s.reads(group, host, limit)
	var v lock.View
	err := s.try(ctx, func(ctx context.Context) error {
		resp, err := s.c.Txn(ctx).Then(ops...).Commit()
		if err == nil {
			v = view(resp, host, limit)
		}
		return err
	})
	return v, err
}

// Enqueue implements [lock.Store].
func (s *Store) Enqueue(ctx context.Context, group, host string, data []byte) (lock.View, error) {
	key := s.queue(group) + host
	var v lock.View
	err := s.try(ctx, func(ctx context.Context) error {
		lease, err := s.leased(ctx)
		if err != nil {
			return err
		}
		resp, err := s.c.Txn(ctx).Then(clientv3.OpPut(key, string(data), clientv3.WithLease(lease)), clientv3.OpGet(key), clientv3.OpGet(s.state(group)), clientv3.OpGet(s.queue(group), clientv3.WithPrefix(), clientv3.WithCountOnly())).Commit()
		if errors.Is(err, rpctypes.ErrLeaseNotFound) {
			s.forget(lease)
			return rpctypes.ErrGRPCTimeout // tried again, with a new lease
		}
		if err != nil {
			return err
		}
		v = lock.View{Rev: resp.Header.Revision}
		if kvs := resp.Responses[1].GetResponseRange().Kvs; len(kvs) > 0 {
			v.Own = &lock.Item{Host: host, Data: kvs[0].Value, Arrival: kvs[0].CreateRevision}
		}
		if kvs := resp.Responses[2].GetResponseRange().Kvs; len(kvs) > 0 {
			v.State, v.StateRev = kvs[0].Value, kvs[0].ModRevision
		}
		v.Length = int(resp.Responses[3].GetResponseRange().Count)
		return nil
	})
	return v, err
}

// Ahead implements [lock.Store].
func (s *Store) Ahead(ctx context.Context, group string, arrival int64) (int, error) {
	n := 0
	err := s.try(ctx, func(ctx context.Context) error {
		resp, err := s.c.Get(ctx, s.queue(group), clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithMaxCreateRev(arrival-1))
		if err == nil {
			n = len(resp.Kvs)
		}
		return err
	})
	return n, err
}

// maxRemove keeps a transaction below etcd's limit of 128 operations. What is not removed now is removed with the next change.
const maxRemove = 48

// Commit implements [lock.Store].
func (s *Store) Commit(ctx context.Context, group, host string, limit int, v lock.View, c lock.Change) (int64, lock.View, error) {
	cmps := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(s.state(group)), "=", v.StateRev)}
	if c.Exclusive {
		cmps = append(cmps, clientv3.Compare(clientv3.CreateRevision(s.queue(group)), "<", v.Rev+1).WithPrefix())
	}
	ops := []clientv3.Op{clientv3.OpPut(s.state(group), string(c.State))}
	for _, r := range c.Records {
		key := s.record(group) + r.Name
		cmps = append(cmps, clientv3.Compare(clientv3.CreateRevision(key), "=", r.Born), clientv3.Compare(clientv3.Version(key), "=", r.Version))
		ops = append(ops, clientv3.OpPut(key, string(r.Data)))
	}
	for i, host := range c.Remove {
		if i == maxRemove {
			break
		}
		ops = append(ops, clientv3.OpDelete(s.queue(group)+host))
	}
	if c.Signal {
		ops = append(ops, clientv3.OpPut(s.signal(group), ""))
	}
	for n, line := range c.Audit {
		if len(ops) == 120 {
			break
		}
		ops = append(ops, clientv3.OpPut(fmt.Sprintf("%s%03d", s.history(group), n), string(line)))
	}
	var rev int64
	var now lock.View
	err := s.try(ctx, func(ctx context.Context) error {
		// A commit whose answer was lost looks like a conflict when it is tried again. The caller then finds its change in the state.
		resp, err := s.c.Txn(ctx).If(cmps...).Then(ops...).Else(s.reads(group, host, limit)...).Commit()
		switch {
		case err != nil:
			return err
		case resp.Succeeded:
			rev = resp.Header.Revision
		default:
			rev, now = 0, view(resp, host, limit)
		}
		return nil
	})
	if err == nil && rev == 0 {
		err = lock.ErrConflict
	}
	return rev, now, err
}

// atOnce is how many records one transaction reads: below etcd's limit of 128 operations, and a bounded answer, whatever somebody has put there.
const atOnce = 64

// maxRecords bounds how many records of a group are listed.
const maxRecords = 20000

// place names the store in what is signed: etcd's own name of the cluster, and the prefix.
func (s *Store) place(cluster uint64) string { return fmt.Sprintf("etcd:%x%s", cluster, s.cfg.Prefix) }

// Records implements [lock.Store].
func (s *Store) Records(ctx context.Context, group string, names ...string) ([]lock.Record, error) {
	switch {
	case len(names) == 0:
		return s.allRecords(ctx, group)
	case len(names) > atOnce:
		if list, ok, err := s.changedRecords(ctx, group, names); ok || err != nil {
			return list, err
		}
	}
	return s.namedRecords(ctx, group, names)
}

// seen is a record and the revision at which it was written.
type seen struct {
	lock.Record
	written int64
}

// known are the records of a group that were read, and when that was by etcd's clocks and this client's own.
type known struct {
	records  map[string]seen
	conns    int64
	revision int64
	term     uint64
}

// holds reports whether the same etcd with the same history may answer now. An etcd that was restored counts its revisions on from the backup, so that another record can have the
// numbers of one that was read before; but it was stopped for that, and speaks over new connections. Behind a proxy only its revision or its term, gone back, tell of it.
func (k known) holds(now known) bool {
	return k.conns == now.conns && k.revision <= now.revision && k.term <= now.term
}

// changedRecords reads the records of a large group: first who has written when, and then what is not known yet. It does nothing when somebody has put so many others beside them that the
// list alone would be long.
func (s *Store) changedRecords(ctx context.Context, group string, names []string) (list []lock.Record, ok bool, err error) {
	s.mu.Lock()
	old := s.read[group]
	s.mu.Unlock()
	conns := s.conns.Load() // as old, before etcd is asked: what happens meanwhile belongs to the next look
	now := known{records: make(map[string]seen, len(names))}
	more := false
	err = s.try(ctx, func(ctx context.Context) error {
		resp, err := s.c.Get(ctx, s.record(group), clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(int64(2*len(names)+atOnce)))
		if err != nil {
			return err
		}
		more = resp.More
		clear(now.records)
		now.conns, now.revision, now.term = s.conns.Load(), resp.Header.Revision, resp.Header.RaftTerm
		for _, kv := range resp.Kvs {
			name := strings.TrimPrefix(string(kv.Key), s.record(group))
			now.records[name] = seen{lock.Record{Name: name, Born: kv.CreateRevision, Version: kv.Version, Place: s.place(resp.Header.ClusterId)}, kv.ModRevision}
		}
		return nil
	})
	if err != nil || more {
		return nil, false, err
	}
	if !old.holds(now) {
		old.records = nil
	}
	found := known{records: make(map[string]seen, len(names)), conns: conns, revision: now.revision, term: now.term}
	var unknown []string
	for _, name := range names {
		is, there := now.records[name]
		was := old.records[name]
		if is.Data = was.Data; !there {
			continue
		}
		if was.written == is.written && was.Born == is.Born && was.Version == is.Version && was.Place == is.Place {
			found.records[name] = is
		} else {
			unknown = append(unknown, name)
		}
	}
	fresh, err := s.namedRecords(ctx, group, unknown)
	if err != nil {
		return nil, false, err
	}
	for _, r := range fresh {
		found.records[r.Name] = seen{r, now.records[r.Name].written} // if it was written again meanwhile, the next look tells by its version
	}
	list = make([]lock.Record, 0, len(found.records))
	for _, name := range names {
		if r, ok := found.records[name]; ok {
			list = append(list, r.Record)
		}
	}
	s.mu.Lock()
	s.read[group] = found
	s.mu.Unlock()
	return list, true, nil
}

// namedRecords reads records by their names.
func (s *Store) namedRecords(ctx context.Context, group string, names []string) ([]lock.Record, error) {
	var list []lock.Record
	for some := range slices.Chunk(names, atOnce) {
		var ops []clientv3.Op
		for _, name := range some {
			ops = append(ops, clientv3.OpGet(s.record(group)+name))
		}
		err := s.try(ctx, func(ctx context.Context) error {
			resp, err := s.c.Txn(ctx).Then(ops...).Commit()
			if err != nil {
				return err
			}
			for i, name := range some {
				for _, kv := range resp.Responses[i].GetResponseRange().Kvs {
					list = append(list, lock.Record{Name: name, Data: kv.Value, Born: kv.CreateRevision, Version: kv.Version, Place: s.place(resp.Header.ClusterId)}.Bounded())
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return list, nil
}

func (s *Store) allRecords(ctx context.Context, group string) ([]lock.Record, error) {
	var list []lock.Record
	from := s.record(group)
	for more := true; more; {
		err := s.try(ctx, func(ctx context.Context) error {
			resp, err := s.c.Get(ctx, from, clientv3.WithRange(clientv3.GetPrefixRangeEnd(s.record(group))), clientv3.WithLimit(atOnce))
			if err != nil {
				return err
			}
			more = resp.More
			for _, kv := range resp.Kvs {
				from = string(kv.Key) + "\x00"
				list = append(list, lock.Record{Name: strings.TrimPrefix(string(kv.Key), s.record(group)), Data: kv.Value, Born: kv.CreateRevision, Version: kv.Version, Place: s.place(resp.Header.ClusterId)})
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		if len(list) > maxRecords {
			return nil, fmt.Errorf("%w: there are more than %d keys below %s; delete what is no host's", lock.ErrInvalid, maxRecords, s.record(group))
		}
	}
	return list, nil
}

// History implements [lock.Store].
func (s *Store) History(ctx context.Context, group string) ([][]byte, error) {
	var lines [][]byte
	err := s.try(ctx, func(ctx context.Context) error {
		resp, err := s.c.Get(ctx, s.history(group), clientv3.WithPrefix())
		if err != nil {
			return err
		}
		lines = nil
		for _, kv := range resp.Kvs {
			lines = append(lines, kv.Value)
		}
		return nil
	})
	return lines, err
}

// Groups implements [lock.Store].
func (s *Store) Groups(ctx context.Context) ([]string, error) {
	var names []string
	err := s.try(ctx, func(ctx context.Context) error {
		resp, err := s.c.Get(ctx, s.cfg.Prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
		if err != nil {
			return err
		}
		names = nil
		for _, kv := range resp.Kvs {
			name, what, _ := strings.Cut(strings.TrimPrefix(string(kv.Key), s.cfg.Prefix), "/")
			if what == "state" {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		return nil
	})
	return names, err
}
