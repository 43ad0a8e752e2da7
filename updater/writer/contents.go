package writer

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/partition/install"
	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/postinstall"
)

// Contents says where each part of a payload goes.
type Contents struct {
	Slot  payload.Partition
	Files map[string]install.File // by the name of the part
	post  string                  // program of the slot to run; "" for none
	must  bool                    // it must be there and succeed
}

// Parts of a payload that are files beside the slot.
const (
	KernelPart = "kernel"
	PolicyPart = "pcr_policy"
)

// places is where the files beside a slot go, by the name of the part.
func places(c config.Config) map[string]install.File {
	return map[string]install.File{
		KernelPart: {Dir: atomicfile.OS(c.Slots.Kernels), Prefix: "vmlinuz-"},
		PolicyPart: {Dir: atomicfile.OS(c.Paths.State), Prefix: "pcrs-", Suffix: ".zip"},
	}
}

// ContentsOf finds a place for everything that a payload brings to the host that c configures. What has no place makes it a payload for another kind of host.
func ContentsOf(p *payload.Payload, conf config.Config) (Contents, error) {
	known := places(conf)
	want := conf.Update.Partition
	c := Contents{Files: map[string]install.File{}}
	var names, rest []string
	for _, q := range p.Partitions {
		names = append(names, q.Name)
		file, ok := known[q.Name]
		switch {
		case q.Name == want:
			c.Slot = q
		case ok && len(p.Partitions) > 1:
			c.Files[q.Name] = file
		case want == "" && c.Slot.Name == "":
			c.Slot = q
		default:
			rest = append(rest, q.Name)
		}
	}
	switch {
	case c.Slot.Name == "" && want != "":
		return c, fmt.Errorf("%w: it holds %s, and update.partition wants %s", payload.ErrUnsupported, strings.Join(names, ", "), want)
	case c.Slot.Name == "" || len(rest) > 0 && want == "":
		return c, fmt.Errorf("%w: it holds %s, and which of them goes to the slot is not known; update.partition says so", payload.ErrUnsupported, strings.Join(names, ", "))
	case len(rest) > 0:
		return c, fmt.Errorf("%w: it holds %s, and this host has no place for %s", payload.ErrUnsupported, strings.Join(names, ", "), strings.Join(rest, ", "))
	}
	if conf.Slots.PostInstall == "off" {
		return c, nil
	}
	c.post, c.must = c.Slot.PostInstall, !c.Slot.PostInstallOptional
	if p.Major == 1 {
		c.post, c.must = payload.PostInstallDefault, true
	}
	return c, nil
}

// Paths is where the files of a slot are, by the name of the part.
func (c Contents) Paths(label string) map[string]string {
	paths := map[string]string{}
	for part, f := range c.Files {
		dir, _ := f.Dir.(atomicfile.OS)
		if name, err := f.FileName(label); err == nil { // or install.Begin would have refused it
			paths[part] = filepath.Join(string(dir), name)
		}
	}
	return paths
}

// postInstall is what runs the release's own program, nil if there is none.
func (w *Writer) postInstall(c Contents, version string, step func(string)) func(context.Context, partition.Slot) (bool, error) {
	if c.post == "" {
		return nil
	}
	return func(ctx context.Context, s partition.Slot) (bool, error) {
		step("running the post-install program of")
		var args []string
		for _, part := range []struct{ name, key string }{{KernelPart, "KERNEL"}, {PolicyPart, "PCR_POLICY"}} {
			if path, ok := c.Paths(s.Label)[part.name]; ok {
				args = append(args, part.key+"="+path)
			}
		}
		ran, err := postinstall.Program{
			Disk: w.where.Disk, Slot: s, Path: c.post, Args: args, Version: version, Missing: !c.must,
			// Not below Run: the agent may write there, and would decide what is run.
			Mount: filepath.Join(filepath.Clean(w.conf.Paths.Run)+"-writer", "slot"), Output: filepath.Join(w.conf.Paths.State, "post-install.log"),
			Timeout: time.Duration(w.conf.Slots.PostInstallTimeout), Log: w.log,
		}.Run(ctx)
		if err != nil && !c.must && ctx.Err() == nil {
			w.log.Warn("the post-install program is optional, and the update goes on without it", "error", err)
			return ran, nil
		}
		return ran, err
	}
}
