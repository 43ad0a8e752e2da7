package powercut

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/bootsim"
	"github.com/flipside-linux/flipside/partition/devicetest"
)

// mutant is a disk below which some flushes do not happen: those before which the pending writes are of one kind.
type mutant struct {
	*devicetest.Memory
	r       *rig
	without []string
	pending string
	dropped int
}

const (
	atStart = "nothing, at the start of a change"
	ofData  = "data"
)

func (m *mutant) kind(off int64) string {
	ss := int64(m.r.sector)
	parts := m.r.layout.Parts
	end := parts[len(parts)-1].Start + parts[len(parts)-1].Size
	switch {
	case off < 2*ss:
		return "the primary header"
	case off < parts[0].Start:
		return "the primary entries"
	case off < end:
		return ofData
	case off < m.Size()-ss:
		return "the backup entries"
	}
	return "the backup header"
}

func (m *mutant) WriteAt(p []byte, off int64) (int, error) {
	m.pending = m.kind(off)
	return m.Memory.WriteAt(p, off)
}

func (m *mutant) Flush() error {
	kind := m.pending
	m.pending = atStart
	if slices.Contains(m.without, kind) {
		m.dropped++
		return nil
	}
	return m.Memory.Flush()
}

// mutate runs the update, and it killed at every operation, on a disk that leaves flushes out, and returns the first thing that goes wrong.
func mutate(t *testing.T, sector int, strict, kills bool, without ...string) error {
	t.Helper()
	opt := Options{All: 5, Random: 10}
	build := func() (*rig, *mutant) {
		r, err := newRig(sector, Healthy)
		if err != nil {
			t.Fatal(err)
		}
		if strict {
			r.dev = devicetest.NewStrict(r.base, sector)
		}
		m := &mutant{Memory: r.dev, r: r, without: without, pending: atStart}
		r.front = m
		r.restart()
		return r, m
	}
	dropped := 0
	run := func(kill int) error {
		r, m := build()
		if kill >= 0 {
			r.front = &devicetest.Faulty{Device: m, At: kill, Err: errKilled, Dead: true}
			r.restart()
		}
		err := r.update(Good)
		if kill >= 0 && err == nil {
			return errDone
		}
		if kill < 0 && err != nil {
			return fmt.Errorf("the update does not go through: %w", err)
		}
		if kill >= 0 {
			m.pending = atStart // another process knows nothing of what is pending
			r.front = m
			r.restart()
			if err := r.recover(); err != nil {
				return fmt.Errorf("killed at operation %d: %w", kill, err)
			}
		}
		dropped += m.dropped
		var c Counts
		c.judge(opt, r, r.base, r.dev.Log, fmt.Sprintf("killed at operation %d", kill))
		if len(c.Violations) > 0 {
			return errors.New(c.Violations[0])
		}
		return nil
	}
	for kill := -1; ; kill++ {
		if err := run(kill); errors.Is(err, errDone) {
			break
		} else if err != nil {
			return err
		}
		if !kills {
			break
		}
	}
	if len(without) > 0 && dropped == 0 {
		t.Fatalf("no flush after %q ever happens: the mutation does nothing", without)
	}
	return nil
}

var errDone = errors.New("done")

// TestMutationFlushes: without any one of the flushes the enumeration sees a failure. So none is there for nothing, and the oracle has teeth.
func TestMutationFlushes(t *testing.T) {
	for _, sector := range sectorSizes() {
		for _, tt := range []struct {
			strict, kills bool
			without       []string
		}{
			{false, true, []string{atStart}},
			{false, false, []string{"the primary entries"}},
			{false, false, []string{"the primary header"}},
			{false, false, []string{"the backup entries"}},
			{false, false, []string{"the backup header"}},
			// Behind the flush of the data there are two more before the primary header makes the slot bootable: at the start of the activation, and after
			// the primary entries. No power cut sees it missing; reading back past the cache does.
			{true, false, []string{ofData}},
		} {
			err := mutate(t, sector, tt.strict, tt.kills, tt.without...)
			if err == nil {
				t.Errorf("sectors of %d: without the flush after %q nothing fails", sector, tt.without)
				continue
			}
			t.Logf("sectors of %d, without the flush after %q: %v", sector, tt.without, err)
		}
	}
}

// sectorSizes are those to try in the time there is.
func sectorSizes() []int {
	if long() {
		return []int{512, 4096}
	}
	return []int{512}
}

// TestMutationOrder: with any two neighbouring steps swapped the enumeration sees a failure.
func TestMutationOrder(t *testing.T) {
	for _, sector := range sectorSizes() {
		r, err := newRig(sector, Healthy)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.update(Good); err != nil {
			t.Fatal(err)
		}
		m := &mutant{Memory: r.dev, r: r}
		boots := bootOps(r.calls)
		type step struct {
			from, to int // operations, the flush included
			kind     string
		}
		var steps []step
		from := 0
		for i, op := range r.dev.Log {
			if op.Kind != devicetest.Flush {
				continue
			}
			if i > from && !boots(i) {
				steps = append(steps, step{from, i + 1, m.kind(r.dev.Log[from].Off)})
			}
			from = i + 1
		}
		swapped := 0
		for i := range len(steps) - 1 {
			a, b := steps[i], steps[i+1]
			if a.kind == ofData && b.kind == ofData {
				continue // data has no order
			}
			log := slices.Clone(r.dev.Log[:a.from])
			log = append(log, r.dev.Log[b.from:b.to]...)
			log = append(log, r.dev.Log[a.to:b.from]...)
			log = append(log, r.dev.Log[a.from:a.to]...)
			log = append(log, r.dev.Log[b.to:]...)
			swapped++
			o := newOracle(r, r.base)
			var seen error
			crashes(r.base, sector, log, boots, limits{6, 20}, 1, func(s state) {
				if seen == nil {
					seen = o.check(s)
				}
			})
			if seen == nil {
				t.Errorf("sectors of %d: %s (operation %d) after %s (operation %d) and nothing fails", sector, a.kind, a.from, b.kind, b.from)
				continue
			}
			t.Logf("sectors of %d: %s before %s: %v", sector, b.kind, a.kind, seen)
		}
		if swapped < 10 {
			t.Errorf("only %d steps were swapped", swapped)
		}
	}
}

// TestFaults: every operation fails once, in every way. The update says so, and what is left is as after a power cut there.
func TestFaults(t *testing.T) {
	for _, sector := range sectorSizes() {
		for _, fault := range []struct {
			name  string
			err   error
			short bool
		}{{"EIO", errIO, false}, {"ENOSPC", errSpace, false}, {"a short write", errIO, true}} {
			count := 0
			for at := 0; ; at++ {
				r, err := newRig(sector, Healthy)
				if err != nil {
					t.Fatal(err)
				}
				f := &devicetest.Faulty{Device: r.dev, At: at, Err: fault.err, Short: fault.short}
				r.front = f
				r.restart()
				err = r.update(Good)
				if f.Count <= at {
					break
				}
				count++
				if err == nil {
					t.Errorf("sectors of %d: %s at operation %d and the update went through", sector, fault.name, at)
					continue
				}
				r.front = r.dev
				o := newOracle(r, r.base)
				image := r.dev.Bytes()
				if err := errors.Join(o.boots(image), o.armed(image)); err != nil {
					t.Errorf("sectors of %d: %s at operation %d: %v", sector, fault.name, at, err)
				}
				if _, err := o.recovers(state{at, image}); err != nil {
					t.Errorf("sectors of %d: %s at operation %d: %v", sector, fault.name, at, err)
				}
				// The data may be written and the flush may have failed: what comes after must not build upon it.
				var c Counts
				c.judgeFault(r)
				for _, v := range c.Violations {
					t.Errorf("sectors of %d: %s at operation %d: %s", sector, fault.name, at, v)
				}
			}
			t.Logf("sectors of %d: %s at each of %d operations", sector, fault.name, count)
		}
	}
}

var (
	errIO    = errors.New("input/output error")
	errSpace = errors.New("no space left on device")
)

// judgeFault enumerates a power cut after a fault. Where in a change it came is not looked at.
func (c *Counts) judgeFault(r *rig) {
	o := newOracle(r, r.base)
	crashes(r.base, r.sector, r.dev.Log, bootOps(r.calls), limits{4, 5}, 1, func(s state) {
		c.States++
		if err := errors.Join(o.boots(s.image), o.armed(s.image)); err != nil && len(c.Violations) < maxViolations {
			c.Violations = append(c.Violations, fmt.Sprintf("power cut at operation %d: %v", s.cut, err))
		}
	})
}

// TestLyingDisk: a disk that says that data is on the medium when it is not, and then loses it, gets a weaker promise: the trial boot
// fails, and the boot after it is of the old release.
func TestLyingDisk(t *testing.T) {
	r, err := newRig(512, Healthy)
	if err != nil {
		t.Fatal(err)
	}
	run, err := r.disk.RunningFromLabel(slotA)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.install(run); err != nil {
		t.Fatal(err)
	}
	copy(r.slot(r.dev.Bytes(), slotB), r.slot(r.base, slotB)[:1024])
	for i, want := range []string{slotB, slotA, slotA} {
		got, _, err := bootsim.Choose(r.dev, partition.GRUB)
		if err != nil || got.Label != want {
			t.Errorf("boot %d: %q, %v, want %s", i+1, got.Label, err, want)
		}
	}
}
