package install_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/partition/devicetest"
	"github.com/flipside-linux/flipside/partition/gptimage"
	"github.com/flipside-linux/flipside/partition/install"
)

var (
	release = bytes.Repeat([]byte("release "), 512)
	kernel  = []byte("kernel of the release")
)

func image(data []byte) install.Image {
	return install.Image{Size: int64(len(data)), SHA256: sha256.Sum256(data)}
}

// disk has the slots A and B, of which B is one to go back to, and a third that is called like A.
func disk(t *testing.T, labels ...string) (*partition.Disk, partition.Running) {
	t.Helper()
	d := partition.NewDisk(medium(t, labels...), partition.Options{})
	run, err := d.RunningFromLabel(labels[0])
	if err != nil {
		t.Fatal(err)
	}
	return d, run
}

func layout(labels ...string) gptimage.Layout {
	l := gptimage.Layout{Sector: 512, UUID: "22222222-2222-4222-8222-222222222222", Align: 512}
	for i, label := range labels {
		l.Parts = append(l.Parts, gptimage.Partition{
			Label: label, Type: gptimage.TypeUSR, UUID: "7130c94a-213a-4e5a-8e26-6cce9662f13" + string(rune('0'+i)), Size: 8192, Attributes: gptimage.Attributes(uint8(len(labels)-i), 0, true),
		})
	}
	return l
}

func medium(t *testing.T, labels ...string) partition.Device {
	t.Helper()
	l := layout(labels...)
	size, err := l.Size()
	if err != nil {
		t.Fatal(err)
	}
	m := devicetest.NewStrict(make([]byte, size), 512)
	if err := errors.Join(l.Write(m), m.Flush()); err != nil {
		t.Fatal(err)
	}
	return m
}

func slot(t *testing.T, d *partition.Disk, label string) partition.Slot {
	t.Helper()
	s, err := d.Slot(label)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// update runs an update of USR-B as far as it goes.
func update(t *testing.T, dir string, kernelImage install.Image, post func(context.Context, partition.Slot) (bool, error)) (*partition.Disk, error) {
	t.Helper()
	d, run := disk(t, "USR-A", "USR-B")
	in, err := install.Begin(d, run, "USR-B", install.Options{Files: map[string]install.File{"kernel": {Dir: atomicfile.OS(dir), Prefix: "vmlinuz-"}}, PostInstall: post})
	if err != nil {
		return d, err
	}
	defer in.Close()
	if slot(t, d, "USR-B").Bootable() {
		t.Error("the slot is bootable while it is written")
	}
	if _, err := in.Slot().WriteAt(release, 0); err != nil {
		return d, err
	}
	if err := in.Reserve("kernel", int64(len(kernel))); err != nil {
		return d, err
	}
	if _, err := in.File("kernel").WriteAt(kernel, 0); err != nil {
		return d, err
	}
	ready, err := in.Finish(t.Context(), image(release), map[string]install.Image{"kernel": kernelImage})
	if err != nil {
		return d, err
	}
	return d, ready.Arm(1)
}

func TestUpdate(t *testing.T) {
	dir := t.TempDir()
	d, err := update(t, dir, image(kernel), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "vmlinuz-b")); err != nil || !bytes.Equal(got, kernel) {
		t.Errorf("the kernel: %q, %v", got, err)
	}
	if s := slot(t, d, "USR-B"); s.Priority != 3 || s.Tries != 1 || s.Successful {
		t.Errorf("%+v", s)
	}
}

// What is wrong leaves the slot unbootable.
func TestRefuses(t *testing.T) {
	refused := errors.New("refused")
	for name, tt := range map[string]struct {
		kernel install.Image
		post   func(context.Context, partition.Slot) (bool, error)
		want   error
	}{
		"another kernel":             {image([]byte("something else entirely")), nil, atomicfile.ErrMismatch},
		"a program that is not well": {image(kernel), func(context.Context, partition.Slot) (bool, error) { return true, refused }, refused},
	} {
		d, err := update(t, t.TempDir(), tt.kernel, tt.post)
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
		if s := slot(t, d, "USR-B"); s.Bootable() {
			t.Errorf("%s: the slot is bootable: %+v", name, s)
		}
	}
}

// The program runs with the kernel in its place and the slot not bootable. (That its changes of the boot bits are undone is tested with a real one in updater/host.)
func TestPostInstall(t *testing.T) {
	dir := t.TempDir()
	ran := false
	d, err := update(t, dir, image(kernel), func(_ context.Context, s partition.Slot) (bool, error) {
		ran = true
		if got, err := os.ReadFile(filepath.Join(dir, "vmlinuz-b")); err != nil || !bytes.Equal(got, kernel) || s.Label != "USR-B" || s.Bootable() {
			t.Errorf("it runs with %+v and the kernel %q, %v", s, got, err)
		}
		return true, nil
	})
	if err != nil || !ran {
		t.Fatal(ran, err)
	}
	if s := slot(t, d, "USR-B"); s.Priority != 3 || s.Tries != 1 {
		t.Errorf("%+v", s)
	}
}

// Root may write to the slot while the program runs, and does: then it is not what was signed any more. A program that did not run is not waited for.
func TestPostInstallWritesToTheSlot(t *testing.T) {
	for _, ran := range []bool{true, false} {
		m := medium(t, "USR-A", "USR-B")
		d := partition.NewDisk(m, partition.Options{})
		run, err := d.RunningFromLabel("USR-A")
		if err != nil {
			t.Fatal(err)
		}
		post := func(_ context.Context, s partition.Slot) (bool, error) {
			_, err := m.WriteAt(make([]byte, 512), s.Start)
			return ran, errors.Join(err, m.Flush())
		}
		in, err := install.Begin(d, run, "USR-B", install.Options{PostInstall: post})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := in.Slot().WriteAt(release, 0); err != nil {
			t.Fatal(err)
		}
		_, err = in.Finish(t.Context(), image(release), nil)
		if errors.Is(err, partition.ErrMismatch) != ran {
			t.Errorf("ran = %v: %v", ran, err)
		}
		if slot(t, d, "USR-B").Bootable() {
			t.Error("the slot is bootable")
		}
	}
}

// Programs made for other agents set the boot bits themselves. Whatever becomes of the program, and also when everybody has lost patience with it, the slot is
// not bootable.
func TestPostInstallSetsBits(t *testing.T) {
	refused := errors.New("refused")
	for name, tt := range map[string]struct {
		spoil, cancel bool
		err, want     error
	}{
		"it refuses":           {err: refused, want: refused},
		"it spoils the slot":   {spoil: true, want: partition.ErrMismatch},
		"nobody waits for it":  {cancel: true, err: context.Canceled, want: context.Canceled},
		"all is well, for all": {},
	} {
		m := medium(t, "USR-A", "USR-B")
		d := partition.NewDisk(m, partition.Options{})
		run, err := d.RunningFromLabel("USR-A")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		post := func(_ context.Context, s partition.Slot) (bool, error) {
			l := layout("USR-A", "USR-B")
			l.Parts[1].Attributes = gptimage.Attributes(3, 1, false)
			err := l.Write(m)
			if tt.spoil {
				_, e := m.WriteAt(make([]byte, 512), s.Start)
				err = errors.Join(err, e)
			}
			if err := errors.Join(err, m.Flush()); err != nil {
				t.Fatal(err)
			}
			if !slot(t, d, "USR-B").Bootable() {
				t.Fatal("the program did not set the bits")
			}
			if tt.cancel {
				cancel()
			}
			return true, tt.err
		}
		in, err := install.Begin(d, run, "USR-B", install.Options{PostInstall: post})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := in.Slot().WriteAt(release, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := in.Finish(ctx, image(release), nil); !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
		cancel()
		if s := slot(t, d, "USR-B"); s.Bootable() {
			t.Errorf("%s: the slot is bootable: %+v", name, s)
		}
	}
}

// What can be known beforehand is said before the slot is given up.
func TestBeginTouchesNothing(t *testing.T) {
	for name, tt := range map[string]struct {
		labels []string
		dir    string
		into   string
	}{
		"no boot partition":              {[]string{"USR-A", "USR-B"}, "/nonexistent", "USR-B"},
		"two slots with one kernel":      {[]string{"USR-A", "OLD-A", "USR-B"}, t.TempDir(), "OLD-A"},
		"a label without a letter":       {[]string{"USR-A", "OTHER"}, t.TempDir(), "OTHER"},
		"a label that is no file's name": {[]string{"USR-A", "USR-/B"}, t.TempDir(), "USR-/B"},
		"the running slot":               {[]string{"USR-A", "USR-B"}, t.TempDir(), "USR-A"},
	} {
		d, run := disk(t, tt.labels...)
		_, err := install.Begin(d, run, tt.into, install.Options{Files: map[string]install.File{"kernel": {Dir: atomicfile.OS(tt.dir), Prefix: "vmlinuz-"}}})
		if err == nil {
			t.Errorf("%s: it begins", name)
		}
		for _, label := range tt.labels {
			if s := slot(t, d, label); !s.Bootable() {
				t.Errorf("%s: %s is not bootable any more", name, label)
			}
		}
		if list, _ := os.ReadDir(tt.dir); len(list) > 0 {
			t.Errorf("%s: left %v", name, list)
		}
	}
}

func TestNothingProven(t *testing.T) {
	if err := (install.Ready{}).Arm(1); err == nil {
		t.Error("nothing was armed")
	}
	d, run := disk(t, "USR-A", "USR-B")
	in, err := install.Begin(d, run, "USR-B", install.Options{Files: map[string]install.File{"kernel": {Dir: atomicfile.OS(t.TempDir()), Prefix: "vmlinuz-"}}})
	if err != nil {
		t.Fatal(err)
	}
	defer in.Discard()
	if _, err := in.Slot().WriteAt(release, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Finish(t.Context(), image(release), nil); err == nil {
		t.Error("a kernel that nobody spoke of is complete")
	}
}
