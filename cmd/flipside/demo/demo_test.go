package demo

import (
	"io"
	"os"
	"path/filepath"
	"testing"
)

// A directory that somebody named is never removed, and what is in it is never touched.
func TestANamedDirectoryIsNotTheDemosToRemove(t *testing.T) {
	dir := t.TempDir()
	mine := filepath.Join(dir, "mine")
	if err := os.WriteFile(mine, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := Run(t.Context(), Options{Flipsided: "/nonexistent", Dir: dir, Out: io.Discard}); err == nil {
		t.Error("the demo ran in a directory that is not empty")
	}
	if b, err := os.ReadFile(mine); err != nil || string(b) != "precious" {
		t.Errorf("the file is %q, %v", b, err)
	}
}
