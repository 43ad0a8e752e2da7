package bootsim_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/partition/bootsim"
)

// The order that the Version Format Specification gives as its example, and the rules beside it.
func TestCompareVersions(t *testing.T) {
	for _, chain := range [][]string{
		{"~", "", "a", "ab", "abb"},
		{"122.1", "123~rc1-1", "123", "123-a", "123-a.1", "123-1", "123-1.1", "123^post1", "123.a-1", "123.1-1", "123a-1", "124-1"},
		{"1", "2", "10", "100"},
		{"A", "a"},
		{"abc", "abc1", "abc2", "abc10"},
	} {
		for i := range chain {
			for k := range chain {
				want := min(1, max(-1, i-k))
				if got := bootsim.CompareVersions(chain[i], chain[k]); got != want {
					t.Errorf("%q and %q: %d, want %d", chain[i], chain[k], got, want)
				}
			}
		}
	}
	for _, same := range [][2]string{{"01", "1"}, {"a_1", "a1"}, {"1.007", "1.7"}} {
		if got := bootsim.CompareVersions(same[0], same[1]); got != 0 {
			t.Errorf("%q and %q: %d, want 0", same[0], same[1], got)
		}
	}
}

func dir(t *testing.T, files ...string) atomicfile.OS {
	t.Helper()
	d := t.TempDir()
	for _, f := range files {
		name, text, _ := strings.Cut(f, ": ")
		if err := os.WriteFile(filepath.Join(d, name), []byte(strings.ReplaceAll(text, "; ", "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return atomicfile.OS(d)
}

// What systemd-boot 252 was seen to do, boot by boot, with OVMF.
func TestBootsAsSeen(t *testing.T) {
	const a, b = "sort-key rig; version 1.0.0; linux /a", "sort-key rig; version 2.0.0; linux /b"
	for _, tt := range []struct {
		name  string
		files []string
		boots []string // names after each boot
	}{
		{"three tries, then the old one", []string{"rig-1.0.0.conf: " + a, "rig-2.0.0+3.conf: " + b}, []string{"rig-2.0.0+2-1.conf", "rig-2.0.0+1-2.conf", "rig-2.0.0+0-3.conf", "rig-1.0.0.conf", "rig-1.0.0.conf"}},
		{"one try", []string{"rig-1.0.0.conf: " + a, "rig-2.0.0+1.conf: " + b}, []string{"rig-2.0.0+0-1.conf", "rig-1.0.0.conf"}},
		{"all exhausted: the newest is started all the same", []string{"rig-1.0.0+0-2.conf: " + a, "rig-2.0.0+0-3.conf: " + b}, []string{"rig-2.0.0+0-4.conf", "rig-2.0.0+0-5.conf"}},
		{"a letter is no counter", []string{"rig-1.0.0.conf: " + a, "rig-2.0.0+x.conf: " + b}, []string{"rig-2.0.0+x.conf", "rig-2.0.0+x.conf"}},
		{"a program that is missing is passed over and not counted", []string{"rig-1.0.0.conf: " + a, "rig-2.0.0+2.conf: " + strings.ReplaceAll(b, "/b", "/missing")}, []string{"rig-1.0.0.conf", "rig-1.0.0.conf"}},
		{"the order is the version's and not the name's", []string{"z.conf: " + a, "b.conf: " + b}, []string{"b.conf"}},
		{"an entry of zeros is none", []string{"rig-1.0.0.conf: " + a, "rig-2.0.0.conf: \x00" + b}, []string{"rig-1.0.0.conf"}},
	} {
		d := dir(t, tt.files...)
		for i, want := range tt.boots {
			e, err := bootsim.SystemdBoot(d, func(p string) bool { return p != "/missing" })
			if err != nil || e.Name != want {
				t.Errorf("%s: boot %d is %q, %v; want %q", tt.name, i+1, e.Name, err, want)
			}
		}
		names, err := d.List()
		if err != nil || len(names) != len(tt.files) || !slices.Contains(names, tt.boots[len(tt.boots)-1]) {
			t.Errorf("%s: left %v, %v", tt.name, names, err)
		}
	}
	if _, err := bootsim.SystemdBoot(dir(t), nil); err == nil {
		t.Error("nothing was booted")
	}
}
