package powercut

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/partition/bls"
	"github.com/flipside-linux/flipside/partition/devicetest"
	"github.com/flipside-linux/flipside/partition/gptimage"
	"github.com/flipside-linux/flipside/partition/install"
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

// Backend is where the boot bits are kept, and with them which boot loader chooses.
type Backend string

// The backends.
const (
	InTable   Backend = "bits in the table"
	InEntries Backend = "bits in boot entries" // systemd-boot's, on the same kind of file system as the kernels
)

// Step is a moment of an update at which its state is saved.
type Step string

// The steps, in their order. The last one depends on the path.
const (
	Idle       Step = "idle"
	Applying   Step = "applying"
	Checkpoint Step = "checkpoint"
	Armed      Step = "armed"
	Rebooting  Step = "rebooting"
	Trial      Step = "trial"
	Confirmed  Step = "confirmed"
	FellBack   Step = "fell back"
)

const (
	slotA, slotB = "USR-A", "USR-B"
	slotSectors  = 24
	chunk        = 4 // sectors in one write of data
	settle       = 3 // chunks between two flushes

	kernelSectors = 3
	stateSectors  = 6
	kernelA       = "vmlinuz-a"
	kernelB       = "vmlinuz-b"
	stateFile     = "state.json"
)

// call is one change of the table, or one boot, in the log.
type call struct {
	name     string
	from, to int    // operations of the log
	after    []byte // the disk afterwards
	boot     bool
}

// save is one change of the state file.
type save struct {
	from, to int
	data     []byte
}

// rig is a machine: a disk with two slots, an old release that runs from the first, and an older one in the second; a boot partition with their
// kernels; and a file system with the state file. All three lie one after the other on one device, so that there is one log.
type rig struct {
	sector  int
	boot    FileSystem // kind of the boot partition's
	backend Backend
	saved   func(Step) []byte
	base    []byte
	layout  gptimage.Layout
	size    int64     // of the disk proper
	run     []byte    // what is in A
	old     []byte    // and was in B
	release []byte    // what comes into B
	kernels [3][]byte // of the three
	sum     [32]byte  // of the release
	dev     *devicetest.Memory
	front   partition.Device // what the production code gets
	disk    *partition.Disk
	calls   []call
	saves   []save

	mutate func(bls.Dir) bls.Dir // what the production code gets for the entries; nil: the entries
}

// window is the disk proper of a rig's device.
type window struct {
	partition.Device
	size int64
}

func (w window) Size() int64  { return w.size }
func (w window) Flush() error { return w.Device.(devicetest.RangeFlusher).FlushRange(0, w.size) }

func (w window) ReadMedium(p []byte, off int64) (int, error) {
	if m, ok := w.Device.(partition.MediumReader); ok {
		return m.ReadMedium(p, off)
	}
	return w.ReadAt(p, off)
}

// kernelsOf are the kernels on a device.
func (r *rig) kernelsOf(dev partition.Device) *files {
	return newFiles(dev, r.boot, r.size, kernelSectors, kernelA, kernelB, "."+kernelB+".new")
}

// stateOf is the file system with the state.
func (r *rig) stateOf(dev partition.Device) *files {
	return newFiles(dev, Journal, r.size+r.kernelsOf(dev).size(), stateSectors, stateFile, "."+stateFile+".new")
}

func newRig(sector int, start Start, boot FileSystem, backend Backend, saved func(Step) []byte) (*rig, error) {
	size := int64(slotSectors * sector)
	if saved == nil {
		saved = func(s Step) []byte { return []byte(s) }
	}
	r := &rig{sector: sector, boot: boot, backend: backend, saved: saved, layout: gptimage.Layout{Sector: sector, UUID: "22222222-2222-4222-8222-222222222222", Align: int64(sector), Parts: []gptimage.Partition{
		{Label: "EFI-SYSTEM", Type: gptimage.TypeEFI, UUID: "11111111-1111-4111-8111-111111111111", Size: int64(4 * sector)},
		{Label: slotA, Type: gptimage.TypeUSR, UUID: "7130c94a-213a-4e5a-8e26-6cce9662f132", Size: size, Attributes: gptimage.Attributes(2, 0, true)},
		{Label: slotB, Type: gptimage.TypeUSR, UUID: "e03dd35c-7c2d-4a47-b3fe-27f15780a57c", Size: size, Attributes: gptimage.Attributes(1, 0, true)},
	}}}
	var err error
	if r.size, err = r.layout.Size(); err != nil {
		return nil, err
	}
	total := r.size
	empty := devicetest.NewMemory(nil, sector)
	for _, f := range []*files{r.kernelsOf(empty), r.stateOf(empty), r.entriesOf(empty)} {
		total += f.size()
	}
	m := devicetest.NewMemory(make([]byte, total), sector)
	if err := r.layout.Write(window{m, r.size}); err != nil {
		return nil, err
	}
	noise := rand.NewChaCha8([32]byte{byte(sector >> 8)})
	fill := func(p []byte) []byte {
		noise.Read(p)
		return bytes.Clone(p)
	}
	r.run = fill(r.slot(m.Bytes(), slotA))
	r.old = fill(r.slot(m.Bytes(), slotB))
	r.release = fill(make([]byte, size))
	r.sum = sha256.Sum256(r.release)
	for i := range r.kernels {
		r.kernels[i] = fill(make([]byte, kernelSectors*sector-7*i))
	}
	boots := r.kernelsOf(m)
	for i, name := range []string{kernelA, kernelB} {
		f, err := boots.Create(name)
		if err != nil {
			return nil, err
		}
		if _, err := f.WriteAt(r.kernels[i], 0); err != nil {
			return nil, err
		}
	}
	if err := atomicfile.Write(r.stateOf(m), stateFile, saved(Idle)); err != nil {
		return nil, err
	}
	if err := r.writeEntries(m); err != nil {
		return nil, err
	}
	r.base = m.Bytes()
	switch start {
	case PrimaryBad: // its header's checksum
		r.base[sector+60] ^= 0xff
	case BackupBad: // its entries
		r.base[r.size-3*int64(sector)] ^= 0xff
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
	r.saves = []save{{-2, -1, r.stateOf(r.dev).read(stateFile)}}
	r.restart()
}

// restart is a new process on the same disk.
func (r *rig) restart() { r.disk = r.open(r.front) }

// save replaces the state file.
func (r *rig) save(step Step) error {
	data := r.saved(step)
	s := save{len(r.dev.Log), 1 << 30, data}
	err := atomicfile.Write(r.stateOf(r.front), stateFile, data)
	if err == nil {
		s.to = len(r.dev.Log)
	}
	r.saves = append(r.saves, s)
	if err != nil {
		return fmt.Errorf("saving the state %q: %w", step, err)
	}
	return nil
}

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

// powerOn returns the label of what was booted.
func (r *rig) powerOn() (label string, err error) {
	err = r.do("boot", true, func() error {
		label, err = r.choose(r.front, partition.GRUB)
		return err
	})
	r.restart()
	return label, err
}

// update runs the whole update, in the order of the daemon.
func (r *rig) update(p Path) error {
	run, err := r.disk.RunningFromLabel(slotA)
	if err != nil {
		return err
	}
	if err := r.install(run); err != nil {
		return err
	}
	if err := r.save(Rebooting); err != nil {
		return err
	}
	label, err := r.powerOn()
	if err != nil {
		return err
	}
	if label != slotB {
		return fmt.Errorf("the boot loader chose %q for the trial", label)
	}
	if p == Good {
		if err := r.save(Trial); err != nil {
			return err
		}
		err := r.do("mark successful", false, func() error {
			run, err := r.disk.RunningFromLabel(slotB)
			if err != nil {
				return err
			}
			return r.disk.MarkSuccessful(run)
		})
		return errors.Join(err, r.unless(err, Confirmed))
	}
	if label, err = r.powerOn(); err != nil {
		return err
	}
	if label != slotA {
		return fmt.Errorf("the boot loader chose %q after a failed trial", label)
	}
	if err := r.save(FellBack); err != nil {
		return err
	}
	return r.do("mark bad", false, func() error { return r.disk.MarkBad(slotB) })
}

func (r *rig) unless(err error, step Step) error {
	if err != nil {
		return nil
	}
	return r.save(step)
}

// install writes the release to slot B and its kernel to the boot partition, and makes them boot next.
func (r *rig) install(run partition.Running) error {
	if err := r.save(Applying); err != nil {
		return err
	}
	boots := r.kernelsOf(r.front)
	var in *install.Install
	err := r.do("begin", false, func() (err error) {
		in, err = install.Begin(r.disk, run, slotB, install.Options{
			Files:       map[string]install.File{"kernel": {Dir: boots, Prefix: "vmlinuz-"}},
			PostInstall: func(context.Context, partition.Slot) (bool, error) { return true, r.postInstall(boots) },
		})
		return err
	})
	if err != nil {
		return err
	}
	defer in.Close()
	t := in.Slot()
	step := chunk * r.sector
	for off := 0; off < len(r.release); off += step {
		if _, err := t.WriteAt(r.release[off:off+step], int64(off)); err != nil {
			return err
		}
		if upto := off + step; upto/step%settle == 0 && upto < len(r.release) {
			if err := t.Settle(int64(upto)); err != nil {
				return err
			}
			if err := r.save(Checkpoint); err != nil {
				return err
			}
		}
	}
	if _, err := in.File("kernel").WriteAt(r.kernels[2], 0); err != nil {
		return err
	}
	var ready install.Ready
	err = r.do("finish", false, func() (err error) {
		ready, err = in.Finish(context.Background(), install.Image{Size: int64(len(r.release)), SHA256: r.sum},
			map[string]install.Image{"kernel": {Size: int64(len(r.kernels[2])), SHA256: sha256.Sum256(r.kernels[2])}})
		return err
	})
	if err != nil {
		return err
	}
	if err := r.do("activate", false, func() error { return ready.Arm(1) }); err != nil {
		return err
	}
	return r.save(Armed)
}

// postInstall is the new release's own program: it finds its kernel in place, and its slot not bootable yet.
func (r *rig) postInstall(boots *files) error {
	s, err := r.disk.Slot(slotB)
	if err != nil {
		return err
	}
	if s.Bootable() || !bytes.Equal(boots.read(kernelB), r.kernels[2]) {
		return errors.New("the post-install program runs too early, or too late")
	}
	return nil
}

// recover is what a start after a power cut does.
func (r *rig) recover() error {
	return r.do("recover", false, func() error {
		_, err := r.disk.Repair()
		return err
	})
}

var errKilled = errors.New("the process was killed")
