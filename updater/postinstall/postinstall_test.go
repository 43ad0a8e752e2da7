package postinstall

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/gptimage"
)

// image makes a disk whose slot USR-B holds an ext4 with a program, and returns its path and the slot.
func image(t *testing.T, script string) (string, partition.Slot) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	mke2fs, err := exec.LookPath("mke2fs")
	if err != nil {
		t.Skip("mke2fs (e2fsprogs) is not installed")
	}
	dir := t.TempDir()
	disk, tree, fs := filepath.Join(dir, "disk.img"), filepath.Join(dir, "tree"), filepath.Join(dir, "fs.img")
	parts := []gptimage.Partition{
		{Label: "USR-A", Type: gptimage.TypeUSR, UUID: "7130c94a-213a-4e5a-8e26-6cce9662f132", Size: 1 << 20, Attributes: gptimage.Attributes(1, 0, true)},
		{Label: "USR-B", Type: gptimage.TypeUSR, UUID: "e03dd35c-7c2d-4a47-b3fe-27f15780a57c", Size: 4 << 20},
	}
	if err := gptimage.Create(disk, 512, "22222222-2222-4222-8222-222222222222", parts); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "postinst"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/bin/true", filepath.Join(tree, "outside")); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mke2fs, "-q", "-t", "ext4", "-d", tree, fs, "4M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	data, err := os.ReadFile(fs)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, parts[1].Start); err != nil {
		t.Fatal(err)
	}
	d, err := partition.OpenDisk(disk, partition.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	s, err := d.Slot("USR-B")
	if err != nil {
		t.Fatal(err)
	}
	return disk, s
}

// run runs the program, and says what it printed and what is left mounted.
func run(t *testing.T, disk string, s partition.Slot, change func(*Program)) (string, error) {
	t.Helper()
	dir := t.TempDir()
	p := Program{Disk: disk, Slot: s, Path: "postinst", Version: "2.0.0", Mount: filepath.Join(dir, "slot"), Output: filepath.Join(dir, "out"), Timeout: time.Minute}
	if change != nil {
		change(&p)
	}
	before, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.Run(t.Context())
	if errors.Is(err, unix.EPERM) || err != nil && strings.Contains(err.Error(), "loop") && !strings.Contains(err.Error(), "post-install program refused") {
		t.Skipf("no loop devices here: %v", err)
	}
	if _, mounts := os.Stat(p.Mount); mounts == nil && unix.Unmount(p.Mount, unix.MNT_DETACH) == nil {
		t.Error("the slot is still mounted")
	}
	after, _ := os.ReadFile(disk)
	if !bytes.Equal(before, after) {
		t.Error("the disk changed")
	}
	out, _ := os.ReadFile(p.Output)
	return string(out), err
}

func TestRun(t *testing.T) {
	t.Setenv("https_proxy", "http://proxy.example:3128")
	t.Setenv("SECRET", "of the daemon")
	disk, s := image(t, `
echo "args: $*"
echo "env: $FLIPSIDE_SLOT $FLIPSIDE_VERSION $https_proxy [$SECRET]"
touch ./written 2>/dev/null && echo "the slot can be written"
ls postinst >&2
`)
	out, err := run(t, disk, s, func(p *Program) { p.Args = []string{"KERNEL=/boot/vmlinuz-b"} })
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 3 || !strings.HasPrefix(lines[0], "args: /dev/") || !strings.HasSuffix(lines[0], " KERNEL=/boot/vmlinuz-b") ||
		lines[1] != "env: USR-B 2.0.0 http://proxy.example:3128 []" || lines[2] != "postinst" {
		t.Errorf("it printed %q", out)
	}
}

func TestRefused(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		script string
		want   error
		text   string
	}{
		{"echo no space for it; exit 3", ErrFailed, `its last line was "no space for it"`},
		{"exit 75", ErrTemporary, ""},
		{"kill -9 $$", ErrFailed, "killed"},
	} {
		disk, s := image(t, tt.script)
		_, err := run(t, disk, s, nil)
		if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%q: %v, want %v with %q", tt.script, err, tt.want, tt.text)
		}
	}
}

// A program that does not end is stopped with everything that it started.
func TestTimeout(t *testing.T) {
	t.Parallel()
	mark := filepath.Join(t.TempDir(), "pid")
	disk, s := image(t, fmt.Sprintf("trap '' TERM\nsleep 1000 &\necho $! >%s\necho waiting\nwait\nwait\n", mark))
	_, err := run(t, disk, s, func(p *Program) { p.Timeout = 300 * time.Millisecond })
	if !errors.Is(err, ErrTimeout) {
		t.Fatal(err)
	}
	pid, err := os.ReadFile(mark)
	if err != nil {
		t.Skip("it was stopped before it began")
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		stat, err := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("what it started still runs: %s", stat)
		}
	}
}

func TestCanceled(t *testing.T) {
	t.Parallel()
	disk, s := image(t, "exec sleep 1000")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	dir := t.TempDir()
	_, err := Program{Disk: disk, Slot: s, Path: "postinst", Mount: dir + "/slot", Output: dir + "/out"}.Run(ctx)
	if err == nil || errors.Is(err, ErrFailed) || errors.Is(err, ErrTimeout) {
		t.Errorf("%v: that the daemon ends says nothing about the release", err)
	}
}

func TestWhatIsRun(t *testing.T) {
	t.Parallel()
	disk, s := image(t, "exit 0")
	for path, ok := range map[string]bool{"postinst": true, "missing": false, "outside": false, "../postinst": false, "/bin/true": false, "lost+found": false} {
		if _, err := run(t, disk, s, func(p *Program) { p.Path = path }); (err == nil) != ok {
			t.Errorf("%q: %v", path, err)
		}
	}
	if _, err := run(t, disk, s, func(p *Program) { p.Path, p.Missing = "missing", true }); err != nil {
		t.Errorf("a program that need not be there: %v", err)
	}
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, 4096), s.Start); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t, disk, s, nil); err == nil || !strings.Contains(err.Error(), "no file system") {
		t.Errorf("a slot without a file system: %v", err)
	}
}

// What a killed process left mounted goes away, also where the directory has two names, as /var/run and /run are one.
func TestLeftMounted(t *testing.T) {
	t.Parallel()
	disk, s := image(t, "exit 0")
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "run"), 0o700), os.Symlink("run", filepath.Join(dir, "link"))); err != nil {
		t.Fatal(err)
	}
	if _, _, err := mountSlot(disk, s, filepath.Join(dir, "run", "slot")); err != nil {
		t.Skipf("no loop devices here: %v", err)
	}
	for range 2 {
		_, unmount, err := mountSlot(disk, s, filepath.Join(dir, "link", "slot"))
		if err != nil {
			t.Fatal(err)
		}
		if err := unmount(); err != nil {
			t.Error(err)
		}
		if err := unix.Unmount(filepath.Join(dir, "run", "slot"), unix.MNT_DETACH); !errors.Is(err, unix.EINVAL) {
			t.Errorf("something is still mounted below: %v", err)
		}
	}
}

func TestOutputIsBounded(t *testing.T) {
	var kept bytes.Buffer
	o := &output{w: &kept, left: 1000}
	for range 1000 {
		if n, err := o.Write([]byte(strings.Repeat("x", 5000))); n != 5000 || err != nil {
			t.Fatal(n, err)
		}
	}
	o.Write([]byte("\nthe end"))
	o.end()
	if kept.Len() > 1100 || len(o.line) > maxLine || !strings.Contains(o.lastLine(), "the end") {
		t.Errorf("%d bytes are kept, the last line is %s", kept.Len(), o.lastLine())
	}
}
