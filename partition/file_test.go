package partition_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/bootsim"
	"github.com/flipside-linux/flipside/partition/devicetest"
	"github.com/flipside-linux/flipside/partition/gptimage"
)

func TestFileDevice(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		devicetest.Run(t, func(t *testing.T) partition.Device {
			path := filepath.Join(t.TempDir(), "disk")
			if err := os.WriteFile(path, make([]byte, 1<<16), 0o600); err != nil {
				t.Fatal(err)
			}
			dev, closer, err := partition.OpenDevice(path, partition.Options{SectorSize: sector})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { closer() })
			return dev
		})
	}
}

// Writes of every size and alignment are read back as they were, whichever way they went.
func TestFileDeviceWritesOfEveryKind(t *testing.T) {
	dirs := []string{t.TempDir()}
	if dir, err := os.MkdirTemp("/dev/shm", "flipside-"); err == nil { // another file system, which may have no O_DIRECT
		t.Cleanup(func() { os.RemoveAll(dir) })
		dirs = append(dirs, dir)
	}
	for _, dir := range dirs {
		path, want := filepath.Join(dir, "disk"), make([]byte, 1<<20)
		if err := os.WriteFile(path, want, 0o600); err != nil {
			t.Fatal(err)
		}
		dev, closer, err := partition.OpenDevice(path, partition.Options{SectorSize: 512})
		if err != nil {
			t.Fatal(err)
		}
		rng := rand.New(rand.NewPCG(1, 2))
		data := make([]byte, 300<<10)
		for range 300 {
			unit := []int{1, 512, 4096, 65536}[rng.IntN(4)]
			n := min(unit*rng.IntN(5), len(data)-4096)
			off := rng.IntN((len(want)-n)/unit+1) * unit
			from := []int{0, 512, 1}[rng.IntN(3)]
			p := data[from : from+n]
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			if got, err := dev.WriteAt(p, int64(off)); got != n || err != nil {
				t.Fatalf("%d bytes at %d: %d, %v", n, off, got, err)
			}
			copy(want[off:], p)
		}
		if err := dev.Flush(); err != nil {
			t.Fatal(err)
		}
		cached, medium := make([]byte, len(want)), make([]byte, len(want))
		if _, err := dev.ReadAt(cached, 0); err != nil || !bytes.Equal(cached, want) {
			t.Errorf("%s: another image through the cache, %v", dir, err)
		}
		if _, err := dev.(partition.MediumReader).ReadMedium(medium, 0); err != nil || !bytes.Equal(medium, want) {
			t.Errorf("%s: another image on the medium, %v", dir, err)
		}
		if err := closer(); err != nil {
			t.Fatal(err)
		}
	}
}

// A large write leaves nothing in the page cache.
func TestFileDeviceWritesAroundTheCache(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	const size = 1 << 20
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Type == unix.TMPFS_MAGIC || st.Type == unix.OVERLAYFS_SUPER_MAGIC {
		t.Skip("a file system that may have only the page cache")
	}
	if f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0); err != nil {
		t.Skip("the file system has no O_DIRECT: ", err)
	} else {
		f.Close()
	}
	dev, closer, err := partition.OpenDevice(path, partition.Options{SectorSize: 512})
	if err != nil {
		t.Fatal(err)
	}
	defer closer()
	if _, err := dev.WriteAt(make([]byte, size), 0); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)
	resident := make([]byte, size/os.Getpagesize())
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), size, uintptr(unsafe.Pointer(&resident[0]))); errno != 0 {
		t.Fatal(errno)
	}
	n := 0
	for _, b := range resident {
		n += int(b & 1)
	}
	if n > len(resident)/8 { // the beginning is read for the sector size
		t.Errorf("%d of %d pages are in the cache", n, len(resident))
	}
}

// image makes a disk image in a file, as image builders do.
func image(t *testing.T, sector int) (path string, parts []gptimage.Partition) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "disk.img")
	parts = []gptimage.Partition{
		{Label: "EFI-SYSTEM", Type: gptimage.TypeEFI, UUID: "11111111-1111-4111-8111-111111111111", Size: 1 << 20},
		{Label: "USR-A", Type: gptimage.TypeUSR, UUID: uuidA, Size: 1 << 20, Attributes: gptimage.Attributes(1, 0, true)},
		{Label: "USR-B", Type: gptimage.TypeUSR, UUID: uuidB, Size: 1 << 20},
	}
	if err := gptimage.Create(path, sector, "22222222-2222-4222-8222-222222222222", parts); err != nil {
		t.Fatal(err)
	}
	return path, parts
}

func openFile(t *testing.T, path string, opt partition.Options) *partition.Disk {
	t.Helper()
	d, err := partition.OpenDisk(path, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// TestTools: after every change the system's own tools find nothing wrong, and read the same boot bits.
func TestTools(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		path, _ := image(t, sector)
		check := func(when string) {
			t.Helper()
			if sector != 512 {
				return // on image files these tools know sectors of 512 bytes only
			}
			for _, tool := range [][]string{{"sgdisk", "-v", path}, {"sfdisk", "--verify", path}, {"cgpt", "show", path}} {
				if _, err := exec.LookPath(tool[0]); err != nil {
					t.Logf("%s is not installed", tool[0])
					continue
				}
				out, err := exec.Command(tool[0], tool[1:]...).CombinedOutput()
				text := string(out)
				if err != nil || strings.Contains(text, "INVALID") || tool[0] == "sgdisk" && !strings.Contains(text, "No problems found") || tool[0] == "sfdisk" && !strings.Contains(text, "No errors detected") {
					t.Errorf("%s: %s: %v\n%s", when, strings.Join(tool, " "), err, text)
				}
			}
		}
		check("new")
		d := openFile(t, path, partition.Options{})
		run := running(t, d, "USR-A")
		target, err := d.Begin(run, "USR-B")
		if err != nil {
			t.Fatal(err)
		}
		check("begin")
		data := bytes.Repeat([]byte("release\n"), 100_001)
		for off := 0; off < len(data); off += 65536 {
			end := min(off+65536, len(data))
			if _, err := target.WriteAt(data[off:end], int64(off)); err != nil {
				t.Fatal(err)
			}
			if err := target.Settle(int64(end)); err != nil {
				t.Fatal(err)
			}
		}
		v, err := target.Verify(context.Background(), int64(len(data)), sha256.Sum256(data))
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Activate(run, v, 1); err != nil {
			t.Fatal(err)
		}
		check("activate")
		if sector == 512 {
			cgpt(t, path, "2", "1", "0")
		}
		if s, err := bootsim.BootFile(path); err != nil || s.Label != "USR-B" {
			t.Fatalf("boots %q, %v", s.Label, err)
		}
		check("boot")
		if err := d.MarkSuccessful(running(t, d, "USR-B")); err != nil {
			t.Fatal(err)
		}
		check("mark successful")
		if sector == 512 {
			cgpt(t, path, "2", "0", "1")
		}
		if err := d.MarkBad("USR-A"); err != nil {
			t.Fatal(err)
		}
		check("mark bad")
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("xxxx"), int64(sector)+60); err != nil {
			t.Fatal(err)
		}
		f.Close()
		if what, err := d.Repair(); err != nil || what == "" {
			t.Fatalf("repair: %q, %v", what, err)
		}
		check("repair")
	}
}

// cgpt compares the boot bits of USR-B with what cgpt reads. Its attributes are those of a kernel partition, in the same bits.
func cgpt(t *testing.T, path, priority, tries, successful string) {
	t.Helper()
	if _, err := exec.LookPath("cgpt"); err != nil {
		return
	}
	for flag, want := range map[string]string{"-P": priority, "-T": tries, "-S": successful} {
		out, err := exec.Command("cgpt", "show", "-i", "3", flag, path).Output()
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("cgpt show %s: %q, %v, want %s", flag, got, err, want)
		}
	}
}

// TestClaim: two that have the same disk open never write to one slot.
func TestClaim(t *testing.T) {
	path, _ := image(t, 512)
	one, two := openFile(t, path, partition.Options{}), openFile(t, path, partition.Options{})
	if _, err := one.Begin(running(t, one, "USR-A"), "USR-B"); err != nil {
		t.Fatal(err)
	}
	if _, err := one.Begin(running(t, one, "USR-A"), "USR-B"); err != nil {
		t.Errorf("beginning anew on the same disk: %v", err)
	}
	if _, err := two.Begin(running(t, two, "USR-A"), "USR-B"); !errors.Is(err, partition.ErrBusy) {
		t.Errorf("a second writer: %v, want ErrBusy", err)
	}
	one.Close()
	if _, err := two.Begin(running(t, two, "USR-A"), "USR-B"); err != nil {
		t.Errorf("after the first is gone: %v", err)
	}
}

func TestOpenDisk(t *testing.T) {
	if _, err := partition.OpenDisk(filepath.Join(t.TempDir(), "none"), partition.Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if _, err := partition.OpenDisk(t.TempDir(), partition.Options{ReadOnly: true}); err == nil {
		t.Error("a directory was opened as a disk")
	}
	path, _ := image(t, 512)
	if _, err := partition.OpenDisk(path, partition.Options{SectorSize: 520}); err == nil {
		t.Error("sectors of 520 bytes were accepted")
	}
	d := openFile(t, path, partition.Options{ReadOnly: true})
	if _, err := d.Begin(running(t, d, "USR-A"), "USR-B"); !errors.Is(err, partition.ErrReadOnly) {
		t.Error(err)
	}
	if _, err := d.Repair(); !errors.Is(err, partition.ErrReadOnly) {
		t.Error(err)
	}
}
