package partition

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/google/uuid"
)

// DefaultType is the partition type of USR slots.
const DefaultType = "5dfbf5f4-2848-4bac-aa5e-0d9a20b745a6"

// Errors that callers decide on.
var (
	ErrRunning   = errors.New("the running slot is never written to")
	ErrNoSlot    = errors.New("no such slot")
	ErrNotProven = errors.New("the running slot is not known to be good")
	// ErrTried means that a slot has been booted, or may have been, and is not known to have come up.
	ErrTried    = errors.New("the slot may have been booted since")
	ErrStale    = errors.New("the slot was written to after it was verified")
	ErrMismatch = errors.New("the slot does not hold what was promised")
	ErrGeometry = errors.New("the partition table does not say where the slot is")
	ErrLast     = errors.New("no slot would be left to boot")
	ErrSettled  = errors.New("it was promised that nothing changes here")
	ErrBusy     = errors.New("somebody else is at it")
	ErrReadOnly = errors.New("the disk is open for reading only")
)

// Slot is one A/B partition as the table has it.
type Slot struct {
	Label      string
	Index      int // in the table, from 1
	Type, UUID uuid.UUID
	Start      int64 // bytes
	Size       int64 // bytes
	Priority   uint8 // 0 (never) to 15
	Tries      uint8 // boots left to prove itself
	Successful bool
}

// Bootable reports whether the boot loader may choose the slot.
func (s Slot) Bootable() bool { return s.Priority > 0 && (s.Tries > 0 || s.Successful) }

// Options say how a disk is opened.
type Options struct {
	SectorSize int  // 0: asked from the device, or seen on the image
	ReadOnly   bool // changes are errors
	TypeGUID   uuid.UUID
	Bits       Bits // where the boot bits are kept; nil: in the partition table
}

// Bits are the boot bits of slots, where they are not kept in the partition table: it then says only where a slot is. Package bls has those of
// systemd-boot. The Disk calls one method at a time, and those that write only under its lock.
type Bits interface {
	// Settle makes durable what a process that was killed may have written and not flushed.
	Settle() error
	// Read sets Priority, Tries and Successful of slots, from whatever they were.
	Read(slots []Slot) error
	// Write makes the bits those of now, durably. was is what Read said, of the same slots in the same order. Whenever it is cut off, each slot
	// has its bits of was or of now, or can be booted less than either says; those that lose priority are changed first.
	Write(was, now []Slot) error
}

// same reports whether both are the same partition at the same place. Boot bits may differ.
func (s Slot) same(o Slot) bool {
	return s.Label == o.Label && s.Index == o.Index && s.UUID == o.UUID && s.Start == o.Start && s.Size == o.Size
}

// Disk is a disk with slots.
type Disk struct {
	dev   Device
	opt   Options
	close func() error
	lock  func() (func(), error)             // of the whole disk
	claim func(off, n int64) (func(), error) // of a slot, while it may be written to

	mu      sync.Mutex     // held by whoever writes
	failed  error          // of a flush: afterwards nothing is known of what was written, and nothing more is
	gen     map[int]int    // writes to each slot, by its index: a proof from before one is void
	eras    map[int]int    // activations of each slot: a target from before one writes no more
	claimed map[int]func() // what gives up the claim on each slot that may be written to
}

// NewDisk makes a Disk of a device.
func NewDisk(dev Device, opt Options) *Disk {
	if opt.TypeGUID == uuid.Nil {
		opt.TypeGUID = uuid.MustParse(DefaultType)
	}
	free := func() {}
	return &Disk{
		dev: dev, opt: opt, gen: map[int]int{}, eras: map[int]int{}, claimed: map[int]func(){},
		close: func() error { return nil },
		lock:  func() (func(), error) { return free, nil },
		claim: func(int64, int64) (func(), error) { return free, nil },
	}
}

// Close closes the disk.
func (d *Disk) Close() error { return d.close() }

// Slots returns the slots in the order of the table.
func (d *Disk) Slots() ([]Slot, error) {
	t, err := readTables(d.dev).truth()
	if err != nil {
		return nil, err
	}
	return d.slots(t)
}

// slots are those of a table, with their boot bits.
func (d *Disk) slots(t *table) ([]Slot, error) {
	slots := d.slotsOf(t)
	if d.opt.Bits == nil {
		return slots, nil
	}
	if err := d.opt.Bits.Read(slots); err != nil {
		return nil, fmt.Errorf("reading the boot bits: %w", err)
	}
	return slots, nil
}

// Slot returns the slot with a label, of which there must be exactly one.
func (d *Disk) Slot(label string) (Slot, error) {
	slots, err := d.Slots()
	if err != nil {
		return Slot{}, err
	}
	return find(slots, label)
}

func find(slots []Slot, label string) (Slot, error) {
	var found []Slot
	for _, s := range slots {
		if s.Label == label {
			found = append(found, s)
		}
	}
	if len(found) != 1 {
		return Slot{}, fmt.Errorf("%w: %d partitions of the slot type are labelled %q", ErrNoSlot, len(found), label)
	}
	return found[0], nil
}

// Running is the slot that the host runs from. It is the proof that somebody found out.
type Running struct{ slot Slot }

// Slot returns what is known of it.
func (r Running) Slot() Slot { return r.slot }

// RunningFromLabel takes the caller's word for which slot is running, for images and simulated machines.
func (d *Disk) RunningFromLabel(label string) (Running, error) {
	s, err := d.Slot(label)
	if err != nil {
		return Running{}, err
	}
	return Running{s}, nil
}

// Copy is the state of one copy of the partition table.
type Copy struct {
	Sector int64 // of its header
	Err    error // why it is not valid, or nil
}

// Table is the state of both copies. Only the primary counts if it is valid.
type Table struct {
	Primary, Backup Copy
	Healthy         bool // both are valid and say the same
}

// Table reads the state of both copies of the partition table.
func (d *Disk) Table() Table {
	ts := readTables(d.dev)
	ss := int64(d.dev.SectorSize())
	return Table{Copy{ts.primary.headerOff / ss, ts.primary.err}, Copy{ts.backup.headerOff / ss, ts.backup.err}, ts.healthy()}
}

// flush is a barrier. After one that failed nothing is written or flushed any more.
func (d *Disk) flush() error {
	if d.failed != nil {
		return d.failed
	}
	if err := d.dev.Flush(); err != nil {
		d.failed = fmt.Errorf("a flush of the disk failed, and what is on it is not known until it is opened again: %w", err)
		return d.failed
	}
	return nil
}

// writeAt writes everything or fails.
func (d *Disk) writeAt(p []byte, off int64) error {
	if d.opt.ReadOnly {
		return ErrReadOnly
	}
	if d.failed != nil {
		return d.failed
	}
	n, err := d.dev.WriteAt(p, off)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("writing %d bytes at byte %d of the disk: %w", len(p), off, err)
	}
	return nil
}
