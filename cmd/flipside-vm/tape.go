package main

import (
	"encoding/binary"
	"os"
	"slices"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/gptimage"
)

// area is a part of a disk: the label of a partition, or tableArea.
type area string

const (
	tableArea area = "table" // both copies of the partition table, and whatever else is in no partition
	bootArea  area = "EFI-SYSTEM"
	flushed   area = "flush" // no area: everything before it is on the medium
)

// span is where an area lies, in bytes.
type span struct {
	area       area
	start, end int64
}

// spans reads what lies where on a disk.
func spans(disk string) ([]span, error) {
	d, err := partition.OpenDisk(disk, partition.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	slots, err := d.Slots()
	d.Close()
	if err != nil {
		return nil, err
	}
	var list []span
	for _, s := range slots {
		list = append(list, span{area(s.Label), s.Start, s.Start + s.Size})
	}
	for label, typ := range map[area]string{bootArea: gptimage.TypeEFI, "ROOT": gptimage.TypeLinux, "OEM": gptimage.TypeLinux} {
		s, err := partitionOf(disk, typ, string(label))
		if err != nil {
			return nil, err
		}
		list = append(list, span{label, s.Start, s.Start + s.Size})
	}
	return list, nil
}

// tape follows the record of writes while QEMU makes it: what part of the disk each entry went to.
type tape struct {
	spans []span
	log   *os.File
	size  int64  // of the sectors that the record counts in
	at    int64  // of the next entry, bytes
	areas []area // of the entries so far
}

// read reads what has come since. What is there only in part is left for the next time.
func (t *tape) read() {
	le := binary.LittleEndian
	var super [28]byte
	if n, _ := t.log.ReadAt(super[:], 0); n < len(super) || le.Uint64(super[:]) != logMagic {
		return
	}
	if t.size == 0 {
		if t.size = int64(le.Uint32(super[24:])); t.size < 512 || t.size > 1<<16 {
			t.size = 0
			return
		}
		t.at = t.size
	}
	for n := le.Uint64(super[16:]); uint64(len(t.areas)) < n; {
		var e [24]byte
		if n, _ := t.log.ReadAt(e[:], t.at); n < len(e) {
			return
		}
		sector, sectors, flags := le.Uint64(e[:]), le.Uint64(e[8:]), le.Uint64(e[16:])
		t.at += t.size
		if flags&flagDiscard == 0 {
			t.at += int64(sectors) * t.size
		}
		where := flushed
		if sectors > 0 {
			where = t.areaOf(int64(sector) * t.size)
		}
		t.areas = append(t.areas, where)
	}
}

// length is the number of entries so far.
func (t *tape) length() int {
	if t == nil {
		return 0
	}
	return len(t.areas)
}

func (t *tape) areaOf(at int64) area {
	for _, s := range t.spans {
		if at >= s.start && at < s.end {
			return s.area
		}
	}
	return tableArea
}

// first returns the first entry not before from that went to one of the areas, or -1.
func (t *tape) first(from int, areas ...area) int {
	for i := from; i < t.length(); i++ {
		if slices.Contains(areas, t.areas[i]) {
			return i
		}
	}
	return -1
}

// last returns the area of the last write before entry end.
func (t *tape) last(end int) area {
	for i := min(end, t.length()) - 1; i >= 0; i-- {
		if t.areas[i] != flushed {
			return t.areas[i]
		}
	}
	return ""
}
