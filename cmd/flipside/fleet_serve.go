package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/fleetlock"
)

func (a *app) fleetServe(s *semaphoreFlags) *cobra.Command {
	var listen, cert, key string
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "answer FleetLock clients, as Zincati, from the semaphore in etcd",
		Args:  cobra.NoArgs,
		Long: `Serve speaks the FleetLock protocol over HTTP. Hosts that speak it and hosts that run flipsided share the same groups, so that
a mixed fleet never has more hosts down than the policy allows.

Clients name themselves and are believed: keep the address where only they reach it.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if (cert == "") != (key == "") {
				return usagef("--tls-cert and --tls-key belong together")
			}
			return s.with(func(k *lock.Keeper) error {
				l, err := net.Listen("tcp", listen)
				if err != nil {
					return fmt.Errorf("listening for FleetLock clients: %w", err)
				}
				srv := &http.Server{
					Handler: &fleetlock.Server{Semaphore: k}, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
					WriteTimeout: s.timeout + 10*time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
				}
				stop := context.AfterFunc(cmd.Context(), func() {
					ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
					defer cancel()
					srv.Shutdown(ctx)
				})
				defer stop()
				fmt.Fprintf(a.stderr, "FleetLock clients are answered at %s\n", l.Addr())
				if cert != "" {
					err = srv.ServeTLS(l, cert, key)
				} else {
					err = srv.Serve(l)
				}
				if errors.Is(err, http.ErrServerClosed) {
					return nil
				}
				return err
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&listen, "listen", "127.0.0.1:3333", "`address` to listen on")
	f.StringVar(&cert, "tls-cert", "", "PEM `file` of the server's certificate")
	f.StringVar(&key, "tls-key", "", "PEM `file` of the server's key")
	return cmd
}
