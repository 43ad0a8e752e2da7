package main

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// writeLog makes a record as QEMU does: sector, flags and data of each entry.
func writeLog(t *testing.T, path string, entries ...[3]any) {
	t.Helper()
	le := binary.LittleEndian
	b := make([]byte, 512)
	le.PutUint64(b, logMagic)
	le.PutUint64(b[8:], 1)
	le.PutUint64(b[16:], uint64(len(entries)))
	le.PutUint32(b[24:], 512)
	for _, e := range entries {
		sector, flags, data := e[0].(int), e[1].(int), e[2].([]byte)
		h := make([]byte, 512)
		le.PutUint64(h, uint64(sector))
		le.PutUint64(h[8:], uint64(len(data)/512))
		le.PutUint64(h[16:], uint64(flags))
		b = append(append(b, h...), data...)
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// What a flush covered is always there; what came later is there, or not, or in part, and all of that does happen.
func TestReplay(t *testing.T) {
	dir := t.TempDir()
	disk, log := filepath.Join(dir, "disk"), filepath.Join(dir, "log")
	fill := func(c byte, sectors int) []byte { return bytes.Repeat([]byte{c}, 512*sectors) }
	writeLog(t, log,
		[3]any{0, 0, fill('a', 2)}, [3]any{4, 0, fill('b', 1)}, [3]any{0, flagFlush, []byte(nil)},
		[3]any{0, 0, fill('c', 1)}, [3]any{6, flagFUA, fill('d', 1)}, [3]any{8, 0, fill('e', 4)})
	seen := map[string]bool{}
	for seed := range uint64(200) {
		if err := os.WriteFile(disk, fill('.', 16), 0o644); err != nil {
			t.Fatal(err)
		}
		lost, err := replay(disk, log, -1, rand.New(rand.NewPCG(seed, 0)))
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(disk)
		if err != nil {
			t.Fatal(err)
		}
		line := ""
		for i := range 16 {
			line += string(got[i*512])
		}
		seen[line] = true
		if line[1] != 'a' || line[4] != 'b' || line[6] != 'd' || (line[0] != 'a' && line[0] != 'c') || lost.pending != 3 {
			t.Fatalf("seed %d: %s, %v", seed, line, lost)
		}
	}
	for _, want := range []string{"aa..b.d.........", "ca..b.d.eeee....", "aa..b.d.eeee....", "ca..b.d.........", "ca..b.d.ee......"} {
		if !seen[want] {
			t.Errorf("never seen: %s", want)
		}
	}
	if err := os.WriteFile(disk, fill('.', 16), 0o644); err != nil {
		t.Fatal(err)
	}
	if lost, err := replay(disk, log, -1, nil); err != nil || lost.dropped+lost.torn > 0 {
		t.Errorf("without a power cut: %v, %v", lost, err)
	}
}

// A record whose writer was killed ends where its last whole entry ends; one that is none is refused.
func TestReadLogCut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	writeLog(t, path, [3]any{0, 0, make([]byte, 1024)}, [3]any{2, 0, make([]byte, 1024)})
	for size, want := range map[int64]int{512 + 2*1536: 2, 512 + 2*1536 - 1: 1, 512 + 1536 + 100: 1, 600: 0} {
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		entries, _, err := readLog(f)
		f.Close()
		if err != nil || len(entries) != want {
			t.Errorf("%d bytes: %d entries, %v, want %d", size, len(entries), err, want)
		}
		writeLog(t, path, [3]any{0, 0, make([]byte, 1024)}, [3]any{2, 0, make([]byte, 1024)})
	}
	if err := os.WriteFile(path, make([]byte, 4096), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, _, err := readLog(f); err == nil {
		t.Error("an empty file is taken for a record of writes")
	}
}

func TestCopySparse(t *testing.T) {
	dir := t.TempDir()
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	data := make([]byte, 8<<20)
	copy(data[1<<20:], "in the middle")
	copy(data[len(data)-4:], "last")
	f, err := os.Create(from)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte("in the middle"), 1<<20)
	f.WriteAt([]byte("last"), int64(len(data)-4))
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := copySparse(to, from); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the copy differs (%v)", err)
	}
}
