// Package install is one update of a slot as a transaction: the slot, the files that belong to it on other file systems, such as its kernel on the
// boot partition, the new release's own post-install program, and the boot bits, in the only order in which a power cut between any
// two steps leaves the old release bootable with its own kernel.
//
//	in, err := install.Begin(disk, running, "USR-B", install.Options{Files: kernel, PostInstall: program})
//	in.Slot().WriteAt(...)                     // and in.File("kernel").WriteAt(...), as often as it takes
//	ready, err := in.Finish(ctx, image, files) // all is on the medium and right, and the program has run
//	err = ready.Arm(1)                         // the slot boots next
//
// # Order
//
//  1. The slot's boot bits are zero on the medium. Before that nothing that belongs to it changes.
//  2. The slot and the temporary files are written.
//  3. The slot is flushed, read back past every cache, and its hash compared.
//  4. Each file is put into its place, as package atomicfile does it.
//  5. The post-install program runs. What it did to the slot's boot bits is undone, and the slot is read back again.
//  6. The boot bits are set. Only a [Ready] can do it, and only Finish makes one.
//
// A file is named for its slot and is never that of the running slot: [FileName].
package install

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
)

// File says where a file that belongs to a slot is kept: as Prefix and the slot's letter, such as vmlinuz-b for USR-B.
type File struct {
	Dir    atomicfile.Dir
	Prefix string // such as "vmlinuz-"
	Suffix string // such as ".zip"
}

// Image is what something holds when it is complete.
type Image struct {
	Size   int64 // bytes
	SHA256 [32]byte
}

// Options say what belongs to a slot beside its partition.
type Options struct {
	Files map[string]File // by the name of their image
	// PostInstall runs the new release's own program, with the slot complete and the files in their places. nil: there is none.
	// It says whether the program ran: then the slot is read back once more, because what root runs can write to it.
	PostInstall func(ctx context.Context, s partition.Slot) (ran bool, err error)
}

// Install is an update of a slot under way.
type Install struct {
	disk   *partition.Disk
	run    partition.Running
	target *partition.Target
	files  map[string]*atomicfile.Pending
	post   func(context.Context, partition.Slot) (bool, error)
}

// FileName is the name of a slot's file: what comes after the last dash of the label, in small letters, after the prefix.
func (f File) FileName(label string) (string, error) {
	_, letter, ok := cutLast(label)
	name := f.Prefix + strings.ToLower(letter) + f.Suffix
	if !ok || letter == "" || strings.ContainsAny(name, "/\x00") {
		return "", fmt.Errorf("slot %q has no letter to name its files by: want a label such as USR-B", label)
	}
	return name, nil
}

func cutLast(s string) (before, after string, ok bool) {
	if i := strings.LastIndexByte(s, '-'); i >= 0 {
		return s[:i], s[i+1:], true
	}
	return s, "", false
}

// Begin makes the slot unbootable, durably, and opens what is to be written. It refuses as [partition.Disk.Begin] does, and when a file of the slot
// would have the name of a file of another slot.
func Begin(d *partition.Disk, run partition.Running, label string, opt Options) (*Install, error) {
	slots, err := d.Slots()
	if err != nil {
		return nil, err
	}
	names := map[string]string{}
	for key, f := range opt.Files {
		name, err := f.FileName(label)
		if err != nil {
			return nil, err
		}
		for _, s := range slots {
			if other, err := f.FileName(s.Label); s.Label != label && err == nil && other == name {
				return nil, fmt.Errorf("slots %q and %q would both have the file %q", label, s.Label, name)
			}
		}
		// A directory that is not there is found out while the slot is still one to go back to.
		if _, err := f.Dir.Free(); err != nil {
			return nil, fmt.Errorf("where %q goes: %w", name, err)
		}
		names[key] = name
	}
	in := &Install{disk: d, run: run, files: map[string]*atomicfile.Pending{}, post: opt.PostInstall}
	if in.target, err = d.Begin(run, label); err != nil {
		return nil, err
	}
	for key, f := range opt.Files {
		if in.files[key], err = atomicfile.Begin(f.Dir, names[key]); err != nil {
			in.Close()
			return nil, err
		}
	}
	return in, nil
}

// Slot is where the slot's image is written.
func (in *Install) Slot() *partition.Target { return in.target }

// File is where the image of a file is written, nil if there is no such file.
func (in *Install) File(name string) *atomicfile.Pending { return in.files[name] }

// Reserve finds out whether a file of size bytes fits. The slot is not bootable, so its old file may go where there is no space for both.
func (in *Install) Reserve(name string, size int64) error { return in.files[name].Reserve(size, true) }

// Close gives up what is not in its place. The slot stays unbootable unless it was armed.
func (in *Install) Close() error {
	var errs []error
	for _, p := range in.files {
		if p != nil {
			errs = append(errs, p.Close())
		}
	}
	return errors.Join(errs...)
}

// Discard is Close for a release that will not be tried again: what it left of files is removed.
func (in *Install) Discard() error {
	var errs []error
	for _, p := range in.files {
		if p != nil {
			errs = append(errs, p.Discard())
		}
	}
	return errors.Join(errs...)
}

// Ready is the proof that a slot and all that belongs to it are on the medium and complete, and that the post-install program is content.
type Ready struct {
	in       *Install
	verified partition.Verified
}

// Finish proves the slot, puts the files into their places, and runs the post-install program. There must be an image for each file.
func (in *Install) Finish(ctx context.Context, slot Image, files map[string]Image) (Ready, error) {
	for name := range in.files {
		if _, ok := files[name]; !ok {
			return Ready{}, fmt.Errorf("nobody said what %q must hold", name)
		}
	}
	v, err := in.target.Verify(ctx, slot.Size, slot.SHA256)
	if err != nil {
		return Ready{}, err
	}
	for _, name := range slices.Sorted(maps.Keys(in.files)) {
		if err := in.files[name].Commit(ctx, files[name].Size, files[name].SHA256); err != nil {
			return Ready{}, err
		}
	}
	if in.post != nil {
		if err := in.runPost(ctx, v.Slot(), slot); err != nil {
			return Ready{}, err
		}
	}
	return Ready{in, v}, nil
}

// runPost runs the post-install program, and looks at the slot again if it ran. Such programs set the boot bits themselves, for agents that leave that to
// them: whatever came of it, also when it failed or ctx has ended, nothing is bootable afterwards that Arm did not make so.
func (in *Install) runPost(ctx context.Context, s partition.Slot, want Image) (err error) {
	defer func() {
		now, e := in.disk.Slot(s.Label)
		if e == nil && now != s {
			e = in.disk.MarkBad(s.Label)
		}
		if e != nil {
			err = errors.Join(err, fmt.Errorf("after the post-install program: %w", e))
		}
	}()
	ran, err := in.post(ctx, s)
	if err != nil || !ran {
		return err
	}
	if err := in.disk.Check(ctx, s.Label, want.Size, want.SHA256); err != nil {
		return fmt.Errorf("after the post-install program: %w", err)
	}
	return nil
}

// Arm makes the slot the one that boots next, with tries boots to prove itself.
func (r Ready) Arm(tries int) error {
	if r.in == nil {
		return errors.New("arming a slot: nothing was finished")
	}
	return r.in.disk.Activate(r.in.run, r.verified, tries)
}
