package host

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/writer"
)

// The note is there while a release is armed or on trial, and gone before and after.
func TestDeadmanNote(t *testing.T) {
	r := newRig(t)
	note := filepath.Join(r.dir, "state", deadmanNote)
	r.publish("2.0.0", r.payload("2.0.0", r.image("2.0.0"), r.key))
	slot, _ := r.boot()
	if _, err := os.Stat(note); err == nil {
		t.Error("there is a note and nothing was armed")
	}
	if _, rebooted := r.run(slot, func(updater.Status) bool { return false }); !rebooted {
		t.Fatal("no reboot")
	}
	text, err := os.ReadFile(note)
	if err != nil {
		t.Fatal(err)
	}
	if lines := strings.Split(string(text), "\n"); len(lines) != 6 || lines[1] != "1.0.0" || lines[3] != "2.0.0" || lines[4] != "USR-A" {
		t.Errorf("the note says %q", text)
	}
	slot, _ = r.boot()
	if st, _ := r.run(slot, settled); st.Version != "2.0.0" {
		t.Fatalf("it runs %s: %s", st.Version, st.Why)
	}
	if _, err := os.Stat(note); err == nil {
		t.Error("the release is confirmed, and the note is there")
	}
}

// What the daemon finds at its start.
func TestDeadmanStart(t *testing.T) {
	armed := updater.State{Phase: updater.Armed, Update: &updater.Update{Offer: omaha.Offer{Version: "2.0.0"}, ToSlot: "USR-B"}}
	trial := armed
	trial.Phase = updater.Trial
	good, on := updater.SlotFacts{Priority: 1, Successful: true}, updater.SlotFacts{Priority: 2, Tries: 1}
	for name, tt := range map[string]struct {
		state updater.State
		facts updater.Facts
		want  string // the boot in the note, "" for none
	}{
		"started again from the old slot": {armed, updater.Facts{Running: "USR-A", Slots: map[string]updater.SlotFacts{"USR-A": good, "USR-B": on}}, "now"},
		"fallen back":                     {armed, updater.Facts{Running: "USR-A", Slots: map[string]updater.SlotFacts{"USR-A": good, "USR-B": {}}}, ""},
		"on trial":                        {trial, updater.Facts{Running: "USR-B", Slots: map[string]updater.SlotFacts{"USR-A": good, "USR-B": {Priority: 2}}}, "then"},
		"confirmed, and killed before it was noted": {trial, updater.Facts{Running: "USR-B", Slots: map[string]updater.SlotFacts{"USR-A": good, "USR-B": {Priority: 2, Successful: true}}}, ""},
	} {
		dir := t.TempDir()
		if err := (deadman{dir: dir, bootID: "then", version: "1.0.0"}).set("2.0.0"); err != nil {
			t.Fatal(err)
		}
		if err := (deadman{dir: dir, bootID: "now", version: "1.0.0"}).start(tt.state, tt.facts); err != nil {
			t.Fatal(err)
		}
		text, _ := os.ReadFile(filepath.Join(dir, deadmanNote))
		if boot, _, _ := strings.Cut(string(text), "\n"); boot != tt.want {
			t.Errorf("%s: the note is of boot %q, want %q", name, boot, tt.want)
		}
	}
}

// The shipped program, with a systemctl that stands for the service manager (whole machines are in machinetest): it reboots only the side that is on
// trial, only when flipsided does not run there, only after its time, and only once.
func TestDeadmanProgram(t *testing.T) {
	text, err := os.ReadFile("../../packaging/systemd/deadman")
	if err != nil {
		t.Fatal(err)
	}
	boot, err := readLine("boot id", "/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Skip(err)
	}
	running, err := writer.RunningVersion(config.Config{Host: config.Host{OSRelease: "/usr/lib/os-release"}})
	if err != nil {
		t.Skip(err)
	}
	// What the kernel says of /usr: a partition, a verity device upon one, one upon two, and a file system without a device.
	partition := map[string]string{"sys/dev/block/8:3/uevent": "DEVNAME=sda3\nPARTNAME=USR-A\n", "mountinfo": "1 0 8:1 / / rw - ext4 x rw\n2 1 8:3 / /usr ro - ext4 x ro\n"}
	verity := map[string]string{
		"sys/dev/block/254:0/uevent": "DEVNAME=dm-0\n", "sys/dev/block/254:0/slaves/sda4/uevent": "DEVNAME=sda4\nPARTNAME=USR-B\n",
		"mountinfo": "1 0 8:1 / / rw - ext4 x rw\n2 1 254:0 / /usr ro - ext4 x ro\n",
	}
	two := map[string]string{
		"sys/dev/block/254:0/uevent": "DEVNAME=dm-0\n", "sys/dev/block/254:0/slaves/sda4/uevent": "PARTNAME=USR-B\n", "sys/dev/block/254:0/slaves/sda5/uevent": "PARTNAME=HASH-B\n",
		"mountinfo": "1 0 254:0 / / ro - ext4 x rw\n",
	}
	overlay := map[string]string{"mountinfo": "1 0 8:1 / / rw - ext4 x rw\n2 1 0:40 / /usr ro - overlay x ro\n"}
	for name, tt := range map[string]struct {
		note    *deadman
		active  bool
		kernel  map[string]string
		reboots bool
	}{
		"nothing is on trial":                          {nil, false, nil, false},
		"armed in this boot":                           {&deadman{bootID: boot, version: "0"}, false, nil, false},
		"the old release runs":                         {&deadman{bootID: "another", version: running}, false, nil, false},
		"flipsided runs":                               {&deadman{bootID: "another", version: "0"}, true, nil, false},
		"there is still time":                          {&deadman{bootID: "another", version: "0", limit: 1000000 * time.Hour}, false, nil, false},
		"flipsided does not run":                       {&deadman{bootID: "another", version: "0"}, false, nil, true},
		"the old slot runs":                            {&deadman{bootID: "another", version: "0", slot: "USR-A"}, false, partition, false},
		"the new slot, of the same version":            {&deadman{bootID: "another", version: running, slot: "USR-B"}, false, partition, true},
		"the new slot under verity":                    {&deadman{bootID: "another", version: running, slot: "USR-A"}, false, verity, true},
		"the old slot under verity":                    {&deadman{bootID: "another", version: "0", slot: "USR-B"}, false, verity, false},
		"two partitions, and the same version":         {&deadman{bootID: "another", version: running, slot: "USR-A"}, false, two, false},
		"an overlay, and another version":              {&deadman{bootID: "another", version: "0", slot: "USR-A"}, false, overlay, true},
		"a note of before slots were written into one": {&deadman{bootID: "another", version: running}, false, partition, false},
	} {
		dir := t.TempDir()
		script := filepath.Join(dir, "deadman")
		program := string(text)
		if tt.kernel != nil {
			program = strings.NewReplacer("/proc/self/mountinfo", dir+"/mountinfo", "/sys/", dir+"/sys/").Replace(program)
		}
		if err := os.WriteFile(script, []byte(program), 0o755); err != nil {
			t.Fatal(err)
		}
		for file, content := range tt.kernel {
			path := filepath.Join(dir, file)
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		active := "exit 3"
		if tt.active {
			active = "exit 0"
		}
		fake := "#!/bin/sh\necho \"$*\" >>" + dir + "/said\ncase $1 in is-active) " + active + ";; esac\n"
		if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte(fake), 0o755); err != nil {
			t.Fatal(err)
		}
		if tt.note != nil {
			tt.note.dir = dir
			if err := tt.note.set("2.0.0"); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			cmd := exec.Command("sh", script)
			cmd.Env = []string{"STATE_DIRECTORY=" + dir, "PATH=" + dir + ":" + os.Getenv("PATH")}
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s", name, err, out)
			}
		}
		said, _ := os.ReadFile(filepath.Join(dir, "said"))
		want := 0
		if tt.reboots {
			want = 1
		}
		if n := strings.Count(string(said), "reboot"); n != want {
			t.Errorf("%s: %d reboots, want %d: it said\n%s", name, n, want, said)
		}
	}
}
