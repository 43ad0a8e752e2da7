package partition_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/devicetest"
	"github.com/flipside-linux/flipside/partition/gptimage"
)

// TestGoBack: a slot that was good before boots next, on trial, and the running slot stays what it falls back to.
func TestGoBack(t *testing.T) {
	for _, tt := range []struct {
		name         string
		a, b         string // A runs
		label        string
		tries        int
		want         error
		wantA, wantB string
	}{
		{name: "good before", a: "P2 T0 S1", b: "P1 T0 S1", label: "USR-B", tries: 1, wantA: "P2 T0 S1", wantB: "P3 T1 S0"},
		{name: "good before, and first already", a: "P1 T0 S1", b: "P2 T0 S1", label: "USR-B", tries: 2, wantA: "P1 T0 S1", wantB: "P2 T2 S0"},
		{name: "no priority above", a: "P15 T0 S1", b: "P7 T0 S1", label: "USR-B", tries: 3, wantA: "P1 T0 S1", wantB: "P2 T3 S0"},
		{name: "on its way already", a: "P1 T0 S1", b: "P2 T1 S0", label: "USR-B", tries: 3, wantA: "P1 T0 S1", wantB: "P2 T1 S0"},
		{name: "never good, and not next", a: "P2 T0 S1", b: "P1 T1 S0", label: "USR-B", tries: 1, want: partition.ErrNotProven},
		{name: "its trial failed", a: "P1 T0 S1", b: "P2 T0 S0", label: "USR-B", tries: 1, want: partition.ErrNotProven},
		{name: "unbootable", a: "P1 T0 S1", b: "P0 T0 S0", label: "USR-B", tries: 1, want: partition.ErrNotProven},
		{name: "good and without priority", a: "P1 T0 S1", b: "P0 T0 S1", label: "USR-B", tries: 1, want: partition.ErrNotProven},
		{name: "the running slot is on trial", a: "P2 T0 S0", b: "P1 T0 S1", label: "USR-B", tries: 1, want: partition.ErrNotProven},
		{name: "the running slot", a: "P2 T0 S1", b: "P1 T0 S1", label: "USR-A", tries: 1, want: partition.ErrRunning},
		{name: "not a slot", a: "P2 T0 S1", b: "P1 T0 S1", label: "ROOT", tries: 1, want: partition.ErrNoSlot},
		{name: "no tries", a: "P2 T0 S1", b: "P1 T0 S1", label: "USR-B", tries: 0, want: errAny},
		{name: "too many tries", a: "P2 T0 S1", b: "P1 T0 S1", label: "USR-B", tries: 4, want: errAny},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := memory(t, layout(512, attributes(tt.a), attributes(tt.b)))
			d := open(m)
			before := bytes.Clone(m.Bytes())
			err := d.GoBack(running(t, d, "USR-A"), tt.label, tt.tries)
			if tt.want != nil {
				if err == nil || tt.want != errAny && !errors.Is(err, tt.want) {
					t.Errorf("got %v, want %v", err, tt.want)
				}
				if !bytes.Equal(before, m.Bytes()) {
					t.Error("it was refused, and the disk was written")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, backup := range []bool{false, true} {
				a, b := words(m, backup)
				if a != attributes(tt.wantA) || b != attributes(tt.wantB) {
					t.Errorf("backup %v: A %#x, B %#x, want %s and %s", backup, a, b, tt.wantA, tt.wantB)
				}
			}
			slots, err := d.Slots()
			if err != nil {
				t.Fatal(err)
			}
			if next, ok := partition.Next(slots); !ok || next.Label != "USR-B" {
				t.Errorf("%s boots next", next.Label)
			}
		})
	}
}

// TestStay: a rollback that is given up leaves the disk as good as it was: the running slot boots next, the other is what it falls back to.
func TestStay(t *testing.T) {
	for _, tt := range []struct {
		name         string
		a, b         string // A runs
		tries        int
		want         error
		wantA, wantB string
	}{
		{name: "put back", a: "P2 T0 S1", b: "P3 T1 S0", tries: 1, wantA: "P4 T0 S1", wantB: "P3 T0 S1"},
		{name: "no priority above", a: "P14 T0 S1", b: "P15 T3 S0", tries: 3, wantA: "P2 T0 S1", wantB: "P1 T0 S1"},
		{name: "put back already", a: "P4 T0 S1", b: "P3 T0 S1", tries: 1, wantA: "P4 T0 S1", wantB: "P3 T0 S1"},
		{name: "never begun, and first", a: "P2 T0 S1", b: "P3 T0 S1", tries: 1, wantA: "P4 T0 S1", wantB: "P3 T0 S1"},
		{name: "not started since, whatever the tries", a: "P2 T0 S1", b: "P3 T2 S0", tries: 0, wantA: "P4 T0 S1", wantB: "P3 T0 S1"},
		{name: "a try is spent", a: "P2 T0 S1", b: "P3 T1 S0", tries: 2, want: partition.ErrTried},
		{name: "its tries are spent", a: "P2 T0 S1", b: "P3 T0 S0", tries: 1, want: partition.ErrTried},
		{name: "unbootable", a: "P2 T0 S1", b: "P0 T0 S0", tries: 0, want: partition.ErrTried},
		{name: "the running slot is on trial", a: "P2 T0 S0", b: "P3 T1 S0", tries: 1, want: partition.ErrNotProven},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := memory(t, layout(512, attributes(tt.a), attributes(tt.b)))
			d := open(m)
			before := bytes.Clone(m.Bytes())
			err := d.Stay(running(t, d, "USR-A"), "USR-B", tt.tries)
			if tt.want != nil {
				if !errors.Is(err, tt.want) {
					t.Errorf("got %v, want %v", err, tt.want)
				}
				if !bytes.Equal(before, m.Bytes()) {
					t.Error("it was refused, and the disk was written")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, backup := range []bool{false, true} {
				a, b := words(m, backup)
				if a != attributes(tt.wantA) || b != attributes(tt.wantB) {
					t.Errorf("backup %v: A %#x, B %#x, want %s and %s", backup, a, b, tt.wantA, tt.wantB)
				}
			}
		})
	}
}

var errAny = errors.New("any error")

// TestGoBackWrites: going back is written as every other change is: entries before the header that vouches for them, primary before backup,
// and a flush after each; nothing but the table is touched. Cut anywhere, the disk boots one of the two.
func TestGoBackWrites(t *testing.T) {
	m := memory(t, layout(512, gptimage.Attributes(2, 0, true), gptimage.Attributes(1, 0, true)))
	d := open(m)
	run := running(t, d, "USR-A")
	start := bytes.Clone(m.Bytes())
	m.Log = nil
	if err := d.GoBack(run, "USR-B", 1); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, op := range m.Log {
		switch op.Kind {
		case devicetest.Write:
			got = append(got, fmt.Sprintf("write %d at %d", len(op.Data), op.Off))
		case devicetest.Flush:
			got = append(got, "flush")
		default:
			got = append(got, "discard")
		}
	}
	end := len(start)
	want := []string{
		"flush",
		"write 512 at 1024", "flush", "write 512 at 512", "flush",
		fmt.Sprintf("write 512 at %d", end-33*512), "flush", fmt.Sprintf("write 512 at %d", end-512), "flush",
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	disk := start
	for i := 0; ; i++ {
		slots, err := open(devicetest.NewMemory(disk, 512)).Slots()
		if err != nil {
			t.Fatalf("cut before operation %d: %v", i, err)
		}
		if next, ok := partition.Next(slots); !ok {
			t.Errorf("cut before operation %d: nothing boots", i)
		} else if a := slots[0]; !a.Successful || a.Priority == 0 {
			t.Errorf("cut before operation %d: %s boots next and nothing is left to fall back to", i, next.Label)
		}
		if i == len(m.Log) {
			break
		}
		copy(disk[m.Log[i].Off:], m.Log[i].Data)
	}
}

// slowMedium is a device whose medium is read only when it is let.
type slowMedium struct {
	*devicetest.Memory
	from         int64 // reads before this are not held
	reading, let chan struct{}
}

func (s *slowMedium) ReadMedium(p []byte, off int64) (int, error) {
	if s.reading != nil && off >= s.from {
		s.reading <- struct{}{}
		<-s.let
	}
	return s.Memory.ReadMedium(p, off)
}

// TestSettleHoldsNobodyUp: while what is final is read back, what lies behind it is written, and what is being read is not.
func TestSettleHoldsNobodyUp(t *testing.T) {
	f := newFresh(t)
	slow := &slowMedium{Memory: f.m}
	f.d = open(slow)
	f.run = running(t, f.d, "USR-A")
	target := f.begin(t)
	if _, err := target.WriteAt(f.data[:4096], 0); err != nil {
		t.Fatal(err)
	}
	slow.from, slow.reading, slow.let = target.Slot().Start, make(chan struct{}), make(chan struct{})
	done := make(chan error, 1)
	go func() { done <- target.Settle(4096) }()
	<-slow.reading
	if _, err := target.WriteAt([]byte{1}, 4095); !errors.Is(err, partition.ErrSettled) {
		t.Errorf("a write to what is being read back: %v", err)
	}
	if _, err := target.WriteAt(f.data[4096:], 4096); err != nil { // would never return if it waited
		t.Error(err)
	}
	close(slow.let)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	slow.reading = nil
	if err := f.d.Activate(f.run, f.verify(t, target), 3); err != nil {
		t.Fatal(err)
	}
}

// TestSettleTwiceAtATime: while one call reads back, another one flushes, and what both speak of is not written until both have ended.
func TestSettleTwiceAtATime(t *testing.T) {
	f := newFresh(t)
	slow := &slowMedium{Memory: f.m}
	f.d = open(slow)
	f.run = running(t, f.d, "USR-A")
	target := f.begin(t)
	f.write(t, target)
	reading, let := make(chan struct{}), make(chan struct{})
	slow.from, slow.reading, slow.let = target.Slot().Start, reading, let
	done := make(chan error, 2)
	go func() { done <- target.Settle(4096) }()
	<-reading
	go func() { done <- target.Settle(8192) }()
	for { // until the second call has taken hold
		_, err := target.WriteAt(f.data[8191:8192], 8191)
		if errors.Is(err, partition.ErrSettled) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	let <- struct{}{}
	<-reading // the second one reads, so the first has ended
	if _, err := target.WriteAt([]byte{1}, 8191); !errors.Is(err, partition.ErrSettled) {
		t.Errorf("a write to what the second call reads back: %v", err)
	}
	let <- struct{}{}
	for range 2 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	slow.reading = nil
	if _, err := target.WriteAt(f.data[8192:], 8192); err != nil {
		t.Error(err)
	}
	if err := f.d.Activate(f.run, f.verify(t, target), 3); err != nil {
		t.Fatal(err)
	}
}
