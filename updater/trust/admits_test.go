package trust

import (
	"context"
	"os"
	"strings"
	"testing"
)

// The release of a slot may run again if it is not below the floor and this host knows that.
func TestAdmits(t *testing.T) {
	f := newFloor(t, Auto, "")
	want := func(slot string, words ...string) {
		t.Helper()
		err := f.Admits(slot)
		if (err == nil) != (len(words) == 0) {
			t.Fatalf("slot %s: %v, want %q", slot, err, words)
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("slot %s: %v, want %q", slot, err, w)
			}
		}
	}
	want("USR-A") // no floor
	f.Release = 100
	if rose, err := f.Confirm(context.Background(), "USR-A", "1"); rose || err != nil { // the release that the host was installed with
		t.Fatal(rose, err)
	}
	f.Release = 0 // the next one says no number in its os-release
	take(t, f, "USR-B", "2", 200)
	want("USR-A", "release 1 in slot USR-A has number 100, and the floor is 200")
	want("USR-B")
	want("USR-C", "slot USR-C is not known", "200")
	if _, err := f.Confirm(context.Background(), "USR-B", "2"); err != nil { // the next start of the daemon
		t.Fatal(err)
	}
	want("USR-B")
	take(t, f, "USR-A", "3", 200)
	want("USR-B") // as new is not older
	want("USR-A")
	if _, err := f.Confirm(context.Background(), "USR-A", "0"); err != nil { // written by something else, without a number
		t.Fatal(err)
	}
	want("USR-A", "release 0 in slot USR-A has number 0")
	if err := os.WriteFile(f.Path, []byte("{rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.Release = 200
	if _, err := f.Confirm(context.Background(), "USR-A", "3"); err != nil {
		t.Fatal(err)
	}
	if data, _ := os.ReadFile(f.Path); string(data) != "{rubbish" {
		t.Errorf("a file that cannot be read was replaced: %s", data)
	}
	want("USR-B", "not known")
	f.Mode = WithTPM // and there is none: the floor is not known
	want("USR-B", "the floor of releases is not known")
}
