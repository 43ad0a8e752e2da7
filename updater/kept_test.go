package updater

import (
	"path/filepath"
	"testing"

	"github.com/flipside-linux/flipside/updater/history"
	"github.com/flipside-linux/flipside/updater/kepttest"
)

// TestKeptStates reads the states that earlier versions of Flipside saved: a host that is updated in the middle of something goes on with it. Nothing that
// they hold may be lost.
func TestKeptStates(t *testing.T) {
	files, err := filepath.Glob("../testdata/host/state*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no states: %v", err)
	}
	for _, path := range files {
		t.Run(filepath.Base(path), func(t *testing.T) {
			st, err := Store{path}.Load()
			if err != nil {
				t.Fatal(err)
			}
			if err := kepttest.Whole(path, st); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestKeptHistory reads the history that an earlier version wrote on the host of these states.
func TestKeptHistory(t *testing.T) {
	kinds := map[string]int{}
	for r, err := range history.Read("../testdata/host") {
		if err != nil {
			t.Fatal(err)
		}
		if r.Time.IsZero() || r.Text == "" || r.Version == "" {
			t.Errorf("record %d lacks something: %+v", r.Seq, r)
		}
		kinds[r.Kind]++
	}
	for kind, n := range map[string]int{"update-started": 2, "update-armed": 2, "trial-boot": 2, "healthy": 1, "unhealthy": 1, "fell-back": 1} {
		if kinds[kind] != n {
			t.Errorf("%d records are called %s, want %d; there are %v", kinds[kind], kind, n, kinds)
		}
	}
}
