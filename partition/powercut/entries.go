package powercut

import (
	"fmt"
	"slices"
	"strings"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/bls"
	"github.com/flipside-linux/flipside/partition/bootsim"
)

// The boot entries of a rig that has any. One is longer than a sector of 512 bytes, so that there are halves of it.
const (
	entrySectors = 3
	entryPath    = "/flipside/vmlinuz-"
)

var (
	entryNames   = []string{"flipside-a.conf", "flipside-a+1.conf", "flipside-a+0-1.conf", "flipside-b.conf", "flipside-b+1.conf", "flipside-b+0-1.conf"}
	entryOptions = strings.Repeat("option=value ", 60) + "last=one"
)

// entriesOf are the boot entries on a device, behind everything else.
func (r *rig) entriesOf(dev partition.Device) *files {
	state := r.stateOf(dev)
	return newFiles(dev, r.boot, state.off+state.size(), entrySectors, entryNames...)
}

func entryTemplate() string { return "efi " + entryPath + "{letter}\noptions " + entryOptions + "\n" }

// writeEntries makes the entries of a host that was installed.
func (r *rig) writeEntries(dev partition.Device) error {
	if r.backend != InEntries {
		return nil
	}
	dir := r.entriesOf(dev)
	for i, letter := range []string{"a", "b"} {
		f, err := dir.Create("flipside-" + letter + ".conf")
		if err != nil {
			return err
		}
		text := fmt.Sprintf("sort-key flipside\nversion %02d\n%s", 2-i, strings.ReplaceAll(entryTemplate(), "{letter}", letter))
		if _, err := f.WriteAt([]byte(text), 0); err != nil {
			return err
		}
	}
	return nil
}

// open opens the disk of a rig on a device.
func (r *rig) open(dev partition.Device) *partition.Disk {
	opt := partition.Options{}
	if r.backend == InEntries {
		dir := bls.Dir(r.entriesOf(dev))
		if r.mutate != nil {
			dir = r.mutate(dir)
		}
		opt.Bits = &bls.Entries{Dir: dir, Template: entryTemplate()}
	}
	return partition.NewDisk(window{dev, r.size}, opt)
}

// choose lets the boot loader of a rig choose and spend a try, on any device. It returns the label of the slot.
func (r *rig) choose(dev partition.Device, f partition.Firmware) (string, error) {
	if r.backend != InEntries {
		s, _, err := bootsim.Choose(window{dev, r.size}, f)
		return s.Label, err
	}
	kernels := r.kernelsOf(dev)
	e, err := bootsim.SystemdBoot(r.entriesOf(dev), func(p string) bool {
		return kernels.read("vmlinuz-"+strings.TrimPrefix(p, entryPath)) != nil
	})
	return labelOf(e), err
}

func labelOf(e bootsim.Entry) string {
	return "USR-" + strings.ToUpper(strings.TrimPrefix(e.Program, entryPath))
}

// choose lets the boot loader choose on an image, which stays as it is.
func (o *oracle) choose(image []byte, f partition.Firmware) (string, error) {
	return o.r.choose(o.all(image), f)
}

// entries: whatever systemd-boot could ever start, whole is what it leads to, and whole are its lines; and our own reading of it does not fail.
func (o *oracle) entries(image []byte) error {
	list, err := bootsim.Entries(o.r.entriesOf(o.all(image)))
	if err != nil {
		return err
	}
	for _, e := range list {
		if err := o.whole(image, labelOf(e)); err != nil {
			return fmt.Errorf("the entry %s leads to slot %s: %w", e.Name, labelOf(e), err)
		}
		if e.Options != entryOptions || e.SortKey != "flipside" || e.Version == "" {
			return fmt.Errorf("the entry %s is not whole: %+v", e.Name, e)
		}
	}
	_, err = o.r.open(o.all(image)).Slots()
	return err
}

// settled: between two calls the boot bits are what the last one made.
func (o *oracle) settled(image, before []byte) error {
	if o.r.backend != InEntries {
		return nil
	}
	got, err := o.r.open(o.all(image)).Slots()
	if err != nil {
		return err
	}
	want, err := o.r.open(o.all(before)).Slots()
	if err != nil {
		return err
	}
	if !slices.Equal(got, want) {
		return fmt.Errorf("between two changes the boot bits are %+v, want %+v", got, want)
	}
	return nil
}
