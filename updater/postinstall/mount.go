package postinstall

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/partition"
)

// mountSlot mounts a slot read-only, through a loop device that cannot be written and goes away with the mount. What an earlier process that was
// killed left mounted there is unmounted first.
func mountSlot(disk string, s partition.Slot, dir string) (device string, unmount func() error, err error) {
	fail := func(err error) (string, func() error, error) {
		return "", nil, fmt.Errorf("mounting the slot: %w", err)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return fail(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fail(err)
	}
	if err := unmountAll(dir); err != nil {
		return fail(err)
	}
	back, err := os.Open(disk)
	if err != nil {
		return fail(err)
	}
	defer back.Close()
	name, data, err := detect(back, s.Start)
	if err != nil {
		return fail(err)
	}
	loop, err := attach(back, s)
	if err != nil {
		return fail(err)
	}
	defer loop.Close() // the mount holds it
	if err := unix.Mount(loop.Name(), dir, name, unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, data); err != nil {
		return fail(fmt.Errorf("%s on %s: %w", name, dir, err))
	}
	return loop.Name(), func() error {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmounting %s: %w", dir, err)
		}
		return nil
	}, nil
}

// unmountAll unmounts whatever is mounted on a directory. The kernel is asked, by whatever name the directory goes: it says EINVAL when nothing is.
func unmountAll(dir string) error {
	for {
		err := unix.Unmount(dir, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unmounting what an earlier run left on %s: %w", dir, err)
		}
	}
}

// attach makes a read-only loop device of the slot's bytes.
func attach(back *os.File, s partition.Slot) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	conf := unix.LoopConfig{Fd: uint32(back.Fd())}
	conf.Info.Offset, conf.Info.Sizelimit = uint64(s.Start), uint64(s.Size)
	conf.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR
	for range 50 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("finding a free loop device: %w", err)
		}
		loop, err := openLoop(n)
		if err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &conf)
		if err == nil {
			return loop, nil
		}
		loop.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("setting up %s: %w", loop.Name(), err)
		}
		// Somebody else was faster.
		time.Sleep(10 * time.Millisecond)
	}
	return nil, errors.New("no loop device could be had")
}

// openLoop opens a loop device that was just made: udev may be a moment behind.
func openLoop(n int) (*os.File, error) {
	path := fmt.Sprintf("/dev/loop%d", n)
	for try := 0; ; try++ {
		f, err := os.OpenFile(path, os.O_RDONLY, 0)
		if err == nil || try == 50 || !errors.Is(err, os.ErrNotExist) {
			return f, err
		}
		time.Sleep(20 * time.Millisecond)
	}
}
