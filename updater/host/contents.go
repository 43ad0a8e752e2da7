package host

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/partition/install"
	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/updater/postinstall"
)

// contents says where each part of a payload goes.
type contents struct {
	slot  payload.Partition
	files map[string]install.File // by the name of the part
	post  string                  // program of the slot to run; "" for none
	must  bool                    // it must be there and succeed
}

// Parts of a payload that are files beside the slot.
const (
	kernelPart = "kernel"
	policyPart = "pcr_policy"
)

// places is where the files beside a slot go, by the name of the part.
func (in *installer) places() map[string]install.File {
	return map[string]install.File{
		kernelPart: {Dir: atomicfile.OS(in.conf.Slots.Kernels), Prefix: "vmlinuz-"},
		policyPart: {Dir: atomicfile.OS(in.conf.Paths.State), Prefix: "pcrs-", Suffix: ".zip"},
	}
}

// contents finds a place for everything that a payload brings. What has no place makes it a payload for another kind of host.
func (in *installer) contents(p *payload.Payload) (contents, error) {
	known := in.places()
	want := in.conf.Update.Partition
	c := contents{files: map[string]install.File{}}
	var names, rest []string
	for _, q := range p.Partitions {
		names = append(names, q.Name)
		file, ok := known[q.Name]
		switch {
		case q.Name == want:
			c.slot = q
		case ok && len(p.Partitions) > 1:
			c.files[q.Name] = file
		case want == "" && c.slot.Name == "":
			c.slot = q
		default:
			rest = append(rest, q.Name)
		}
	}
	switch {
	case c.slot.Name == "" && want != "":
		return c, fmt.Errorf("%w: it holds %s, and update.partition wants %s", payload.ErrUnsupported, strings.Join(names, ", "), want)
	case c.slot.Name == "" || len(rest) > 0 && want == "":
		return c, fmt.Errorf("%w: it holds %s, and which of them goes to the slot is not known; update.partition says so", payload.ErrUnsupported, strings.Join(names, ", "))
	case len(rest) > 0:
		return c, fmt.Errorf("%w: it holds %s, and this host has no place for %s", payload.ErrUnsupported, strings.Join(names, ", "), strings.Join(rest, ", "))
	}
	if in.conf.Slots.PostInstall == "off" {
		return c, nil
	}
	c.post, c.must = c.slot.PostInstall, !c.slot.PostInstallOptional
	if p.Major == 1 {
		c.post, c.must = payload.PostInstallDefault, true
	}
	return c, nil
}

// sources opens what a delta changes, for reading only: the running slot, and the files that belong to it.
func (in *installer) sources(p *payload.Payload, c contents, running partition.Slot) (map[string]io.ReaderAt, func(), error) {
	sources, files := map[string]io.ReaderAt{}, []*os.File{}
	closeAll := func() {
		for _, f := range files {
			f.Close()
		}
	}
	for _, q := range p.Partitions {
		if q.OldSize == 0 {
			continue
		}
		path, slot := in.path, q.Name == c.slot.Name
		if !slot {
			file := c.files[q.Name]
			name, err := file.FileName(running.Label)
			if err != nil {
				closeAll()
				return nil, nil, err
			}
			dir, _ := file.Dir.(atomicfile.OS)
			path = filepath.Join(string(dir), name)
		}
		f, err := os.Open(path)
		if err != nil {
			closeAll()
			return nil, nil, fmt.Errorf("%w: the running system's %s: %w", payload.ErrBase, q.Name, err)
		}
		files, sources[q.Name] = append(files, f), f
		if slot {
			if q.OldSize > running.Size {
				closeAll()
				return nil, nil, fmt.Errorf("%w: it had %d bytes, and the running slot %s has %d", payload.ErrBase, q.OldSize, running.Label, running.Size)
			}
			sources[q.Name] = io.NewSectionReader(f, running.Start, running.Size)
		}
	}
	return sources, closeAll, nil
}

// postInstall is what runs the release's own program, nil if there is none.
func (in *installer) postInstall(c contents, version string, meter *meter) func(context.Context, partition.Slot) (bool, error) {
	if c.post == "" {
		return nil
	}
	return func(ctx context.Context, s partition.Slot) (bool, error) {
		meter.step("running the post-install program of")
		var args []string
		for _, part := range []struct{ name, key string }{{kernelPart, "KERNEL"}, {policyPart, "PCR_POLICY"}} {
			if path, ok := c.paths(s.Label)[part.name]; ok {
				args = append(args, part.key+"="+path)
			}
		}
		ran, err := postinstall.Program{
			Disk: in.path, Slot: s, Path: c.post, Args: args, Version: version, Missing: !c.must,
			Mount: filepath.Join(in.conf.Paths.Run, "slot"), Output: filepath.Join(in.conf.Paths.State, "post-install.log"),
			Timeout: time.Duration(in.conf.Slots.PostInstallTimeout), Log: in.log,
		}.Run(ctx)
		if err != nil && !c.must && ctx.Err() == nil {
			in.log.Warn("the post-install program is optional, and the update goes on without it", "error", err)
			return ran, nil
		}
		return ran, err
	}
}

// paths is where the files of a slot are, by the name of the part.
func (c contents) paths(label string) map[string]string {
	paths := map[string]string{}
	for part, f := range c.files {
		dir, _ := f.Dir.(atomicfile.OS)
		if name, err := f.FileName(label); err == nil { // or install.Begin would have refused it
			paths[part] = filepath.Join(string(dir), name)
		}
	}
	return paths
}
