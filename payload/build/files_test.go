package build_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/payload/build"
)

// imageOf makes an image with the file system's own tool.
func imageOf(t *testing.T, kind string, files map[string][]byte) build.Image {
	t.Helper()
	dir, out := t.TempDir(), filepath.Join(t.TempDir(), "image")
	for name, data := range files {
		path := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	tool := exec.Command("mke2fs", "-q", "-t", "ext4", "-d", dir, out, "8M")
	if kind == "squashfs" {
		tool = exec.Command("mksquashfs", dir, out, "-quiet", "-no-progress")
	}
	if msg, err := tool.CombinedOutput(); errors.Is(err, exec.ErrNotFound) {
		t.Skipf("%s is not installed", tool.Path)
	} else if err != nil {
		t.Fatalf("%v: %s", err, msg)
	}
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if rest := len(data) % 4096; rest != 0 {
		data = append(data, make([]byte, 4096-rest)...)
	}
	return build.Image{Name: "usr", Data: bytes.NewReader(data), Size: int64(len(data))}
}

// TestFilesWithHoles: a hole, and room that was never written, are zeros, whatever is on the disk where somebody might look for them.
func TestFilesWithHoles(t *testing.T) {
	hole := make([]byte, 1<<20)
	comb := make([]byte, 800*4096) // so many extents that they take more than one block
	for i := 0; i < len(comb); i += 2 * 4096 {
		copy(comb[i:], noise(4096, byte(i>>13)))
	}
	files := map[string][]byte{
		"begin": slices.Concat(hole, noise(50000, 1)), "middle": slices.Concat(noise(70001, 2), hole, noise(90002, 3)), "end": slices.Concat(noise(30000, 4), hole),
		"all": hole, "comb": comb, "empty": nil, "dense": noise(200000, 5),
		"room": slices.Concat(noise(8192, 6), hole[:100*4096], noise(5000, 7)), "only-room": hole[:20*4096], "room-beyond": noise(5000, 8),
	}
	for _, kind := range []string{"ext4", "ext4, blocks of 1 KiB", "squashfs"} {
		t.Run(kind, func(t *testing.T) {
			var img build.Image
			if kind == "squashfs" {
				img = imageOf(t, kind, files)
			} else {
				img = holed(t, kind != "ext4", files)
			}
			list, err := build.Files(t.Context(), img)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]build.File{}
			for _, f := range list {
				got[strings.TrimPrefix(f.Path, "/")] = f
			}
			for name, data := range files {
				f := got[name]
				if f.Size != int64(len(data)) || f.SHA256 != sha256.Sum256(data) {
					t.Errorf("%s: %d bytes with SHA-256 %x, want %d with %x", name, f.Size, f.SHA256, len(data), sha256.Sum256(data))
				}
				if kind != "ext4" {
					continue
				}
				var blocks []byte
				for _, b := range f.Blocks {
					block := make([]byte, 4096)
					if _, err := img.Data.ReadAt(block, int64(b)*4096); err != nil {
						t.Fatal(err)
					}
					blocks = append(blocks, block...)
				}
				var want []byte
				for block := range slices.Chunk(data, 4096) {
					if !bytes.Equal(block, hole[:len(block)]) {
						want = append(want, block...)
					}
				}
				if len(blocks)-len(want) < 0 || len(blocks)-len(want) >= 4096 || !bytes.Equal(blocks[:len(want)], want) {
					t.Errorf("%s: its blocks, %v, do not hold it", name, f.Blocks)
				}
			}
			other := build.Image{Data: img.Data, Size: img.Size}
			if c, err := build.Compare(t.Context(), img, other); err != nil || !c.FilesKnown || len(c.Files) != 0 {
				t.Errorf("compared with itself: %v, %v", c.Files, err)
			}
		})
	}
}

// holed makes an ext4 of files on a disk that is full of something else. What is called room has blocks that were never written, where the file is zeros.
func holed(t *testing.T, small bool, files map[string][]byte) build.Image {
	t.Helper()
	dir, out := t.TempDir(), filepath.Join(t.TempDir(), "image")
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(out, bytes.Repeat([]byte("not zeros"), 16<<20/9), 0o644); err != nil {
		t.Fatal(err)
	}
	size, count := "4096", 1
	if small {
		size, count = "1024", 4
	}
	commands := [][]string{
		{"mke2fs", "-q", "-F", "-t", "ext4", "-b", size, "-E", "nodiscard,lazy_itable_init=0", "-d", dir, out},
		{"debugfs", "-w", "-R", fmt.Sprintf("fallocate /room 0 %d", 103*count), out},
		{"debugfs", "-w", "-R", fmt.Sprintf("fallocate /only-room 0 %d", 20*count-1), out},
		{"debugfs", "-w", "-R", fmt.Sprintf("fallocate /room-beyond 0 %d", 40*count), out},
	}
	for _, c := range commands {
		if msg, err := exec.Command(c[0], c[1:]...).CombinedOutput(); errors.Is(err, exec.ErrNotFound) {
			t.Skipf("%s is not installed", c[0])
		} else if err != nil {
			t.Fatalf("%v: %v: %s", c, err, msg)
		}
	}
	msg, err := exec.Command("debugfs", "-R", "ex /only-room", out).CombinedOutput()
	if err != nil || !strings.Contains(string(msg), "Uninit") {
		t.Fatalf("no room that was never written: %v: %s", err, msg)
	}
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	data = data[:len(data)&^4095]
	return build.Image{Name: "usr", Data: bytes.NewReader(data), Size: int64(len(data))}
}

func noise(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := 0; i < n; i += 32 {
		sum := sha256.Sum256([]byte{seed, byte(i >> 5), byte(i >> 13), byte(i >> 21)})
		copy(b[i:], sum[:])
	}
	return b
}

func TestCompareNamesFiles(t *testing.T) {
	changed := noise(100000, 2)
	changed[5000]++
	before := map[string][]byte{"bin/same": noise(50000, 1), "bin/changed": noise(100000, 2), "lib/gone": noise(20000, 3), "lib/was": noise(30000, 4)}
	after := map[string][]byte{"bin/same": noise(50000, 1), "bin/changed": changed, "lib/is": noise(30000, 4), "new": noise(9000, 5)}
	for _, kind := range []string{"ext4", "squashfs"} {
		t.Run(kind, func(t *testing.T) {
			c, err := build.Compare(t.Context(), imageOf(t, kind, before), imageOf(t, kind, after))
			if err != nil {
				t.Fatal(err)
			}
			if !c.FilesKnown {
				t.Fatal("the files are not known")
			}
			got := map[string]string{}
			for _, f := range c.Files {
				got[f.Path] = f.Kind + f.From
			}
			want := map[string]string{"/bin/changed": "changed", "/lib/gone": "removed", "/lib/is": "moved/lib/was", "/new": "added"}
			for path, kind := range want {
				if got[path] != kind {
					t.Errorf("%s: %q, want %q", path, got[path], kind)
				}
			}
			if len(got) != len(want) {
				t.Errorf("changes: %v", got)
			}
			if c.Same+c.Moved+c.Zero+c.Changed != c.Blocks {
				t.Errorf("%+v does not add up", c)
			}
		})
	}
}

// Whatever an image holds, asking for its files gives an answer.
func TestFilesOfDamagedImages(t *testing.T) {
	if testing.Short() {
		t.Skip("too slow for the race detector, which other tests run under")
	}
	img := imageOf(t, "ext4", map[string][]byte{"a/b": noise(5000, 1), "c": noise(100, 2)})
	data := make([]byte, img.Size)
	if _, err := img.Data.ReadAt(data, 0); err != nil {
		t.Fatal(err)
	}
	for i := 1024; i < len(data); i += len(data) / 100 {
		bad := bytes.Clone(data)
		for k := i; k < min(i+64, len(bad)); k++ {
			bad[k] ^= 0x5a
		}
		if _, err := build.Files(t.Context(), build.Image{Data: bytes.NewReader(bad), Size: int64(len(bad))}); err != nil && !errors.Is(err, build.ErrNoFileSystem) {
			t.Errorf("damaged at %d: %v", i, err)
		}
	}
	if _, err := build.Files(t.Context(), image(1<<20)); !errors.Is(err, build.ErrNoFileSystem) {
		t.Errorf("no file system: %v", err)
	}
}
