// Package mounted finds out which partition of which disk /usr is mounted from, by following what the kernel says: the mount table, then
// the block device, down through dm-verity and other mapped devices to one partition. It never guesses: a device that is made of two
// partitions, or of none, is an error.
package mounted

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

// ErrUnclear means that it cannot be said which single partition /usr is mounted from.
var ErrUnclear = errors.New("cannot tell which partition /usr is mounted from")

// Partition is a partition of a disk.
type Partition struct {
	Disk  string // device, such as /dev/sda
	Index int    // in the partition table, from 1
	Name  string // device of the partition, such as sda3
}

// maxDepth of devices upon devices. Deeper than this is a loop, or nothing that a host has.
const maxDepth = 8

// Usr returns the partition that /usr, or / where /usr is not mounted by itself, is mounted from. root is the root of the file
// system: os.DirFS("/") on a host.
func Usr(root fs.FS) (Partition, error) {
	device, point, err := mountOf(root, "/usr", "/")
	if err != nil {
		return Partition{}, err
	}
	parts, err := resolve(root, device, 0)
	if err != nil {
		return Partition{}, fmt.Errorf("%w: %s is on device %s: %w", ErrUnclear, point, device, err)
	}
	if len(parts) != 1 {
		var names []string
		for _, p := range parts {
			names = append(names, p.Name)
		}
		return Partition{}, fmt.Errorf("%w: %s is on device %s, which is made of %d partitions: %s", ErrUnclear, point, device, len(parts), strings.Join(names, ", "))
	}
	return parts[0], nil
}

// mount is one line of the mount table.
type mount struct{ device, kind, source string }

// mountOf returns the device, by number or by name, that the first of points that is a mount point is mounted from. Later mounts lie on top of earlier
// ones, and an overlay, as systemd-sysext lays it over /usr, on the /usr of the slot. btrfs has numbers of its own for its mounts; it is found by
// the name of its device.
func mountOf(root fs.FS, points ...string) (device, point string, err error) {
	data, err := fs.ReadFile(root, "proc/self/mountinfo")
	if err != nil {
		return "", "", fmt.Errorf("%w: %w", ErrUnclear, err)
	}
	found := map[string][]mount{}
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		// 36 35 254:0 / /usr ro,relatime shared:1 - ext4 /dev/mapper/usr ro
		f := strings.Fields(lines.Text())
		i := slices.Index(f, "-")
		if i >= 6 && len(f) >= i+3 {
			found[f[4]] = append(found[f[4]], mount{f[2], f[i+1], f[i+2]})
		}
	}
	for _, p := range points {
		list := found[p]
		if len(list) == 0 {
			continue
		}
		for len(list) > 1 && list[len(list)-1].kind == "overlay" {
			list = list[:len(list)-1]
		}
		m := list[len(list)-1]
		if !strings.HasPrefix(m.device, "0:") {
			return m.device, p, nil
		}
		if m.kind == "btrfs" {
			device, err := blockDevice(root, m.source)
			if err != nil {
				return "", "", fmt.Errorf("%w: %s is mounted from %s: %w", ErrUnclear, p, m.source, err)
			}
			return device, p, nil
		}
		return "", "", fmt.Errorf("%w: %s is mounted from a file system without a block device (%s)", ErrUnclear, p, m.kind)
	}
	return "", "", fmt.Errorf("%w: none of %s is a mount point", ErrUnclear, strings.Join(points, ", "))
}

// blockDevice returns the kernel's name of a device that is named as in the mount table: /dev/sda3, or /dev/mapper/usr.
func blockDevice(root fs.FS, source string) (string, error) {
	mapped, ok := strings.CutPrefix(source, "/dev/mapper/")
	if !ok {
		name, ok := strings.CutPrefix(source, "/dev/")
		if !ok || strings.Contains(name, "/") || !fs.ValidPath(name) {
			return "", errors.New("it is not the name of a block device")
		}
		return name, nil
	}
	devices, err := fs.ReadDir(root, "sys/class/block")
	if err != nil {
		return "", err
	}
	for _, d := range devices {
		name, err := fs.ReadFile(root, path.Join("sys/class/block", d.Name(), "dm/name"))
		if err == nil && strings.TrimSpace(string(name)) == mapped {
			return d.Name(), nil
		}
	}
	return "", errors.New("no mapped device has that name")
}

// resolve follows a block device, by number or by name, down to the partitions that it is made of.
func resolve(root fs.FS, device string, depth int) ([]Partition, error) {
	if depth > maxDepth {
		return nil, errors.New("devices upon devices without end")
	}
	dir := path.Join("sys/dev/block", device)
	if !strings.Contains(device, ":") {
		dir = path.Join("sys/class/block", device)
	}
	uevent, err := fs.ReadFile(root, path.Join(dir, "uevent"))
	if err != nil {
		return nil, err
	}
	env := map[string]string{}
	for line := range strings.Lines(string(uevent)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
		env[k] = v
	}
	name := env["DEVNAME"]
	if name == "" || strings.ContainsAny(name, " \t") {
		return nil, fmt.Errorf("%s/uevent does not name the device", dir)
	}
	if env["DEVTYPE"] == "partition" {
		n, err := strconv.Atoi(env["PARTN"])
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%s is partition %q", name, env["PARTN"])
		}
		disk, err := diskOf(root, name)
		if err != nil {
			return nil, err
		}
		return []Partition{{Disk: "/dev/" + disk, Index: n, Name: name}}, nil
	}
	slaves, err := fs.ReadDir(root, path.Join(dir, "slaves"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if len(slaves) == 0 {
		return nil, fmt.Errorf("%s is neither a partition nor made of partitions", name)
	}
	var all []Partition
	seen := map[string]bool{}
	for _, s := range slaves {
		parts, err := resolve(root, s.Name(), depth+1)
		if err != nil {
			return nil, err
		}
		for _, p := range parts {
			if !seen[p.Name] {
				seen[p.Name] = true
				all = append(all, p)
			}
		}
	}
	return all, nil
}

// diskOf returns the disk that holds a partition.
func diskOf(root fs.FS, partition string) (string, error) {
	disks, err := fs.ReadDir(root, "sys/block")
	if err != nil {
		return "", err
	}
	for _, d := range disks {
		if _, err := fs.Stat(root, path.Join("sys/block", d.Name(), partition, "partition")); err == nil {
			return d.Name(), nil
		}
	}
	return "", fmt.Errorf("no disk holds partition %s", partition)
}
