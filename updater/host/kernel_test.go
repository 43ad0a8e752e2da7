package host

import (
	"bytes"
	"crypto"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/payload/build"
	"github.com/flipside-linux/flipside/updater"
)

// bundle is a payload of a slot's image and its kernel.
func (r *rig) bundle(usr build.Image, kernel []byte) []byte {
	r.t.Helper()
	images := []build.Image{usr}
	if kernel != nil {
		images = append(images, build.Image{Name: "kernel", Data: bytes.NewReader(kernel), Size: int64(len(kernel))})
	}
	var b bytes.Buffer
	if _, err := build.Full(r.t.Context(), &b, build.Spec{Images: images, Keys: []crypto.Signer{r.key}, TempDir: r.dir}); err != nil {
		r.t.Fatal(err)
	}
	return b.Bytes()
}

// bootDir makes a boot partition's directory with the running slot's kernel, and an old one of the other's.
func (r *rig) bootDir() string {
	r.t.Helper()
	dir := filepath.Join(r.dir, "boot")
	if err := os.Mkdir(dir, 0o755); err != nil {
		r.t.Fatal(err)
	}
	r.write("boot/vmlinuz-a", "kernel of 1.0.0")
	r.write("boot/vmlinuz-b", "kernel of 0.9.0")
	r.slotsConf = "kernels = \"" + dir + "\"\n"
	return dir
}

func names(t *testing.T, dir string) (list []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

func TestHostTakesAKernel(t *testing.T) {
	r := newRig(t)
	dir := r.bootDir()
	kernel := bytes.Repeat([]byte("kernel of 2.0.0\n"), 4096)
	usr := r.image("2.0.0")
	r.publish("2.0.0", r.bundle(build.Image{Name: "usr", Data: bytes.NewReader(usr), Size: int64(len(usr))}, kernel))
	slot, _ := r.boot()
	if _, rebooted := r.run(slot, func(updater.Status) bool { return false }); !rebooted {
		t.Fatal("no reboot")
	}
	if got, err := os.ReadFile(filepath.Join(dir, "vmlinuz-b")); err != nil || !bytes.Equal(got, kernel) {
		t.Errorf("the new slot's kernel: %d bytes, %v", len(got), err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "vmlinuz-a")); err != nil || string(got) != "kernel of 1.0.0" {
		t.Errorf("the running slot's kernel: %q, %v", got, err)
	}
	if list := names(t, dir); !slices.Equal(list, []string{"vmlinuz-a", "vmlinuz-b"}) {
		t.Errorf("on the boot partition: %q", list)
	}
	if slot, version := r.boot(); slot != "USR-B" || version != "2.0.0" {
		t.Errorf("booted %s from %s", version, slot)
	}
}

// A boot partition that is not there is told before the other slot is given up.
func TestHostWithoutABootPartition(t *testing.T) {
	r := newRig(t)
	r.slotsConf = "kernels = \"" + r.dir + "/missing\"\n"
	usr := r.image("2.0.0")
	r.publish("2.0.0", r.bundle(build.Image{Name: "usr", Data: bytes.NewReader(usr), Size: int64(len(usr))}, make([]byte, 4096)))
	before := r.read("USR-B")
	slot, _ := r.boot()
	st, _ := r.run(slot, func(st updater.Status) bool { return st.LastError != "" })
	if !strings.Contains(st.LastError, `"vmlinuz-b"`) {
		t.Errorf("it says: %s", st.LastError)
	}
	if !bytes.Equal(r.read("USR-B"), before) {
		t.Error("the other slot was written to")
	}
}

// ext4 makes an image of a version whose post-install program is a shell script.
func (r *rig) ext4(version, script string) build.Image {
	r.t.Helper()
	if os.Geteuid() != 0 {
		r.t.Skip("mounting a slot needs root")
	}
	mke2fs, err := exec.LookPath("mke2fs")
	if err != nil {
		r.t.Skip("mke2fs (e2fsprogs) is not installed")
	}
	tree, fs := filepath.Join(r.dir, "tree"), filepath.Join(r.dir, "fs.img")
	if err := os.MkdirAll(filepath.Join(tree, "bin"), 0o755); err != nil {
		r.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "bin", "after"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		r.t.Fatal(err)
	}
	if out, err := exec.Command(mke2fs, "-q", "-t", "ext4", "-d", tree, fs, "3M").CombinedOutput(); err != nil {
		r.t.Fatalf("%v: %s", err, out)
	}
	img, err := os.ReadFile(fs)
	if err != nil {
		r.t.Fatal(err)
	}
	copy(img, version+"\x00") // the first 1024 bytes are free in ext4
	r.images[version] = img
	return build.Image{Name: "usr", Data: bytes.NewReader(img), Size: int64(len(img)), PostInstall: "bin/after"}
}

// The program runs with its kernel in place and its slot not bootable; and what it does to the boot bits, as programs for the older engines do, does not count.
func TestHostRunsPostInstall(t *testing.T) {
	if _, err := exec.LookPath("sgdisk"); err != nil {
		t.Skip("sgdisk (gdisk) is not installed")
	}
	r := newRig(t)
	r.bootDir()
	script := `set -e
head -c 15 "${2#KERNEL=}" >"$FLIPSIDE_DISK.kernel"
sgdisk -i 3 "$FLIPSIDE_DISK" | grep 'Attribute flags' >"$FLIPSIDE_DISK.bits"
sgdisk -A 3:set:48 -A 3:set:52 "$FLIPSIDE_DISK" >/dev/null
echo "ran for $FLIPSIDE_SLOT and $FLIPSIDE_VERSION"
`
	r.publish("2.0.0", r.bundle(r.ext4("2.0.0", script), bytes.Repeat([]byte("kernel of 2.0.0\n"), 256)))
	slot, _ := r.boot()
	if _, rebooted := r.run(slot, func(st updater.Status) bool { return st.LastError != "" && r.skipWithoutLoop(st) }); !rebooted {
		t.Fatal("no reboot")
	}
	for name, want := range map[string]string{
		"disk.img.kernel": "kernel of 2.0.0", "disk.img.bits": "Attribute flags: 0000000000000000\n", "state/post-install.log": "ran for USR-B and 2.0.0\n",
	} {
		if got, err := os.ReadFile(filepath.Join(r.dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v, want %q", name, got, err, want)
		}
	}
	if s := r.slot("USR-B"); s.Priority != 2 || s.Tries != 1 || s.Successful {
		t.Errorf("USR-B before the reboot: %+v", s)
	}
}

func (r *rig) skipWithoutLoop(st updater.Status) bool {
	if strings.Contains(st.LastError, "loop") {
		r.t.Skipf("no loop devices here: %s", st.LastError)
	}
	return true
}

func TestPostInstallRefuses(t *testing.T) {
	r := newRig(t)
	r.publish("2.0.0", r.bundle(r.ext4("2.0.0", "echo this machine is too old; exit 1"), nil))
	slot, _ := r.boot()
	st, _ := r.run(slot, func(st updater.Status) bool { return st.LastError != "" && settled(st) })
	r.skipWithoutLoop(st)
	if !strings.Contains(st.LastError, `its last line was "this machine is too old"`) || len(st.Quarantine) != 1 {
		t.Errorf("it says %s; quarantine: %v", st.LastError, st.Quarantine)
	}
	if s := r.slot("USR-B"); s.Bootable() {
		t.Errorf("USR-B is bootable: %+v", s)
	}
	if slot, version := r.boot(); slot != "USR-A" || version != "1.0.0" {
		t.Errorf("booted %s from %s", version, slot)
	}
}

// A program that root runs can write to the slot that it came from, past the read-only mount. The slot is read back after it, and is not armed.
func TestPostInstallSpoilsTheSlot(t *testing.T) {
	if _, err := exec.LookPath("sgdisk"); err != nil {
		t.Skip("sgdisk (gdisk) is not installed")
	}
	r := newRig(t)
	script := `set -e
first=$(sgdisk -i 3 "$FLIPSIDE_DISK" | sed -n 's/^First sector: \([0-9]*\).*/\1/p')
printf spoilt | dd of="$FLIPSIDE_DISK" bs=1 seek=$((first * 512 + 4096)) conv=notrunc 2>/dev/null
`
	r.publish("2.0.0", r.bundle(r.ext4("2.0.0", script), nil))
	slot, _ := r.boot()
	st, _ := r.run(slot, func(st updater.Status) bool { return st.LastError != "" && settled(st) })
	r.skipWithoutLoop(st)
	if !strings.Contains(st.LastError, "after the post-install program") || !strings.Contains(st.LastError, "SHA-256") {
		t.Errorf("it says %s", st.LastError)
	}
	if s := r.slot("USR-B"); s.Bootable() {
		t.Errorf("USR-B is bootable: %+v", s)
	}
}
