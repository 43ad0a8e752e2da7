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
	"unsafe"

	"golang.org/x/sys/unix"
)

// FileTarget writes an image to a file or a block device, and reads it back from the medium: past the page cache with O_DIRECT, or, where the
// file system has no such thing (tmpfs, some network ones), after asking the kernel to drop the cached pages (POSIX_FADV_DONTNEED), which it
// does for pages that are clean. It is a [Target] and a [Settler].
type FileTarget struct {
	f      *os.File
	direct *os.File // nil where there is no O_DIRECT

	mu      sync.Mutex // of what follows, which only reading back uses
	buf     []byte
	settled int64
	hash    hash.Hash
}

// NewFileTarget writes to f, which must be open for reading and writing. The caller closes the target and then f.
func NewFileTarget(f *os.File) *FileTarget {
	t := &FileTarget{f: f, hash: sha256.New()}
	// Opened anew through /proc: the name may have changed, and the flags are those of the open file.
	if d, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDONLY|unix.O_DIRECT, 0); err == nil {
		t.direct = d
	}
	return t
}

// Close lets go of what reading back needs; the file stays open.
func (t *FileTarget) Close() error {
	if t.direct == nil {
		return nil
	}
	return t.direct.Close()
}

// WriteAt writes to the file.
func (t *FileTarget) WriteAt(p []byte, off int64) (int, error) { return t.f.WriteAt(p, off) }

// Flush makes what was written durable.
func (t *FileTarget) Flush() error { return unix.Fdatasync(int(t.f.Fd())) }

// Settle flushes, and reads the bytes before upto back.
func (t *FileTarget) Settle(upto int64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if upto <= t.settled {
		return nil
	}
	if err := t.Flush(); err != nil {
		return fmt.Errorf("flushing %s: %w", t.f.Name(), err)
	}
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

// readBack hashes what is on the medium from settled to upto. The caller holds the lock and has flushed.
func (t *FileTarget) readBack(ctx context.Context, upto int64) error {
	if t.buf == nil {
		t.buf = aligned(copyBuffer)
	}
	for t.settled < upto {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		// Direct reads begin and end at blocks; what is read beyond upto, or was settled before, is left out.
		begin := t.settled &^ (blockSize - 1)
		skip := t.settled - begin
		n, err := t.readAt(t.buf, begin)
		if err == io.EOF {
			err = nil
		}
		if err == nil && int64(n) <= skip {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("reading %s back at byte %d: %w", t.f.Name(), t.settled, err)
		}
		got := t.buf[skip:min(int64(n), upto-begin)]
		t.hash.Write(got)
		t.settled += int64(len(got))
	}
	return nil
}

func (t *FileTarget) readAt(p []byte, off int64) (int, error) {
	if t.direct != nil {
		n, err := t.direct.ReadAt(p, off)
		if !errors.Is(err, unix.EINVAL) {
			return n, err
		}
		// It could be opened so and cannot be read so.
		t.direct.Close()
		t.direct = nil
	}
	if err := unix.Fadvise(int(t.f.Fd()), off, int64(len(p)), unix.FADV_DONTNEED); err != nil {
		return 0, err
	}
	return t.f.ReadAt(p, off)
}

// aligned returns a buffer that begins where direct reads need it to.
func aligned(n int) []byte {
	buf := make([]byte, n+blockSize)
	skip := -int(uintptr(unsafe.Pointer(&buf[0]))) & (blockSize - 1)
	return buf[skip : skip+n : skip+n]
}
