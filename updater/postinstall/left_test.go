package postinstall

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// A program that succeeds and leaves something behind that keeps its output open has succeeded; one that fails has not.
func TestLeftBehind(t *testing.T) {
	for _, tt := range []struct {
		script string
		want   error
	}{
		{"sleep 60 &\nexit 0\n", nil},
		{"sleep 60 &\nexit 1\n", ErrFailed},
	} {
		t.Run(tt.script, func(t *testing.T) {
			t.Parallel() // each waits for the output to end
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "program"), []byte("#!/bin/sh\n"+tt.script), 0o755); err != nil {
				t.Fatal(err)
			}
			err := Program{Mount: dir, Path: "program", Output: filepath.Join(dir, "output")}.run(t.Context(), "device")
			if !errors.Is(err, tt.want) {
				t.Errorf("%q: %v, want %v", tt.script, err, tt.want)
			}
		})
	}
}
