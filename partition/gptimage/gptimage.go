// Package gptimage makes disk images with a GPT, for image builders, tests and the demo. It only creates; package partition changes.
package gptimage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"unicode/utf16"

	"github.com/google/uuid"
)

// Types of partitions that hosts have.
const (
	TypeEFI   = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
	TypeLinux = "0fc63daf-8483-4772-8e79-3d69d8477de4"
	TypeUSR   = "5dfbf5f4-2848-4bac-aa5e-0d9a20b745a6"
)

// Partition is one partition of a new image.
type Partition struct {
	Label      string
	Type       string // GUID
	UUID       string // GUID
	Size       int64  // bytes, rounded up to the alignment
	Attributes uint64
	Start      int64 // bytes; filled in
}

// Attributes makes the attribute field of a slot.
func Attributes(priority, tries uint8, successful bool) uint64 {
	a := uint64(priority&15)<<48 | uint64(tries&15)<<52
	if successful {
		a |= 1 << 56
	}
	return a
}

const mib = 1 << 20

// Layout is a disk that is to be made. What is zero has the value that everybody uses.
type Layout struct {
	Sector    int    // 512 or 4096
	UUID      string // GUID of the disk
	Align     int64  // bytes; 1 MiB
	EntrySize int    // bytes; 128
	Entries   int    // 128
	Parts     []Partition
}

// place fills in the defaults and where everything is, and returns the size of the disk.
func (l *Layout) place() (total int64, err error) {
	if l.Align == 0 {
		l.Align = mib
	}
	if l.EntrySize == 0 {
		l.EntrySize = 128
	}
	if l.Entries == 0 {
		l.Entries = 128
	}
	ss := int64(l.Sector)
	switch {
	case ss != 512 && ss != 4096:
		return 0, fmt.Errorf("sectors of %d bytes", l.Sector)
	case l.EntrySize < 128 || l.EntrySize&(l.EntrySize-1) != 0 || l.Align%ss != 0:
		return 0, fmt.Errorf("entries of %d bytes, aligned to %d", l.EntrySize, l.Align)
	case len(l.Parts) > l.Entries:
		return 0, fmt.Errorf("%d partitions in %d entries", len(l.Parts), l.Entries)
	}
	up := func(n int64) int64 { return (n + l.Align - 1) / l.Align * l.Align }
	array := (int64(l.Entries*l.EntrySize) + ss - 1) / ss * ss
	at := up(2*ss + array)
	for i := range l.Parts {
		l.Parts[i].Start = at
		at += up(l.Parts[i].Size)
	}
	return at + up(array+ss), nil
}

// Size is that of the disk, in bytes.
func (l *Layout) Size() (int64, error) { return l.place() }

// Write writes the protective MBR and both copies of the table, and fills in where the partitions begin. What is between them is left alone.
func (l *Layout) Write(w io.WriterAt) error {
	if err := l.write(w); err != nil {
		return fmt.Errorf("making a disk image: %w", err)
	}
	return nil
}

func (l *Layout) write(w io.WriterAt) error {
	total, err := l.place()
	if err != nil {
		return err
	}
	ss := int64(l.Sector)
	le := binary.LittleEndian
	n := l.Entries * l.EntrySize
	entries := make([]byte, (int64(n)+ss-1)/ss*ss)
	for i, p := range l.Parts {
		typ, err1 := uuid.Parse(p.Type)
		id, err2 := uuid.Parse(p.UUID)
		if err := errors.Join(err1, err2); err != nil {
			return fmt.Errorf("partition %q: %w", p.Label, err)
		}
		name := utf16.Encode([]rune(p.Label))
		if len(name) > 36 {
			return fmt.Errorf("label %q is too long", p.Label)
		}
		size := (p.Size + l.Align - 1) / l.Align * l.Align
		e := entries[i*l.EntrySize:]
		copy(e, disk(typ))
		copy(e[16:], disk(id))
		le.PutUint64(e[32:], uint64(p.Start/ss))
		le.PutUint64(e[40:], uint64((p.Start+size)/ss-1))
		le.PutUint64(e[48:], p.Attributes)
		for j, c := range name {
			le.PutUint16(e[56+2*j:], c)
		}
	}
	last := uint64(total/ss) - 1
	array := uint64(int64(len(entries)) / ss)
	id, err := uuid.Parse(l.UUID)
	if err != nil {
		return err
	}
	header := func(my, other, first uint64) []byte {
		h := make([]byte, ss)
		copy(h, "EFI PART")
		le.PutUint32(h[8:], 0x10000)
		le.PutUint32(h[12:], 92)
		le.PutUint64(h[24:], my)
		le.PutUint64(h[32:], other)
		le.PutUint64(h[40:], 2+array)
		le.PutUint64(h[48:], last-array-1)
		copy(h[56:], disk(id))
		le.PutUint64(h[72:], first)
		le.PutUint32(h[80:], uint32(l.Entries))
		le.PutUint32(h[84:], uint32(l.EntrySize))
		le.PutUint32(h[88:], crc32.ChecksumIEEE(entries[:n]))
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
		return h
	}
	mbr := make([]byte, ss)
	copy(mbr[446:], []byte{0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0})
	le.PutUint32(mbr[458:], uint32(min(last, 0xffffffff)))
	mbr[510], mbr[511] = 0x55, 0xaa
	for _, piece := range []struct {
		data []byte
		lba  uint64
	}{{mbr, 0}, {header(1, last, 2), 1}, {entries, 2}, {entries, last - array}, {header(last, 1, last-array), last}} {
		if _, err := w.WriteAt(piece.data, int64(piece.lba)*ss); err != nil {
			return err
		}
	}
	return nil
}

// Create makes a sparse disk image. The partitions begin at whole MiB, in order; their Start is filled in.
func Create(path string, sector int, diskUUID string, parts []Partition) error {
	l := Layout{Sector: sector, UUID: diskUUID, Parts: parts}
	total, err := l.Size()
	if err != nil {
		return fmt.Errorf("making a disk image: %w", err)
	}
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("making a disk image: %w", err)
	}
	if err = f.Truncate(total); err == nil {
		err = l.write(f)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("making a disk image: %w", err)
	}
	return nil
}

// disk is the mixed-endian form of GUIDs on disk.
func disk(u uuid.UUID) []byte {
	return append([]byte{u[3], u[2], u[1], u[0], u[5], u[4], u[7], u[6]}, u[8:]...)
}
