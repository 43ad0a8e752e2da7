package build

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/fstest"
)

// A file of zeros takes no room in an image, however long it says it is: reading it ends when it is told to.
func TestReadingAHoleEndsWhenToldTo(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	c := &extentCopy{extentReader: &extentReader{zeros: make([]byte, 4096)}, ctx: ctx, to: ending{cancel}, size: 1 << 62}
	if err := c.hole(c.size); !errors.Is(err, context.Canceled) || c.done > 8192 {
		t.Errorf("%v after %d bytes, want that it was cancelled after the first 4096", err, c.done)
	}
	if err := copyFile(ctx, io.Discard, fstest.MapFS{"a": {Data: make([]byte, 10)}}, "a", 10, make([]byte, 10)); !errors.Is(err, context.Canceled) {
		t.Errorf("another file: %v, want that it was cancelled", err)
	}
}

// ending is a writer that cancels what writes to it.
type ending struct{ cancel func() }

func (e ending) Write(p []byte) (int, error) { e.cancel(); return len(p), nil }

// A file system's reader that comes no further is an error, and so is one that ends too soon.
func TestReaderThatComesNoFurther(t *testing.T) {
	if _, err := io.Copy(io.Discard, advancing{t.Context(), stuck{}}); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("stuck: %v, want %v", err, io.ErrNoProgress)
	}
	if err := copyFile(t.Context(), io.Discard, fstest.MapFS{"a": {Data: make([]byte, 10)}}, "a", 11, make([]byte, 10)); err == nil {
		t.Error("10 of 11 bytes are taken for the file")
	}
}

type stuck struct{}

func (stuck) Read([]byte) (int, error) { return 0, nil }
