package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/fleetlock"
	"github.com/flipside-linux/flipside/lock/single"
	"github.com/flipside-linux/flipside/reboot"
)

func (a *app) fleetServe(s *semaphoreFlags) *cobra.Command {
	var listen string
	var certs tlsFiles
	var own bool
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "answer FleetLock clients, as Zincati, from the semaphore in etcd or in a file",
		Args:  cobra.NoArgs,
		Long: `Serve speaks the FleetLock protocol over HTTP. Hosts that speak it and hosts that run flipsided share the same groups, so that
a mixed fleet never has more hosts down than the policy allows.

With --store DIR the semaphore is kept in a file on this machine, and no etcd is needed; there must be only one such server. While it
runs, "flipside fleet --store DIR ..." on the same machine looks at the semaphore and changes it.

Clients name themselves and are believed: keep the address where only they reach it, or give every host a certificate
(--tls-client-ca) and let it speak for nobody else (--own-name-only).`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			secure, err := certs.config()
			if err != nil {
				return err
			}
			srv := &fleetlock.Server{}
			if own {
				if certs.clientCA == "" {
					return usagef("--own-name-only needs --tls-client-ca: a client without a certificate has no name")
				}
				srv.Permit = ownName
			}
			ctx, cancel := context.WithCancel(cmd.Context())
			defer cancel()
			if s.store != "" {
				return a.serveSingle(ctx, s.store, listen, secure, srv, nil)
			}
			s.asHosts = true
			return s.with(ctx, func(k *lock.Keeper) error {
				srv.Semaphore = k
				return a.serveFleetLock(ctx, listen, secure, srv)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&listen, "listen", "127.0.0.1:3333", "`address` to listen on")
	f.StringVar(&certs.cert, "tls-cert", "", "PEM `file` of the server's certificate")
	f.StringVar(&certs.key, "tls-key", "", "PEM `file` of the server's key")
	f.StringVar(&certs.clientCA, "tls-client-ca", "", "answer only clients with a certificate of these authorities, a PEM `file`")
	f.BoolVar(&own, "own-name-only", false, "a client may only ask for the host whose name is in its certificate")
	return cmd
}

// serveSingle keeps a semaphore in a directory, answers FleetLock clients from it, and lends it to the fleet commands.
func (a *app) serveSingle(ctx context.Context, dir, listen string, secure *tls.Config, srv *fleetlock.Server, opened func(*lock.Keeper)) error {
	store, err := single.Open(dir)
	if errors.Is(err, single.ErrBusy) {
		return withExit(exitBusy, err)
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	lent := make(chan error, 1)
	go func() {
		defer cancel()
		lent <- store.Serve(ctx, dir)
	}()
	k := lock.On(store, lock.Options{Synchronised: new(reboot.Clock).Synchronised})
	srv.Semaphore = k
	if opened != nil {
		opened(k)
	}
	err = a.serveFleetLock(ctx, listen, secure, srv)
	cancel()
	return errors.Join(err, <-lent, k.Close())
}

func (a *app) serveFleetLock(ctx context.Context, listen string, secure *tls.Config, handler http.Handler) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if err != nil {
		return withHint(fmt.Errorf("listening for FleetLock clients: %w", err), "choose another address with --listen")
	}
	scheme := "http"
	if secure != nil {
		l, scheme = tls.NewListener(l, secure), "https"
	}
	srv := &http.Server{
		Handler: handler, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: time.Minute, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		end, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = srv.Shutdown(end) // who still asks is cut off when the process ends
	})
	fmt.Fprintf(a.stderr, "FleetLock clients are answered at %s://%s\n", scheme, l.Addr())
	err = srv.Serve(l)
	if stop() || !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	<-done
	return nil
}

// ownName permits a client to ask for the host that its certificate names, as common name or DNS name.
func ownName(r *http.Request, host string) error {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return errors.New("no certificate was shown")
	}
	leaf := r.TLS.VerifiedChains[0][0]
	if leaf.Subject.CommonName == host || slices.Contains(leaf.DNSNames, host) {
		return nil
	}
	return fmt.Errorf("the certificate is that of %q, not of %q", leaf.Subject.CommonName, host)
}
