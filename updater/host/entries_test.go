package host

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/updater"
)

// newEntriesRig is a host whose boot loader is systemd-boot.
func newEntriesRig(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	r.entries = filepath.Join(r.dir, "entries")
	if err := os.Mkdir(r.entries, 0o755); err != nil {
		t.Fatal(err)
	}
	r.write("entries/flipside-a.conf", "sort-key flipside\nversion 01\nefi /flipside/vmlinuz-a\n")
	r.conf = "[boot]\nbackend = \"bls\"\nentries = \"" + r.entries + "\"\n"
	return r
}

func (r *rig) tableOnly() []byte {
	r.t.Helper()
	data, err := os.ReadFile(r.disk)
	if err != nil {
		r.t.Fatal(err)
	}
	return slices.Concat(data[:34*512], data[len(data)-33*512:])
}

func TestEntriesHostTakesAnUpdate(t *testing.T) {
	r := newEntriesRig(t)
	table := r.tableOnly()
	r.publish("2.0.0", r.payload("2.0.0", r.image("2.0.0"), r.key))
	slot, version := r.boot()
	if slot != "USR-A" || version != "1.0.0" {
		t.Fatalf("booted %s from %s", version, slot)
	}
	if _, rebooted := r.run(slot, func(updater.Status) bool { return false }); !rebooted {
		t.Fatal("no reboot")
	}
	if list := names(t, r.entries); !slices.Equal(list, []string{"flipside-a.conf", "flipside-b+1.conf"}) {
		t.Errorf("entries before the reboot: %q", list)
	}
	if slot, version = r.boot(); slot != "USR-B" || version != "2.0.0" {
		t.Fatalf("booted %s from %s", version, slot)
	}
	st, _ := r.run(slot, settled)
	if s := r.slot("USR-B"); s.Priority != 2 || s.Tries != 0 || !s.Successful || st.LastUpdate == nil || !st.LastUpdate.Good {
		t.Errorf("after the trial: %+v, %+v", s, st.LastUpdate)
	}
	if list := names(t, r.entries); !slices.Equal(list, []string{"flipside-a.conf", "flipside-b.conf"}) {
		t.Errorf("entries after the trial: %q", list)
	}
	if slot, _ = r.boot(); slot != "USR-B" {
		t.Errorf("booted %s after the trial", slot)
	}
	if !bytes.Equal(table, r.tableOnly()) {
		t.Error("the partition table was written to")
	}
}

// A release that does not come up: systemd-boot spends the try and goes back, and the host says so and leaves the slot unbootable.
func TestEntriesHostFallsBack(t *testing.T) {
	r := newEntriesRig(t)
	r.publish("2.0.0", r.payload("2.0.0", r.image("2.0.0"), r.key))
	slot, _ := r.boot()
	if _, rebooted := r.run(slot, func(updater.Status) bool { return false }); !rebooted {
		t.Fatal("no reboot")
	}
	if slot, _ = r.boot(); slot != "USR-B" {
		t.Fatalf("booted %s", slot)
	}
	slot, version := r.boot() // nothing of the new release ever ran
	if slot != "USR-A" || version != "1.0.0" {
		t.Fatalf("booted %s from %s", version, slot)
	}
	st, _ := r.run(slot, settled)
	if _, failed := st.Quarantine["2.0.0"]; !failed {
		t.Errorf("release 2.0.0 is not said to have failed: %s", st.Why)
	}
	if list := names(t, r.entries); !slices.Equal(list, []string{"flipside-a.conf"}) {
		t.Errorf("entries after the failure: %q", list)
	}
}

// Entries that nobody can read, and a boot partition that is not there, stop an update before anything is written.
func TestEntriesHostRefuses(t *testing.T) {
	for name, break_ := range map[string]func(r *rig) error{
		"somebody else's entry": func(r *rig) error {
			return os.WriteFile(filepath.Join(r.entries, "flipside-b.conf"), []byte("title mine\nlinux /vmlinuz\n"), 0o600)
		},
		"no boot partition": func(r *rig) error { return os.RemoveAll(r.entries) },
	} {
		r := newEntriesRig(t)
		r.publish("2.0.0", r.payload("2.0.0", r.image("2.0.0"), r.key))
		r.boot()
		before := r.read("USR-B")
		if err := break_(r); err != nil {
			t.Fatal(err)
		}
		err := Run(t.Context(), r.config("USR-A"), nil)
		if err == nil || !strings.Contains(err.Error(), "boot") {
			t.Errorf("%s: the daemon says %v", name, err)
		}
		if !bytes.Equal(before, r.read("USR-B")) {
			t.Errorf("%s: the slot was written", name)
		}
	}
}
