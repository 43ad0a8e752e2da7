package bls_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/partition/bitstest"
	"github.com/flipside-linux/flipside/partition/bls"
	"github.com/flipside-linux/flipside/partition/bootsim"
	"github.com/flipside-linux/flipside/partition/devicetest"
)

const template = "title Flipside {label}\nefi /flipside/vmlinuz-{letter}\noptions flipside.usr={uuid}\n"

// machine is one whose boot loader is systemd-boot, as bootsim has it.
type machine struct {
	dev *devicetest.Memory
	dir atomicfile.OS
}

func (m machine) Open(*testing.T) *partition.Disk {
	return partition.NewDisk(m.dev, partition.Options{Bits: &bls.Entries{Dir: m.dir, Template: template}})
}

func (m machine) Boot(t *testing.T) string {
	t.Helper()
	e, err := bootsim.SystemdBoot(m.dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	return "USR-" + strings.ToUpper(strings.TrimPrefix(e.Program, "/flipside/vmlinuz-"))
}

func entry(letter string, priority uint8) string {
	return fmt.Sprintf("sort-key flipside\nversion %02d\nefi /flipside/vmlinuz-%s\n", priority, letter)
}

func newMachine(t *testing.T, bits []bitstest.State) machine {
	t.Helper()
	m := machine{bitstest.Device(t, bitstest.Layout(bits)), atomicfile.OS(t.TempDir())}
	for i, b := range bits {
		if b.Priority == 0 {
			continue
		}
		letter, count := string(rune('a'+i)), ""
		if !b.Successful {
			count = fmt.Sprintf("+%d", b.Tries)
		}
		m.put(t, "flipside-"+letter+count+".conf", entry(letter, b.Priority))
	}
	m.put(t, "rescue.conf", "title somebody else's\nlinux /rescue\n")
	return m
}

func (m machine) put(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(string(m.dir), name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (m machine) read(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(string(m.dir), name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestBits(t *testing.T) {
	bitstest.Run(t, func(t *testing.T, bits []bitstest.State) bitstest.Machine { return newMachine(t, bits) })
}

var good = []bitstest.State{{Priority: 2, Successful: true}, {Priority: 1, Successful: true}}

func running(t *testing.T, d *partition.Disk, label string) partition.Running {
	t.Helper()
	r, err := d.RunningFromLabel(label)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// The partition table says where slots are and nothing else: it is never written to, and its boot loader's rule refuses.
func TestTableIsNotWritten(t *testing.T) {
	m := newMachine(t, good)
	before := bytes.Clone(m.dev.Bytes())
	d := m.Open(t)
	if err := errors.Join(d.MarkSuccessful(running(t, d, "USR-A")), d.GoBack(running(t, d, "USR-A"), "USR-B", 1), d.MarkBad("USR-B")); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, m.dev.Bytes()) {
		t.Error("the disk was written")
	}
	if _, _, err := d.Boot(partition.UEFI); !errors.Is(err, partition.ErrElsewhere) {
		t.Errorf("Boot: %v", err)
	}
	if _, err := d.Take(); !errors.Is(err, partition.ErrElsewhere) {
		t.Errorf("Take: %v", err)
	}
	if m.read(t, "rescue.conf") != "title somebody else's\nlinux /rescue\n" {
		t.Error("somebody else's entry was changed")
	}
}

// What has booted keeps its lines when its bits change; a fresh entry is the template's.
func TestLines(t *testing.T) {
	m := newMachine(t, good)
	own := "# written at installation\nsort-key flipside\nversion 01\nefi /flipside/vmlinuz-b\noptions debug\n"
	m.put(t, "flipside-b.conf", own)
	d := m.Open(t)
	if err := d.GoBack(running(t, d, "USR-A"), "USR-B", 2); err != nil {
		t.Fatal(err)
	}
	if got, want := m.read(t, "flipside-b+2.conf"), strings.Replace(own, "01", "03", 1); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for i, want := range []string{"USR-B", "USR-B", "USR-A"} {
		if got := m.Boot(t); got != want {
			t.Errorf("boot %d is of %s, want %s", i+1, got, want)
		}
	}
	target, err := d.Begin(running(t, d, "USR-A"), "USR-B")
	if err != nil {
		t.Fatal(err)
	}
	if names, _ := m.dir.List(); slices.Contains(names, "flipside-b+0-2.conf") || len(names) != 2 {
		t.Errorf("a slot that is written to has an entry: %v", names)
	}
	if _, err := target.WriteAt([]byte("new"), 0); err != nil {
		t.Fatal(err)
	}
	v, err := target.Verify(t.Context(), 3, sha256.Sum256([]byte("new")))
	if err == nil {
		err = d.Activate(running(t, d, "USR-A"), v, 1)
	}
	if err != nil {
		t.Fatal(err)
	}
	want := "sort-key flipside\nversion 03\ntitle Flipside USR-B\nefi /flipside/vmlinuz-b\noptions flipside.usr=" + v.Slot().UUID.String() + "\n"
	if got := m.read(t, "flipside-b+1.conf"); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// What a change that was cut off leaves is read as what boots, and goes with the next change.
func TestLeftovers(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  bitstest.State // of B
		boots string
	}{
		{"going back, cut off", map[string]string{"flipside-b.conf": entry("b", 1), "flipside-b+1.conf": entry("b", 3)}, bitstest.State{Priority: 3, Tries: 1}, "USR-B"},
		{"the same, after its boot", map[string]string{"flipside-b.conf": entry("b", 1), "flipside-b+0-1.conf": entry("b", 3)}, bitstest.State{Priority: 3}, "USR-A"},
		{"marking successful, cut off", map[string]string{"flipside-b.conf": entry("b", 3), "flipside-b+0-1.conf": entry("b", 3)}, bitstest.State{Priority: 3, Successful: true}, "USR-B"},
		{"an entry of zeros", map[string]string{"flipside-b+1.conf": strings.Repeat("\x00", 512) + entry("b", 3)}, bitstest.State{}, "USR-A"},
		{"an empty entry", map[string]string{"flipside-b.conf": ""}, bitstest.State{}, "USR-A"},
	} {
		m := newMachine(t, []bitstest.State{{Priority: 2, Successful: true}, {}})
		for name, text := range tt.files {
			m.put(t, name, text)
		}
		d := m.Open(t)
		s, err := d.Slot("USR-B")
		if err != nil {
			t.Fatal(err)
		}
		if got := (bitstest.State{Priority: s.Priority, Tries: s.Tries, Successful: s.Successful}); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
		if got := m.Boot(t); got != tt.boots {
			t.Errorf("%s: %s boots, want %s", tt.name, got, tt.boots)
		}
		if s.Priority == 0 {
			continue
		}
		if err := d.MarkBad("USR-B"); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if names, _ := m.dir.List(); len(names) != 2 {
			t.Errorf("%s: left %v", tt.name, names)
		}
	}
}

// Entries with our names that somebody else wrote are not guessed about, and nothing is changed.
func TestForeign(t *testing.T) {
	for name, text := range map[string]string{
		"no sort key":             "version 02\nefi /flipside/vmlinuz-a\n",
		"another sort key":        "sort-key debian\nversion 02\nefi /flipside/vmlinuz-a\n",
		"no version":              "sort-key flipside\nefi /flipside/vmlinuz-a\n",
		"a version of one digit":  "sort-key flipside\nversion 2\nefi /flipside/vmlinuz-a\n",
		"a version of a release":  "sort-key flipside\nversion 1.2.3\nefi /flipside/vmlinuz-a\n",
		"a version too high":      "sort-key flipside\nversion 16\nefi /flipside/vmlinuz-a\n",
		"version 0":               "sort-key flipside\nversion 00\nefi /flipside/vmlinuz-a\n",
		"two versions":            "sort-key flipside\nversion 02\nversion 03\nefi /flipside/vmlinuz-a\n",
		"the version comes last":  "sort-key flipside\nefi /flipside/vmlinuz-a\nversion 02\n",
		"the version is far down": "#" + strings.Repeat("-", 600) + "\nsort-key flipside\nversion 02\nefi /flipside/vmlinuz-a\n",
		"too long":                entry("a", 2) + "#" + strings.Repeat("-", 5000) + "\n",
	} {
		m := newMachine(t, good)
		m.put(t, "flipside-a.conf", text)
		d := m.Open(t)
		if _, err := d.Slots(); !errors.Is(err, bls.ErrForeign) {
			t.Errorf("%s: Slots says %v", name, err)
		}
		if err := d.MarkBad("USR-B"); !errors.Is(err, bls.ErrForeign) {
			t.Errorf("%s: MarkBad says %v", name, err)
		}
		if m.read(t, "flipside-a.conf") != text || m.read(t, "flipside-b.conf") != entry("b", 1) {
			t.Errorf("%s: an entry was changed", name)
		}
	}
}

// A name in other case is the same name to the firmware: a slot that has one is neither without an entry nor written over it.
func TestNamesInCapitals(t *testing.T) {
	for _, tt := range []struct{ ours, theirs string }{
		{"flipside-a.conf", "flipside-A.conf"}, {"flipside-b.conf", "flipside-B.conf"}, {"flipside-b.conf", "FLIPSIDE-B+2-1.CONF"}, {"flipside-b.conf", "Flipside-b.conf"},
	} {
		m := newMachine(t, good)
		text := m.read(t, tt.ours)
		if err := os.Rename(filepath.Join(string(m.dir), tt.ours), filepath.Join(string(m.dir), tt.theirs)); err != nil {
			t.Fatal(err)
		}
		d := m.Open(t)
		if _, err := d.Slots(); !errors.Is(err, bls.ErrForeign) {
			t.Errorf("%s: Slots says %v", tt.theirs, err)
		}
		for _, slot := range []string{"USR-A", "USR-B"} {
			if err := d.MarkBad(slot); !errors.Is(err, bls.ErrForeign) {
				t.Errorf("%s: MarkBad of %s says %v", tt.theirs, slot, err)
			}
		}
		if names, _ := m.dir.List(); m.read(t, tt.theirs) != text || len(names) != 3 {
			t.Errorf("%s: the entries were changed: %v", tt.theirs, names)
		}
	}
	// One of somebody else's stays nobody's concern.
	m := newMachine(t, good)
	m.put(t, "Flipside-Rescue.conf", "title rescue\nlinux /rescue\n")
	if err := m.Open(t).MarkBad("USR-B"); err != nil {
		t.Error(err)
	}
}

func TestTemplate(t *testing.T) {
	for text, ok := range map[string]bool{
		"linux /vmlinuz\n": true, "efi /x": true, "": false, "title nothing to start\n": false, "linux\n": false, "linux /x\nversion 3\n": false,
		"sort-key a\nlinux /x\n": false, "linux /x\n" + strings.Repeat("#", 5000): false, "linux /x\x00\n": false,
		"linux /x\noptions " + strings.Repeat("x", 2000): true,
	} {
		if err := (&bls.Entries{Template: text}).Check(); (err == nil) != ok {
			t.Errorf("%.40q: %v", text, err)
		}
	}
}

// Names that lead to one entry, or to none, are found out before anything is changed.
func TestLabels(t *testing.T) {
	e := &bls.Entries{Dir: atomicfile.OS(t.TempDir()), Template: template}
	for _, labels := range [][]string{{"USR-A", "OLD-A"}, {"USR-A", "OTHER"}, {"USR-A", "USR-"}, {"USR-A", "USR-/etc"}, {"USR-A", "USR-b+1"}} {
		if err := e.Read([]partition.Slot{{Label: labels[0]}, {Label: labels[1]}}); err == nil {
			t.Errorf("%q has entries", labels)
		}
	}
}

// An entry longer than a sector is whole or passed over, and a disk that fails is not written to any more.
func TestLongEntry(t *testing.T) {
	m := newMachine(t, good)
	long := "title " + strings.Repeat("x", 1500) + "\nefi /flipside/vmlinuz-b\n"
	d := partition.NewDisk(m.dev, partition.Options{Bits: &bls.Entries{Dir: m.dir, Template: long}})
	run := running(t, d, "USR-A")
	target, err := d.Begin(run, "USR-B")
	if err != nil {
		t.Fatal(err)
	}
	v, err := target.Verify(t.Context(), 4096, sha256.Sum256(make([]byte, 4096)))
	if err == nil {
		err = d.Activate(run, v, 1)
	}
	if err != nil {
		t.Fatal(err)
	}
	if got := m.read(t, "flipside-b+1.conf"); got != "sort-key flipside\nversion 03\n"+long {
		t.Errorf("got %q", got)
	}
}

// full is a directory in which no file can be made.
type full struct{ atomicfile.OS }

var errFull = errors.New("no space")

func (full) Create(string) (atomicfile.File, error) { return nil, errFull }

// After an error nobody knows what the entries are, and nothing more is written through the same Disk, the slot's bytes included.
func TestFailedWrite(t *testing.T) {
	m := newMachine(t, []bitstest.State{{Priority: 2, Successful: true}, {}})
	e := &bls.Entries{Dir: m.dir, Template: template}
	d := partition.NewDisk(m.dev, partition.Options{Bits: e})
	target, err := d.Begin(running(t, d, "USR-A"), "USR-B")
	if err != nil {
		t.Fatal(err)
	}
	e.Dir = full{m.dir}
	if err := d.MarkBad("USR-B"); !errors.Is(err, errFull) {
		t.Errorf("with entries that cannot be flushed: %v", err)
	}
	e.Dir = m.dir
	if err := d.MarkSuccessful(running(t, d, "USR-A")); !errors.Is(err, errFull) {
		t.Errorf("the bits are changed after an error: %v", err)
	}
	if _, err := target.WriteAt([]byte("x"), 0); !errors.Is(err, errFull) {
		t.Errorf("the slot is written after an error: %v", err)
	}
	if m.Boot(t) != "USR-A" {
		t.Error("A does not boot")
	}
}
