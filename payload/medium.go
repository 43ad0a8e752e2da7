package payload

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// FileTarget writes an image to a file or a block device, and reads it back from the medium: past the page cache with O_DIRECT, or, where the
// file system has no such thing (tmpfs, some network ones), after asking the kernel to drop the cached pages (POSIX_FADV_DONTNEED), which it
// does for pages that are clean. It is a [Target] and a [Settler].
type FileTarget struct {
	f      *os.File
	direct *os.File    // nil where there is no O_DIRECT
	around atomic.Bool // large writes go around the page cache

	mu      sync.Mutex // of what follows, which only reading back uses
	bufs    [2]pages
	settled int64
	hash    hash.Hash
}

// NewFileTarget writes to f, which must be open for reading and writing. The caller closes the target and then f.
func NewFileTarget(f *os.File) *FileTarget {
	t := &FileTarget{f: f, hash: sha256.New()}
	// Opened anew through /proc: the name may have changed, and the flags are those of the open file.
	if d, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDWR|unix.O_DIRECT, 0); err == nil {
		t.direct = d
		t.around.Store(true)
	}
	return t
}

// Close lets go of what reading back needs; the file stays open.
func (t *FileTarget) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.bufs {
		t.bufs[i].free()
	}
	if t.direct == nil {
		return nil
	}
	return t.direct.Close()
}

// directFrom is the length from which a write goes around the page cache: it saves a copy, and does not push out what the host's own programs keep
// there. Small ones are better gathered by the kernel.
const directFrom = 64 << 10

// WriteAt writes to the file.
func (t *FileTarget) WriteAt(p []byte, off int64) (int, error) {
	n := 0
	if len(p) >= directFrom && len(p)%blockSize == 0 && off%blockSize == 0 && isAligned(p) && t.around.Load() {
		var err error
		if n, err = t.direct.WriteAt(p, off); !errors.Is(err, unix.EINVAL) {
			return n, err
		}
		t.around.Store(false) // it could be opened so and cannot be written so
	}
	m, err := t.f.WriteAt(p[n:], off+int64(n))
	return n + m, err
}

// Flush makes what was written durable.
func (t *FileTarget) Flush() error { return unix.Fdatasync(int(t.f.Fd())) }

// Settle flushes, and reads the bytes before upto back.
func (t *FileTarget) Settle(upto int64) error {
	if err := t.Flush(); err != nil { // without the lock: meanwhile another call may read back
		return fmt.Errorf("flushing %s: %w", t.f.Name(), err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.readBack(context.Background(), upto)
}

// Verify flushes the file, reads what is not settled back, and compares the hash of the first size bytes. Its error for other bytes is ErrHash.
func (t *FileTarget) Verify(ctx context.Context, size int64, want [32]byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.f.Sync(); err != nil {
		return fmt.Errorf("flushing %s: %w", t.f.Name(), err)
	}
	if t.settled > size {
		t.settled = 0
		t.hash.Reset()
	}
	if err := t.readBack(ctx, size); err != nil {
		return err
	}
	if got := [32]byte(t.hash.Sum(nil)); got != want {
		return fmt.Errorf("%w: %s reads back with SHA-256 %x, want %x", ErrHash, t.f.Name(), got, want)
	}
	return nil
}

// readBack hashes what is on the medium from settled to upto, and reads the next piece meanwhile. The caller holds the lock and has flushed.
func (t *FileTarget) readBack(ctx context.Context, upto int64) error {
	type piece struct {
		data []byte
		err  error
	}
	// Direct reads begin and end at blocks; what is read beyond upto, or was settled before, is left out.
	read := func(i int, from int64) <-chan piece {
		c := make(chan piece, 1)
		buf := t.bufs[i].room(hugePage)
		go func() {
			begin := from &^ (blockSize - 1)
			skip := from - begin
			n, err := t.readAt(buf, begin)
			if err == io.EOF {
				err = nil
			}
			if err == nil && int64(n) <= skip {
				err = io.ErrUnexpectedEOF
			}
			if err != nil {
				c <- piece{nil, err}
				return
			}
			c <- piece{buf[skip:min(int64(n), upto-begin)], nil}
		}()
		return c
	}
	if t.settled >= upto {
		return nil
	}
	next := read(0, t.settled)
	for i := 1; ; i ^= 1 {
		p := <-next
		if p.err != nil {
			return fmt.Errorf("reading %s back at byte %d: %w", t.f.Name(), t.settled, p.err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		to := t.settled + int64(len(p.data))
		if to < upto {
			next = read(i, to)
		}
		t.hash.Write(p.data)
		if t.settled = to; to >= upto {
			return nil
		}
	}
}

func (t *FileTarget) readAt(p []byte, off int64) (int, error) {
	if t.direct != nil {
		n, err := t.direct.ReadAt(p, off)
		if !errors.Is(err, unix.EINVAL) {
			return n, err
		}
	}
	if err := unix.Fadvise(int(t.f.Fd()), off, int64(len(p)), unix.FADV_DONTNEED); err != nil {
		return 0, err
	}
	return t.f.ReadAt(p, off)
}

// pages is memory for large reads and writes that go around the page cache, outside of the heap and of huge pages where the kernel has some: a
// device is then asked for megabytes at once, where 4 KiB pages that are scattered make several requests of it. The zero value is ready.
type pages struct{ all, buf []byte }

// room returns n bytes, which the next call may give again.
func (m *pages) room(n int64) []byte {
	if int64(len(m.buf)) < n {
		m.free()
		size := int((n + hugePage - 1) &^ (hugePage - 1))
		all, err := unix.Mmap(-1, 0, size+hugePage, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			return make([]byte, n) // a limit on address space, as likely as not
		}
		skip := -int(uintptr(unsafe.Pointer(&all[0]))) & (hugePage - 1)
		m.all, m.buf = all, all[skip:skip+size:skip+size]
		unix.Madvise(m.buf, unix.MADV_HUGEPAGE) // advice: without it the pages are small ones
	}
	return m.buf[:n:n]
}

// free gives the memory back. Nobody may use what room returned any more.
func (m *pages) free() {
	if m.all != nil {
		unix.Munmap(m.all)
	}
	*m = pages{}
}

const hugePage = 2 << 20

func isAligned(p []byte) bool { return uintptr(unsafe.Pointer(&p[0]))%blockSize == 0 }
