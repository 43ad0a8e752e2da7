package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/omaha/server"
)

// releaseCommand works on a release server's directory, whether or not the server runs; hosts and events ask a running one.
func (a *app) releaseCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "release",
		Short: "publish releases and steer their rollout",
		Args:  cobra.NoArgs,
	}
	cmd.PersistentFlags().StringVar(&dir, "dir", defaultReleaseDir(), "the release server's directory (default $FLIPSIDE_RELEASES or .)")
	cmd.AddCommand(
		a.releasePublish(&dir), a.releaseList(&dir), a.releasePromote(&dir), a.releaseRollback(&dir),
		a.releasePause(&dir, "pause", "let no further host begin with a channel's version", true),
		a.releasePause(&dir, "resume", "go on with a paused or stopped rollout", false),
		a.releaseHosts(), a.releaseEvents(), a.releaseMirror(&dir), a.releaseExport(&dir), a.releaseImport(&dir),
		a.releaseSet(&dir), a.releasePCRs(&dir), a.releaseWithdraw(&dir), a.releaseBackup(&dir),
	)
	return cmd
}

func (a *app) releasePublish(dir *string) *cobra.Command {
	var channel, version, from string
	var keys []string
	var unverified bool
	cmd := &cobra.Command{
		Use:   "publish FILE",
		Short: "put a payload into the directory and move a channel to it",
		Long: `Publish checks a payload with the keys given, stores it under a version, and lets a channel point at it.

A release begins with its whole payload, which any host can take. Deltas may follow, each --from a version that hosts run: these hosts are offered
the delta, and the whole payload if the delta cannot be used there. A delta must make the same images as the whole payload.`,
		Args: exactArgs(1, "the payload FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if version == "" {
				return usagef("--version is missing")
			}
			p, err := publisher(*dir, keys, unverified)
			if err != nil {
				return err
			}
			rel, ch, err := p.Publish(cmd.Context(), server.Release{Version: version, From: from}, args[0], channel)
			switch {
			case errors.Is(err, server.ErrExists):
				hint := "a version never changes once it is published: choose a new version number"
				if from != "" {
					hint = "a delta never changes once it is published: if it is wrong, delete its file below deltas/, and publish the right one"
				}
				return withHint(err, "%s", hint)
			case errors.Is(err, server.ErrNotPayload):
				return withHint(withExit(exitVerify, err), "make a payload from an image with: flipside payload create")
			case errors.Is(err, server.ErrUnknown):
				return withHint(err, "publish the whole payload first, without --from")
			case err != nil:
				return err
			}
			if a.json {
				return a.printJSON(struct {
					Schema  string          `json:"schema"`
					Release server.Release  `json:"release"`
					Channel string          `json:"channel,omitempty"`
					State   *server.Channel `json:"channel_state,omitempty"`
				}{"flipside.release-publish/v1", rel, channel, orNil(channel != "", ch)})
			}
			if from != "" {
				fmt.Fprintf(a.stdout, "release %s for hosts that run %s: %s, sha256 %s\n", rel.Version, rel.From, formatBytes(rel.Size), rel.SHA256)
			} else {
				fmt.Fprintf(a.stdout, "release %s: %s, sha256 %s\n", rel.Version, formatBytes(rel.Size), rel.SHA256)
			}
			if channel != "" {
				a.sayChannel(channel, ch)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&channel, "channel", "", "the channel to move to it (default: none)")
	cmd.Flags().StringVar(&version, "version", "", "the release's version, SemVer 2")
	cmd.Flags().StringVar(&from, "from", "", "the payload is a delta: the `version` that it changes")
	keyFlags(cmd.Flags(), &keys, &unverified)
	return cmd
}

func (a *app) releaseList(dir *string) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "show channels and releases",
		Long:  `Show channels and releases. Exit status 1: a file of the directory cannot be used, which is named on standard error.`,
		Args:  exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := os.Stat(filepath.Join(*dir, "releases")); err != nil {
				return withHint(fmt.Errorf("read release directory: %w", err), "name it with --dir, or publish into it first")
			}
			s, err := server.New(*dir, server.Options{ReadOnly: true})
			if err != nil {
				return err
			}
			defer s.Close()
			st := s.Status()
			var bad error
			if len(st.Problems) > 0 { // they are part of what is printed
				bad = quiet(exitFailed)
			}
			if a.json {
				err := a.printJSON(struct {
					Schema   string                    `json:"schema"`
					Channels map[string]server.Channel `json:"channels"`
					Releases []server.Release          `json:"releases"`
					Deltas   []server.Release          `json:"deltas,omitempty"`
					Problems []string                  `json:"problems"`
				}{"flipside.release-list/v1", st.Channels, st.Releases, st.Deltas, st.Problems})
				return cmp.Or(err, bad)
			}
			out := a.sheet()
			var rows [][]cell
			for _, name := range sortedKeys(st.Channels) {
				rows = append(rows, cells(plain, name, orDash(st.Channels[name].Version), rolloutWords(st.Channels[name])))
			}
			out.table([]string{"CHANNEL", "VERSION", "ROLLOUT"}, rows)
			rows = nil
			for _, r := range st.Releases {
				rows = append(rows, cells(plain, r.Version, formatBytes(r.Size), r.Published.Format(time.RFC3339)))
				for _, d := range st.Deltas {
					if d.Version == r.Version {
						rows = append(rows, cells(plain, "  from "+d.From, formatBytes(d.Size), d.Published.Format(time.RFC3339)))
					}
				}
			}
			out.line("")
			out.table([]string{"RELEASE", "SIZE", "PUBLISHED"}, rows)
			if err := out.print(a.stdout); err != nil {
				return err
			}
			for _, p := range st.Problems {
				fmt.Fprintf(a.stderr, "flipside: %s\n", p)
			}
			return bad
		},
	}
}

func (a *app) releasePromote(dir *string) *cobra.Command {
	var version, from string
	cmd := &cobra.Command{
		Use:   "promote CHANNEL",
		Short: "move a channel to a published version, or to what another channel holds",
		Args:  exactArgs(1, "CHANNEL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p := &server.Publisher{Dir: *dir}
			if (version == "") == (from == "") {
				return usagef("give either --version or --from")
			}
			if from != "" {
				ch, err := p.Channel(from)
				if err != nil {
					return err
				}
				version = ch.Version
			}
			ch, err := p.Move(args[0], version)
			if err != nil {
				return withHint(err, "see what is published with: flipside release list")
			}
			return a.showChannel(args[0], ch)
		},
	}
	cmd.Flags().StringVar(&version, "version", "", "the version to move to")
	cmd.Flags().StringVar(&from, "from", "", "the channel whose version to take")
	return cmd
}

func (a *app) releaseRollback(dir *string) *cobra.Command {
	var downgrade bool
	cmd := &cobra.Command{
		Use:   "rollback CHANNEL",
		Short: "move a channel back to the version it held before",
		Long: `Move a channel back to the version it held before, past those that are withdrawn or gone. Hosts that did not take the newer version yet stay where
they are. Hosts that did are offered the older one only with --downgrade, and take it only when their own
configuration allows that.`,
		Args: exactArgs(1, "CHANNEL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ch, err := (&server.Publisher{Dir: *dir}).Rollback(args[0], downgrade)
			if err != nil {
				return err
			}
			return a.showChannel(args[0], ch)
		},
	}
	cmd.Flags().BoolVar(&downgrade, "downgrade", false, "offer the older version to hosts that run the newer one")
	return cmd
}

func (a *app) releasePause(dir *string, name, short string, pause bool) *cobra.Command {
	return &cobra.Command{
		Use:   name + " CHANNEL",
		Short: short,
		Args:  exactArgs(1, "CHANNEL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ch, err := (&server.Publisher{Dir: *dir}).Pause(args[0], pause)
			if err != nil {
				return err
			}
			return a.showChannel(args[0], ch)
		},
	}
}

func (a *app) releaseHosts() *cobra.Command {
	var address string
	cmd := &cobra.Command{
		Use:   "hosts",
		Short: "show the hosts that a running server knows, and why they do not move",
		Args:  exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := fetchStatus(cmd.Context(), address)
			if err != nil {
				return withHint(err, "is the server running? name it with --server")
			}
			if a.json {
				return a.printJSON(struct {
					Schema   string           `json:"schema"`
					Hosts    []server.Host    `json:"hosts"`
					Failures []server.Failure `json:"failures"`
				}{"flipside.release-hosts/v1", st.Hosts, st.Failures})
			}
			var rows [][]cell
			for _, h := range st.Hosts {
				why := h.Waits
				if why == "" {
					why = h.Why
				}
				name := h.Alias
				if name == "" {
					name = h.ID
				}
				rows = append(rows, cells(plain, name, h.Version, orDash(h.Channel), string(h.State), orDash(h.Target), bootWord(h), why))
			}
			s := a.sheet()
			s.table([]string{"HOST", "VERSION", "CHANNEL", "STATE", "TARGET", "BOOT", "WHY"}, rows)
			return s.print(a.stdout)
		},
	}
	cmd.Flags().StringVar(&address, "server", "http://127.0.0.1:8787", "the server's address")
	cmd.AddCommand(a.hostsAcceptKey())
	return cmd
}

// bootWord says what is known of a host's last boot from its TPM.
func bootWord(h server.Host) string {
	switch p := h.Proof; {
	case p == nil:
		return "-"
	case p.Other != "":
		return "another key"
	case p.Refused != "":
		return "not believed"
	case p.At.IsZero():
		return "none yet"
	case p.Version != h.Version:
		return "proved " + omaha.Printable(p.Version)
	case p.Words() != "":
		return strings.TrimPrefix(p.Words(), "boots ")
	}
	return "proved"
}

func (a *app) hostsAcceptKey() *cobra.Command {
	var address, tokenFile, key string
	cmd := &cobra.Command{
		Use:   "accept-key ID --key FINGERPRINT",
		Short: "accept the key by which a host proves its boots: of a new board or TPM, or before its first proof",
		Args:  exactArgs(1, "the machine ID of the host"),
		Long: `A release server believes the first key that a host proves a boot with, and no other afterwards. Accept-key says which one counts: after a change of the board or the TPM, or
beforehand, so that nothing is believed at first sight. "flipside trust status" on the host prints the fingerprint of its attestation key. The order is in the server's audit log.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if key == "" {
				return usagef("--key is missing: which key is accepted?")
			}
			token, err := adminToken(tokenFile)
			if err != nil {
				return withHint(fmt.Errorf("accepting a key: %w", err), "name a file with an administrator's token with --token-file")
			}
			body, err := json.Marshal(map[string]string{"key": key})
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(address, "/")+"/v1/admin/hosts/"+url.PathEscape(args[0])+"/key", bytes.NewReader(body))
			if err != nil {
				return err
			}
			req.Header.Set("Authorization", "Bearer "+token)
			req.Header.Set("Content-Type", "application/json")
			resp, err := straight().Do(req)
			if err != nil {
				return fmt.Errorf("accepting a key: %w", err)
			}
			defer resp.Body.Close()
			said, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
			if err != nil {
				return fmt.Errorf("accepting a key: %w", err)
			}
			switch resp.StatusCode {
			case http.StatusNoContent:
				return a.done(fmt.Sprintf("host %s proves its boots by key %s from now on", args[0], key))
			case http.StatusUnauthorized, http.StatusForbidden:
				return withHint(withExit(exitPermitted, fmt.Errorf("accepting a key: the server answers %q", resp.Status)), "--token-file has to hold an administrator's token")
			}
			return fmt.Errorf("accepting a key: the server answers %q: %s", resp.Status, omaha.Printable(strings.TrimSpace(string(said))))
		},
	}
	cmd.Flags().StringVar(&address, "server", "http://127.0.0.1:8787", "the server's address")
	cmd.Flags().StringVar(&tokenFile, "token-file", "", "`file` with an administrator's token")
	cmd.Flags().StringVar(&key, "key", "", "`fingerprint` of the attestation key: sha256:…")
	return cmd
}

func (a *app) releaseEvents() *cobra.Command {
	var address string
	cmd := &cobra.Command{
		Use:   "events",
		Short: "show what hosts did last",
		Args:  exactArgs(0, "no arguments"),
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := fetchStatus(cmd.Context(), address)
			if err != nil {
				return withHint(err, "is the server running? name it with --server")
			}
			if a.json {
				return a.printJSON(struct {
					Schema string            `json:"schema"`
					Events []server.Activity `json:"events"`
				}{"flipside.events/v1", st.Activity})
			}
			var rows [][]cell
			for _, e := range slices.Backward(st.Activity) {
				name, code := e.Alias, "-"
				if name == "" {
					name = e.Host
				}
				if e.Code != 0 {
					code = fmt.Sprint(e.Code)
				}
				rows = append(rows, cells(plain, e.At.Format(time.RFC3339), name, string(e.From), string(e.To), orDash(e.Version), code))
			}
			s := a.sheet()
			s.table([]string{"TIME", "HOST", "FROM", "TO", "VERSION", "CODE"}, rows)
			return s.print(a.stdout)
		},
	}
	cmd.Flags().StringVar(&address, "server", "http://127.0.0.1:8787", "the server's address")
	return cmd
}

// straight is a client that follows no redirect: an administrator's token goes to the server that was named, and nowhere else.
func straight() *http.Client {
	return &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// fetchStatus asks a running server for its status document.
func fetchStatus(ctx context.Context, address string) (server.Status, error) {
	var st server.Status
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(address, "/")+"/v1/status", nil)
	if err != nil {
		return st, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return st, fmt.Errorf("ask the server: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return st, fmt.Errorf("ask the server at %q: it answers %q", address, resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 256<<20)).Decode(&st); err != nil {
		return st, fmt.Errorf("read the server's status: %w", err)
	}
	return st, nil
}

func (a *app) showChannel(name string, ch server.Channel) error {
	if a.json {
		return a.printJSON(server.NewChannelDoc(name, ch))
	}
	a.sayChannel(name, ch)
	return nil
}

func (a *app) sayChannel(name string, ch server.Channel) {
	fmt.Fprintf(a.stdout, "channel %s: %s, %s\n", name, orDash(ch.Version), rolloutWords(ch))
}

// rolloutWords says in one line how a channel is rolled out.
func rolloutWords(c server.Channel) string {
	if h := c.Halted(); h != "" {
		return h + ", " + c.Words()
	}
	return c.Words()
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func orNil[T any](ok bool, v T) *T {
	if !ok {
		return nil
	}
	return &v
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
