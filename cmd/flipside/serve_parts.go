package main

import (
	"cmp"
	"context"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/pflag"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/omaha/server"
	"github.com/flipside-linux/flipside/updater/trust"
)

// semaphoreView is how the release server's page looks at the cluster's semaphore. It only reads.
type semaphoreView struct {
	cfg          etcd.Config
	passwordFile string
	owners       []string
}

func (v *semaphoreView) flags(f *pflag.FlagSet) {
	f.StringSliceVar(&v.cfg.Endpoints, "semaphore", nil, "etcd `URLs` of the semaphore whose holders and queue the page shows; may be repeated")
	f.StringVar(&v.cfg.CA, "semaphore-ca", "", "PEM `file` of the authorities that sign etcd's certificate")
	f.StringVar(&v.cfg.Cert, "semaphore-cert", "", "PEM `file` of the certificate for etcd")
	f.StringVar(&v.cfg.Key, "semaphore-key", "", "PEM `file` of its key")
	f.StringVar(&v.cfg.User, "semaphore-user", "", "etcd `user`; one that may read is enough")
	f.StringVar(&v.passwordFile, "semaphore-password-file", "", "`file` whose first line is the password")
	f.StringSliceVar(&v.owners, "semaphore-owner", nil, "PEM `file` of the public key of who signs the groups' policies; may be repeated. What is not signed is then shown as such")
	f.StringVar(&v.cfg.Prefix, "semaphore-prefix", etcd.DefaultPrefix, "`prefix` of the keys in etcd")
}

// open connects, which does not need etcd to answer yet, and says in opt how to ask.
func (v *semaphoreView) open(opt *server.Options) (closer func() error, err error) {
	if len(v.cfg.Endpoints) == 0 {
		return func() error { return nil }, nil
	}
	if v.passwordFile != "" {
		if v.cfg.Password, err = firstLine(v.passwordFile); err != nil {
			return nil, err
		}
	}
	if v.cfg.Keeper.Owners, err = trust.PublicKeys(v.owners); err != nil {
		return nil, err
	}
	v.cfg.RequestTimeout = 2 * time.Second
	k, err := etcd.New(v.cfg)
	if err != nil {
		return nil, err
	}
	opt.Reboots = func(ctx context.Context) ([]server.RebootGroup, error) { return rebootGroups(ctx, k) }
	return k.Close, nil
}

// rebootGroups translates the semaphore's state into what the page shows.
func rebootGroups(ctx context.Context, k *lock.Keeper) ([]server.RebootGroup, error) {
	names, err := k.Groups(ctx)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	groups := []server.RebootGroup{}
	for _, name := range names {
		st, err := k.State(ctx, name)
		if err != nil {
			return nil, err
		}
		g := server.RebootGroup{Name: name, Max: st.Policy.Max, Holders: []server.RebootHost{}, Queue: []server.RebootHost{}}
		for _, version := range sortedKeys(st.Halts) {
			g.Halted = append(g.Halted, omaha.Printable("release "+version+" is halted: "+st.Halts[version].Reason))
		}
		for _, t := range st.Tampered {
			g.Tampered = append(g.Tampered, omaha.Printable(t))
		}
		for _, h := range st.Holders {
			g.Holders = append(g.Holders, server.RebootHost{
				Host: omaha.Printable(h.Host), Phase: string(h.Phase), From: omaha.Printable(h.From), To: omaha.Printable(h.To), Late: !h.Late.IsZero(), Since: h.Since(),
			})
		}
		for _, w := range st.Queue {
			g.Queue = append(g.Queue, server.RebootHost{Host: omaha.Printable(w.Host), From: omaha.Printable(w.From), To: omaha.Printable(w.To), Since: w.Since})
		}
		groups = append(groups, g)
	}
	return groups, nil
}

// follow is how the server keeps its channels as another one holds them.
type follow struct {
	up       server.Upstream
	http     omaha.HTTPOptions
	channels []string
	every    time.Duration
	any      bool // nobody's signature is asked for
}

func (u *follow) flags(f *pflag.FlagSet) {
	f.StringVar(&u.up.URL, "upstream", "", "update `URL` of another server whose channels are mirrored here")
	f.StringVar(&u.up.AppID, "upstream-app-id", "", "the application's id on that server")
	f.StringVar(&u.up.Board, "upstream-board", "amd64-usr", "the board to ask for")
	f.StringVar(&u.up.Since, "upstream-since", "0.0.0", "the oldest version that hosts here still run")
	f.StringArrayVar(&u.channels, "upstream-channel", []string{"stable"}, "a channel to mirror; may be given again")
	f.DurationVar(&u.every, "upstream-interval", time.Hour, "how often to look")
	f.StringVar(&u.http.Proxy, "upstream-proxy", "", "proxy to use (default: the environment's; \"direct\": none)")
	f.StringArrayVar(&u.http.CAFiles, "upstream-ca", nil, "trust this authority as well, PEM; may be given again")
	f.BoolVar(&u.any, "unverified", false, "take payloads from upstream whatever their signature: the hosts check it in any case")
}

func (u *follow) check(opt *server.Options) error {
	switch {
	case u.up.URL == "":
		return nil
	case u.up.AppID == "":
		return usagef("--upstream needs --upstream-app-id")
	case u.every < time.Minute:
		return usagef("--upstream-interval is shorter than a minute")
	case opt.Verify == nil && !u.any:
		return withHint(usagef("--upstream without a key to check payloads with"), "name it with --key, or say --unverified")
	}
	h, err := omaha.NewHTTP(u.http)
	u.up.HTTP = h
	return err
}

// run mirrors until ctx ends. The channel is closed when it has come to rest.
func (u *follow) run(ctx context.Context, s *server.Server) <-chan struct{} {
	done := make(chan struct{})
	if u.up.URL == "" {
		close(done)
		return done
	}
	go func() {
		defer close(done)
		defer u.up.HTTP.CloseIdle()
		s.Follow(ctx, u.up, u.channels, u.every)
	}()
	return done
}

// keysOf names the keys of a release directory: the given ones, or those in DIR/keys if that exists.
func keysOf(dir string, given []string) []string {
	if len(given) > 0 {
		return given
	}
	own := filepath.Join(cmp.Or(dir, "."), "keys")
	if _, err := os.Stat(own); err != nil {
		return nil
	}
	return []string{own}
}
