package powercut

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/bootsim"
	"github.com/flipside-linux/flipside/partition/devicetest"
	"github.com/flipside-linux/flipside/partition/gptimage"
)

// Start is how the partition table is before the update.
type Start string

// The starts.
const (
	Healthy    Start = "both copies good"
	PrimaryBad Start = "primary copy bad"
	BackupBad  Start = "backup copy bad"
)

// Path is how the update goes.
type Path string

// The paths.
const (
	Good   Path = "good update"
	Failed Path = "new release fails its trial boot"
)

const (
	slotA, slotB = "USR-A", "USR-B"
	slotSectors  = 24
	chunk        = 4 // sectors in one write of data
	settle       = 3 // chunks between two flushes
)

// call is one change of the table, or one boot, in the log.
type call struct {
	name     string
	from, to int    // operations of the log
	after    []byte // the disk afterwards
	boot     bool
}

// rig is a disk with two slots, an old release that runs from the first, and an older one in the second.
type rig struct {
	sector   int
	base     []byte
	layout   gptimage.Layout
	run, old []byte   // what is in A, and was in B
	release  []byte   // what comes into B
	sum      [32]byte // of the release
	dev      *devicetest.Memory
	front    partition.Device // what the production code gets
	disk     *partition.Disk
	calls    []call
}

func newRig(sector int, start Start) (*rig, error) {
	size := int64(slotSectors * sector)
	r := &rig{sector: sector, layout: gptimage.Layout{Sector: sector, UUID: "22222222-2222-4222-8222-222222222222", Align: int64(sector), Parts: []gptimage.Partition{
		{Label: "EFI-SYSTEM", Type: gptimage.TypeEFI, UUID: "11111111-1111-4111-8111-111111111111", Size: int64(4 * sector)},
		{Label: slotA, Type: gptimage.TypeUSR, UUID: "7130c94a-213a-4e5a-8e26-6cce9662f132", Size: size, Attributes: gptimage.Attributes(2, 0, true)},
		{Label: slotB, Type: gptimage.TypeUSR, UUID: "e03dd35c-7c2d-4a47-b3fe-27f15780a57c", Size: size, Attributes: gptimage.Attributes(1, 0, true)},
	}}}
	total, err := r.layout.Size()
	if err != nil {
		return nil, err
	}
	m := devicetest.NewMemory(make([]byte, total), sector)
	if err := r.layout.Write(m); err != nil {
		return nil, err
	}
	r.base = m.Bytes()
	noise := rand.NewChaCha8([32]byte{byte(sector >> 8)})
	fill := func(p []byte) []byte {
		noise.Read(p)
		return bytes.Clone(p)
	}
	r.run = fill(r.slot(r.base, slotA))
	r.old = fill(r.slot(r.base, slotB))
	r.release = fill(make([]byte, size))
	r.sum = sha256.Sum256(r.release)
	switch start {
	case PrimaryBad: // its header's checksum
		r.base[sector+60] ^= 0xff
	case BackupBad: // its entries
		r.base[len(r.base)-3*sector] ^= 0xff
	}
	r.reset(r.base)
	return r, nil
}

func (r *rig) slot(image []byte, label string) []byte {
	for _, p := range r.layout.Parts {
		if p.Label == label {
			return image[p.Start : p.Start+p.Size]
		}
	}
	return nil
}

// reset starts a new log on a disk.
func (r *rig) reset(image []byte) {
	r.dev = devicetest.NewMemory(image, r.sector)
	r.front, r.calls = r.dev, nil
	r.restart()
}

// restart is a new process on the same disk.
func (r *rig) restart() { r.disk = partition.NewDisk(r.front, partition.Options{}) }

// do runs one call and notes where it is in the log. A call that fails has no end.
func (r *rig) do(name string, boot bool, f func() error) error {
	c := call{name: name, from: len(r.dev.Log), boot: boot, to: 1 << 30}
	err := f()
	if err == nil {
		c.to = len(r.dev.Log)
		c.after = append([]byte(nil), r.dev.Bytes()...)
	}
	r.calls = append(r.calls, c)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// boot is a power-on. It returns the label of what was booted.
func (r *rig) boot() (label string, err error) {
	err = r.do("boot", true, func() error {
		s, _, err := bootsim.Choose(r.front, partition.GRUB)
		label = s.Label
		return err
	})
	r.restart()
	return label, err
}

// update runs the whole update, as the daemon does it.
func (r *rig) update(p Path) error {
	run, err := r.disk.RunningFromLabel(slotA)
	if err != nil {
		return err
	}
	if err := r.install(run); err != nil {
		return err
	}
	label, err := r.boot()
	if err != nil {
		return err
	}
	if label != slotB {
		return fmt.Errorf("the boot loader chose %q for the trial", label)
	}
	if p == Good {
		return r.do("mark successful", false, func() error {
			run, err := r.disk.RunningFromLabel(slotB)
			if err != nil {
				return err
			}
			return r.disk.MarkSuccessful(run)
		})
	}
	if label, err = r.boot(); err != nil {
		return err
	}
	if label != slotA {
		return fmt.Errorf("the boot loader chose %q after a failed trial", label)
	}
	return r.do("mark bad", false, func() error { return r.disk.MarkBad(slotB) })
}

// install writes the release to slot B and makes it boot next.
func (r *rig) install(run partition.Running) error {
	var t *partition.Target
	err := r.do("begin", false, func() (err error) {
		t, err = r.disk.Begin(run, slotB)
		return err
	})
	if err != nil {
		return err
	}
	step := chunk * r.sector
	for off := 0; off < len(r.release); off += step {
		if _, err := t.WriteAt(r.release[off:off+step], int64(off)); err != nil {
			return err
		}
		if upto := off + step; upto/step%settle == 0 && upto < len(r.release) {
			if err := t.Settle(int64(upto)); err != nil {
				return err
			}
		}
	}
	v, err := t.Verify(context.Background(), int64(len(r.release)), r.sum)
	if err != nil {
		return err
	}
	return r.do("activate", false, func() error { return r.disk.Activate(run, v, 1) })
}

// recover is what a start after a power cut does.
func (r *rig) recover() error {
	return r.do("recover", false, func() error {
		_, err := r.disk.Repair()
		return err
	})
}

var errKilled = errors.New("the process was killed")
