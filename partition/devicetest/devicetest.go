// Package devicetest has devices for tests of package partition: one in memory that records and can lose what was not flushed, one
// that cannot be written, one that fails when it is told to; and the conformance suite that every device passes.
package devicetest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"

	"github.com/flipside-linux/flipside/partition"
)

// Kind of an operation on a device.
type Kind int

// The kinds.
const (
	Write Kind = iota
	Flush
	Discard
)

// Op is one recorded operation. Data of a write is what was written.
type Op struct {
	Kind Kind
	Off  int64
	Data []byte
	Len  int64 // of a flush: how many bytes from Off it is about; 0 for all of the device
}

// RangeFlusher is a device of which a part can be flushed alone: what a file system does for one file.
type RangeFlusher interface {
	FlushRange(off, n int64) error
}

// Memory is a device in memory that records what is done to it, and of which what was not flushed need not be on the medium.
type Memory struct {
	Log []Op

	mu     sync.RWMutex // of the bytes: one may read back while another one writes or flushes
	cache  []byte
	medium []byte // nil: the cache is the medium
	sector int
}

var (
	_ partition.Device       = (*Memory)(nil)
	_ partition.MediumReader = (*Memory)(nil)
	_ partition.Device       = (*Faulty)(nil)
	_ partition.Device       = ReadOnly{}
)

// NewMemory makes a device that holds data. Past its cache one sees the cache, as with a device whose own cache answers.
func NewMemory(data []byte, sector int) *Memory {
	return &Memory{cache: bytes.Clone(data), sector: sector}
}

// NewStrict makes a device of which ReadMedium sees only what was flushed.
func NewStrict(data []byte, sector int) *Memory {
	return &Memory{cache: bytes.Clone(data), medium: bytes.Clone(data), sector: sector}
}

// Bytes is what the device holds, the cache included. The caller may change it: the change is not recorded, nor durable.
func (m *Memory) Bytes() []byte { return m.cache }

// Size is that of the device.
func (m *Memory) Size() int64 { return int64(len(m.cache)) }

// SectorSize is that of the device.
func (m *Memory) SectorSize() int { return m.sector }

// ReadAt reads what was written.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return readAt(m.cache, p, off)
}

// ReadMedium reads what is on the medium.
func (m *Memory) ReadMedium(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.medium != nil {
		return readAt(m.medium, p, off)
	}
	return readAt(m.cache, p, off)
}

func readAt(data, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("negative offset")
	}
	if off >= int64(len(data)) {
		return 0, io.EOF
	}
	n := copy(p, data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt writes into the cache.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || int64(len(p)) > m.Size()-off {
		return 0, fmt.Errorf("bytes %d to %d are outside the device", off, off+int64(len(p)))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(m.cache[off:], p)
	m.Log = append(m.Log, Op{Kind: Write, Off: off, Data: bytes.Clone(p)})
	return len(p), nil
}

// Flush brings the cache to the medium.
func (m *Memory) Flush() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.Log = append(m.Log, Op{Kind: Flush})
	copy(m.medium, m.cache)
	return nil
}

// FlushRange brings a part of the cache to the medium.
func (m *Memory) FlushRange(off, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.Log = append(m.Log, Op{Kind: Flush, Off: off, Len: n})
	if m.medium != nil {
		copy(m.medium[off:off+n], m.cache[off:off+n])
	}
	return nil
}

// Discard makes a range zero.
func (m *Memory) Discard(off, n int64) error {
	if off < 0 || n < 0 || n > m.Size()-off {
		return fmt.Errorf("bytes %d to %d are outside the device", off, off+n)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.cache[off : off+n])
	m.Log = append(m.Log, Op{Kind: Discard, Off: off, Data: make([]byte, n)})
	return nil
}

// ReadOnly is a device that cannot be written.
type ReadOnly struct{ partition.Device }

// WriteAt fails.
func (ReadOnly) WriteAt([]byte, int64) (int, error) { return 0, partition.ErrReadOnly }

// Discard fails.
func (ReadOnly) Discard(int64, int64) error { return partition.ErrReadOnly }

// Faulty is a device of which one operation fails.
type Faulty struct {
	partition.Device
	At    int   // the operation that fails, from 0, of those that write or flush
	Err   error // with which
	Short bool  // a write does half of its work before it fails, and says nothing: it returns a short count and a nil error
	Dead  bool  // everything after it fails too, as for a process that was killed
	Count int   // operations so far

	down bool
}

func (f *Faulty) hit() bool {
	if f.down {
		return true
	}
	hit := f.Count == f.At
	f.Count++
	f.down = hit && f.Dead
	return hit
}

// WriteAt fails or writes.
func (f *Faulty) WriteAt(p []byte, off int64) (int, error) {
	if !f.hit() {
		return f.Device.WriteAt(p, off)
	}
	if f.Short {
		return f.Device.WriteAt(p[:len(p)/2], off)
	}
	return 0, f.Err
}

// Flush fails or flushes.
func (f *Faulty) Flush() error {
	if !f.hit() {
		return f.Device.Flush()
	}
	return f.Err
}

// FlushRange fails or flushes.
func (f *Faulty) FlushRange(off, n int64) error {
	if f.hit() {
		return f.Err
	}
	return f.Device.(RangeFlusher).FlushRange(off, n)
}

// Discard fails or discards.
func (f *Faulty) Discard(off, n int64) error {
	if !f.hit() {
		return f.Device.Discard(off, n)
	}
	return f.Err
}

// ReadMedium reads from the medium of the device below.
func (f *Faulty) ReadMedium(p []byte, off int64) (int, error) {
	if m, ok := f.Device.(partition.MediumReader); ok {
		return m.ReadMedium(p, off)
	}
	return f.Device.ReadAt(p, off)
}

// Run is what every device must do. open makes a device of at least 64 KiB that may be overwritten.
func Run(t *testing.T, open func(t *testing.T) partition.Device) {
	t.Helper()
	read := func(t *testing.T, d partition.Device, n int, off int64) []byte {
		t.Helper()
		p := make([]byte, n)
		if _, err := d.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		if m, ok := d.(partition.MediumReader); ok {
			q := make([]byte, n)
			if k, err := m.ReadMedium(q, off); k != n {
				t.Fatalf("reading %d bytes at %d from the medium: %d, %v", n, off, k, err)
			}
			if !bytes.Equal(p, q) {
				t.Fatalf("%d bytes at %d differ between cache and medium after a flush", n, off)
			}
		}
		return p
	}
	t.Run("what is written is read", func(t *testing.T) {
		d := open(t)
		ss := int64(d.SectorSize())
		for _, off := range []int64{0, ss, 3 * ss, d.Size() - ss} {
			want := bytes.Repeat([]byte{byte(off/ss) + 1}, int(ss))
			if n, err := d.WriteAt(want, off); n != len(want) || err != nil {
				t.Fatalf("writing at %d: %d, %v", off, n, err)
			}
			if err := d.Flush(); err != nil {
				t.Fatal(err)
			}
			if got := read(t, d, int(ss), off); !bytes.Equal(got, want) {
				t.Errorf("at %d: read something else than was written", off)
			}
		}
		// Lengths and offsets that no sector has.
		want := bytes.Repeat([]byte("odd"), 1000)
		if _, err := d.WriteAt(want, 4099); err != nil {
			t.Fatal(err)
		}
		if err := d.Flush(); err != nil {
			t.Fatal(err)
		}
		if got := read(t, d, len(want), 4099); !bytes.Equal(got, want) {
			t.Error("odd bytes at an odd place: read something else than was written")
		}
	})
	t.Run("nothing is written outside", func(t *testing.T) {
		d := open(t)
		for _, off := range []int64{-1, d.Size(), d.Size() - 1} {
			if _, err := d.WriteAt([]byte{1, 2}, off); err == nil {
				t.Errorf("writing 2 bytes at %d of %d went through", off, d.Size())
			}
		}
		if _, err := d.ReadAt(make([]byte, 2), d.Size()-1); err == nil {
			t.Error("reading past the end went through")
		}
	})
	t.Run("a discard leaves the rest alone", func(t *testing.T) {
		d := open(t)
		want := bytes.Repeat([]byte{7}, 4096)
		for off := int64(0); off < 5*4096; off += 4096 {
			if _, err := d.WriteAt(want, off); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Discard(8192, 4096); err != nil {
			t.Fatal(err)
		}
		if err := d.Flush(); err != nil {
			t.Fatal(err)
		}
		for _, off := range []int64{0, 4096, 12288, 16384} {
			if got := read(t, d, 4096, off); !bytes.Equal(got, want) {
				t.Errorf("bytes at %d changed", off)
			}
		}
	})
}
