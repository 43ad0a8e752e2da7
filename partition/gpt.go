package partition

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"unicode/utf16"

	"github.com/google/uuid"
)

// ErrTable means that no copy of the partition table is valid. Nothing was written.
var ErrTable = errors.New("no valid partition table")

const (
	gptSignature = "EFI PART"
	minHeader    = 92
	maxEntries   = 1 << 20 // bytes of an entry array: 8 times what anyone uses

	attrOffset     = 48 // of the attributes in an entry
	priorityShift  = 48
	triesShift     = 52
	successfulBit  = uint64(1) << 56
	maxPriority    = 15
	attributesMask = uint64(0x1ff) << 48
)

// table is one copy of a GPT: a header sector and its entry array, byte for byte as they are on the disk.
type table struct {
	header    []byte // one sector
	entries   []byte // the entries, the beginning of array
	array     []byte // the whole sectors that hold them
	headerOff int64
	entryOff  int64
	err       error // why the copy is not valid
}

func (t *table) u32(off int) uint32 { return binary.LittleEndian.Uint32(t.header[off:]) }
func (t *table) u64(off int) uint64 { return binary.LittleEndian.Uint64(t.header[off:]) }
func (t *table) entrySize() int     { return int(t.u32(84)) }
func (t *table) count() int         { return int(t.u32(80)) }

// readTable reads the copy whose header is at lba. It is strict: a copy is valid or it is not there.
func readTable(d Device, lba uint64) *table {
	ss := int64(d.SectorSize())
	t := &table{headerOff: int64(lba) * ss, header: make([]byte, ss)}
	if lba < 1 || lba >= uint64(d.Size()/ss) {
		t.err = fmt.Errorf("header at sector %d is outside the disk", lba)
		return t
	}
	if _, err := readMedium(d, t.header, t.headerOff); err != nil {
		t.err = fmt.Errorf("reading the header at sector %d: %w", lba, err)
		return t
	}
	size := t.u32(12)
	switch {
	case string(t.header[:8]) != gptSignature:
		t.err = fmt.Errorf("no GPT signature at sector %d", lba)
	case size < minHeader || int64(size) > ss:
		t.err = fmt.Errorf("header at sector %d has size %d", lba, size)
	case headerCRC(t.header, size) != t.u32(16):
		t.err = fmt.Errorf("header at sector %d has a wrong checksum", lba)
	case t.u64(24) != lba:
		t.err = fmt.Errorf("header at sector %d says that it is at sector %d", lba, t.u64(24))
	case t.u32(8)>>16 != 1:
		t.err = fmt.Errorf("header at sector %d has revision %#x", lba, t.u32(8))
	case t.entrySize() < 128 || t.entrySize()&(t.entrySize()-1) != 0 || int64(t.u32(80))*int64(t.u32(84)) > maxEntries || t.count() == 0:
		t.err = fmt.Errorf("header at sector %d has %d entries of %d bytes", lba, t.u32(80), t.u32(84))
	}
	if t.err != nil {
		return t
	}
	n := int64(t.count() * t.entrySize())
	first, sectors, end := t.u64(72), uint64((n+ss-1)/ss), uint64(d.Size()/ss)
	switch usable := t.u64(40); {
	case first < 2 || first >= end || sectors > end-first || lba >= first && lba < first+sectors:
		t.err = fmt.Errorf("entries at sector %d are outside the disk", first)
	case usable > t.u64(48) || t.u64(48) >= end || lba >= usable && lba <= t.u64(48) || first+sectors > usable && first <= t.u64(48):
		t.err = fmt.Errorf("sectors %d to %d are for partitions, and the header is at %d, the entries at %d", usable, t.u64(48), lba, first)
	}
	if t.err != nil {
		return t
	}
	t.entryOff = int64(first) * ss
	t.array = Buffer(int(int64(sectors) * ss))
	t.entries = t.array[:n]
	if _, err := readMedium(d, t.array, t.entryOff); err != nil {
		t.err = fmt.Errorf("reading the entries at sector %d: %w", first, err)
	} else if crc32.ChecksumIEEE(t.entries) != t.u32(88) {
		t.err = fmt.Errorf("entries at sector %d have a wrong checksum", first)
	}
	return t
}

func headerCRC(header []byte, size uint32) uint32 {
	h := bytes.Clone(header[:size])
	clear(h[16:20])
	return crc32.ChecksumIEEE(h)
}

// seal writes the checksums into a header.
func seal(header, entries []byte) {
	binary.LittleEndian.PutUint32(header[88:], crc32.ChecksumIEEE(entries))
	binary.LittleEndian.PutUint32(header[16:], headerCRC(header, binary.LittleEndian.Uint32(header[12:])))
}

// tables are both copies.
type tables struct{ primary, backup *table }

// readTables reads both copies. The backup is where a valid primary says. Of a primary that is not valid only a hint is taken: whatever is
// found there must be valid by itself.
func readTables(d Device) tables {
	var ts tables
	ts.primary = readTable(d, 1)
	last := uint64(d.Size()/int64(d.SectorSize())) - 1
	if string(ts.primary.header[:8]) == gptSignature {
		ts.backup = readTable(d, ts.primary.u64(32))
		if ts.primary.err == nil || ts.backup.err == nil && ts.backup.headerOff != ts.primary.headerOff {
			return ts
		}
	}
	ts.backup = readTable(d, last)
	return ts
}

// truth is the copy that counts: the primary if it is valid.
func (ts tables) truth() (*table, error) {
	switch {
	case ts.primary.err == nil:
		return ts.primary, nil
	case ts.backup.err == nil:
		return ts.backup, nil
	}
	return nil, fmt.Errorf("%w: primary: %w; backup: %w", ErrTable, ts.primary.err, ts.backup.err)
}

// healthy reports whether both copies are valid and say the same.
func (ts tables) healthy() bool {
	p, b := ts.primary, ts.backup
	return p.err == nil && b.err == nil && p.headerOff != b.headerOff && b.u64(32)*uint64(len(b.header)) == uint64(p.headerOff) &&
		bytes.Equal(p.entries, b.entries) && bytes.Equal(p.common(), b.common())
}

// common is what the headers of both copies have in common: everything but their checksums and places.
func (t *table) common() []byte {
	h := bytes.Clone(t.header[:t.u32(12)])
	clear(h[16:20])
	clear(h[24:40])
	clear(h[72:80])
	return h
}

// extent is a range of sectors, both ends included.
type extent struct{ first, last uint64 }

func (e extent) overlaps(o extent) bool { return e.first <= o.last && o.first <= e.last }

// extents are those of all partitions, of whatever type, by their index from 0.
func (t *table) extents() map[int]extent {
	m := map[int]extent{}
	for i := range t.count() {
		e := t.entries[i*t.entrySize():]
		if guid(e) != uuid.Nil {
			m[i] = extent{binary.LittleEndian.Uint64(e[32:]), binary.LittleEndian.Uint64(e[40:])}
		}
	}
	return m
}

// checkSlot finds out whether writing to a slot could reach anything but the slot.
func (t *table) checkSlot(s Slot) error {
	ss := uint64(len(t.header))
	own := extent{uint64(s.Start) / ss, uint64(s.Start+s.Size)/ss - 1}
	if own.first < t.u64(40) || own.last > t.u64(48) {
		return fmt.Errorf("%w: %s is at sectors %d to %d, and partitions are at %d to %d", ErrGeometry, s.Label, own.first, own.last, t.u64(40), t.u64(48))
	}
	for i, e := range t.extents() {
		if i != s.Index-1 && own.overlaps(e) {
			return fmt.Errorf("%w: %s at sectors %d to %d overlaps partition %d at %d to %d", ErrGeometry, s.Label, own.first, own.last, i+1, e.first, e.last)
		}
	}
	return nil
}

func (d *Disk) slotsOf(t *table) []Slot {
	var slots []Slot
	ss := int64(d.dev.SectorSize())
	for i := range t.count() {
		e := t.entries[i*t.entrySize():][:t.entrySize()]
		if guid(e) != d.opt.TypeGUID {
			continue
		}
		first, last := binary.LittleEndian.Uint64(e[32:]), binary.LittleEndian.Uint64(e[40:])
		if first < 2 || last < first || last >= uint64(d.dev.Size()/ss) {
			continue
		}
		a := binary.LittleEndian.Uint64(e[attrOffset:])
		slots = append(slots, Slot{
			Label: label(e[56:128]), Index: i + 1, Type: d.opt.TypeGUID, UUID: guid(e[16:]), Start: int64(first) * ss, Size: int64(last-first+1) * ss,
			Priority: uint8(a >> priorityShift & 15), Tries: uint8(a >> triesShift & 15), Successful: a&successfulBit != 0,
		})
	}
	return slots
}

// guid decodes the mixed-endian form of GUIDs on disk.
func guid(b []byte) uuid.UUID {
	var u uuid.UUID
	u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7] = b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6]
	copy(u[8:], b[8:16])
	return u
}

func label(b []byte) string {
	var u []uint16
	for i := 0; i+1 < len(b); i += 2 {
		c := binary.LittleEndian.Uint16(b[i:])
		if c == 0 {
			break
		}
		u = append(u, c)
	}
	return string(utf16.Decode(u))
}
