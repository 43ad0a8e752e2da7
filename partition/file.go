package partition

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// file is a disk image or a block device.
type file struct {
	f      *os.File
	direct *os.File    // the same with O_DIRECT; nil where the file system cannot
	around atomic.Bool // large writes go around the page cache
	size   int64
	sector int
}

var _ MediumReader = (*file)(nil)

func (d *file) ReadAt(p []byte, off int64) (int, error) { return d.f.ReadAt(p, off) }
func (d *file) Size() int64                             { return d.size }
func (d *file) SectorSize() int                         { return d.sector }

func (d *file) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || int64(len(p)) > d.size-off {
		return 0, fmt.Errorf("bytes %d to %d are outside the disk", off, off+int64(len(p)))
	}
	n := 0
	if len(p) >= directFrom && len(p)%4096 == 0 && off%4096 == 0 && isAligned(p) && d.around.Load() {
		var err error
		if n, err = d.direct.WriteAt(p, off); !errors.Is(err, unix.EINVAL) {
			return n, err
		}
		d.around.Store(false) // it could be opened so and cannot be written so
	}
	m, err := d.f.WriteAt(p[n:], off+int64(n))
	return n + m, err
}

// directFrom is the length from which a write goes around the page cache: it saves a copy, and does not push out what the host's own programs keep
// there, nor count against the memory that the daemon's unit may have. Small ones are better gathered by the kernel.
const directFrom = 64 << 10

// Flush is fsync, which reaches the medium's own cache.
func (d *file) Flush() error { return d.f.Sync() }

// Discard punches a hole into an image. On a block device it does nothing: a discard there cannot be taken back, and is worth little.
func (d *file) Discard(off, n int64) error {
	err := unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// ReadMedium reads past the page cache: with O_DIRECT where offset, length and file system allow it; else what is cached is flushed and
// dropped first, which the kernel does for clean pages that nobody has mapped.
func (d *file) ReadMedium(p []byte, off int64) (int, error) {
	if d.direct != nil && off%4096 == 0 && len(p) >= 4096 {
		buf := p
		if int64(len(p))%4096 != 0 || !isAligned(p) {
			buf = Buffer((len(p) + 4095) / 4096 * 4096)
		}
		n, err := d.direct.ReadAt(buf, off)
		if n >= len(p) {
			if &buf[0] != &p[0] {
				copy(p, buf)
			}
			return len(p), nil
		}
		// What the medium cannot give, the cache must not.
		if err != nil && !errors.Is(err, syscall.EINVAL) && err != io.EOF {
			return 0, err
		}
	}
	const page = 4096
	from := off / page * page
	if err := unix.Fadvise(int(d.f.Fd()), from, (off+int64(len(p))-from+page-1)/page*page, unix.FADV_DONTNEED); err != nil {
		return 0, err
	}
	return d.f.ReadAt(p, off)
}

// OpenDisk opens a disk image or a block device.
func OpenDisk(path string, opt Options) (*Disk, error) {
	dev, err := openFile(path, opt)
	if err != nil {
		return nil, err
	}
	d := NewDisk(dev, opt)
	d.close = dev.close
	d.lock = func() (func(), error) { return lockFile(dev.f) }
	d.claim = func(off, n int64) (func(), error) { return claimRange(dev.f, off, n) }
	return d, nil
}

// OpenDevice opens a disk image or a block device without looking for a partition table.
func OpenDevice(path string, opt Options) (dev Device, closer func() error, err error) {
	f, err := openFile(path, opt)
	if err != nil {
		return nil, nil, err
	}
	return f, f.close, nil
}

func (d *file) close() error {
	if d.direct != nil {
		d.direct.Close()
	}
	return d.f.Close()
}

func openFile(path string, opt Options) (*file, error) {
	mode := os.O_RDWR
	if opt.ReadOnly {
		mode = os.O_RDONLY
	}
	f, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the disk: %w", err)
	}
	dev := &file{f: f, sector: opt.SectorSize}
	fail := func(err error) (*file, error) {
		f.Close()
		return nil, fmt.Errorf("opening the disk %s: %w", path, err)
	}
	info, err := f.Stat()
	if err != nil {
		return fail(err)
	}
	block := info.Mode()&os.ModeDevice != 0 && info.Mode()&os.ModeCharDevice == 0
	if !block && !info.Mode().IsRegular() {
		return fail(errors.New("it is neither a block device nor a file"))
	}
	if dev.size, err = f.Seek(0, io.SeekEnd); err != nil {
		return fail(err)
	}
	if dev.sector == 0 && block {
		if dev.sector, err = unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET); err != nil {
			return fail(err)
		}
	}
	if dev.sector == 0 {
		dev.sector = guessSector(f)
	}
	if dev.sector != 512 && dev.sector != 4096 {
		return fail(fmt.Errorf("sectors of %d bytes", dev.sector))
	}
	// Opened anew through /proc: what is written must land where the lock is, whatever the name means by now.
	if direct, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), mode|unix.O_DIRECT, 0); err == nil {
		dev.direct = direct
		dev.around.Store(!opt.ReadOnly)
	}
	return dev, nil
}

// guessSector looks where a GPT is on an image.
func guessSector(f *os.File) int {
	var b [8]byte
	for _, s := range []int{512, 4096} {
		if _, err := f.ReadAt(b[:], int64(s)); err == nil && string(b[:]) == gptSignature {
			return s
		}
	}
	return 512
}

// lockFile takes systemd's lock on a whole disk, so that udev and others keep away while the table changes.
func lockFile(f *os.File) (func(), error) {
	for range 100 {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { unix.Flock(int(f.Fd()), unix.LOCK_UN) }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("locking the disk: %w", err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	return nil, fmt.Errorf("locking the disk: %w: the lock has been held for 10 seconds", ErrBusy)
}

// claimRange takes a lock on the bytes of a slot that ends with the open file: two processes never write to one slot, and none makes
// bootable what another is still writing.
func claimRange(f *os.File, off, n int64) (func(), error) {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: 0, Start: off, Len: n}
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return nil, fmt.Errorf("%w: another program writes to the slot", ErrBusy)
	}
	if err != nil {
		return nil, fmt.Errorf("claiming the slot: %w", err)
	}
	return func() {
		lk := unix.Flock_t{Type: unix.F_UNLCK, Whence: 0, Start: off, Len: n}
		unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk)
	}, nil
}
