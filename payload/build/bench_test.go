package build_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/payload/build"
)

// TestBenchDelta prints sizes and times of what is made of the samples and of file systems made of /usr, against references: payloads that the C++
// generators made of the same images, bsdiff(1) over the whole image, and xz(1) and bzip2(1) over the same pieces. FLIPSIDE_LONG=1 runs it.
func TestBenchDelta(t *testing.T) {
	if os.Getenv("FLIPSIDE_LONG") == "" {
		t.Skip("set FLIPSIDE_LONG=1, or run make bench-delta")
	}
	t.Run("samples", benchSamples)
	t.Run("usr", benchUsr)
}

func benchSamples(t *testing.T) {
	key := newKey(t)
	root := [][3]string{{"kernel", "payload-v2/small-kernel-old.img", "payload-v2/small-kernel-new.img"}, {"root", "payload-v2/small-root-old.ext4", "payload-v2/small-root-new.ext4"}}
	for _, tt := range []struct {
		payloads []string
		images   [][3]string
		keys     int
	}{
		{[]string{"payload-v1/v1-delta.dual.payload"}, [][3]string{{"usr", "payload-v1/a.img", "payload-v1/b.img"}}, 2},
		{[]string{"payload-v2/small-delta-m2-aosp.bin", "payload-v2/small-delta-m4-aosp.bin", "payload-v2/small-delta-m4-ref.bin"}, root, 1},
	} {
		spec := build.Spec{Compression: build.Smallest, Keys: slices.Repeat([]crypto.Signer{key}, tt.keys)}
		reference, from := 0, time.Duration(0)
		for i, n := range tt.images {
			img, a, b := pairOf(t, n[0], n[1], n[2])
			spec.Images = append(spec.Images, img)
			start := time.Now()
			reference += smallest(t, b)
			from += time.Since(start)
			if i == len(tt.images)-1 {
				took, size := measure(t, build.Spec{Images: []build.Image{img}, Compression: build.Smallest, Keys: spec.Keys})
				t.Logf("delta of %s: %d bytes in %.2f s; bsdiff(1) of the whole image: %s", filepath.Base(n[2]), size, took.Seconds(), bsdiff(t, a, b))
			}
		}
		took, size := measure(t, spec)
		line := fmt.Sprintf("delta: %d bytes in %.2f s", size, took.Seconds())
		for _, name := range tt.payloads {
			info, err := os.Stat(filepath.Join("..", "..", "..", "shared", "samples", filepath.FromSlash(name)))
			if err != nil {
				t.Fatal(err)
			}
			line += fmt.Sprintf("; %.2f of %s", float64(size)/float64(info.Size()), filepath.Base(name))
		}
		t.Log(line)
		fulls(t, spec, reference, from)
	}
}

// fulls makes full payloads, and compares with what xz(1) and bzip2(1) make of the same pieces.
func fulls(t *testing.T, spec build.Spec, reference int, from time.Duration) {
	t.Helper()
	t.Logf("full: xz(1) or bzip2(1), the smaller for each piece: %d bytes in %.2f s", reference, from.Seconds())
	spec.Images = slices.Clone(spec.Images)
	for i := range spec.Images {
		spec.Images[i].Old = nil
	}
	for _, how := range []build.Compression{build.Smallest, build.XZ, build.Bzip2, build.Zstd} {
		spec.Compression = how
		took, size := measure(t, spec)
		t.Logf("full: %s %d bytes in %.2f s, %.3f of it", how, size, took.Seconds(), float64(size)/float64(reference))
	}
}

// smallest is the size of the data in the pieces of a full payload, each by the better one of two tools.
func smallest(t *testing.T, data []byte) int {
	t.Helper()
	sum := 0
	for piece := range slices.Chunk(data, 2<<20) {
		sum += min(pipe(t, piece, "xz", "-6", "--check=crc32"), pipe(t, piece, "bzip2", "-9"))
	}
	return sum
}

// bsdiff says what bsdiff(1) makes of two images. It takes minutes where much is equal, so there is a limit.
func bsdiff(t *testing.T, a, b []byte) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range map[string][]byte{"a": a, "b": b} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const limit = 60 * time.Second
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	start := time.Now()
	err := exec.CommandContext(ctx, "bsdiff", filepath.Join(dir, "a"), filepath.Join(dir, "b"), filepath.Join(dir, "p")).Run()
	if ctx.Err() != nil {
		return fmt.Sprintf("not done after %s", limit)
	}
	if err != nil {
		return err.Error()
	}
	took := time.Since(start)
	info, err := os.Stat(filepath.Join(dir, "p"))
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d bytes in %.2f s", info.Size(), took.Seconds())
}

// benchUsr makes deltas of an update of /usr in the file systems that such images have.
func benchUsr(t *testing.T) {
	size := 128
	if s := os.Getenv("FLIPSIDE_BENCH_MIB"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		size = n
	}
	dir := t.TempDir()
	changed := trees(t, filepath.Join(dir, "old"), filepath.Join(dir, "new"), int64(size)<<20*5/8)
	t.Logf("an update of a file system of %d MiB that changes %s", size, changed)
	key := newKey(t)
	for _, tt := range []struct {
		name string
		make func(tree, to string) *exec.Cmd
	}{
		{"ext4", func(tree, to string) *exec.Cmd {
			return exec.Command("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-N", "32768", "-O", "^has_journal", "-U", "6f1d5c1e-5a57-4b0e-9d0a-0d6ad8d4c0de", "-E", "hash_seed=6f1d5c1e-5a57-4b0e-9d0a-0d6ad8d4c0de", "-d", tree, to, fmt.Sprintf("%dM", size))
		}},
		{"squashfs, zstd", func(tree, to string) *exec.Cmd {
			return exec.Command("mksquashfs", tree, to, "-comp", "zstd", "-quiet", "-no-progress", "-all-root", "-all-time", "1", "-mkfs-time", "1")
		}},
		{"squashfs, not compressed", func(tree, to string) *exec.Cmd {
			return exec.Command("mksquashfs", tree, to, "-noI", "-noD", "-noF", "-noX", "-quiet", "-no-progress", "-all-root", "-all-time", "1", "-mkfs-time", "1")
		}},
	} {
		img := build.Image{Name: "usr"}
		for _, side := range []string{"old", "new"} {
			path := filepath.Join(dir, side+".img")
			os.Remove(path)
			if out, err := tt.make(filepath.Join(dir, side), path).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", tt.name, err, out)
			}
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			data = append(data, make([]byte, -len(data)&4095)...)
			if side == "old" {
				img.Old = &build.Image{Data: bytes.NewReader(data), Size: int64(len(data))}
			} else {
				img.Data, img.Size = bytes.NewReader(data), int64(len(data))
			}
		}
		took, size := measure(t, build.Spec{Images: []build.Image{img}, Keys: []crypto.Signer{key}})
		full := img
		full.Old = nil
		fullTook, fullSize := measure(t, build.Spec{Images: []build.Image{full}, Keys: []crypto.Signer{key}})
		t.Logf("%-25s %4d MiB: delta %9d bytes in %6.2f s; full payload (zstd) %10d bytes in %6.2f s; the delta is %.3f of it", tt.name, img.Size>>20, size, took.Seconds(), fullSize, fullTook.Seconds(), float64(size)/float64(fullSize))
	}
}

// trees copies files of /usr, about limit bytes of them, and again with some of them changed as an update changes them: programs in places all over
// them, as if they had been compiled again, texts in a line, some added, some removed, some renamed.
func trees(t *testing.T, old, new string, limit int64) string {
	t.Helper()
	rng := rand.New(rand.NewPCG(11, 12))
	var total int64
	var programs, texts, added, removed, renamed int
	err := filepath.WalkDir("/usr", func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil
		}
		if total >= limit {
			return fs.SkipAll
		}
		// The same files on every machine would be best; a choice that does not depend on what else there is comes near.
		if sum := sha256.Sum256([]byte(path)); sum[0] >= 64 {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil || len(data) > 8<<20 {
			return nil
		}
		total += int64(len(data))
		name := strings.TrimPrefix(path, "/usr/")
		put(t, filepath.Join(old, name), data)
		isProgram := bytes.HasPrefix(data, []byte("\x7fELF"))
		switch n := rng.IntN(200); {
		case isProgram && n < 30:
			programs++
			data = again(rng, data)
		case !isProgram && n < 6:
			texts++
			data = slices.Concat(data[:len(data)/2], []byte("changed by the update\n"), data[len(data)/2:])
		case n == 198:
			removed++
			return nil
		case n == 199:
			renamed++
			name += ".renamed"
		case n == 197:
			added++
			put(t, filepath.Join(new, name+".added"), again(rng, data))
		}
		put(t, filepath.Join(new, name), data)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d programs and %d other files, adds %d, removes %d and renames %d", programs, texts, added, removed, renamed)
}

// again is a program as if it had been compiled again: a few bytes are inserted somewhere, and numbers all over it are different.
func again(rng *rand.Rand, data []byte) []byte {
	out := slices.Clone(data)
	for range len(out) / 500 {
		out[rng.IntN(len(out))] += 16
	}
	at := rng.IntN(len(out) + 1)
	return slices.Insert(out, at, make([]byte, 16+rng.IntN(200))...)
}

func put(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, time.Unix(1, 0), time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
}

func measure(t *testing.T, s build.Spec) (time.Duration, int) {
	t.Helper()
	start := time.Now()
	s.TempDir = t.TempDir()
	n := &counter{}
	if _, err := build.Create(t.Context(), n, s); err != nil {
		t.Fatal(err)
	}
	return time.Since(start), n.n
}

type counter struct{ n int }

func (c *counter) Write(p []byte) (int, error) { c.n += len(p); return len(p), nil }

func pipe(t *testing.T, data []byte, tool string, args ...string) int {
	t.Helper()
	cmd := exec.Command(tool, args...)
	cmd.Stdin = bytes.NewReader(data)
	n := &counter{}
	cmd.Stdout = n
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v", tool, err)
	}
	return n.n
}
