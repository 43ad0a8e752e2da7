package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/omaha/server"
)

// releasePCRs says what a boot of a release must have measured.
func (a *app) releasePCRs(dir *string) *cobra.Command {
	var file, host, address string
	var only []int
	var add, none bool
	cmd := &cobra.Command{
		Use:   "pcrs VERSION",
		Short: "say what a boot of a release must have measured, or show what was said",
		Long: `A host with a TPM proves its boots with the values of its PCRs. Pcrs says which values a release leads to; the server then shows for each host whether it boots as released.
The values come from --file, which holds lines such as "11:sha256=0123…" as "flipside trust pcrs" and "systemd-measure calculate" print them, or --from-host, one that is known to be
good and has proven its boot of that release to the server. Which PCRs the release decides about is yours to know: 11 for a unified kernel image, 8 and 9 for GRUB.

A PCR may have several right values, for two slots or two kinds of hardware: --add keeps those that were said before. Without a source of values it shows what was said.
What was said is in DIR/pcrs/VERSION.toml, which may be edited by hand.`,
		Example: `  flipside trust pcrs vmlinuz.efi --phase enter-initrd:leave-initrd:sysinit:ready | flipside release pcrs 2.0.0 --file -
  flipside release pcrs 2.0.0 --from-host 4a1f… --server https://updates.example.org --only 8,9
  flipside release pcrs 2.0.0 --from-host 77c0… --server https://updates.example.org --only 8,9 --add`,
		Args: exactArgs(1, "VERSION"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if sources := len(slices.DeleteFunc([]bool{file != "", host != "", none}, func(b bool) bool { return !b })); sources > 1 {
				return usagef("--file, --from-host and --none exclude each other")
			}
			if (add || len(only) > 0) && file == "" && host == "" {
				return usagef("--add and --only need --file or --from-host")
			}
			var said server.PCRs
			var err error
			switch {
			case file == "-":
				said, err = readPCRs("standard input", a.stdin)
			case file != "":
				var f *os.File
				if f, err = os.Open(file); err == nil {
					said, err = readPCRs(file, f)
					f.Close()
				}
			case host != "":
				said, err = hostPCRs(cmd.Context(), address, host, args[0])
			}
			if err != nil {
				return err
			}
			if said, err = pick(said, only, host != ""); err != nil {
				return err
			}
			pcrs, err := (&server.Publisher{Dir: *dir}).Measure(args[0], func(was server.PCRs) (server.PCRs, error) {
				if none {
					return nil, nil
				}
				now := maps.Clone(was)
				if now == nil {
					now = server.PCRs{}
				}
				for n, values := range said {
					if !add {
						now[n] = nil
					}
					now[n] = append(slices.Clone(now[n]), values...)
				}
				return now, nil
			})
			if err != nil {
				if errors.Is(err, server.ErrUnknown) {
					err = withHint(err, "see what is published with: flipside release list")
				}
				return err
			}
			if a.json {
				return a.printJSON(struct {
					Schema  string      `json:"schema"`
					Version string      `json:"version"`
					PCRs    server.PCRs `json:"pcrs"`
				}{"flipside.release-pcrs/v1", args[0], pcrs})
			}
			if len(pcrs) == 0 {
				_, err = fmt.Fprintf(a.stdout, "nothing is said about the boots of %s\n", args[0])
				return err
			}
			for _, n := range sortedKeys(pcrs) {
				for _, v := range pcrs[n] {
					fmt.Fprintf(a.stdout, "%s:sha256=%s\n", strings.TrimPrefix(n, "0"), v)
				}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&file, "file", "", "`file` with values, - for standard input")
	f.StringVar(&host, "from-host", "", "machine `id` of a host that is known to be good")
	f.StringVar(&address, "server", "http://127.0.0.1:8787", "the server's address, for --from-host")
	f.IntSliceVar(&only, "only", nil, "take these `PCRs` only, comma-separated (default: 11 of a host, all of a file)")
	f.BoolVar(&add, "add", false, "keep the values that were said before as well")
	f.BoolVar(&none, "none", false, "say nothing about the boots of the release any more")
	return cmd
}

// pick takes some PCRs of those that were found.
func pick(said server.PCRs, only []int, fromHost bool) (server.PCRs, error) {
	chosen := len(only) > 0
	if !chosen && fromHost {
		only = []int{11}
	}
	if len(only) == 0 {
		return said, nil
	}
	out := server.PCRs{}
	for _, n := range only {
		key := fmt.Sprintf("%02d", n)
		if len(said[key]) == 0 {
			return nil, withHint(fmt.Errorf("there is no value of PCR %d", n), "there are those of %s", strings.Join(sortedKeys(said), ", "))
		}
		if !chosen && strings.Trim(said[key][0], "0") == "" {
			return nil, withHint(fmt.Errorf("PCR %d of the host is zero: nothing measures into it", n), "its loader and kernel measure into others: choose them with --only")
		}
		out[key] = said[key]
	}
	return out, nil
}

// readPCRs reads lines such as "11:sha256=0123…". What follows the value, and lines for other hashes, are left out.
func readPCRs(name string, r io.Reader) (server.PCRs, error) {
	p := server.PCRs{}
	lines := bufio.NewScanner(io.LimitReader(r, 1<<20))
	for n := 1; lines.Scan(); n++ {
		text := strings.TrimSpace(lines.Text())
		if text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		what, value, ok := strings.Cut(strings.Fields(text)[0], "=")
		number, hash, ok2 := strings.Cut(what, ":")
		if !ok || !ok2 {
			return nil, fmt.Errorf("%s: line %d is not like 11:sha256=0123…", name, n)
		}
		if hash != "sha256" {
			continue
		}
		key, value, err := onePCR(number, value)
		if err != nil {
			return nil, fmt.Errorf("%s: line %d is not like 11:sha256=0123…: %w", name, n, err)
		}
		p[key] = append(p[key], value)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if len(p) == 0 {
		return nil, fmt.Errorf("%s holds no line like 11:sha256=0123…", name)
	}
	return p, nil
}

// onePCR brings the number of a PCR and its value, as somebody else wrote them, into the form that a server keeps.
func onePCR(number, value string) (string, string, error) {
	n, err := strconv.ParseUint(number, 10, 8) // takes no sign and nothing that follows
	if err != nil || n > 23 {
		return "", "", fmt.Errorf("there is no PCR %q", omaha.Printable(number))
	}
	value = strings.TrimPrefix(strings.ToLower(value), "0x")
	if raw, err := hex.DecodeString(value); err != nil || len(raw) != sha256.Size {
		return "", "", fmt.Errorf("PCR %d: %q is not a SHA-256 value of 64 hexadecimal digits", n, omaha.Printable(value))
	}
	return fmt.Sprintf("%02d", n), value, nil
}

const (
	askTime   = 30 * time.Second
	maxDetail = 4 << 20 // of what a server says about one host; it keeps a bounded number of events
)

// hostPCRs asks a server what a host has proven of its boot of a release.
func hostPCRs(ctx context.Context, address, id, version string) (server.PCRs, error) {
	fail := func(err error) (server.PCRs, error) {
		return nil, fmt.Errorf("what host %q has proven: %w", id, err)
	}
	// The client of the hosts themselves: bounded headers, nothing that unpacks, and no redirect to another server.
	client, err := omaha.NewHTTP(omaha.HTTPOptions{Retries: -1})
	if err != nil {
		return fail(err)
	}
	defer client.CloseIdle()
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(address, "/")+"/v1/hosts/"+url.PathEscape(id), nil)
	if err != nil {
		return fail(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return fail(withHint(err, "is the server running? name it with --server"))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fail(fmt.Errorf("the server at %q answers %q", address, omaha.Printable(resp.Status)))
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxDetail+1))
	if err != nil {
		return fail(fmt.Errorf("the answer of the server at %q breaks off: %w", address, err))
	}
	if len(body) > maxDetail {
		return fail(fmt.Errorf("the server at %q answers with more than %d MiB", address, maxDetail>>20))
	}
	var d server.HostDetail
	if err := json.Unmarshal(body, &d); err != nil {
		return fail(fmt.Errorf("the answer of the server at %q: %w", address, err))
	}
	switch p := d.Host.Proof; {
	case p == nil || p.At.IsZero():
		return fail(errors.New("nothing yet"))
	case p.Refused != "":
		return fail(fmt.Errorf("what it sent last was not believed: %s", omaha.Printable(p.Refused)))
	case p.Version != version:
		return fail(fmt.Errorf("its boot of %s, not of %s", omaha.Printable(p.Version), version))
	default:
		out := server.PCRs{}
		for n, v := range p.PCRs {
			key, value, err := onePCR(n, v)
			if err != nil {
				return fail(err)
			}
			if out[key] != nil {
				return fail(fmt.Errorf("two values of PCR %s", key))
			}
			out[key] = []string{value}
		}
		return out, nil
	}
}
