package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/omaha/server"
)

// serveCommand runs the release server.
func (a *app) serveCommand() *cobra.Command {
	var opt server.Options
	var listen string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "serve DIR",
		Short: "run a release server on a directory",
		Long: `Serve the releases in DIR to hosts that ask with Omaha 3.0: this project's and Flatcar's.

DIR is made when it does not exist. Releases are put into it with "flipside release publish --dir DIR";
a running server notices them by itself. What a channel holds and how it is rolled out is in
DIR/channels/<name>.toml, which may be edited by hand.

The server listens on this machine only, unless --listen says otherwise. Behind a proxy or a name, say with
--public-url where hosts find it: payload addresses are never made from what a request claims.`,
		Args: exactArgs(1, "DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			level := slog.LevelInfo
			if verbose {
				level = slog.LevelDebug
			}
			opt.Logger = slog.New(slog.NewTextHandler(a.stderr, &slog.HandlerOptions{Level: level}))
			return a.serve(cmd.Context(), args[0], listen, opt)
		},
	}
	f := cmd.Flags()
	f.StringVar(&listen, "listen", "127.0.0.1:8787", "address to listen on")
	f.StringVar(&opt.PublicURL, "public-url", "", "address under which hosts find this server (default: the one they connected to)")
	f.StringVar(&opt.AppID, "app-id", "", "serve only this application id (default: any)")
	f.BoolVarP(&verbose, "verbose", "v", false, "log more")
	return cmd
}

func (a *app) serve(ctx context.Context, dir, listen string, opt server.Options) error {
	s, err := server.New(dir, opt)
	if err != nil {
		return err
	}
	defer s.Close()
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if err != nil {
		return withHint(fmt.Errorf("listen: %w", err), "choose another address with --listen")
	}
	st := s.Status()
	address := opt.PublicURL
	if address == "" {
		address = "http://" + l.Addr().String()
	}
	if a.json {
		err = a.printJSON(struct {
			Schema string `json:"schema"`
			Listen string `json:"listen"`
			Update string `json:"update"`
			Status string `json:"status"`
		}{"flipside.serve/v1", l.Addr().String(), address + "/v1/update/", address + "/v1/status"})
	} else {
		_, err = fmt.Fprintf(a.stdout, "serving %s: %d channels, %d releases\nhosts ask   %s/v1/update/\nstatus      %s/v1/status\n",
			dir, len(st.Channels), len(st.Releases), address, address)
	}
	if err != nil {
		l.Close()
		return err
	}
	for _, p := range st.Problems {
		fmt.Fprintf(a.stderr, "flipside: %s\n", p)
	}
	return s.Serve(ctx, l)
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
