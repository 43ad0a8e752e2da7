package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/omaha/server"
	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/updater/trust"
)

// publisher makes a publisher for dir, which publishes only what one of the keys signed: the given ones, or those in
// DIR/keys. Without any it refuses, unless unverified says that this is meant.
func publisher(dir string, keys []string, unverified bool) (*server.Publisher, error) {
	verify, err := verifier(keysOf(dir, keys))
	if err != nil {
		return nil, err
	}
	if verify == nil && !unverified {
		return nil, withHint(usagef("there is no key to check the payload's signature with"),
			"name it with --key, put it into %s once and for all, or say --unverified", filepath.Join(dir, "keys"))
	}
	if unverified && len(keys) > 0 {
		return nil, usagef("--key and --unverified contradict each other")
	}
	if unverified {
		verify = nil
	}
	return &server.Publisher{Dir: dir, Verify: verify}, nil
}

// verifier checks a payload with keys; without any it is nil.
func verifier(keys []string) (func(context.Context, string, *server.Delta) error, error) {
	if len(keys) == 0 {
		return nil, nil
	}
	ring, err := keyring(keys, trust.KeyPolicy{})
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, path string, of *server.Delta) error {
		return verifyPayload(ctx, path, of, ring)
	}, nil
}

// keyring reads keys by the rules of a host: files, and directories of drop-ins with their roles, times and revocations. A path that is not there is an
// error here, because somebody has named it.
func keyring(paths []string, policy trust.KeyPolicy) (*payload.Keyring, error) {
	for _, p := range paths {
		if _, err := os.Stat(p); err != nil {
			return nil, fmt.Errorf("%w: %w", payload.ErrNoKey, err)
		}
	}
	k, err := trust.LoadKeys(paths, policy)
	if err != nil {
		return nil, err
	}
	return k.Ring(), nil
}

// verifyPayload checks everything of a payload that a host would check, down to the last operation, by applying it to
// nowhere. A delta needs its old image for that: of one, the metadata's signature and shape are checked, and that it makes the images of the whole payload.
func verifyPayload(ctx context.Context, path string, of *server.Delta, ring *payload.Keyring) error {
	src, err := payload.NewFileSource(path)
	if err != nil {
		return err
	}
	p, err := payload.Open(ctx, src, payload.Options{Keys: ring})
	if err != nil {
		return withExit(exitVerify, err)
	}
	switch {
	case of == nil && p.Delta():
		return withExit(exitUsage, withHint(errors.New("it is a delta, which helps only hosts that run the release that it changes"),
			"publish the release's whole payload first, and then this one with --from and the version that it changes"))
	case of != nil && !p.Delta():
		return withExit(exitUsage, errors.New("it is no delta"))
	case of != nil:
		return agrees(ctx, p, *of, ring)
	}
	targets := make(map[string]payload.Target, len(p.Partitions))
	for _, part := range p.Partitions {
		targets[part.Name] = nowhere{}
	}
	return withExit(exitVerify, p.Apply(ctx, payload.ApplyOptions{Targets: targets}))
}

// agrees finds out whether a delta makes all that the whole payload of its release makes, out of what the release makes that it changes.
func agrees(ctx context.Context, delta *payload.Payload, of server.Delta, ring *payload.Keyring) error {
	open := func(path string) (*payload.Payload, error) {
		src, err := payload.NewFileSource(path)
		if err != nil {
			return nil, err
		}
		return payload.Open(ctx, src, payload.Options{Keys: ring})
	}
	fail := func(format string, args ...any) error { return withExit(exitVerify, fmt.Errorf(format, args...)) }
	whole, err := open(of.Whole)
	if err != nil {
		return fail("the release's whole payload: %w", err)
	}
	if len(delta.Partitions) != len(whole.Partitions) {
		return fail("it makes %d images, and the release's whole payload makes %d", len(delta.Partitions), len(whole.Partitions))
	}
	for _, q := range whole.Partitions {
		if !slices.ContainsFunc(delta.Partitions, func(d payload.Partition) bool { return d.Name == q.Name && d.Size == q.Size && d.SHA256 == q.SHA256 }) {
			return fail("it does not make the image of partition %q that the release's whole payload makes", q.Name)
		}
	}
	if delta.MaxTimestamp != whole.MaxTimestamp {
		return fail("its number is %d, and that of the release's whole payload is %d", delta.MaxTimestamp, whole.MaxTimestamp)
	}
	if of.Base == "" {
		return nil
	}
	base, err := open(of.Base)
	if errors.Is(err, payload.ErrSignature) || errors.Is(err, payload.ErrUnsigned) { // by a key of its time
		return nil
	}
	if err != nil {
		return fail("the whole payload of the release that it changes: %w", err)
	}
	for _, d := range delta.Partitions {
		if d.OldSize > 0 && !slices.ContainsFunc(base.Partitions, func(q payload.Partition) bool {
			return d.Name == q.Name && d.OldSize == q.Size && d.OldSHA256 == q.SHA256
		}) {
			return fail("it changes another image of partition %q than the release has that --from names", d.Name)
		}
	}
	return nil
}

func keyFlags(f *pflag.FlagSet, keys *[]string, unverified *bool) {
	f.StringArrayVar(keys, "key", nil, "take only what this key signed, PEM; may be given again (default DIR/keys)")
	f.BoolVar(unverified, "unverified", false, "take a payload whatever its signature: the hosts check it in any case")
}

// nowhere takes an image and keeps nothing of it.
type nowhere struct{}

func (nowhere) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (nowhere) Flush() error                           { return nil }

func (a *app) releaseMirror(dir *string) *cobra.Command {
	var up server.Upstream
	var opt omaha.HTTPOptions
	var channel string
	var keys []string
	var unverified bool
	cmd := &cobra.Command{
		Use:   "mirror URL",
		Short: "bring a channel up to what another server holds, payloads included",
		Long: `Ask another release server (Flatcar's, a Nebraska, or one of these) for a channel, fetch every release on the way
from --since to the newest, and move the channel here. What is here already is not fetched again.`,
		Example: `  flipside release mirror --dir /srv/releases --key flatcar.pem --track stable --board amd64-usr \
    --app-id '{e96281a6-d1af-4bde-9a0a-97b76e56dc57}' https://public.update.flatcar-linux.net/v1/update/`,
		Args: exactArgs(1, "the URL of a server"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := publisher(*dir, keys, unverified)
			if err != nil {
				return err
			}
			if up.HTTP, err = omaha.NewHTTP(opt); err != nil {
				return err
			}
			defer up.HTTP.CloseIdle()
			var bar *progress
			up.URL = args[0]
			up.Progress = func(version string, done, size int64) {
				if bar == nil {
					bar = a.progress("release "+version, size)
				}
				bar.Set(done)
				if done >= size {
					bar.Done()
					bar = nil
				}
			}
			if channel == "" {
				channel = up.Track
			}
			fresh, err := p.Mirror(cmd.Context(), up, channel)
			if err != nil {
				return err
			}
			return a.sayMirrored(p, channel, fresh)
		},
	}
	f := cmd.Flags()
	f.StringVar(&up.AppID, "app-id", "", "the application's id on that server")
	f.StringVar(&up.Track, "track", "stable", "the channel there")
	f.StringVar(&up.Board, "board", "amd64-usr", "the board to ask for")
	f.StringVar(&up.Since, "since", "0.0.0", "the oldest version that hosts here still run")
	f.StringVar(&channel, "channel", "", "the channel here (default: the same name)")
	keyFlags(f, &keys, &unverified)
	f.StringVar(&opt.Proxy, "proxy", "", "proxy to use (default: the environment's; \"direct\": none)")
	f.StringArrayVar(&opt.CAFiles, "ca", nil, "trust this authority as well, PEM; may be given again")
	return cmd
}

func (a *app) sayMirrored(p *server.Publisher, channel string, fresh []server.Release) error {
	ch, err := p.Channel(channel)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(struct {
			Schema   string           `json:"schema"`
			Name     string           `json:"name"`
			Channel  server.Channel   `json:"channel"`
			Releases []server.Release `json:"releases"`
		}{"flipside.mirror/v1", channel, ch, append([]server.Release{}, fresh...)})
	}
	for _, r := range fresh {
		fmt.Fprintf(a.stdout, "release %s: %s, sha256 %s\n", r.Version, formatBytes(r.Size), r.SHA256)
	}
	a.sayChannel(channel, ch)
	return nil
}

func (a *app) releaseExport(dir *string) *cobra.Command {
	var channels []string
	cmd := &cobra.Command{
		Use:   "export FILE",
		Short: "write channels and their releases into one file, to be carried over an air gap",
		Args:  exactArgs(1, "a FILE to write"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(channels) == 0 {
				return usagef("--channel is missing")
			}
			out, err := renameio.NewPendingFile(args[0], renameio.WithPermissions(0o644))
			if err != nil {
				return fmt.Errorf("export: %w", err)
			}
			defer out.Cleanup()
			hash := sha256.New()
			if err := (&server.Publisher{Dir: *dir}).Export(io.MultiWriter(out, hash), channels...); err != nil {
				return err
			}
			if err := out.CloseAtomicallyReplace(); err != nil {
				return fmt.Errorf("export: %w", err)
			}
			if a.json {
				return a.printJSON(struct {
					Schema   string   `json:"schema"`
					File     string   `json:"file"`
					SHA256   string   `json:"sha256"`
					Channels []string `json:"channels"`
				}{"flipside.bundle/v1", args[0], fmt.Sprintf("%x", hash.Sum(nil)), channels})
			}
			fmt.Fprintf(a.stdout, "%s: %d channels, sha256 %x\n", filepath.Base(args[0]), len(channels), hash.Sum(nil))
			return nil
		},
	}
	cmd.Flags().StringArrayVar(&channels, "channel", nil, "a channel to take along; may be given again")
	return cmd
}

func (a *app) releaseImport(dir *string) *cobra.Command {
	var keys []string
	var unverified bool
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "read a file that export wrote",
		Args:  exactArgs(1, "a FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := publisher(*dir, keys, unverified)
			if err != nil {
				return err
			}
			f, err := os.Open(args[0])
			if err != nil {
				return fmt.Errorf("import: %w", err)
			}
			defer f.Close()
			got, err := p.Import(cmd.Context(), f)
			if errors.Is(err, io.ErrUnexpectedEOF) {
				return withHint(withExit(exitVerify, err), "the file is not complete: copy it again and compare its sha256")
			}
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(struct {
					Schema   string           `json:"schema"`
					Releases []server.Release `json:"releases"`
				}{"flipside.import/v1", append([]server.Release{}, got...)})
			}
			for _, r := range got {
				fmt.Fprintf(a.stdout, "release %s: %s, sha256 %s\n", r.Version, formatBytes(r.Size), r.SHA256)
			}
			return nil
		},
	}
	keyFlags(cmd.Flags(), &keys, &unverified)
	return cmd
}
