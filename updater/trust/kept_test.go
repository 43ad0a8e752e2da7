package trust

import (
	"testing"

	"github.com/flipside-linux/flipside/updater/kepttest"
)

// TestKeptFloor reads the floor that an earlier version of Flipside saved: nothing that it holds may be lost.
func TestKeptFloor(t *testing.T) {
	f := &Floor{Path: "../../testdata/host/trust.json", Mode: FileOnly}
	r, warning, err := f.load()
	if err != nil || warning != "" {
		t.Fatal(err, warning)
	}
	if err := kepttest.Whole(f.Path, r); err != nil {
		t.Error(err)
	}
}
