package writer

import (
	"fmt"
	"io/fs"

	"github.com/google/uuid"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/partition/bls"
	"github.com/flipside-linux/flipside/partition/mounted"
	"github.com/flipside-linux/flipside/updater/config"
)

// OpenDisk opens a disk with slots as the configuration has it: which partitions are slots, and where their boot bits are. The caller closes it.
func OpenDisk(c config.Config, path string, readOnly bool) (*partition.Disk, error) {
	typ, err := uuid.Parse(c.Slots.Type)
	if err != nil {
		return nil, fmt.Errorf("slots.type %q: %w", c.Slots.Type, err)
	}
	opt := partition.Options{ReadOnly: readOnly, TypeGUID: typ}
	if c.Boot.Backend == "bls" {
		opt.Bits = &bls.Entries{Dir: atomicfile.OS(c.Boot.Entries), Template: c.Boot.Entry}
	}
	return partition.OpenDisk(path, opt)
}

// auto stands in the configuration for what can be found out.
const auto = "auto"

// Where is the disk that a host runs from, and the label of the slot.
type Where struct{ Disk, Running string }

// Locate finds out what the configuration names, or what /usr is mounted from. root is the root of the file system. Where both are known they must agree: a name
// that was right before an update is wrong after it, and the slot that runs would be written to.
func Locate(c config.Config, root fs.FS) (Where, error) {
	w := Where{c.Slots.Disk, c.Slots.Running}
	named := w.Disk != auto && w.Running != auto
	usr, err := mounted.Usr(root)
	if named && (err != nil || usr.Disk != w.Disk) {
		return w, nil // nothing to compare with
	}
	if err != nil {
		return w, fmt.Errorf("%w; slots.disk and slots.running can name them", err)
	}
	if w.Disk == auto {
		w.Disk = usr.Disk
	}
	d, err := OpenDisk(c, w.Disk, true)
	if err != nil {
		return w, err
	}
	defer d.Close()
	slots, err := d.Slots()
	if err != nil {
		return w, err
	}
	for _, s := range slots {
		if s.Index == usr.Index {
			if w.Running == auto {
				w.Running = s.Label
			}
			if w.Running != s.Label {
				return w, fmt.Errorf("slots.running is %s, and /usr is mounted from %s", w.Running, s.Label)
			}
			return w, nil
		}
	}
	if named {
		return w, nil
	}
	return w, fmt.Errorf("/usr is mounted from %s, which is not a slot of type %s on %s", usr.Name, c.Slots.Type, w.Disk)
}
