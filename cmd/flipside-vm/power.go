package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
)

// QEMU's blklogwrites driver records what reaches a disk in the format of the kernel's dm-log-writes target
// (Documentation/admin-guide/device-mapper/log-writes.rst): a superblock, then entries of one sector each, those of writes followed by their data.
const (
	logMagic    = 0x6a736677736872
	flagFlush   = 1 << 0
	flagFUA     = 1 << 1
	flagDiscard = 1 << 2
)

type logEntry struct {
	sector, sectors, flags uint64
	at                     int64 // of the data in the log, bytes
}

// readLog reads what was recorded, and the size of the sectors that it counts in. The last entries may be missing: whoever wrote them was killed.
func readLog(log *os.File) ([]logEntry, int64, error) {
	info, err := log.Stat()
	if err != nil {
		return nil, 0, err
	}
	var super [28]byte
	if _, err := log.ReadAt(super[:], 0); err != nil {
		return nil, 0, fmt.Errorf("the record of writes: %w", err)
	}
	le := binary.LittleEndian
	n, size := le.Uint64(super[16:]), int64(le.Uint32(super[24:]))
	if le.Uint64(super[:]) != logMagic || size < 512 || size > 1<<16 {
		return nil, 0, errors.New("the record of writes has no superblock")
	}
	var all []logEntry
	at := size
	for range n {
		var e [32]byte
		if _, err := log.ReadAt(e[:], at); err != nil {
			break
		}
		if bytes.Count(e[:24], []byte{0}) == 24 {
			return nil, 0, errHole
		}
		x := logEntry{le.Uint64(e[:]), le.Uint64(e[8:]), le.Uint64(e[16:]), at + size}
		at += size
		if x.flags&flagDiscard == 0 {
			at += int64(x.sectors) * size
		}
		if at > info.Size() {
			break
		}
		all = append(all, x)
	}
	return all, size, nil
}

// QEMU 7.2 writes entries at the same time that several writes are under way at the same time, and one that is killed then leaves a hole of unknown length in
// the record. That is why the machines have one processor, and thus one queue, of depth one.
var errHole = errors.New("the record of writes has a hole")

// loss is what a power cut did to the writes that no flush had covered.
type loss struct {
	entries, pending, dropped, torn int
}

func (l loss) String() string {
	return fmt.Sprintf("of %d writes and flushes %d were not flushed; %d of those are lost, %d torn", l.entries, l.pending, l.dropped, l.torn)
}

// replay brings the disk to where it may be after a power cut: every write before the last flush is on it; of those after it each one is or is
// not, as random says, and one of them may be there in part. Without random nothing is lost. Entries from end on were not written yet; a negative end
// is that of the record.
func replay(disk, record string, end int, random *rand.Rand) (lost loss, err error) {
	log, err := os.Open(record)
	if err != nil {
		return lost, err
	}
	defer log.Close()
	entries, size, err := readLog(log)
	if err != nil {
		return lost, err
	}
	if end >= 0 && end < len(entries) {
		entries = entries[:end]
	}
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		return lost, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	flushed := 0
	for i, e := range entries {
		if e.flags&flagFlush != 0 {
			flushed = i + 1
		}
	}
	lost.entries, lost.pending = len(entries), len(entries)-flushed
	for i, e := range entries {
		n := int64(e.sectors) * size
		if random != nil && i >= flushed && e.flags&flagFUA == 0 && n > 0 {
			switch {
			case random.IntN(2) == 0:
				lost.dropped++
				continue
			case n > size && random.IntN(4) == 0:
				n = size * (1 + random.Int64N(n/size-1))
				lost.torn++
			}
		}
		if e.flags&flagDiscard != 0 || n == 0 {
			continue // what was discarded may be there or not; it is never read
		}
		w := bufio.NewWriterSize(io.NewOffsetWriter(f, int64(e.sector)*size), 1<<20)
		if _, err := io.Copy(w, io.NewSectionReader(log, e.at, n)); err != nil {
			return lost, fmt.Errorf("replaying writes: %w", err)
		}
		if err := w.Flush(); err != nil {
			return lost, fmt.Errorf("replaying writes: %w", err)
		}
	}
	return lost, nil
}

// copySparse copies a disk image and leaves holes where there are any.
func copySparse(to, from string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	info, err := src.Stat()
	if err != nil {
		return err
	}
	dst, err := os.Create(to)
	if err != nil {
		return err
	}
	if err := dst.Truncate(info.Size()); err != nil {
		return errors.Join(err, dst.Close())
	}
	const seekData, seekHole = 3, 4 // lseek(2)
	for at := int64(0); ; {
		begin, err := src.Seek(at, seekData)
		if err != nil {
			break // ENXIO: no more data
		}
		end, err := src.Seek(begin, seekHole)
		if err != nil {
			return errors.Join(err, dst.Close())
		}
		if _, err := io.Copy(io.NewOffsetWriter(dst, begin), io.NewSectionReader(src, begin, end-begin)); err != nil {
			return errors.Join(err, dst.Close())
		}
		at = end
	}
	return dst.Close()
}
