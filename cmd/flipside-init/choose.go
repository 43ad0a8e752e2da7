package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/gptimage"
)

const defaultKernel = "flipside/vmlinuz-%s"

// choose chooses a slot, spends its try, and starts its kernel. It returns only with an error.
func choose(options map[string]string, say func(string, ...any)) error {
	disk, err := findDisk(options["flipside.disk"])
	if err != nil {
		return err
	}
	slot, err := takeSlot(disk)
	if err != nil {
		return err
	}
	say("slot %s, priority %d, tries %d, successful %v", slot.Label, slot.Priority, slot.Tries, slot.Successful)
	pattern := options["flipside.kernel"]
	if pattern == "" {
		pattern = defaultKernel
	}
	image, err := readKernel(disk, pattern, slot.Label)
	if err != nil {
		return fmt.Errorf("the kernel of slot %s: %w", slot.Label, err)
	}
	line := image.CommandLine + " flipside.usr=" + slot.UUID.String()
	for _, k := range []string{"flipside.disk", "flipside.watchdog"} {
		if v := options[k]; v != "" {
			line += " " + k + "=" + v
		}
	}
	if err := kexec(image, line); err != nil {
		return fmt.Errorf("starting the kernel of slot %s: %w", slot.Label, err)
	}
	return errors.New("kexec came back")
}

func takeSlot(disk string) (partition.Slot, error) {
	d, err := partition.OpenDisk(disk, partition.Options{})
	if err != nil {
		return partition.Slot{}, err
	}
	defer d.Close()
	return d.Take()
}

// readKernel reads the image of a slot from the EFI system partition.
func readKernel(disk, pattern, label string) (image, error) {
	device, err := findPartition(disk, gptimage.TypeEFI, func(partition.Slot) bool { return true })
	if err != nil {
		return image{}, fmt.Errorf("the EFI system partition: %w", err)
	}
	const dir = "/run/esp"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return image{}, err
	}
	if err := unix.Mount(device, dir, "vfat", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return image{}, fmt.Errorf("mounting %s: %w", device, err)
	}
	defer unix.Unmount(dir, 0)
	name := pattern
	if strings.Contains(pattern, "%s") {
		name = strings.Replace(pattern, "%s", suffix(label), 1)
	}
	f, err := os.Open(filepath.Join(dir, filepath.Clean("/"+name)))
	if err != nil {
		return image{}, err
	}
	defer f.Close()
	return readImage(f)
}

// suffix is the last part of a slot's label, in lower case: that of USR-A is a.
func suffix(label string) string {
	return strings.ToLower(label[strings.LastIndexByte(label, '-')+1:])
}

// kexec goes over to another kernel.
func kexec(im image, line string) error {
	kernel, err := memory("kernel", im.Kernel)
	if err != nil {
		return err
	}
	flags, initrd := 0, -1
	if len(im.Initrd) == 0 {
		flags = unix.KEXEC_FILE_NO_INITRAMFS
	} else if initrd, err = memory("initrd", im.Initrd); err != nil {
		return err
	}
	if err := unix.KexecFileLoad(kernel, initrd, line, flags); err != nil {
		return fmt.Errorf("loading it: %w", err)
	}
	unix.Sync()
	return unix.Reboot(unix.LINUX_REBOOT_CMD_KEXEC)
}

// memory makes a file in memory, for system calls that want a descriptor.
func memory(name string, data []byte) (int, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return -1, err
	}
	for len(data) > 0 {
		n, err := unix.Write(fd, data)
		if err != nil {
			return -1, err
		}
		data = data[n:]
	}
	return fd, nil
}
