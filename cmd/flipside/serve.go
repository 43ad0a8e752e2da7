package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/fleetlock"
	"github.com/flipside-linux/flipside/omaha/server"
	"github.com/flipside-linux/flipside/updater/trust"
)

// serveCommand runs the release server.
func (a *app) serveCommand() *cobra.Command {
	var opt server.Options
	var listen, tokenFile, fleetListen, makersDir string
	var certs tlsFiles
	var keys []string
	var sem semaphoreView
	var up follow
	var verbose bool
	cmd := &cobra.Command{
		Use:   "serve DIR",
		Short: "run a release server on a directory",
		Long: `Serve the releases in DIR to hosts that ask with Omaha 3.0: this project's and Flatcar's.

DIR is made when it does not exist. Releases are put into it with "flipside release publish --dir DIR";
a running server notices them by itself. What a channel holds and how it is rolled out is in
DIR/channels/<name>.toml, which may be edited by hand.

The server listens on this machine only, unless --listen says otherwise. Behind a proxy or a name, say with
--public-url where hosts find it: payload addresses are never made from what a request claims.

Everybody who reaches the server may read; nobody may change anything over HTTP until --admin-token-file or --admin-cert
names somebody. Payloads are taken over HTTP only when --key says whose signature counts.

With --upstream the server keeps its channels as another server holds them: Flatcar's, a Nebraska, or one of these.`,
		Example: `  flipside serve /srv/releases
  flipside serve /srv/releases --listen 0.0.0.0:443 --tls-cert web.pem --tls-key web.key --public-url https://updates.example.org \
    --key release.pub --admin-token-file tokens --semaphore https://etcd-1:2379
  flipside serve /srv/mirror --key flatcar.pem --upstream https://public.update.flatcar-linux.net/v1/update/ \
    --upstream-app-id '{e96281a6-d1af-4bde-9a0a-97b76e56dc57}' --upstream-channel stable`,
		Args: exactArgs(1, "DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			level := slog.LevelInfo
			if verbose {
				level = slog.LevelDebug
			}
			opt.Logger = slog.New(slog.NewTextHandler(a.stderr, &slog.HandlerOptions{Level: level}))
			var err error
			var makers *trust.Makers
			if makersDir != "" {
				if makers, err = trust.LoadMakers(makersDir); err != nil {
					return err
				}
				opt.Endorser = makers.Challenge
			}
			opt.Prover = prover(makers)
			if tokenFile != "" {
				if opt.Admins.Tokens, err = readTokens(tokenFile); err != nil {
					return err
				}
			}
			if len(opt.Admins.Certs) > 0 && certs.clientCA == "" {
				return usagef("--admin-cert needs --tls-client-ca")
			}
			if fleetListen != "" && len(sem.cfg.Endpoints) > 0 {
				return usagef("--fleetlock keeps a semaphore of its own: leave --semaphore away")
			}
			if opt.Verify, err = verifier(keysOf(args[0], keys)); err != nil {
				return err
			}
			closer, err := sem.open(&opt)
			if err != nil {
				return err
			}
			defer closer()
			if err := up.check(&opt); err != nil {
				return err
			}
			if fleetListen == "" {
				return a.serve(cmd.Context(), args[0], listen, certs, opt, up)
			}
			secure, err := certs.config()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithCancel(cmd.Context())
			defer cancel()
			fleet := make(chan error, 1)
			var keeper atomic.Pointer[lock.Keeper]
			opt.Reboots = func(ctx context.Context) ([]server.RebootGroup, error) {
				if k := keeper.Load(); k != nil {
					return rebootGroups(ctx, k)
				}
				return nil, errors.New("it is being opened")
			}
			go func() {
				defer cancel()
				fleet <- a.serveSingle(ctx, filepath.Join(args[0], "fleet"), fleetListen, secure, &fleetlock.Server{}, keeper.Store)
			}()
			err = a.serve(ctx, args[0], listen, certs, opt, up)
			cancel()
			return errors.Join(err, <-fleet)
		},
	}
	f := cmd.Flags()
	f.StringVar(&listen, "listen", "127.0.0.1:8787", "address to listen on")
	f.StringVar(&fleetListen, "fleetlock", "", "also keep a reboot semaphore in DIR/fleet and answer FleetLock clients at this address (see flipside fleet serve)")
	f.StringVar(&opt.PublicURL, "public-url", "", "address under which hosts find this server (default: the one they connected to)")
	f.StringVar(&opt.AppID, "app-id", "", "serve only this application id (default: any)")
	f.StringArrayVar(&keys, "key", nil, "whose signature counts for payloads that come over HTTP or from upstream, PEM; may be given again (default DIR/keys)")
	f.StringVar(&tokenFile, "admin-token-file", "", "file with a NAME and a TOKEN on each line, who may change channels over HTTP (default: nobody)")
	f.StringArrayVar(&opt.Admins.Certs, "admin-cert", nil, "common name of a client certificate whose holder may change channels over HTTP; may be given again")
	f.StringVar(&certs.cert, "tls-cert", "", "serve HTTPS with this certificate, PEM")
	f.StringVar(&certs.key, "tls-key", "", "the certificate's key, PEM")
	f.StringVar(&certs.clientCA, "tls-client-ca", "", "answer only clients with a certificate of these authorities, PEM")
	f.BoolVar(&certs.optional, "tls-client-optional", false, "answer clients without a certificate as well; those with one have to have a good one")
	f.StringVar(&makersDir, "tpm-makers", "", "`directory` of the certificates of TPM makers, PEM or DER: a host's first key counts only if it is in a TPM of theirs (default: it is believed at sight)")
	sem.flags(f)
	up.flags(f)
	f.BoolVar(&verbose, "verbose", false, "log more")
	return cmd
}

// tlsFiles are what HTTPS is made of.
type tlsFiles struct {
	cert, key, clientCA string
	optional            bool
}

// config returns nil when HTTPS is not wanted.
func (t tlsFiles) config() (*tls.Config, error) {
	if t == (tlsFiles{}) {
		return nil, nil
	}
	if t.cert == "" || t.key == "" {
		return nil, usagef("HTTPS needs --tls-cert and --tls-key")
	}
	pair, err := tls.LoadX509KeyPair(t.cert, t.key)
	if err != nil {
		return nil, fmt.Errorf("read the certificate: %w", err)
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}}
	if t.clientCA != "" {
		pem, err := os.ReadFile(t.clientCA)
		if err != nil {
			return nil, fmt.Errorf("read the clients' authorities: %w", err)
		}
		cfg.ClientCAs, cfg.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
		if t.optional {
			cfg.ClientAuth = tls.VerifyClientCertIfGiven
		}
		if !cfg.ClientCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%q holds no certificate in PEM form", t.clientCA)
		}
	}
	return cfg, nil
}

// readTokens reads a file with a name and a token of at least 16 characters on each line. A line with nothing but a token
// is that of "admin".
func readTokens(path string) (map[string]string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the admin tokens: %w", err)
	}
	tokens := map[string]string{}
	for n, line := range strings.Split(string(data), "\n") {
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		name, token := "admin", fields[len(fields)-1]
		if len(fields) > 1 {
			name = fields[0]
		}
		switch {
		case len(fields) > 2:
			return nil, fmt.Errorf("line %d of %q is not a name and a token", n+1, path)
		case len(token) < 16:
			return nil, withHint(fmt.Errorf("the admin token on line %d of %q has only %d characters, at least 16 are needed", n+1, path, len(token)),
				"make one with: head -c 24 /dev/urandom | base64")
		case tokens[name] != "":
			return nil, fmt.Errorf("%q has two tokens for %q", path, name)
		}
		tokens[name] = token
	}
	if len(tokens) == 0 {
		return nil, fmt.Errorf("%q holds no admin token", path)
	}
	return tokens, nil
}

func (a *app) serve(ctx context.Context, dir, listen string, certs tlsFiles, opt server.Options, up follow) error {
	secure, err := certs.config()
	if err != nil {
		return err
	}
	s, err := server.New(dir, opt)
	if errors.Is(err, server.ErrBusy) {
		return withExit(exitBusy, err)
	}
	if err != nil {
		return err
	}
	defer s.Close()
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if err != nil {
		return withHint(fmt.Errorf("listen: %w", err), "choose another address with --listen")
	}
	scheme := "http"
	if secure != nil {
		l, scheme = tls.NewListener(l, secure), "https"
	}
	st := s.Status()
	address := opt.PublicURL
	if address == "" {
		address = scheme + "://" + l.Addr().String()
	}
	if a.json {
		err = a.printJSON(struct {
			Schema string `json:"schema"`
			Listen string `json:"listen"`
			Update string `json:"update"`
			Status string `json:"status"`
		}{"flipside.serve/v1", l.Addr().String(), address + "/v1/update/", address + "/v1/status"})
	} else {
		_, err = fmt.Fprintf(a.stdout, "serving %s: %d channels, %d releases\nhosts ask   %s/v1/update/\npeople see  %s/\nscripts     %s/v1/status\n",
			dir, len(st.Channels), len(st.Releases), address, address, address)
	}
	if err != nil {
		l.Close()
		return err
	}
	for _, p := range st.Problems {
		fmt.Fprintf(a.stderr, "flipside: %s\n", p)
	}
	ctx, cancel := context.WithCancel(ctx)
	stopped := up.run(ctx, s)
	err = s.Serve(ctx, l)
	cancel()
	<-stopped
	return err
}

// exactArgs accepts n arguments, called names in the usage.
func exactArgs(n int, names string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return usagef("%s needs %s, got %d arguments", cmd.CommandPath(), names, len(args))
		}
		return nil
	}
}

// defaultReleaseDir is where the release commands look when --dir is not given.
func defaultReleaseDir() string {
	if dir := os.Getenv("FLIPSIDE_RELEASES"); dir != "" {
		return dir
	}
	return "."
}
