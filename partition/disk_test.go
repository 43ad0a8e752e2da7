package partition_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/bootsim"
	"github.com/flipside-linux/flipside/partition/devicetest"
	"github.com/flipside-linux/flipside/partition/gptimage"
)

const (
	uuidA = "7130c94a-213a-4e5a-8e26-6cce9662f132"
	uuidB = "e03dd35c-7c2d-4a47-b3fe-27f15780a57c"
	uuidC = "6a0c1f6e-9d0c-4a64-8d5e-1c6ad2a4f0c3"
)

// layout is a small disk: EFI-SYSTEM, USR-A, USR-B, ROOT.
func layout(sector int, a, b uint64) gptimage.Layout {
	return gptimage.Layout{Sector: sector, UUID: "22222222-2222-4222-8222-222222222222", Align: 8192, Parts: []gptimage.Partition{
		{Label: "EFI-SYSTEM", Type: gptimage.TypeEFI, UUID: "11111111-1111-4111-8111-111111111111", Size: 8192, Attributes: 1<<63 | 4},
		{Label: "USR-A", Type: gptimage.TypeUSR, UUID: uuidA, Size: 16384, Attributes: a},
		{Label: "USR-B", Type: gptimage.TypeUSR, UUID: uuidB, Size: 16384, Attributes: b},
		{Label: "ROOT", Type: gptimage.TypeLinux, UUID: "33333333-3333-4333-8333-333333333333", Size: 8192},
	}}
}

func memory(t testing.TB, l gptimage.Layout) *devicetest.Memory {
	t.Helper()
	size, err := l.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(i * 7)
	}
	m := devicetest.NewMemory(b, l.Sector)
	if err := l.Write(m); err != nil {
		t.Fatal(err)
	}
	return devicetest.NewStrict(m.Bytes(), l.Sector)
}

func open(dev partition.Device) *partition.Disk {
	return partition.NewDisk(dev, partition.Options{})
}

func running(t testing.TB, d *partition.Disk, label string) partition.Running {
	t.Helper()
	r, err := d.RunningFromLabel(label)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func attributes(s string) uint64 {
	var p, t, g uint8
	fmt.Sscanf(s, "P%d T%d S%d", &p, &t, &g)
	return gptimage.Attributes(p, t, g == 1)
}

// words are the attribute fields of both slots, of the primary or the backup.
func words(m *devicetest.Memory, backup bool) (a, b uint64) {
	at := 2 * m.SectorSize()
	if backup {
		at = len(m.Bytes()) - m.SectorSize() - 16384
	}
	le := binary.LittleEndian
	return le.Uint64(m.Bytes()[at+128+48:]), le.Uint64(m.Bytes()[at+256+48:])
}

// TestBoot is the table of what GRUB did on real disks, with SeaBIOS and OVMF.
func TestBoot(t *testing.T) {
	for _, tt := range []struct {
		a, b  string
		boots string   // labels, one letter per power-on; - for none
		after []uint64 // attribute field of the slot that was booted, after each
	}{
		{"P1 T0 S1", "P0 T0 S0", "A", []uint64{0x0101 << 48}},
		{"P1 T0 S1", "P2 T1 S0", "BAA", []uint64{0x0002 << 48, 0x0101 << 48, 0x0101 << 48}},
		{"P1 T0 S1", "P2 T3 S0", "BBBA", []uint64{0x0022 << 48, 0x0012 << 48, 0x0002 << 48, 0x0101 << 48}},
		{"P1 T0 S1", "P2 T0 S1", "BB", []uint64{0x0102 << 48, 0x0102 << 48}},
		{"P1 T0 S1", "P2 T2 S1", "BBB", []uint64{0x0112 << 48, 0x0102 << 48, 0x0102 << 48}},
		{"P14 T0 S1", "P15 T15 S0", "B", []uint64{0x00ef << 48}},
		{"P1 T0 S0", "P2 T0 S0", "--", nil},
		{"P2 T1 S0", "P2 T1 S0", "AB-", []uint64{0x0002 << 48, 0x0002 << 48}},
		{"P1 T0 S0", "P1 T0 S1", "B", []uint64{0x0101 << 48}},
		{"P0 T0 S1", "P0 T3 S0", "-", nil},
	} {
		for _, f := range []partition.Firmware{partition.GRUB, partition.UEFI} {
			t.Run(fmt.Sprintf("%s/%s/%v", tt.a, tt.b, f), func(t *testing.T) {
				m := memory(t, layout(512, attributes(tt.a), attributes(tt.b)))
				for i, want := range tt.boots {
					before := bytes.Clone(m.Bytes())
					slot, wrote, err := bootsim.Choose(m, f)
					if want == '-' {
						if !errors.Is(err, partition.ErrNoBoot) || !bytes.Equal(m.Bytes(), before) {
							t.Fatalf("boot %d: %q, %v, want none and no write", i+1, slot.Label, err)
						}
						continue
					}
					if err != nil || slot.Label != "USR-"+string(want) {
						t.Fatalf("boot %d: %q, %v, want USR-%c", i+1, slot.Label, err, want)
					}
					if wrote == bytes.Equal(m.Bytes(), before) {
						t.Fatalf("boot %d: wrote is %v", i+1, wrote)
					}
					for _, backup := range []bool{false, true} {
						a, b := words(m, backup)
						got := a
						if want == 'B' {
							got = b
						}
						if got != tt.after[i] {
							t.Errorf("boot %d: attributes %#016x, want %#016x (backup copy %v)", i+1, got, tt.after[i], backup)
						}
					}
				}
			})
		}
	}
}

// TestBytes: one change touches the attributes and the checksums of both copies, and not one byte more.
func TestBytes(t *testing.T) {
	for _, tt := range []struct{ sector, entrySize, entries int }{{512, 128, 128}, {4096, 128, 128}, {512, 256, 128}, {4096, 256, 128}, {512, 128, 9}, {4096, 512, 40}, {512, 128, 256}} {
		t.Run(fmt.Sprintf("%d/%d/%d", tt.sector, tt.entrySize, tt.entries), func(t *testing.T) {
			l := layout(tt.sector, attributes("P1 T0 S1"), 1<<60|3)
			l.EntrySize, l.Entries = tt.entrySize, tt.entries
			m := memory(t, l)
			ss, size := tt.sector, len(m.Bytes())
			array := (tt.entrySize*tt.entries + ss - 1) / ss * ss
			// Bytes of the headers and the entries that no standard knows must stay as well.
			image := m.Bytes()
			tail := tt.entrySize*tt.entries - array
			for i := tail; i < 0; i++ {
				image[2*ss+array+i], image[size-ss+i] = 0xa5, 0xa5
			}
			for i := 92; i < ss; i++ {
				image[ss+i], image[size-ss+i] = 0x5a, 0x5a
			}
			if tt.entrySize > 128 {
				for _, at := range []int{2 * ss, size - ss - array} {
					for i := 128; i < tt.entrySize; i++ {
						image[at+2*tt.entrySize+i] = 0x77
					}
				}
				for h, at := range map[int]int{ss: 2 * ss, size - ss: size - ss - array} {
					reseal(image, h, at, tt.entrySize*tt.entries)
				}
			}
			m = devicetest.NewStrict(image, ss)
			before := bytes.Clone(image)
			d := open(m)
			if err := d.MarkSuccessful(running(t, d, "USR-B")); err != nil {
				t.Fatal(err)
			}
			allowed := map[int]bool{}
			for h, at := range map[int]int{ss: 2 * ss, size - ss: size - ss - array} {
				for i := range 4 {
					allowed[h+16+i], allowed[h+88+i] = true, true
				}
				allowed[at+2*tt.entrySize+54], allowed[at+2*tt.entrySize+55] = true, true
			}
			changed := 0
			for i, b := range m.Bytes() {
				if b == before[i] {
					continue
				}
				changed++
				if !allowed[i] {
					t.Fatalf("byte %d (sector %d) changed from %#x to %#x", i, i/ss, before[i], b)
				}
			}
			if changed < 10 {
				t.Errorf("only %d bytes changed", changed)
			}
			if got := binary.LittleEndian.Uint64(m.Bytes()[2*ss+2*tt.entrySize+48:]); got != 1<<60|3|0x0101<<48 {
				t.Errorf("attributes %#x: bits that are not the boot loader's changed", got)
			}
			if state := open(m).Table(); !state.Healthy {
				t.Errorf("the table afterwards: %+v", state)
			}
			for _, op := range m.Log {
				if op.Kind == devicetest.Write && (op.Off%int64(ss) != 0 || len(op.Data) != ss) {
					t.Errorf("a write of %d bytes at %d, want whole sectors and no more than change", len(op.Data), op.Off)
				}
			}
		})
	}
}

func reseal(image []byte, header, entries, n int) {
	le := binary.LittleEndian
	le.PutUint32(image[header+88:], crc32.ChecksumIEEE(image[entries:entries+n]))
	le.PutUint32(image[header+16:], 0)
	le.PutUint32(image[header+16:], crc32.ChecksumIEEE(image[header:header+92]))
}

// TestDamage: damaged tables, what boots with them, and what a repair does.
func TestDamage(t *testing.T) {
	const ss = 512
	le := binary.LittleEndian
	for _, tt := range []struct {
		name       string
		damage     func(b []byte) []byte
		grub, uefi string // label of what boots with a try to spend, or "" for nothing
		repair     string // part of what the repair says, or of its error
		fails      bool
	}{
		{"nothing", func(b []byte) []byte { return b }, "USR-B", "USR-B", "", false},
		{"primary header checksum", func(b []byte) []byte { b[ss+60] ^= 1; return b }, "USR-B", "USR-B", "primary copy is rewritten", false},
		{"primary entries", func(b []byte) []byte { b[2*ss+300] ^= 1; return b }, "USR-B", "USR-B", "primary copy is rewritten", false},
		{"primary header zero", func(b []byte) []byte { clear(b[ss : 2*ss]); return b }, "", "USR-B", "primary copy is rewritten", false},
		{"primary zero", func(b []byte) []byte { clear(b[ss : 34*ss]); return b }, "", "USR-B", "primary copy is rewritten", false},
		{"backup header", func(b []byte) []byte { b[len(b)-ss+60] ^= 1; return b }, "USR-B", "USR-B", "backup copy is rewritten", false},
		{"backup entries", func(b []byte) []byte { b[len(b)-3*ss] ^= 1; return b }, "USR-B", "USR-B", "backup copy is rewritten", false},
		{"backup zero", func(b []byte) []byte { clear(b[len(b)-33*ss:]); return b }, "USR-B", "USR-B", "backup copy is rewritten", false},
		{"both headers", func(b []byte) []byte { b[ss+60] ^= 1; b[len(b)-ss+60] ^= 1; return b }, "", "", "no valid partition table", true},
		{"both entries", func(b []byte) []byte { b[2*ss] ^= 1; b[len(b)-3*ss] ^= 1; return b }, "", "", "no valid partition table", true},
		{"both valid and different: the primary counts", func(b []byte) []byte {
			le.PutUint64(b[len(b)-33*ss+256+48:], 0)
			reseal(b, len(b)-ss, len(b)-33*ss, 16384)
			return b
		}, "USR-B", "USR-B", "from which it differs", false},
		{"new primary entries, all else old", func(b []byte) []byte {
			le.PutUint64(b[2*ss+256+48:], 0)
			return b
		}, "USR-B", "USR-B", "primary copy is rewritten", false},
		{"new primary header, all else old", func(b []byte) []byte {
			c := bytes.Clone(b)
			le.PutUint64(c[2*ss+256+48:], 0)
			reseal(c, ss, 2*ss, 16384)
			copy(b[ss:2*ss], c[ss:2*ss])
			return b
		}, "", "USR-B", "primary copy is rewritten", false},
		{"the disk has grown", func(b []byte) []byte { return append(b, make([]byte, 1<<16)...) }, "USR-B", "USR-B", "", false},
		{"the disk has grown and the backup is bad", func(b []byte) []byte {
			b[len(b)-ss+60] ^= 1
			return append(b, make([]byte, 1<<16)...)
		}, "USR-B", "USR-B", "backup copy is rewritten", false},
		{"the disk has grown and the primary is bad", func(b []byte) []byte {
			b[ss+60] ^= 1
			return append(b, make([]byte, 1<<16)...)
		}, "USR-B", "USR-B", "primary copy is rewritten", false},
		{"the image has an odd tail", func(b []byte) []byte { return append(b, 1, 2, 3) }, "USR-B", "USR-B", "", false},
		{"the image was cut short", func(b []byte) []byte { return b[:len(b)-ss] }, "USR-B", "USR-B", "outside the disk", true},
		{"the primary says that the backup is in a partition", func(b []byte) []byte {
			le.PutUint64(b[ss+32:], 80)
			reseal(b, ss, 2*ss, 16384)
			return b
		}, "USR-B", "USR-B", "something else is", true},
		{"the primary says that the backup is the primary", func(b []byte) []byte {
			le.PutUint64(b[ss+32:], 1)
			reseal(b, ss, 2*ss, 16384)
			return b
		}, "USR-B", "USR-B", "something else is", true},
		{"another revision", func(b []byte) []byte { b[ss+10] = 2; reseal(b, ss, 2*ss, 16384); return b }, "USR-B", "USR-B", "primary copy is rewritten", false},
		{"entries beyond counting", func(b []byte) []byte {
			for _, h := range []int{ss, len(b) - ss} {
				le.PutUint32(b[h+80:], 1<<31)
				reseal(b, h, 2*ss, 16384)
			}
			return b
		}, "", "", "no valid partition table", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			image := tt.damage(bytes.Clone(memory(t, layout(ss, attributes("P1 T0 S1"), attributes("P2 T1 S0"))).Bytes()))
			for f, want := range map[partition.Firmware]string{partition.GRUB: tt.grub, partition.UEFI: tt.uefi} {
				if tt.fails && want != "" {
					continue // what firmware does with a backup that is elsewhere is not known
				}
				slot, _, err := bootsim.Choose(devicetest.NewMemory(image, ss), f)
				if slot.Label != want || (want == "") != errors.Is(err, partition.ErrNoBoot) {
					t.Errorf("%v boots %q, %v, want %q", f, slot.Label, err, want)
				}
			}
			m := devicetest.NewStrict(image, ss)
			d := open(m)
			what, err := d.Repair()
			if tt.fails {
				if err == nil || !strings.Contains(err.Error(), tt.repair) {
					t.Fatalf("repair: %q, %v, want an error with %q", what, err, tt.repair)
				}
				if !bytes.Equal(m.Bytes(), image) {
					t.Error("something was written")
				}
				return
			}
			if err != nil || !strings.Contains(what, tt.repair) || (tt.repair == "") != (what == "") {
				t.Fatalf("repair: %q, %v, want %q", what, err, tt.repair)
			}
			if !d.Table().Healthy {
				t.Errorf("after the repair: %+v", d.Table())
			}
			if again, err := d.Repair(); err != nil || again != "" {
				t.Errorf("a second repair: %q, %v", again, err)
			}
			if s, err := d.Slot("USR-B"); err != nil || s.Tries != 1 || s.Priority != 2 {
				t.Errorf("slot B after the repair: %+v, %v", s, err)
			}
		})
	}
}

// fresh is a disk with a release for USR-B.
type fresh struct {
	m    *devicetest.Memory
	d    *partition.Disk
	run  partition.Running
	data []byte
	sum  [32]byte
}

func newFresh(t *testing.T) *fresh {
	t.Helper()
	m := memory(t, layout(512, attributes("P1 T0 S1"), attributes("P2 T0 S1")))
	d := open(m)
	data := bytes.Repeat([]byte("release\n"), 1024)
	return &fresh{m, d, running(t, d, "USR-A"), data, sha256.Sum256(data)}
}

func (f *fresh) begin(t *testing.T) *partition.Target {
	t.Helper()
	target, err := f.d.Begin(f.run, "USR-B")
	if err != nil {
		t.Fatal(err)
	}
	return target
}

func (f *fresh) write(t *testing.T, target *partition.Target) {
	t.Helper()
	if _, err := target.WriteAt(f.data, 0); err != nil {
		t.Fatal(err)
	}
}

func (f *fresh) verify(t *testing.T, target *partition.Target) partition.Verified {
	t.Helper()
	v, err := target.Verify(context.Background(), int64(len(f.data)), f.sum)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestProof(t *testing.T) {
	for _, tt := range []struct {
		name string
		then func(t *testing.T, f *fresh, target *partition.Target) // after the slot was verified
		want error
	}{
		{"nothing happens", func(*testing.T, *fresh, *partition.Target) {}, nil},
		{"a byte is written", func(t *testing.T, f *fresh, target *partition.Target) {
			if _, err := target.WriteAt([]byte{1}, 16383); err != nil {
				t.Fatal(err)
			}
		}, partition.ErrStale},
		{"a range is discarded", func(t *testing.T, f *fresh, target *partition.Target) {
			if err := target.Discard(8192, 512); err != nil {
				t.Fatal(err)
			}
		}, partition.ErrStale},
		{"another target writes", func(t *testing.T, f *fresh, _ *partition.Target) {
			f.write(t, f.begin(t))
		}, partition.ErrStale},
		{"another target begins", func(t *testing.T, f *fresh, _ *partition.Target) { f.begin(t) }, partition.ErrStale},
		{"somebody makes it bootable", func(t *testing.T, f *fresh, _ *partition.Target) {
			other := open(f.m)
			if err := other.MarkSuccessful(running(t, other, "USR-B")); err != nil {
				t.Fatal(err)
			}
		}, partition.ErrStale},
		{"the partition moves", func(t *testing.T, f *fresh, _ *partition.Target) {
			b := f.m.Bytes()
			for _, at := range []int{1024, len(b) - 33*512} {
				binary.LittleEndian.PutUint64(b[at+256+40:], binary.LittleEndian.Uint64(b[at+256+40:])-1)
			}
			reseal(b, 512, 1024, 16384)
			reseal(b, len(b)-512, len(b)-33*512, 16384)
		}, partition.ErrGeometry},
		{"the running slot loses its success", func(t *testing.T, f *fresh, _ *partition.Target) {
			b := f.m.Bytes()
			for _, at := range []int{1024, len(b) - 33*512} {
				binary.LittleEndian.PutUint64(b[at+128+48:], attributes("P1 T1 S0"))
			}
			reseal(b, 512, 1024, 16384)
			reseal(b, len(b)-512, len(b)-33*512, 16384)
		}, partition.ErrNotProven},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFresh(t)
			target := f.begin(t)
			f.write(t, target)
			v := f.verify(t, target)
			tt.then(t, f, target)
			err := f.d.Activate(f.run, v, 1)
			if !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) {
				t.Fatalf("activate: %v, want %v", err, tt.want)
			}
			if err != nil {
				return
			}
			s, err := f.d.Slot("USR-B")
			if err != nil || s.Priority != 2 || s.Tries != 1 || s.Successful {
				t.Fatalf("after activate: %+v, %v", s, err)
			}
			if _, err := target.WriteAt([]byte{1}, 0); err == nil {
				t.Error("a slot that boots next was written to")
			}
			if err := f.d.Activate(f.run, v, 1); !errors.Is(err, partition.ErrStale) {
				t.Errorf("a proof was used twice: %v", err)
			}
		})
	}
	t.Run("no proof", func(t *testing.T) {
		f := newFresh(t)
		if err := f.d.Activate(f.run, partition.Verified{}, 1); err == nil {
			t.Error("a slot was activated without proof")
		}
	})
	t.Run("a proof of another disk", func(t *testing.T) {
		f, g := newFresh(t), newFresh(t)
		target := f.begin(t)
		f.write(t, target)
		if err := g.d.Activate(g.run, f.verify(t, target), 1); err == nil {
			t.Error("a slot was activated with the proof of another disk")
		}
	})
	t.Run("tries", func(t *testing.T) {
		f := newFresh(t)
		target := f.begin(t)
		f.write(t, target)
		v := f.verify(t, target)
		for _, tries := range []int{-1, 0, 4, 16} {
			if err := f.d.Activate(f.run, v, tries); err == nil {
				t.Errorf("%d tries were accepted", tries)
			}
		}
	})
	t.Run("a wrong hash", func(t *testing.T) {
		f := newFresh(t)
		target := f.begin(t)
		f.write(t, target)
		f.m.Bytes()[target.Slot().Start+77] ^= 1
		if _, err := target.Verify(context.Background(), int64(len(f.data)), f.sum); !errors.Is(err, partition.ErrMismatch) {
			t.Errorf("verify: %v", err)
		}
	})
}

func TestSettle(t *testing.T) {
	f := newFresh(t)
	target := f.begin(t)
	f.write(t, target)
	if err := target.Settle(4096); err != nil {
		t.Fatal(err)
	}
	if _, err := target.WriteAt([]byte{1}, 4095); !errors.Is(err, partition.ErrSettled) {
		t.Errorf("a write below what is settled: %v", err)
	}
	if err := target.Discard(0, 512); !errors.Is(err, partition.ErrSettled) {
		t.Errorf("a discard below what is settled: %v", err)
	}
	if _, err := target.WriteAt(f.data[4096:], 4096); err != nil {
		t.Error(err)
	}
	if err := target.Settle(2048); err != nil {
		t.Errorf("settling less again: %v", err)
	}
	if err := target.Settle(1 << 40); err == nil {
		t.Error("settling beyond the slot went through")
	}
	v := f.verify(t, target)
	if err := f.d.Activate(f.run, v, 3); err != nil {
		t.Fatal(err)
	}
	// Settled more than the image has: everything is read again.
	f = newFresh(t)
	target = f.begin(t)
	f.write(t, target)
	if err := target.Settle(12288); err != nil {
		t.Fatal(err)
	}
	f.verify(t, target)
}

func TestRefusals(t *testing.T) {
	t.Run("the running slot", func(t *testing.T) {
		f := newFresh(t)
		if _, err := f.d.Begin(f.run, "USR-A"); !errors.Is(err, partition.ErrRunning) {
			t.Error(err)
		}
	})
	t.Run("nobody knows what is running", func(t *testing.T) {
		f := newFresh(t)
		if _, err := f.d.Begin(partition.Running{}, "USR-B"); err == nil {
			t.Error("went through")
		}
	})
	t.Run("the running slot is on trial", func(t *testing.T) {
		m := memory(t, layout(512, attributes("P2 T0 S0"), attributes("P1 T0 S1")))
		d := open(m)
		before := bytes.Clone(m.Bytes())
		if _, err := d.Begin(running(t, d, "USR-A"), "USR-B"); !errors.Is(err, partition.ErrNotProven) || !bytes.Equal(before, m.Bytes()) {
			t.Error(err)
		}
	})
	t.Run("not a slot", func(t *testing.T) {
		f := newFresh(t)
		for _, label := range []string{"ROOT", "", "USR-C"} {
			if _, err := f.d.Begin(f.run, label); !errors.Is(err, partition.ErrNoSlot) {
				t.Errorf("%q: %v", label, err)
			}
		}
	})
	t.Run("two of one label", func(t *testing.T) {
		l := layout(512, attributes("P1 T0 S1"), 0)
		l.Parts = append(l.Parts, gptimage.Partition{Label: "USR-B", Type: gptimage.TypeUSR, UUID: uuidC, Size: 8192})
		d := open(memory(t, l))
		if _, err := d.Begin(running(t, d, "USR-A"), "USR-B"); !errors.Is(err, partition.ErrNoSlot) {
			t.Error(err)
		}
	})
	t.Run("slots that overlap", func(t *testing.T) {
		m := memory(t, layout(512, attributes("P1 T0 S1"), 0))
		b := m.Bytes()
		for _, at := range []int{1024, len(b) - 33*512} {
			copy(b[at+256+32:at+256+48], b[at+128+32:at+128+48])
		}
		reseal(b, 512, 1024, 16384)
		reseal(b, len(b)-512, len(b)-33*512, 16384)
		d := open(devicetest.NewStrict(b, 512))
		if _, err := d.Begin(running(t, d, "USR-A"), "USR-B"); !errors.Is(err, partition.ErrGeometry) {
			t.Error(err)
		}
	})
	t.Run("the last bootable slot", func(t *testing.T) {
		d := open(memory(t, layout(512, attributes("P1 T0 S1"), 0)))
		if err := d.MarkBad("USR-A"); !errors.Is(err, partition.ErrLast) {
			t.Error(err)
		}
	})
	t.Run("read only", func(t *testing.T) {
		m := memory(t, layout(512, attributes("P1 T0 S1"), 0))
		d := partition.NewDisk(m, partition.Options{ReadOnly: true})
		if err := d.MarkSuccessful(running(t, d, "USR-A")); !errors.Is(err, partition.ErrReadOnly) {
			t.Error(err)
		}
		d = open(devicetest.ReadOnly{Device: m})
		if err := d.MarkSuccessful(running(t, d, "USR-B")); !errors.Is(err, partition.ErrReadOnly) {
			t.Error(err)
		}
	})
	t.Run("outside the slot", func(t *testing.T) {
		f := newFresh(t)
		target := f.begin(t)
		for _, off := range []int64{-1, 16384, 16383, 1 << 62} {
			if _, err := target.WriteAt([]byte{1, 2}, off); err == nil {
				t.Errorf("2 bytes at %d of 16384 were written", off)
			}
		}
	})
}

// TestPriorities: activation gives the highest priority, and makes room when there is none above.
func TestPriorities(t *testing.T) {
	for _, tt := range []struct{ a, c, wantA, wantB, wantC string }{
		{"P1 T0 S1", "P0 T0 S0", "P1", "P2", "P0"},
		{"P14 T0 S1", "P3 T0 S1", "P14", "P15", "P3"},
		{"P15 T0 S1", "P0 T0 S1", "P1", "P2", "P0"},
		{"P15 T0 S1", "P7 T0 S1", "P2", "P3", "P1"},
		{"P15 T0 S1", "P15 T0 S1", "P1", "P2", "P1"},
	} {
		l := layout(512, attributes(tt.a), 0)
		l.Parts = append(l.Parts, gptimage.Partition{Label: "USR-C", Type: gptimage.TypeUSR, UUID: uuidC, Size: 8192, Attributes: attributes(tt.c)})
		f := newFresh(t)
		f.m = memory(t, l)
		f.d = open(f.m)
		f.run = running(t, f.d, "USR-A")
		target := f.begin(t)
		f.write(t, target)
		if err := f.d.Activate(f.run, f.verify(t, target), 2); err != nil {
			t.Fatal(err)
		}
		slots, err := f.d.Slots()
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range []string{tt.wantA, tt.wantB, tt.wantC} {
			if got := fmt.Sprintf("P%d", slots[i].Priority); got != want {
				t.Errorf("A %s, C %s: %s has %s, want %s", tt.a, tt.c, slots[i].Label, got, want)
			}
		}
		if next, ok := partition.Next(slots); !ok || next.Label != "USR-B" {
			t.Errorf("A %s, C %s: %s boots next", tt.a, tt.c, next.Label)
		}
	}
}

// TestFlushFails: after a flush that failed nothing is written or flushed any more, however often one asks.
func TestFlushFails(t *testing.T) {
	for at := range 8 {
		m := memory(t, layout(512, attributes("P1 T0 S1"), attributes("P2 T0 S1")))
		broken := errors.New("broken")
		faulty := &devicetest.Faulty{Device: m, At: at, Err: broken}
		d := open(faulty)
		run := running(t, d, "USR-A")
		_, err := d.Begin(run, "USR-B")
		if faulty.Count <= at {
			break
		}
		if !errors.Is(err, broken) {
			t.Fatalf("operation %d failed and Begin says %v", at, err)
		}
		if at%2 == 1 {
			continue // a write failed: trying again is right
		}
		count := faulty.Count
		for range 3 {
			if _, err := d.Begin(run, "USR-B"); !errors.Is(err, broken) {
				t.Errorf("after a failed flush: %v", err)
			}
		}
		if faulty.Count != count {
			t.Errorf("after a failed flush the disk was used %d times more", faulty.Count-count)
		}
	}
}

// FuzzTable reads and repairs a disk whose two headers and first entries are anything.
func FuzzTable(f *testing.F) {
	bases := map[bool][]byte{}
	for large, ss := range map[bool]int{false: 512, true: 4096} {
		b := memory(f, layout(ss, attributes("P1 T0 S1"), attributes("P2 T1 S0"))).Bytes()
		bases[large] = b
		primary, backup, entries := b[ss:ss+92], b[len(b)-ss:len(b)-ss+92], b[2*ss:2*ss+512]
		f.Add(primary, backup, entries, large)
		f.Add(backup, primary, entries, large)
		f.Add(primary, primary, entries[:128], large)
		f.Add([]byte("EFI PART"), backup, entries, large)
		f.Add(primary, []byte{}, entries, large)
	}
	f.Fuzz(func(t *testing.T, primary, backup, entries []byte, large bool) {
		ss := 512
		if large {
			ss = 4096
		}
		image := bytes.Clone(bases[large])
		copy(image[ss:ss+92], primary)
		copy(image[len(image)-ss:len(image)-ss+92], backup)
		copy(image[2*ss:2*ss+16384], entries)
		// With right checksums more of a header is looked at.
		for _, h := range []int{ss, len(image)/ss*ss - ss} {
			if h >= ss && h+92 <= len(image) {
				at := int64(binary.LittleEndian.Uint64(image[h+72:])) * int64(ss)
				n := int64(binary.LittleEndian.Uint32(image[h+80:])) * int64(binary.LittleEndian.Uint32(image[h+84:]))
				if at > 0 && n > 0 && at < int64(len(image)) && n <= int64(len(image))-at {
					reseal(image, h, int(at), int(n))
				}
			}
		}
		m := devicetest.NewStrict(image, ss)
		d := open(m)
		slots, err := d.Slots()
		if err != nil {
			if _, err := d.Repair(); err == nil || !bytes.Equal(m.Bytes(), image) {
				t.Fatalf("a table that cannot be read was repaired: %v", err)
			}
			return
		}
		for _, s := range slots {
			if s.Start < 2*int64(ss) || s.Size <= 0 || s.Start+s.Size > m.Size() {
				t.Fatalf("slot outside the disk: %+v", s)
			}
		}
		_, refused := d.Damage()
		_, err = d.Repair()
		if (refused == nil) != (err == nil) {
			t.Fatalf("Damage says of the repair: %v; the repair: %v", refused, err)
		}
		if err != nil {
			if !bytes.Equal(m.Bytes(), image) {
				t.Fatalf("a repair that was refused wrote: %v", err)
			}
			return
		}
		if !d.Table().Healthy {
			t.Fatal("the table is damaged after its repair")
		}
		after, err := d.Slots()
		if err != nil || len(after) != len(slots) {
			t.Fatalf("%d slots before the repair, %d after: %v", len(slots), len(after), err)
		}
		bootsim.Choose(m, partition.GRUB)
	})
}
