// Package gptimage makes disk images with a GPT, for image builders, tests and the demo. It only creates; package partition changes.
package gptimage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
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
	Size       int64  // bytes, rounded up to MiB
	Attributes uint64
	Start      int64 // bytes; filled in by Create
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

// Create makes a sparse disk image. The partitions begin at whole MiB, in order; their Start is filled in.
func Create(path string, sector int, diskUUID string, parts []Partition) error {
	if sector != 512 && sector != 4096 {
		return fmt.Errorf("making a disk image: sectors of %d bytes", sector)
	}
	if len(parts) > 128 {
		return fmt.Errorf("making a disk image: %d partitions", len(parts))
	}
	ss := int64(sector)
	at := int64(mib)
	entries := make([]byte, 128*128)
	for i := range parts {
		p := &parts[i]
		typ, err1 := uuid.Parse(p.Type)
		id, err2 := uuid.Parse(p.UUID)
		if err := errors.Join(err1, err2); err != nil {
			return fmt.Errorf("making a disk image: partition %q: %w", p.Label, err)
		}
		p.Start = at
		size := (p.Size + mib - 1) / mib * mib
		e := entries[i*128:]
		copy(e, disk(typ))
		copy(e[16:], disk(id))
		binary.LittleEndian.PutUint64(e[32:], uint64(at/ss))
		binary.LittleEndian.PutUint64(e[40:], uint64((at+size)/ss-1))
		binary.LittleEndian.PutUint64(e[48:], p.Attributes)
		name := utf16.Encode([]rune(p.Label))
		if len(name) > 36 {
			return fmt.Errorf("making a disk image: label %q is too long", p.Label)
		}
		for j, c := range name {
			binary.LittleEndian.PutUint16(e[56+2*j:], c)
		}
		at += size
	}
	total := at + mib
	last := uint64(total/ss) - 1
	array := uint64((int64(len(entries)) + ss - 1) / ss)
	id, err := uuid.Parse(diskUUID)
	if err != nil {
		return fmt.Errorf("making a disk image: %w", err)
	}
	header := func(my, other, first uint64) []byte {
		h := make([]byte, ss)
		copy(h, "EFI PART")
		le := binary.LittleEndian
		le.PutUint32(h[8:], 0x10000)
		le.PutUint32(h[12:], 92)
		le.PutUint64(h[24:], my)
		le.PutUint64(h[32:], other)
		le.PutUint64(h[40:], 2+array)
		le.PutUint64(h[48:], last-array-1)
		copy(h[56:], disk(id))
		le.PutUint64(h[72:], first)
		le.PutUint32(h[80:], 128)
		le.PutUint32(h[84:], 128)
		le.PutUint32(h[88:], crc32.ChecksumIEEE(entries))
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
		return h
	}
	mbr := make([]byte, 512)
	copy(mbr[446:], []byte{0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0})
	binary.LittleEndian.PutUint32(mbr[458:], uint32(min(last, 0xffffffff)))
	mbr[510], mbr[511] = 0x55, 0xaa
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("making a disk image: %w", err)
	}
	err = f.Truncate(total)
	for _, w := range []struct {
		data []byte
		lba  uint64
	}{{mbr, 0}, {header(1, last, 2), 1}, {entries, 2}, {entries, last - array}, {header(last, 1, last-array), last}} {
		if err == nil {
			_, err = f.WriteAt(w.data, int64(w.lba)*ss)
		}
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
