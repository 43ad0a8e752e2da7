package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/gptimage"
)

// start mounts the slot that the boot stage chose and becomes the system's init. It returns only with an error.
func start(options map[string]string, say func(string, ...any)) error {
	disk, err := findDisk(options["flipside.disk"])
	if err != nil {
		return err
	}
	hash := options["flipside.usrhash"]
	var usr string
	if id := options["flipside.usr"]; id != "" {
		if usr, err = findPartition(disk, partition.DefaultType, func(p partition.Slot) bool { return p.UUID.String() == id }); err != nil {
			return fmt.Errorf("the slot with UUID %q: %w", id, err)
		}
	} else if usr, err = findSlot(disk, hash); err != nil {
		return err
	}
	label := options["flipside.root"]
	if label == "" {
		label = "ROOT"
	}
	root, err := findPartition(disk, gptimage.TypeLinux, func(p partition.Slot) bool { return p.Label == label })
	if err != nil {
		return fmt.Errorf("the partition labelled %q: %w", label, err)
	}
	verified, err := setupVerity(usr, "usr", hash)
	if err != nil {
		return fmt.Errorf("dm-verity on %s: %w", usr, err)
	}
	const dir = "/sysroot"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := mountRoot(root, dir, verified, options["flipside.watchdog"], say); err != nil {
		return fmt.Errorf("mounting the root file system %s: %w", root, err)
	}
	if err := unix.Mount(verified, dir+"/usr", "ext4", unix.MS_RDONLY|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("mounting %s at /usr: %w", verified, err)
	}
	say("/usr is %s, verified by %s", usr, verified)
	return switchRoot(dir, "/usr/lib/systemd/systemd")
}

// findSlot returns the device of the slot whose hash tree has a root. Two slots can only both have it if they hold the same release.
func findSlot(disk, hash string) (string, error) {
	root, offset, err := parseHash(hash)
	if err != nil {
		return "", err
	}
	d, err := partition.OpenDisk(disk, partition.Options{ReadOnly: true})
	if err != nil {
		return "", err
	}
	slots, err := d.Slots()
	d.Close()
	if err != nil {
		return "", err
	}
	var errs []error
	for _, s := range slots {
		device, err := findPartition(disk, partition.DefaultType, func(p partition.Slot) bool { return p.UUID == s.UUID })
		if err != nil {
			errs = append(errs, err)
			continue
		}
		got, err := rootOf(device, offset)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", device, err))
		case got == root:
			return device, nil
		}
	}
	return "", errors.Join(append([]error{fmt.Errorf("no slot of %s has the root hash %s", disk, root)}, errs...)...)
}

// switchRoot makes dir the root file system and executes init in it.
func switchRoot(dir, init string) error {
	for _, m := range []string{"/dev", "/proc", "/sys", "/run"} {
		if err := unix.Mount(m, dir+m, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("moving %s into the root file system: %w", m, err)
		}
	}
	// The initramfs stays in memory, at a few MiB, as it would with a container's init; its program is this one.
	if err := unix.Chdir(dir); err != nil {
		return err
	}
	if err := unix.Mount(dir, "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("moving the root file system: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if c, err := unix.Open("/dev/console", unix.O_RDWR|unix.O_NOCTTY, 0); err == nil {
		for fd := range 3 {
			unix.Dup2(c, fd)
		}
	}
	return fmt.Errorf("executing %s: %w", init, unix.Exec(init, []string{init}, []string{"PATH=/usr/sbin:/usr/bin", "TERM=linux"}))
}
