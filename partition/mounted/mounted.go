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

// mountOf returns the device number of the first of points that is a mount point. Later mounts lie on top of earlier ones.
func mountOf(root fs.FS, points ...string) (device, point string, err error) {
	data, err := fs.ReadFile(root, "proc/self/mountinfo")
	if err != nil {
		return "", "", fmt.Errorf("%w: %w", ErrUnclear, err)
	}
	found := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		// 36 35 254:0 / /usr ro,relatime shared:1 - ext4 /dev/mapper/usr ro
		f := strings.Fields(lines.Text())
		if len(f) >= 5 {
			found[f[4]] = f[2]
		}
	}
	for _, p := range points {
		if dev, ok := found[p]; ok {
			if strings.HasPrefix(dev, "0:") {
				return "", "", fmt.Errorf("%w: %s is mounted from a file system without a block device", ErrUnclear, p)
			}
			return dev, p, nil
		}
	}
	return "", "", fmt.Errorf("%w: none of %s is a mount point", ErrUnclear, strings.Join(points, ", "))
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
