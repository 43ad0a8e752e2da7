package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/gptimage"
	"github.com/flipside-linux/flipside/updater"
)

// slotsRig is a disk image and the command.
type slotsRig struct {
	t    *testing.T
	disk string
	sum  string // SHA-256 of the first 4096 bytes of USR-B
}

func newSlotsRig(t *testing.T) *slotsRig {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk.img")
	parts := []gptimage.Partition{
		{Label: "USR-A", Type: gptimage.TypeUSR, UUID: "7130c94a-213a-4e5a-8e26-6cce9662f132", Size: 1 << 20, Attributes: gptimage.Attributes(1, 0, true)},
		{Label: "USR-B", Type: gptimage.TypeUSR, UUID: "e03dd35c-7c2d-4a47-b3fe-27f15780a57c", Size: 1 << 20},
	}
	if err := gptimage.Create(disk, 512, "22222222-2222-4222-8222-222222222222", parts); err != nil {
		t.Fatal(err)
	}
	image := bytes.Repeat([]byte("release "), 512)
	f, err := os.OpenFile(disk, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt(image, parts[1].Start)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return &slotsRig{t, disk, fmt.Sprintf("%x", sha256.Sum256(image))}
}

// run runs a command line after "flipside slots --disk IMAGE" and returns all output.
func (r *slotsRig) run(want int, args ...string) string {
	r.t.Helper()
	var out bytes.Buffer
	a := &app{stdin: strings.NewReader("yes\n"), stdout: &out, stderr: &out}
	if code := a.run(r.t.Context(), append([]string{"slots", "--disk", r.disk}, args...)); code != want {
		r.t.Fatalf("flipside slots %s: exit status %d, want %d\n%s", strings.Join(args, " "), code, want, out.String())
	}
	return out.String()
}

func (r *slotsRig) slot(label string) partition.Slot {
	r.t.Helper()
	d, err := partition.OpenDisk(r.disk, partition.Options{ReadOnly: true})
	if err != nil {
		r.t.Fatal(err)
	}
	defer d.Close()
	s, err := d.Slot(label)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

func (r *slotsRig) bits(label string) string {
	s := r.slot(label)
	return fmt.Sprintf("P%d T%d S%v", s.Priority, s.Tries, s.Successful)
}

// damage inverts a byte of the image.
func (r *slotsRig) damage(off int64) {
	r.t.Helper()
	b, err := os.ReadFile(r.disk)
	if err != nil {
		r.t.Fatal(err)
	}
	if off < 0 {
		off += int64(len(b))
	}
	b[off] ^= 0xff
	if err := os.WriteFile(r.disk, b, 0o644); err != nil {
		r.t.Fatal(err)
	}
}

func TestSlotsShow(t *testing.T) {
	r := newSlotsRig(t)
	out := r.run(exitOK, "--running", "USR-A")
	for _, want := range []string{"USR-A", "running, boots next", "not bootable", "both copies are valid and equal"} {
		if !strings.Contains(out, want) {
			t.Errorf("the table lacks %q:\n%s", want, out)
		}
	}
	var doc struct {
		Schema string
		Slots  []map[string]any
		Table  struct {
			Healthy         bool
			Primary, Backup struct{ Valid bool }
		}
	}
	if err := json.Unmarshal([]byte(r.run(exitOK, "--running", "USR-A", "--json")), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.Schema != "flipside.slots/v1" || len(doc.Slots) != 2 || !doc.Table.Healthy {
		t.Fatalf("JSON: %+v", doc)
	}
	for _, key := range []string{"label", "uuid", "index", "size", "priority", "tries", "successful", "bootable", "running", "next"} {
		if _, ok := doc.Slots[0][key]; !ok {
			t.Errorf("JSON of a slot has no %q", key)
		}
	}
	if doc.Slots[0]["running"] != true || doc.Slots[0]["next"] != true || doc.Slots[1]["bootable"] != false {
		t.Errorf("JSON slots: %v", doc.Slots)
	}
}

func TestSlotsActivate(t *testing.T) {
	r := newSlotsRig(t)
	with := func(sum string, more ...string) []string {
		return append([]string{"activate", "USR-B", "--running", "USR-A", "--size", "4096", "--sha256", sum}, more...)
	}
	if out := r.run(exitVerify, with(strings.Repeat("00", 32), "--yes")...); !strings.Contains(out, "nothing was changed") {
		t.Error(out)
	}
	if got := r.bits("USR-B"); got != "P0 T0 Sfalse" {
		t.Fatalf("after a wrong hash: %s", got)
	}
	r.run(exitUsage, with(r.sum)...) // not a terminal, no --yes
	r.run(exitUsage, with("x", "--yes")...)
	r.run(exitUsage, with(r.sum, "--yes", "--tries", "4")...)
	r.run(exitOK, with(r.sum, "--dry-run")...)
	if got := r.bits("USR-B"); got != "P0 T0 Sfalse" {
		t.Fatalf("after a dry run: %s", got)
	}
	r.run(exitOK, with(r.sum, "--yes")...)
	if got := r.bits("USR-B"); got != "P2 T1 Sfalse" {
		t.Fatalf("after activate: %s", got)
	}
	if out := r.run(exitBlocked, "activate", "USR-A", "--running", "USR-A", "--size", "1", "--sha256", r.sum, "--yes"); !strings.Contains(out, "running slot") {
		t.Error(out)
	}
	r.run(exitOK, "mark-successful", "USR-B", "--running", "USR-B", "--yes")
	if got := r.bits("USR-B"); got != "P2 T0 Strue" {
		t.Fatalf("after mark-successful: %s", got)
	}
	r.run(exitNothing, "mark-successful", "USR-B", "--running", "USR-B", "--yes")
	r.run(exitBlocked, "mark-successful", "USR-A", "--running", "USR-B", "--yes")
	r.run(exitOK, "deactivate", "USR-A", "--running", "USR-B", "--yes")
	if got := r.bits("USR-A"); got != "P0 T0 Sfalse" {
		t.Fatalf("after deactivate: %s", got)
	}
	r.run(exitNothing, "deactivate", "USR-A", "--running", "USR-B", "--yes")
	r.run(exitBlocked, "deactivate", "USR-B", "--running", "USR-B", "--yes")
	r.run(exitUsage, "deactivate", "USR-A", "--yes") // nobody knows what runs
	r.run(exitUsage, "deactivate")
}

func TestSlotsRepair(t *testing.T) {
	r := newSlotsRig(t)
	r.run(exitNothing, "repair", "--yes")
	r.damage(512 + 60)
	if out := r.run(exitOK); !strings.Contains(out, "primary copy is bad") {
		t.Error(out)
	}
	if out := r.run(exitOK, "repair", "--dry-run"); !strings.Contains(out, "would repair") {
		t.Error(out)
	}
	r.run(exitOK, "repair", "--yes")
	r.run(exitNothing, "repair", "--yes")
	r.damage(-100 - 512*3)
	if out := r.run(exitOK); !strings.Contains(out, "backup copy is bad") {
		t.Error(out)
	}
	r.run(exitOK, "repair", "--yes")
	r.damage(512 + 60)
	r.damage(-512 + 60)
	if out := r.run(exitVerify, "repair", "--yes"); !strings.Contains(out, "nothing was written") {
		t.Error(out)
	}
}

func TestSlotsBusy(t *testing.T) {
	r := newSlotsRig(t)
	d, err := partition.OpenDisk(r.disk, partition.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	run, err := d.RunningFromLabel("USR-A")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Begin(run, "USR-B"); err != nil {
		t.Fatal(err)
	}
	if out := r.run(exitBusy, "activate", "USR-B", "--running", "USR-A", "--size", "4096", "--sha256", r.sum, "--yes"); !strings.Contains(out, "flipsided") {
		t.Error(out)
	}
}

// What a slot holds is what flipsided noted; for a disk that is not the daemon's nothing is known.
func TestSlotsVersions(t *testing.T) {
	r := newSlotsRig(t)
	dir := filepath.Dir(r.disk)
	store := updater.Store{Path: filepath.Join(dir, "state.json")}
	if err := store.Save(updater.State{Phase: updater.Idle, Holds: map[string]string{"USR-A": "1.0.0", "USR-B": "2.0.0"}}); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "flipside.toml")
	text := fmt.Sprintf("[update]\nserver = \"http://127.0.0.1:1/\"\n[slots]\ndisk = %q\nrunning = \"USR-A\"\n[paths]\nstate = %q\n", r.disk, dir)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	out := r.run(0, "--config", conf)
	for _, want := range []string{"USR-A  1      1.0.0    good ", "USR-B  2      2.0.0    not bootable "} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	r.run(0, "activate", "USR-B", "--size", "4096", "--sha256", r.sum, "--yes", "--config", conf)
	var doc struct{ Slots []slotInfo }
	if err := json.Unmarshal([]byte(r.run(0, "--config", conf, "--json")), &doc); err != nil || len(doc.Slots) != 2 {
		t.Fatal(doc, err)
	}
	if b := doc.Slots[1]; b.Version != "2.0.0" || b.State != "on trial" || !b.Next {
		t.Errorf("%+v", b)
	}
	if out := r.run(0); strings.Contains(out, "2.0.0") {
		t.Errorf("without the daemon's configuration it knows versions:\n%s", out)
	}
}
