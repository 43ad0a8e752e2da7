package history

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var at = time.Date(2026, 11, 23, 4, 0, 0, 0, time.UTC)

func write(t *testing.T, dir string, max int64, from, to int) {
	t.Helper()
	l, err := open(&Log{dir: dir, max: max, unsafe: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for i := from; i <= to; i++ {
		if err := l.Append(Record{Time: at.Add(time.Duration(i) * time.Second), Boot: "b1", Kind: "note", Text: fmt.Sprintf("number %d", i)}); err != nil {
			t.Fatal(err)
		}
	}
}

func read(t *testing.T, dir string) (records []Record, damage []*Damage) {
	t.Helper()
	for r, err := range Read(dir) {
		var d *Damage
		switch {
		case errors.As(err, &d):
			damage = append(damage, d)
		case err != nil:
			t.Fatal(err)
		default:
			records = append(records, r)
		}
	}
	return records, damage
}

func TestRecordsComeBackInOrder(t *testing.T) {
	dir := t.TempDir()
	if r, d := read(t, dir); len(r) != 0 || len(d) != 0 {
		t.Fatalf("an empty directory has %v, %v", r, d)
	}
	write(t, dir, 0, 1, 3)
	write(t, dir, 0, 4, 5) // after a restart the numbers go on
	records, damage := read(t, dir)
	if len(records) != 5 || len(damage) != 0 {
		t.Fatalf("%d records, damage %v", len(records), damage)
	}
	for i, r := range records {
		if r.Seq != uint64(i+1) || r.Text != fmt.Sprintf("number %d", i+1) || !r.Time.Equal(at.Add(time.Duration(i+1)*time.Second)) {
			t.Errorf("record %d: %+v", i, r)
		}
	}
	last, _, err := Last(dir, 2)
	if err != nil || len(last) != 2 || last[0].Seq != 4 {
		t.Errorf("Last(2) = %+v, %v", last, err)
	}
	if last, _, _ := Last(dir, 0); len(last) != 0 {
		t.Errorf("Last(0) = %+v", last)
	}
}

func TestItStaysWithinItsBound(t *testing.T) {
	dir := t.TempDir()
	const max = 4096
	for i := 0; i < 20; i++ {
		write(t, dir, max, 20*i+1, 20*i+20)
		var size int64
		for _, name := range []string{current, previous} {
			if info, err := os.Stat(filepath.Join(dir, name)); err == nil {
				size += info.Size()
			}
		}
		if size > max {
			t.Fatalf("after %d records the history has %d bytes", 20*i+20, size)
		}
	}
	records, damage := read(t, dir)
	if len(damage) != 0 || len(records) < 15 || records[len(records)-1].Seq != 400 {
		t.Errorf("%d records to %d, damage %v", len(records), records[len(records)-1].Seq, damage)
	}
}

// A power cut may leave any prefix of the last line. What was there before stays readable, and so does what comes after.
func TestTornAtEveryByte(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, 0, 1, 2)
	path := filepath.Join(dir, current)
	two, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir, 0, 3, 3)
	three, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for cut := len(two); cut < len(three); cut++ {
		if err := os.WriteFile(path, three[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		write(t, dir, 0, 4, 4)
		records, damage := read(t, dir)
		// Whole but for its newline, it counts.
		want, wantDamage := 3, 1
		if cut == len(two) {
			wantDamage = 0
		}
		if cut == len(three)-1 {
			want, wantDamage = 4, 0
		}
		if len(records) != want || len(damage) != wantDamage || records[len(records)-1].Text != "number 4" {
			t.Fatalf("cut at %d: %d records, damage %v", cut-len(two), len(records), damage)
		}
	}
}

// Every flipped bit is found, and costs no more than the line that it is in.
func TestFlippedBits(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, 0, 1, 3)
	path := filepath.Join(dir, current)
	sound, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range sound {
		for _, bit := range []int{i % 8, 5} {
			bad := bytes.Clone(sound)
			bad[i] ^= 1 << bit
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			records, damage := read(t, dir)
			same := 0
			for _, r := range records {
				if r.Text == fmt.Sprintf("number %d", r.Seq) {
					same++
				}
			}
			// The case of a hex digit carries nothing.
			if same == 3 && len(damage) == 0 && bit == 5 && bytes.EqualFold(sound[i:i+1], bad[i:i+1]) {
				continue
			}
			if len(records) != same {
				t.Fatalf("bit %d of byte %d: a record came back changed: %+v", bit, i, records)
			}
			if len(records) < 1 || len(damage) == 0 && len(records) != 2 {
				t.Fatalf("bit %d of byte %d: %d records, damage %v", bit, i, len(records), damage)
			}
		}
	}
}

func TestMissingRecordsAreSeen(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, 0, 1, 4)
	path := filepath.Join(dir, current)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(data), "\n")
	if err := os.WriteFile(path, []byte(lines[0]+lines[3]), 0o600); err != nil {
		t.Fatal(err)
	}
	records, damage := read(t, dir)
	if len(records) != 2 || len(damage) != 1 || !errors.Is(damage[0], ErrMissing) || damage[0].Line != 2 || !strings.Contains(damage[0].Error(), "2 records") {
		t.Errorf("%+v, %v", records, damage)
	}
}

func TestTextIsMadeSafe(t *testing.T) {
	dir := t.TempDir()
	l, err := Open(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.Append(Record{Time: at, Kind: "note", Text: "a\x1b[31m\nb\u009b\u202e\u2028\xff" + strings.Repeat("x", 1<<20)}); err != nil {
		t.Fatal(err)
	}
	records, damage := read(t, dir)
	if len(damage) != 0 || len(records) != 1 || !strings.HasPrefix(records[0].Text, "a[31m bxx") || len(records[0].Text) > maxText+4 {
		t.Errorf("%d records, damage %v", len(records), damage)
	}
}

// A reader sees every record once while the writer turns to new files.
func TestReadWhileWriting(t *testing.T) {
	dir := t.TempDir()
	l, err := open(&Log{dir: dir, max: 8192, unsafe: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		for i := range 300 {
			if err := l.Append(Record{Time: at, Kind: "note", Text: fmt.Sprint(i)}); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for {
		var last uint64
		for r, err := range Read(dir) {
			if err != nil && !strings.Contains(err.Error(), "history.log") {
				t.Fatal(err)
			}
			if err == nil && r.Seq <= last {
				t.Fatalf("record %d after %d", r.Seq, last)
			}
			last = max(last, r.Seq)
		}
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			return
		default:
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte("00000000 {}\n"))
	f.Add([]byte("9c1f02ab {\"seq\":1}\nxx\n"))
	f.Add(bytes.Repeat([]byte("a"), 3*maxLine))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, current), data, 0o600); err != nil {
			t.Fatal(err)
		}
		var last uint64
		for r, err := range Read(dir) {
			if err == nil && r.Seq <= last {
				t.Fatalf("record %d after %d", r.Seq, last)
			}
			last = r.Seq
		}
		l, err := open(&Log{dir: dir, unsafe: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Append(Record{Time: at, Kind: "note", Text: "after"}); err != nil {
			t.Fatal(err)
		}
		l.Close()
		if got, _, err := Last(dir, 1); err != nil || len(got) != 1 || got[0].Text != "after" {
			t.Fatalf("%+v, %v", got, err)
		}
	})
}

// full is a file on a disk that has room for a few bytes more, and again for all after one record did not fit; it cannot be shortened.
type full struct {
	output
	room int
}

func (f *full) Write(data []byte) (int, error) {
	n, err := f.output.Write(data[:min(len(data), f.room)])
	if f.room -= n; err == nil && n < len(data) {
		f.room, err = 1<<20, unix.ENOSPC
	}
	return n, err
}

func (f *full) Truncate(int64) error { return unix.EIO }

// A record that was written in part and cannot be taken back costs no other.
func TestTornAndNotTakenBack(t *testing.T) {
	dir := t.TempDir()
	l, err := open(&Log{dir: dir, unsafe: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	add := func(i int) error { return l.Append(Record{Time: at, Kind: "note", Text: fmt.Sprintf("number %d", i)}) }
	if err := add(1); err != nil {
		t.Fatal(err)
	}
	l.f = &full{output: l.f, room: 40}
	if err := add(2); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("on a full disk: %v", err)
	}
	for i := 3; i <= 4; i++ {
		if err := add(i); err != nil {
			t.Error(err)
		}
	}
	if records, damage := read(t, dir); len(records) != 3 || len(damage) != 1 || records[1].Text != "number 3" || records[2].Text != "number 4" {
		t.Errorf("%+v, damage %v", records, damage)
	}
}

// A history that could not begin a new file, as on a full disk, goes on when there is room again.
func TestGoesOnAfterAFullDisk(t *testing.T) {
	dir := t.TempDir()
	l, err := open(&Log{dir: dir, max: 2000, unsafe: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	add := func(i int) error {
		return l.Append(Record{Time: at.Add(time.Duration(i) * time.Second), Boot: "b1", Kind: "note", Text: fmt.Sprintf("number %d", i)})
	}
	if err := add(1); err != nil {
		t.Fatal(err)
	}
	// No file can be made: the one that is written is moved away already, and in its place is what cannot be opened.
	if err := os.Rename(filepath.Join(dir, current), filepath.Join(dir, previous)); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, current), 0o755); err != nil {
		t.Fatal(err)
	}
	l.f.Close()
	l.f = nil
	if err := add(2); err == nil {
		t.Fatal("a record was added to no file")
	}
	if err := os.Remove(filepath.Join(dir, current)); err != nil {
		t.Fatal(err)
	}
	if err := add(3); err != nil {
		t.Error(err)
	}
	if records, damage := read(t, dir); len(records) != 2 || len(damage) != 0 || records[1].Text != "number 3" {
		t.Errorf("%+v, damage %v", records, damage)
	}
	l.Close()
	if err := add(4); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}
