package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/payload"
)

func (a *app) payloadVerifyCommand() *cobra.Command {
	var keys []string
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "check everything about a payload",
		Long: `Verify checks the signatures with the keys given, reads the whole file, decodes every operation, and compares the images
that come out with the hashes in the manifest. The images are kept in a temporary directory (TMPDIR) meanwhile.

Exit status: 0 all of it holds, 6 it does not.`,
		Args: exactArgs(1, "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := openPayload(cmd.Context(), args[0], keys)
			if err != nil {
				return err
			}
			if p.Delta() {
				return withExit(exitVerify, fmt.Errorf("%s: %w: a delta can only be checked with the old image", args[0], payload.ErrUnsupported))
			}
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
			if err := a.applyPayload(cmd.Context(), "verifying", p, places); err != nil {
				return payloadError(fmt.Errorf("%s: %w", args[0], err))
			}
			return a.printInfo(describe(args[0], p, "everything: signatures, data and images"))
		},
	}
	cmd.Flags().StringSliceVar(&keys, "key", nil, "public key (PEM file or directory); any one of several is enough")
	return cmd
}

func (a *app) payloadApplyCommand() *cobra.Command {
	var keys, to []string
	cmd := &cobra.Command{
		Use:   "apply FILE --key PUB --to PATH",
		Short: "write a payload's images to files or block devices",
		Long: `Apply writes the images of a payload, after its signature was checked with the keys given, and reads back what it wrote. A file is
written beside its name and gets the name only when all of it is proven; a block device is written in place.

With several partitions, --to NAME=PATH says where each goes.

Exit status: 0 the images are written and proven, 6 something does not verify.`,
		Args: exactArgs(1, "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := openPayload(cmd.Context(), args[0], keys)
			if err != nil {
				return err
			}
			places, err := placesOf(p, to)
			if err != nil {
				return err
			}
			if err := a.applyPayload(cmd.Context(), "applying", p, places); err != nil {
				return payloadError(fmt.Errorf("%s: %w", args[0], err))
			}
			return a.printInfo(describe(args[0], p, "everything: signatures, data and the images, read back"))
		},
	}
	cmd.Flags().StringSliceVar(&keys, "key", nil, "public key (PEM file or directory); any one of several is enough")
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

// output is a file or block device that an image is written to.
type output struct {
	*os.File
	final string // name that a file gets at the end; empty for a block device
}

func (o *output) Flush() error { return o.Sync() }

func openOutput(path string) (*output, error) {
	info, err := os.Stat(path)
	switch {
	case err == nil && info.Mode()&os.ModeDevice != 0:
		f, err := os.OpenFile(path, os.O_RDWR|os.O_EXCL, 0)
		return &output{File: f}, err
	case err == nil && !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is neither a file nor a block device", path)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return nil, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".partial-")
	if err != nil {
		return nil, err
	}
	return &output{f, path}, nil
}

func (a *app) applyPayload(ctx context.Context, what string, p *payload.Payload, places map[string]string) (err error) {
	outs := map[string]*output{}
	targets := map[string]payload.Target{}
	defer func() {
		for _, o := range outs {
			o.Close()
			if err != nil && o.final != "" {
				os.Remove(o.Name())
			}
		}
	}()
	for name, path := range places {
		o, err := openOutput(path)
		if err != nil {
			return fmt.Errorf("opening the place of partition %q: %w", name, err)
		}
		outs[name], targets[name] = o, o
	}
	bar := a.progress(what, p.Size)
	if err := p.Apply(ctx, payload.ApplyOptions{Targets: targets, Progress: func(g payload.Progress) { bar.Set(g.Bytes) }}); err != nil {
		return err
	}
	bar.Done()
	for _, q := range p.Partitions {
		o := outs[q.Name]
		h := sha256.New()
		if _, err := io.Copy(h, io.NewSectionReader(o, 0, q.Size)); err != nil {
			return fmt.Errorf("reading partition %q back: %w", q.Name, err)
		}
		if !bytes.Equal(h.Sum(nil), q.SHA256[:]) {
			return fmt.Errorf("%w: partition %q reads back with SHA-256 %s", payload.ErrHash, q.Name, hex.EncodeToString(h.Sum(nil)))
		}
		if o.final == "" {
			continue
		}
		if err := errors.Join(o.Truncate(q.Size), o.Chmod(0o644), o.Sync(), os.Rename(o.Name(), o.final)); err != nil {
			return fmt.Errorf("finishing partition %q: %w", q.Name, err)
		}
	}
	return nil
}
