package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/updater/trust"
)

func (a *app) payloadVerifyCommand() *cobra.Command {
	var keys, dirs, from []string
	var policy trust.KeyPolicy
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "check everything about a payload",
		Long: `Verify checks the signatures with the keys given, reads the whole file, decodes every operation, and compares the images
that come out with the hashes in the manifest. The images are kept in a temporary directory (TMPDIR) meanwhile.

Directories of keys are read as hosts read them: NAME.pem, and NAME.toml with a key's role and time and with revocations. --keys DIR is --key DIR.

A delta is checked with the images that it changes: --from PATH, or --from NAME=PATH for each of several partitions.

Exit status: 0 all of it holds, 6 it does not.`,
		Args: exactArgs(1, "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := openPayload(cmd.Context(), args[0], append(keys, dirs...), policy)
			if err != nil {
				return err
			}
			sources, closeSources, err := openSources(p, from)
			if err != nil {
				return err
			}
			defer closeSources()
			// The images have to be somewhere to be hashed whole, whatever the order in which they are written.
			dir, err := os.MkdirTemp("", "flipside-verify-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(dir)
			places := map[string]string{}
			for _, q := range p.Partitions {
				places[q.Name] = filepath.Join(dir, q.Name)
			}
			if err := a.applyPayload(cmd.Context(), "verifying", p, sources, places); err != nil {
				return payloadError(fmt.Errorf("%s: %w", args[0], err))
			}
			return a.printInfo(describe(args[0], p, "everything: signatures, data and images"))
		},
	}
	cmd.Flags().StringSliceVar(&keys, "key", nil, "public key (PEM file or directory); any one of several is enough")
	cmd.Flags().StringSliceVar(&dirs, "keys", nil, "`directory` of keys, as a host's keys.d; may be repeated")
	cmd.Flags().IntVar(&policy.Signatures, "signatures", 1, "`number` of different keys that must have signed, as trust.signatures on a host")
	cmd.Flags().BoolVar(&policy.Development, "development", false, "development keys count")
	cmd.Flags().StringSliceVar(&from, "from", nil, "old image of a delta; NAME=PATH for one of several partitions")
	return cmd
}

func (a *app) payloadApplyCommand() *cobra.Command {
	var keys, from, to []string
	cmd := &cobra.Command{
		Use:   "apply FILE --key PUB [--from PATH] --to PATH",
		Short: "write a payload's images to files or block devices",
		Long: `Apply writes the images of a payload, after its signature was checked with the keys given, and reads back what it wrote. A file is
written beside its name and gets the name only when all of it is proven; a block device is written in place.

With several partitions, --to NAME=PATH says where each goes. A delta changes old images: --from says where they are, in the same way. They are
only read, and nothing is written before they were found to be the right ones.

Exit status: 0 the images are written and proven, 6 something does not verify.`,
		Args: exactArgs(1, "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := openPayload(cmd.Context(), args[0], keys, trust.KeyPolicy{})
			if err != nil {
				return err
			}
			places, err := placesOf(p, to)
			if err != nil {
				return err
			}
			sources, closeSources, err := openSources(p, from)
			if err != nil {
				return err
			}
			defer closeSources()
			if err := a.applyPayload(cmd.Context(), "applying", p, sources, places); err != nil {
				return payloadError(fmt.Errorf("%s: %w", args[0], err))
			}
			return a.printInfo(describe(args[0], p, "everything: signatures, data and the images, read back"))
		},
	}
	cmd.Flags().StringSliceVar(&keys, "key", nil, "public key (PEM file or directory); any one of several is enough")
	cmd.Flags().StringSliceVar(&from, "from", nil, "old image of a delta; NAME=PATH for one of several partitions")
	cmd.Flags().StringSliceVar(&to, "to", nil, "where the image goes; NAME=PATH for one of several partitions")
	return cmd
}

// placesOf says which partition goes where.
func placesOf(p *payload.Payload, to []string) (map[string]string, error) {
	places := map[string]string{}
	for _, t := range to {
		name, path, ok := strings.Cut(t, "=")
		if !ok {
			if len(p.Partitions) != 1 {
				return nil, usagef("the payload has %d partitions: say --to NAME=PATH for each", len(p.Partitions))
			}
			name, path = p.Partitions[0].Name, t
		}
		places[name] = path
	}
	for _, q := range p.Partitions {
		if places[q.Name] == "" {
			return nil, usagef("nothing says where partition %q goes: --to %s=PATH", q.Name, q.Name)
		}
	}
	if len(places) != len(p.Partitions) {
		return nil, usagef("--to names a partition that the payload does not have")
	}
	return places, nil
}

// openSources opens the old images of a delta.
func openSources(p *payload.Payload, from []string) (map[string]io.ReaderAt, func(), error) {
	files := map[string]*os.File{}
	closeAll := func() {
		for _, f := range files {
			f.Close()
		}
	}
	var want []string
	for _, q := range p.Partitions {
		if q.OldSize > 0 {
			want = append(want, q.Name)
		}
	}
	sources := map[string]io.ReaderAt{}
	for _, arg := range from {
		name, path, ok := strings.Cut(arg, "=")
		if !ok {
			if len(want) != 1 {
				return nil, nil, usagef("the payload changes %d partitions: say --from NAME=PATH for each", len(want))
			}
			name, path = want[0], arg
		}
		if !slices.Contains(want, name) {
			closeAll()
			return nil, nil, usagef("--from names %q, which is no partition that the payload changes", name)
		}
		f, err := os.Open(path)
		if err != nil {
			closeAll()
			return nil, nil, fmt.Errorf("opening the old image of partition %q: %w", name, err)
		}
		files[name], sources[name] = f, f
	}
	for _, name := range want {
		if sources[name] == nil {
			closeAll()
			return nil, nil, usagef("the payload is a delta: --from %s=PATH says where the old image is", name)
		}
	}
	return sources, closeAll, nil
}

// output is a file or block device that an image is written to.
type output struct {
	*payload.FileTarget
	file  *os.File
	final string // name that a file gets at the end; empty for a block device
}

func openOutput(path string, size int64) (*output, error) {
	info, err := os.Stat(path)
	switch {
	case err == nil && info.Mode()&os.ModeDevice != 0:
		f, err := os.OpenFile(path, os.O_RDWR|os.O_EXCL, 0)
		if err != nil {
			return nil, err
		}
		return &output{FileTarget: payload.NewFileTarget(f), file: f}, nil
	case err == nil && !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is neither a file nor a block device", path)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return nil, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".partial-")
	if err != nil {
		return nil, err
	}
	o := &output{payload.NewFileTarget(f), f, path}
	// Room for all of it now: what does not fit is known at once, and writes that lengthen no file need not wait for each other.
	if err := unix.Fallocate(int(f.Fd()), 0, 0, size); err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
		o.close(false)
		return nil, fmt.Errorf("making room for %d MiB in %s: %w", size>>20, filepath.Dir(path), err)
	}
	return o, nil
}

func sizeOf(p *payload.Payload, name string) int64 {
	for _, q := range p.Partitions {
		if q.Name == name {
			return q.Size
		}
	}
	return 0
}

func (o *output) close(keep bool) {
	o.Close()
	o.file.Close()
	if !keep && o.final != "" {
		os.Remove(o.file.Name())
	}
}

func (a *app) applyPayload(ctx context.Context, what string, p *payload.Payload, sources map[string]io.ReaderAt, places map[string]string) (err error) {
	outs := map[string]*output{}
	targets := map[string]payload.Target{}
	defer func() {
		for _, o := range outs {
			o.close(err == nil)
		}
	}()
	for name, path := range places {
		o, err := openOutput(path, sizeOf(p, name))
		if err != nil {
			return fmt.Errorf("opening the place of partition %q: %w", name, err)
		}
		outs[name], targets[name] = o, o
	}
	var bar *progress
	step := payload.Step("")
	err = p.Apply(ctx, payload.ApplyOptions{Targets: targets, Sources: sources, Progress: func(g payload.Progress) {
		if g.Step != step {
			if bar != nil {
				bar.Done()
			}
			title := what
			if g.Step == payload.StepChecking {
				title = string(g.Step)
			}
			bar, step = a.progress(title, g.Total), g.Step
		}
		bar.Set(g.Bytes)
	}})
	if err != nil {
		return err
	}
	if bar != nil {
		bar.Done()
	}
	for _, q := range p.Partitions {
		o := outs[q.Name]
		if err := o.Verify(ctx, q.Size, q.SHA256); err != nil {
			return fmt.Errorf("partition %q: %w", q.Name, err)
		}
	}
	for _, q := range p.Partitions { // a file gets its name only when all of them are proven
		o := outs[q.Name]
		if o.final == "" {
			continue
		}
		if err := o.file.Truncate(q.Size); err != nil {
			return fmt.Errorf("finishing partition %q: %w", q.Name, err)
		}
		if err := atomicfile.Place(o.file, o.final, 0o644); err != nil {
			return fmt.Errorf("finishing partition %q: %w", q.Name, err)
		}
	}
	return nil
}
