package build_test

import (
	"bytes"
	"crypto"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/payload/build"
)

// TestBenchDelta prints sizes and times of what is made of the samples, against references: payloads that the C++ generators made of the
// same images, bsdiff(1) over the whole image, and xz(1) and bzip2(1) over the same pieces. FLIPSIDE_LONG=1 runs it.
func TestBenchDelta(t *testing.T) {
	if os.Getenv("FLIPSIDE_LONG") == "" {
		t.Skip("set FLIPSIDE_LONG=1, or run make bench-delta")
	}
	key := newKey(t)
	for _, tt := range []struct{ payload, old, new string }{
		{"payload-v1/v1-delta.dual.payload", "payload-v1/a.img", "payload-v1/b.img"},
		{"", "payload-v2/small-root-old.ext4", "payload-v2/small-root-new.ext4"},
	} {
		img, a, b := pairOf(t, "usr", tt.old, tt.new)
		took, size := measure(t, build.Spec{Images: []build.Image{img}, Compression: build.Smallest, Keys: []crypto.Signer{key, key}})
		line := fmt.Sprintf("delta %s: %d bytes in %.2f s", filepath.Base(tt.new), size, took.Seconds())
		if info, err := os.Stat(filepath.Join("..", "..", "..", "shared", "samples", filepath.FromSlash(tt.payload))); err == nil && tt.payload != "" {
			line += fmt.Sprintf("; %.2f of the C++ generator's %d bytes", float64(size)/float64(info.Size()), info.Size())
		}
		dir := t.TempDir()
		for name, data := range map[string][]byte{"a": a, "b": b} {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		start := time.Now()
		if err := exec.Command("bsdiff", filepath.Join(dir, "a"), filepath.Join(dir, "b"), filepath.Join(dir, "p")).Run(); err == nil {
			ref := time.Since(start)
			info, err := os.Stat(filepath.Join(dir, "p"))
			if err != nil {
				t.Fatal(err)
			}
			line += fmt.Sprintf("; bsdiff(1) %d bytes in %.2f s, %.2f of its time", info.Size(), ref.Seconds(), took.Seconds()/ref.Seconds())
		} else {
			line += "; bsdiff(1) is not installed"
		}
		t.Log(line)

		reference, start := 0, time.Now()
		for off := 0; off < len(b); off += 2 << 20 {
			piece := b[off:min(len(b), off+2<<20)]
			reference += min(pipe(t, piece, "xz", "-6", "--check=crc32"), pipe(t, piece, "bzip2", "-9"))
		}
		t.Logf("full %s: xz(1) or bzip2(1), the smaller: %d bytes in %.2f s", filepath.Base(tt.new), reference, time.Since(start).Seconds())
		img.Old = nil
		for _, how := range []build.Compression{build.Smallest, build.XZ, build.Bzip2, build.Zstd} {
			took, size := measure(t, build.Spec{Images: []build.Image{img}, Compression: how, Keys: []crypto.Signer{key}})
			t.Logf("full %s: %s %d bytes in %.2f s, %.3f of it", filepath.Base(tt.new), how, size, took.Seconds(), float64(size)/float64(reference))
		}
	}
}

func measure(t *testing.T, s build.Spec) (time.Duration, int) {
	start := time.Now()
	data, _ := create(t, s)
	return time.Since(start), len(data)
}

func pipe(t *testing.T, data []byte, tool string, args ...string) int {
	cmd := exec.Command(tool, args...)
	cmd.Stdin = bytes.NewReader(data)
	out, err := cmd.Output()
	if err != nil {
		t.Skipf("%s: %v", tool, err)
	}
	return len(out)
}
