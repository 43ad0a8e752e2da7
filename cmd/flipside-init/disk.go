package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/partition"
)

const diskTimeout = 20 * time.Second // disks may be slow to appear

// findDisk returns the named disk, or the first one that has slots.
func findDisk(name string) (string, error) {
	deadline := time.Now().Add(diskTimeout)
	for {
		candidates := []string{name}
		if name == "" {
			entries, err := os.ReadDir("/sys/block")
			if err != nil {
				return "", fmt.Errorf("looking for disks: %w", err)
			}
			candidates = nil
			for _, e := range entries {
				candidates = append(candidates, "/dev/"+e.Name())
			}
		}
		var errs []error
		for _, c := range candidates {
			n, err := countSlots(c)
			if err == nil && n > 0 {
				return c, nil
			}
			if err == nil {
				err = errors.New("it has no slots")
			}
			errs = append(errs, fmt.Errorf("%s: %w", c, err))
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("no disk with slots: %w", errors.Join(errs...))
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func countSlots(disk string) (int, error) {
	d, err := partition.OpenDisk(disk, partition.Options{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	defer d.Close()
	slots, err := d.Slots()
	return len(slots), err
}

// findPartition returns the device of the one partition of a type that is wanted.
func findPartition(disk, typeGUID string, wanted func(partition.Slot) bool) (string, error) {
	d, err := partition.OpenDisk(disk, partition.Options{ReadOnly: true, TypeGUID: uuid.MustParse(typeGUID)})
	if err != nil {
		return "", err
	}
	defer d.Close()
	all, err := d.Slots()
	if err != nil {
		return "", err
	}
	var found []int
	for _, p := range all {
		if wanted(p) {
			found = append(found, p.Index)
		}
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%d partitions of %s are it, want one", len(found), disk)
	}
	name := strings.TrimPrefix(disk, "/dev/")
	deadline := time.Now().Add(diskTimeout)
	for {
		files, _ := filepath.Glob("/sys/block/" + name + "/*/partition")
		for _, f := range files {
			if data, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(data)) == strconv.Itoa(found[0]) {
				return "/dev/" + filepath.Base(filepath.Dir(f)), nil
			}
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("the kernel shows no device for partition %d of %s", found[0], disk)
		}
		rescan(disk)
		time.Sleep(50 * time.Millisecond)
	}
}

// rescan has the kernel read the partition table again. When it found the disk, the primary copy may have been bad: power had gone in the middle of a change. The
// kernel then looks at the backup only if "gpt" is on its command line, and otherwise shows no partitions. Since then takeSlot has repaired the table.
func rescan(disk string) {
	f, err := os.Open(disk)
	if err != nil {
		return // whoever waits for a partition says that it does not come
	}
	defer f.Close()
	unix.IoctlSetInt(int(f.Fd()), unix.BLKRRPART, 0)
}
