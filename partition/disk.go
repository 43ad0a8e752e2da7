package partition

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/uuid"
)

// DefaultType is the partition type of USR slots.
const DefaultType = "5dfbf5f4-2848-4bac-aa5e-0d9a20b745a6"

// Errors that callers decide on.
var (
	ErrRunning   = errors.New("the running slot is never written to")
	ErrNoSlot    = errors.New("no such slot")
	ErrNotProven = errors.New("the running slot is not known to be good")
	ErrStale     = errors.New("the slot was written to after it was verified")
	ErrMismatch  = errors.New("the slot does not hold what was promised")
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
}

// Disk is a disk with slots. Its methods may be called by one goroutine at a time.
type Disk struct {
	dev   Device
	opt   Options
	close func() error
	lock  func() (func(), error)
}

// NewDisk makes a Disk of a device.
func NewDisk(dev Device, opt Options) *Disk {
	if opt.TypeGUID == uuid.Nil {
		opt.TypeGUID = uuid.MustParse(DefaultType)
	}
	return &Disk{dev: dev, opt: opt, close: func() error { return nil }, lock: func() (func(), error) { return func() {}, nil }}
}

// Close closes the disk.
func (d *Disk) Close() error { return d.close() }

// Slots returns the slots in the order of the table.
func (d *Disk) Slots() ([]Slot, error) {
	t, err := readTables(d.dev).truth()
	if err != nil {
		return nil, err
	}
	return d.slotsOf(t), nil
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
	return Running{s}, err
}

// edit changes attribute bits in one rewrite of both copies.
func (d *Disk) edit(change func([]Slot) error) error {
	if d.opt.ReadOnly {
		return errors.New("changing the partition table: the disk is open for reading only")
	}
	unlock, err := d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	ts := readTables(d.dev)
	good, err := ts.truth()
	if err != nil {
		return err
	}
	if !ts.healthy() {
		if err := d.repair(ts, good); err != nil {
			return fmt.Errorf("repairing the partition table: %w", err)
		}
		ts = readTables(d.dev)
		if !ts.healthy() {
			return errors.New("repairing the partition table: it is still damaged after the repair")
		}
		good = ts.primary
	}
	slots := d.slotsOf(good)
	if err := change(slots); err != nil {
		return err
	}
	entries := bytes.Clone(good.entries)
	for _, s := range slots {
		at := entries[(s.Index-1)*good.entrySize()+attrOffset:]
		a := binary.LittleEndian.Uint64(at) &^ attributesMask
		a |= uint64(s.Priority)<<priorityShift | uint64(s.Tries)<<triesShift
		if s.Successful {
			a |= successfulBit
		}
		binary.LittleEndian.PutUint64(at, a)
	}
	if bytes.Equal(entries, good.entries) {
		return nil
	}
	// Primary entries, primary header, backup entries, backup header, a flush after each: every prefix boots on every firmware.
	for _, t := range []*table{ts.primary, ts.backup} {
		if err := d.writeCopy(t, entries); err != nil {
			return fmt.Errorf("writing the partition table: %w", err)
		}
	}
	return nil
}

// writeCopy writes one copy: its entries, then its header, each followed by a flush and read back from the medium.
func (d *Disk) writeCopy(t *table, entries []byte) error {
	header := bytes.Clone(t.header)
	seal(header, entries)
	for _, w := range []struct {
		data []byte
		off  int64
	}{{entries, t.entryOff}, {header, t.headerOff}} {
		if _, err := d.dev.WriteAt(w.data, w.off); err != nil {
			return err
		}
		if err := d.dev.Flush(); err != nil {
			return err
		}
		back := make([]byte, len(w.data))
		if _, err := readMedium(d.dev, back, w.off); err != nil {
			return err
		}
		if !bytes.Equal(back, w.data) {
			return fmt.Errorf("what was written at byte %d is not what is on the medium", w.off)
		}
	}
	return nil
}

// repair rewrites the copy that is bad, or the backup if both are valid and differ.
func (d *Disk) repair(ts tables, good *table) error {
	ss := int64(len(good.header))
	bad := &table{header: bytes.Clone(good.header), entries: good.entries}
	sectors := uint64((int64(len(good.entries)) + ss - 1) / ss)
	if good == ts.primary {
		last := good.u64(32)
		bad.headerOff, bad.entryOff = int64(last)*ss, int64(last-sectors)*ss
	} else {
		bad.headerOff, bad.entryOff = ss, 2*ss
	}
	if bad.headerOff+ss > d.dev.Size() || bad.entryOff < 2*ss {
		return fmt.Errorf("the other copy would be at byte %d, outside the disk", bad.headerOff)
	}
	binary.LittleEndian.PutUint64(bad.header[24:], uint64(bad.headerOff/ss))
	binary.LittleEndian.PutUint64(bad.header[32:], uint64(good.headerOff/ss))
	binary.LittleEndian.PutUint64(bad.header[72:], uint64(bad.entryOff/ss))
	return d.writeCopy(bad, good.entries)
}
