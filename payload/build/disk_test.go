package build

import (
	"errors"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
)

// A disk that is full ends the making of a payload, however many pieces of the image are still to come.
func TestFullDisk(t *testing.T) {
	for _, major := range []int{1, 2} {
		full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer full.Close()
		image, err := os.Create(t.TempDir() + "/usr.img")
		if err != nil {
			t.Fatal(err)
		}
		defer image.Close()
		const workers, size = 2, 40 * chunkV2
		if err := image.Truncate(size); err != nil {
			t.Fatal(err)
		}
		synctest.Test(t, func(t *testing.T) { // which fails as soon as all of it waits for each other
			b := &builder{spec: Spec{Major: major, Compression: None, Workers: workers}, blobs: full, ctx: t.Context()}
			if _, err := b.image(Image{Name: "usr", Data: image, Size: size}); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("major %d: %v, want that there is no space", major, err)
			}
		})
	}
}
