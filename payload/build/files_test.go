package build_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
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
