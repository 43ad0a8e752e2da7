package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/omaha/server"
)

// releaseSet changes how a channel is rolled out. Only what is given changes.
func (a *app) releaseSet(dir *string) *cobra.Command {
	var c server.Channel
	cmd := &cobra.Command{
		Use:   "set CHANNEL",
		Short: "change how a channel is rolled out",
		Long: `Change how a channel is rolled out. What is not given stays as it is; 0 and "" lift a limit, but
--percent 0 is nobody: 100 is all hosts. The same can be written into DIR/channels/CHANNEL.toml by hand.`,
		Example: `  flipside release set stable --percent 10 --stop-after-failures 3
  flipside release set stable --hours "Mon-Fri 09:00-17:00" --time-zone Europe/Berlin --after canary --after-healthy 5`,
		Args: exactArgs(1, "CHANNEL"),
	}
	f := cmd.Flags()
	percent := f.Int("percent", 0, "of the hosts, by a hash of their id and the version; 0 is nobody, 100 is all")
	f.IntVar(&c.MaxConcurrent, "max-concurrent", 0, "updates at once")
	f.IntVar(&c.MaxPerPeriod, "max-per-period", 0, "updates begun in one period")
	f.StringVar(&c.Period, "period", "", "such as 1h")
	f.IntVar(&c.StopFailures, "stop-after-failures", 0, "hosts that blame the release")
	f.IntVar(&c.StopTimeouts, "stop-after-timeouts", 0, "hosts that were not heard of in time")
	f.IntVar(&c.StopDiffers, "stop-after-differing-boots", 0, "hosts whose TPM shows that they booted something else (see flipside release pcrs)")
	f.IntVar(&c.StopFailurePercent, "stop-failure-percent", 0, "share of the hosts that are through with it")
	f.IntVar(&c.StopFailureMin, "stop-failure-min", 0, "how many have to be through before the share counts (default 10)")
	f.StringVar(&c.GrantTimeout, "grant-timeout", "", "after which an update counts as timed out (default 2h)")
	f.StringVar(&c.Hours, "hours", "", `when updates may begin, such as "Mon-Fri 09:00-17:00"`)
	f.StringVar(&c.TimeZone, "time-zone", "", "of the hours, such as Europe/Berlin")
	f.StringVar(&c.After, "after", "", "a channel whose hosts go first")
	f.IntVar(&c.AfterHealthy, "after-healthy", 0, "how many of them have to be healthy (default 1)")
	f.StringVar(&c.PollInterval, "poll-interval", "", "what hosts are asked to wait between checks")
	f.StringSliceVar(&c.Floors, "floors", nil, "versions that no host may skip, comma-separated")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *percent < 0 || *percent > 100 {
			return usagef("--percent %d is not one from 0, which is nobody, to 100, which is all hosts", *percent)
		}
		p := &server.Publisher{Dir: *dir}
		if _, err := p.Channel(args[0]); err != nil {
			return err
		}
		changed := 0
		ch, err := p.Change(args[0], func(now *server.Channel) error {
			for name, set := range map[string]func(){
				"percent": func() { now.Percent = percent }, "max-concurrent": func() { now.MaxConcurrent = c.MaxConcurrent },
				"max-per-period": func() { now.MaxPerPeriod = c.MaxPerPeriod }, "period": func() { now.Period = c.Period },
				"stop-after-failures": func() { now.StopFailures = c.StopFailures }, "stop-after-timeouts": func() { now.StopTimeouts = c.StopTimeouts },
				"stop-after-differing-boots": func() { now.StopDiffers = c.StopDiffers },
				"stop-failure-percent":       func() { now.StopFailurePercent = c.StopFailurePercent }, "stop-failure-min": func() { now.StopFailureMin = c.StopFailureMin },
				"grant-timeout": func() { now.GrantTimeout = c.GrantTimeout }, "hours": func() { now.Hours = c.Hours }, "time-zone": func() { now.TimeZone = c.TimeZone },
				"after": func() { now.After = c.After }, "after-healthy": func() { now.AfterHealthy = c.AfterHealthy },
				"poll-interval": func() { now.PollInterval = c.PollInterval }, "floors": func() { now.Floors = c.Floors },
			} {
				if cmd.Flags().Changed(name) {
					set()
					changed++
				}
			}
			if changed == 0 {
				return usagef("nothing to set: see flipside release set --help")
			}
			return nil
		})
		if err != nil {
			return err
		}
		return a.showChannel(args[0], ch)
	}
	return cmd
}

// releaseWithdraw puts a version on a channel's blacklist, or takes it off.
func (a *app) releaseWithdraw(dir *string) *cobra.Command {
	var undo bool
	cmd := &cobra.Command{
		Use:   "withdraw CHANNEL VERSION",
		Short: "let no host on a channel get a version any more",
		Args:  exactArgs(2, "CHANNEL and VERSION"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ch, known, err := (&server.Publisher{Dir: *dir}).Withdraw(args[0], args[1], undo)
			if err != nil {
				return err
			}
			if !known && !undo {
				fmt.Fprintf(a.stderr, "flipside: version %s is not published here, as far as \"flipside release list\" tells\n", args[1])
			}
			if err := a.showChannel(args[0], ch); err != nil || a.json {
				return err
			}
			_, err = fmt.Fprintf(a.stdout, "withdrawn: %s\n", orDash(strings.Join(ch.Blacklist, ", ")))
			return err
		},
	}
	cmd.Flags().BoolVar(&undo, "undo", false, "let hosts get it again")
	return cmd
}

// releaseBackup copies the state file, of a running server over HTTP or of a directory that no server uses.
func (a *app) releaseBackup(dir *string) *cobra.Command {
	var address, tokenFile string
	cmd := &cobra.Command{
		Use:   "backup FILE",
		Short: "write a consistent copy of a server's state",
		Long: `Write a consistent copy of what a release server knows about its hosts and rollouts. A running server is asked over HTTP,
with an administrator's token; a directory that no server uses is read directly. To restore it, stop the server and put the
file in place of DIR/state.db. Channels and releases are plain files: copy them as such.`,
		Args: exactArgs(1, "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			out, err := renameio.NewPendingFile(args[0], renameio.WithPermissions(0o600))
			if err != nil {
				return fmt.Errorf("backup: %w", err)
			}
			defer out.Cleanup()
			if address != "" {
				err = backupFrom(cmd.Context(), address, tokenFile, out)
			} else {
				err = backupOf(cmd.Context(), *dir, out)
			}
			if err != nil {
				return err
			}
			n, err := out.Seek(0, io.SeekEnd)
			if err == nil {
				err = out.CloseAtomicallyReplace()
			}
			if err != nil {
				return fmt.Errorf("backup: %w", err)
			}
			if a.json {
				return a.printJSON(struct {
					Schema string `json:"schema"`
					File   string `json:"file"`
					Bytes  int64  `json:"bytes"`
				}{"flipside.backup/v1", args[0], n})
			}
			_, err = fmt.Fprintf(a.stdout, "%s: %s\n", args[0], formatBytes(n))
			return err
		},
	}
	cmd.Flags().StringVar(&address, "server", "", "address of a running server (default: read --dir)")
	cmd.Flags().StringVar(&tokenFile, "token-file", "", "file with an administrator's token, for --server")
	return cmd
}

func backupOf(ctx context.Context, dir string, out io.Writer) error {
	if _, err := os.Stat(dir + "/state.db"); err != nil {
		return withHint(fmt.Errorf("backup: %w", err), "name the server's directory with --dir, or a running server with --server")
	}
	s, err := server.New(dir, server.Options{})
	if errors.Is(err, server.ErrBusy) {
		return withHint(withExit(exitBusy, err), "ask it with --server and --token-file")
	}
	if err != nil {
		return err
	}
	return errors.Join(s.Backup(ctx, out), s.Close())
}

func backupFrom(ctx context.Context, address, tokenFile string, out io.Writer) error {
	token, err := adminToken(tokenFile)
	if err != nil {
		return withHint(fmt.Errorf("backup: %w", err), "name a file with an administrator's token with --token-file")
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(address, "/")+"/v1/admin/backup", nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := straight().Do(req)
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusUnauthorized, http.StatusForbidden:
		return withHint(withExit(exitPermitted, fmt.Errorf("backup: the server at %q answers %q", address, resp.Status)), "--token-file has to hold an administrator's token")
	default:
		return fmt.Errorf("backup: the server at %q answers %q", address, resp.Status)
	}
	if _, err := io.Copy(out, resp.Body); err != nil {
		return fmt.Errorf("backup: the copy broke off: %w", err)
	}
	return nil
}

// adminToken reads the first token of a file, which may be the server's own with a name before each.
func adminToken(path string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 0 && !strings.HasPrefix(fields[0], "#") {
			return fields[len(fields)-1], nil
		}
	}
	return "", fmt.Errorf("%q holds no token", path)
}

// firstLine reads a secret from a file.
func firstLine(path string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(data)), "\n")
	return strings.TrimSpace(line), nil
}
