package payload_test

import (
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/flipside-linux/flipside/payload"
)

// A file target takes writes of every size and alignment, settles while others write, and reads back what was written.
func TestFileTarget(t *testing.T) {
	const size = 4 << 20
	dirs := []string{t.TempDir()}
	if dir, err := os.MkdirTemp("/dev/shm", "flipside-"); err == nil { // another file system, which may have no O_DIRECT
		t.Cleanup(func() { os.RemoveAll(dir) })
		dirs = append(dirs, dir)
	}
	for _, dir := range dirs {
		f, err := os.Create(filepath.Join(dir, "image"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		target := payload.NewFileTarget(f)
		defer target.Close()
		rng := rand.New(rand.NewPCG(3, 4))
		image, buf := make([]byte, size), make([]byte, size)
		for i := range image {
			image[i] = byte(rng.Uint32())
		}
		settled := make(chan error, 2)
		calls := 0
		for off := 0; off < size; {
			unit := []int{1, 512, 4096, 65536, 65536}[rng.IntN(5)]
			if off%unit != 0 {
				unit -= off % unit // up to where such a one can begin
			}
			n, from := min(unit*(1+rng.IntN(4)), size-off), []int{0, 512, 1}[rng.IntN(3)]
			p := buf[from : from+min(n, len(buf)-from)]
			copy(p, image[off:])
			if got, err := target.WriteAt(p, int64(off)); got != len(p) || err != nil {
				t.Fatalf("%d bytes at %d: %d, %v", len(p), off, got, err)
			}
			if off += len(p); off > (calls+1)<<20 && off < size {
				upto := int64(off)
				go func() { settled <- target.Settle(upto) }()
				if calls++; calls >= 2 {
					if err := <-settled; err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		for range min(calls, 1) {
			if err := <-settled; err != nil {
				t.Fatal(err)
			}
		}
		if err := target.Verify(t.Context(), size, sha256.Sum256(image)); err != nil {
			t.Errorf("%s: %v", dir, err)
		}
		if err := target.Verify(t.Context(), size-1, sha256.Sum256(image[:size-1])); err != nil { // less than is settled: read again
			t.Errorf("%s: %v", dir, err)
		}
		if err := target.Verify(t.Context(), size, sha256.Sum256(image[1:])); !errors.Is(err, payload.ErrHash) {
			t.Errorf("%s: another image: %v", dir, err)
		}
	}
}
