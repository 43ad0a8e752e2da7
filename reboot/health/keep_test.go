package health

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestKeep(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "failed-boots")
	now := time.Date(2026, 11, 23, 4, 0, 0, 0, time.UTC)
	var last string
	for i := range maxKept + 3 {
		path, err := Keep(t.Context(), dir, Bad{Version: "2.0.0/../x", BootID: "b", Reason: "port 80 does not answer", Output: "starting\n"}, now.Add(time.Duration(i)*time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		if filepath.Dir(path) != dir {
			t.Fatalf("kept in %s", path)
		}
		last = path
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != maxKept || filepath.Join(dir, entries[maxKept-1].Name()) != last {
		t.Errorf("%d are kept, the last %v, %v", len(entries), entries[len(entries)-1], err)
	}
	for name, want := range map[string]string{"reason": "port 80 does not answer\n", "output": "starting\n"} {
		if got, err := os.ReadFile(filepath.Join(last, name)); err != nil || string(got) != want {
			t.Errorf("%s = %q, %v", name, got, err)
		}
	}
	if got, err := os.ReadFile(filepath.Join(last, "journal")); err != nil || strings.TrimSpace(string(got)) == "" && len(got) > 0 {
		t.Errorf("journal = %q, %v", got, err)
	}
}
