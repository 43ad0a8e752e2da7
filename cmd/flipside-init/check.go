package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// checkLimit is how long a check may keep the watchdog from restarting the machine.
const checkLimit = time.Hour

// mountRoot mounts the root file system. On a medium that does not write a page whole, a power cut may leave half of the last record of a journal: the
// kernel then refuses to mount, every time, and wants a check. The slot's own e2fsck mends what needs no person to decide.
func mountRoot(root, dir, verified, watchdog string, say func(string, ...any)) error {
	err := unix.Mount(root, dir, "ext4", 0, "")
	if !errors.Is(err, unix.EUCLEAN) && !errors.Is(err, unix.EBADMSG) {
		return err
	}
	say("the root file system %s: %v: it is checked", root, err)
	if e := fed(watchdog, checkLimit, func() error { return check(root, verified) }); e != nil {
		return fmt.Errorf("%w; checking it: %w", err, e)
	}
	return unix.Mount(root, dir, "ext4", 0, "")
}

// check runs e2fsck from a verified /usr, in a root that has nothing else.
func check(device, verified string) (err error) {
	const dir = "/check"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("check", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=1m,mode=755"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Unmount(dir, 0)) }()
	for _, name := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+name, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	for _, m := range []struct {
		from, kind, to string
		flags          uintptr
	}{{verified, "ext4", "usr", unix.MS_RDONLY | unix.MS_NODEV}, {"/dev", "", "dev", unix.MS_BIND}, {"/proc", "", "proc", unix.MS_BIND}} {
		to := filepath.Join(dir, m.to)
		if err := os.Mkdir(to, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.from, to, m.kind, m.flags, ""); err != nil {
			return fmt.Errorf("mounting %s at %s: %w", m.from, to, err)
		}
		defer func() { err = errors.Join(err, unix.Unmount(to, 0)) }()
	}
	cmd := exec.Command("/usr/sbin/e2fsck", "-p", device) // -p: what is safe, without a question
	cmd.Dir, cmd.Env, cmd.SysProcAttr = "/", []string{"PATH=/usr/sbin:/usr/bin"}, &syscall.SysProcAttr{Chroot: dir}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 && exit.ExitCode()&^3 == 0 { // 1: errors were corrected, 2: and what is mounted should be mounted anew; see e2fsck(8)
		return nil
	}
	if err != nil {
		return fmt.Errorf("e2fsck: %w: %s", err, out)
	}
	return nil
}
