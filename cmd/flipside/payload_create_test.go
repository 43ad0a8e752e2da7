package main

import (
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/flipside-linux/flipside/payload/build"
)

// A payload that cannot be flushed to the disk does not take the place of a good one.
func TestPayloadNotFlushed(t *testing.T) {
	out := filepath.Join(t.TempDir(), "payload")
	if err := os.WriteFile(out, []byte("good"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := writePayload(out, true, func(w io.Writer) (build.Result, error) { return build.Result{}, w.(*os.File).Close() })
	if err == nil {
		t.Error("it is said to be in place")
	}
	if got, err := os.ReadFile(out); err != nil || string(got) != "good" {
		t.Errorf("in its place is %q, %v", got, err)
	}
}
