package machinetest

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/payload/build"
)

// after is a release's post-install program. What it prints is what the test reads: where it runs, and what it may do there.
const after = `#!/bin/sh
echo "for $FLIPSIDE_SLOT and $FLIPSIDE_VERSION"
grep " $PWD " /proc/self/mounts
grep -E '^(NoNewPrivs|Seccomp|CapBnd):' /proc/self/status
touch "$PWD/x" 2>/dev/null && echo "the slot can be written"
touch /usr/x 2>/dev/null && echo "/usr can be written"
exit 0
`

// The installed service, in its sandbox, mounts the new slot and runs the program that the release brings; nothing stays mounted, and the release is taken.
func TestPostInstallInTheService(t *testing.T) {
	l := newLab(t)
	mke2fs, err := exec.LookPath("mke2fs")
	if err != nil {
		t.Skip("mke2fs (e2fsprogs) is not installed")
	}
	probe := exec.Command("sh", "-c", `f=$(mktemp) && truncate -s 1M "$f" && d=$(losetup -f --show "$f"); s=$?; [ $s != 0 ] || losetup -d "$d"; rm -f "$f"; exit $s`)
	if out, err := probe.CombinedOutput(); err != nil {
		t.Skipf("no loop devices here: %v: %s", err, out)
	}
	tree, file := filepath.Join(l.dir, "tree"), filepath.Join(l.dir, "fs.img")
	if err := os.Mkdir(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "after"), []byte(after), 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mke2fs, "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, file, "2M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	img, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	copy(img, "2.0.0\x00") // the first 1024 bytes are free in ext4
	l.publishImage("2.0.0", "", build.Image{Data: bytes.NewReader(img), Size: int64(len(img)), PostInstall: "after"})

	m := l.machine("m1", "[reboot]\nstrategy = \"off\"\n")
	// What udev makes on a host.
	m.Must("mknod -m 660 /dev/loop-control c 10 237; for i in $(seq 0 63); do mknod -m 660 /dev/loop$i b 7 $i; done")
	m.Must("systemctl enable --now flipsided")
	says(m, "release 2.0.0 is in place on USR-B")
	log, err := os.ReadFile(filepath.Join(m.Share, "post-install.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", log)
	for _, want := range []string{"for USR-B and 2.0.0\n", " /run/flipside-writer/slot ext4 ro,nosuid,nodev,", "NoNewPrivs:\t1\n", "Seccomp:\t2\n"} {
		if !strings.Contains(string(log), want) {
			t.Errorf("its output has no %q", want)
		}
	}
	if strings.Contains(string(log), "can be written") {
		t.Error("it could write where nothing may be written")
	}
	// The mounts of the service, and of the machine.
	if out := m.Must("cat /proc/$(systemctl show -P MainPID flipsided)/mounts /proc/mounts"); strings.Contains(out, "flipside-writer/slot") {
		t.Errorf("the slot is still mounted:\n%s", out)
	}
}
