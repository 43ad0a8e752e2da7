package mounted

import (
	"errors"
	"strings"
	"testing"
	"testing/fstest"
)

func file(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }

// tree is a host with a disk sda, of which sda3 and sda4 are slots.
func tree(mountinfo string, more map[string]string) fstest.MapFS {
	m := fstest.MapFS{
		"proc/self/mountinfo":          file(mountinfo),
		"sys/block/sda/sda3/partition": file("3\n"),
		"sys/block/sda/sda4/partition": file("4\n"),
		"sys/dev/block/8:3/uevent":     file("MAJOR=8\nMINOR=3\nDEVNAME=sda3\nDEVTYPE=partition\nPARTN=3\nPARTNAME=USR-A\n"),
		"sys/class/block/sda3/uevent":  file("DEVNAME=sda3\nDEVTYPE=partition\nPARTN=3\n"),
		"sys/class/block/sda4/uevent":  file("DEVNAME=sda4\nDEVTYPE=partition\nPARTN=4\n"),
		"sys/dev/block/254:0/uevent":   file("DEVNAME=dm-0\nDEVTYPE=disk\n"),
	}
	for name, body := range more {
		m[name] = file(body)
	}
	return m
}

const root = "20 1 8:9 / / rw shared:1 - ext4 /dev/sda9 rw\n"

func TestUsr(t *testing.T) {
	for _, tt := range []struct {
		name string
		fs   fstest.MapFS
		want Partition
		err  string
	}{
		{"a plain partition", tree(root+"30 20 8:3 / /usr ro - ext4 /dev/sda3 ro\n", nil), Partition{"/dev/sda", 3, "sda3"}, ""},
		{"verity, data and hashes on one partition", tree(root+"30 20 254:0 / /usr ro - ext4 /dev/mapper/usr ro\n", map[string]string{"sys/dev/block/254:0/slaves/sda4": ""}), Partition{"/dev/sda", 4, "sda4"}, ""},
		{"the last mount is on top", tree("30 20 254:0 / /usr ro - ext4 /dev/mapper/usr ro\n31 20 8:3 / /usr ro - ext4 /dev/sda3 ro\n", nil), Partition{"/dev/sda", 3, "sda3"}, ""},
		{"/usr is part of /", tree("20 1 8:3 / / rw - ext4 /dev/sda3 rw\n", nil), Partition{"/dev/sda", 3, "sda3"}, ""},
		{"two partitions", tree("30 20 254:0 / /usr ro - ext4 x ro\n", map[string]string{"sys/dev/block/254:0/slaves/sda3": "", "sys/dev/block/254:0/slaves/sda4": ""}), Partition{}, "made of 2 partitions: sda3, sda4"},
		{"an overlay", tree("30 20 0:31 / /usr rw - overlay overlay rw\n", nil), Partition{}, "without a block device"},
		{"an overlay of system extensions", tree("30 20 8:3 / /usr ro - ext4 /dev/sda3 ro\n40 30 0:31 / /usr ro - overlay sysext ro\n41 40 0:32 / /usr ro - overlay sysext ro\n", nil), Partition{"/dev/sda", 3, "sda3"}, ""},
		{"an overlay beneath something else", tree("30 20 0:31 / /usr ro - overlay sysext ro\n31 30 0:40 / /usr rw - tmpfs tmpfs rw\n", nil), Partition{}, "without a block device (tmpfs)"},
		{"btrfs on verity, beneath system extensions", tree("30 20 0:27 / /usr ro - btrfs /dev/mapper/usr ro\n40 30 0:31 / /usr ro - overlay sysext ro\n", map[string]string{
			"sys/class/block/dm-0/uevent": "DEVNAME=dm-0\nDEVTYPE=disk\n", "sys/class/block/dm-0/dm/name": "usr\n", "sys/class/block/dm-0/slaves/sda4": "",
		}), Partition{"/dev/sda", 4, "sda4"}, ""},
		{"btrfs on a partition", tree("30 20 0:27 / /usr ro shared:3 - btrfs /dev/sda3 ro,subvol=/\n", nil), Partition{"/dev/sda", 3, "sda3"}, ""},
		{"btrfs on a mapped device that is gone", tree("30 20 0:27 / /usr ro - btrfs /dev/mapper/usr ro\n", nil), Partition{}, "no mapped device"},
		{"btrfs by another name", tree("30 20 0:27 / /usr ro - btrfs /dev/../sda3 ro\n", nil), Partition{}, "not the name of a block device"},
		{"a whole disk", tree("30 20 254:0 / /usr ro - ext4 x ro\n", nil), Partition{}, "neither a partition nor made of partitions"},
		{"a device upon itself", tree("30 20 254:0 / /usr ro - ext4 x ro\n", map[string]string{"sys/dev/block/254:0/slaves/dm-0": "", "sys/class/block/dm-0/uevent": "DEVNAME=dm-0\nDEVTYPE=disk\n", "sys/class/block/dm-0/slaves/dm-0": ""}), Partition{}, "without end"},
		{"a device that is gone", tree("30 20 9:9 / /usr ro - ext4 x ro\n", nil), Partition{}, "9:9"},
		{"no mounts", tree("", nil), Partition{}, "is a mount point"},
		{"a bad number", tree("30 20 8:3 / /usr ro - ext4 x ro\n", map[string]string{"sys/dev/block/8:3/uevent": "DEVNAME=sda3\nDEVTYPE=partition\nPARTN=x\n"}), Partition{}, `partition "x"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Usr(tt.fs)
			if tt.err == "" {
				if err != nil || got != tt.want {
					t.Errorf("got %+v, %v, want %+v", got, err, tt.want)
				}
				return
			}
			if !errors.Is(err, ErrUnclear) || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("error = %v, want ErrUnclear with %q", err, tt.err)
			}
		})
	}
}
