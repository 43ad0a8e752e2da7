package powercut

import (
	"os"
	"testing"
	"time"
)

// TestEnumerate is the claim: N crash states, 0 without a complete, verified, bootable slot.
func TestEnumerate(t *testing.T) {
	opt, least := Short(), 1000
	if long() {
		opt, least = Long(), 100_000
	}
	if testing.Short() { // for the race detector, under which all of this takes ten times as long
		opt.Starts, opt.Boots, opt.Kill, opt.Again, least = []Start{Healthy}, []FileSystem{FAT}, 25, 0, 500
	}
	total := 0
	for _, start := range opt.Starts {
		o := opt
		o.Starts = []Start{start}
		began := time.Now()
		c, err := Enumerate(o)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %v (%s)", start, c, time.Since(began).Round(time.Millisecond))
		for _, v := range c.Violations {
			t.Error(v)
		}
		total += c.Total()
	}
	t.Logf("%d crash states enumerated", total)
	if total < least {
		t.Errorf("%d states, want at least %d: the enumeration is not what it was", total, least)
	}
}

// long reports whether there is time for everything.
func long() bool { return os.Getenv("FLIPSIDE_LONG") != "" }
