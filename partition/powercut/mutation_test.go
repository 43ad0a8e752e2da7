package powercut

import (
	"bytes"
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

	kernelContents = "the kernel's contents"
	kernelPlace    = "the kernel, in its place"
	kernelName     = "the kernel's name"
	stateContents  = "the state's contents"
	stateName      = "the state's name"
	other          = "something else"
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
	case off < m.r.size-ss:
		return "the backup entries"
	case off < m.r.size:
		return "the backup header"
	}
	return m.fileKind(off)
}

// fileKind says what a flush in one of the file systems is of.
func (m *mutant) fileKind(off int64) string {
	kernels, state := m.r.kernelsOf(m.Memory), m.r.stateOf(m.Memory)
	pending := func(f *files, name string) bool {
		r, err := f.record("." + name + ".new")
		return err == nil && r.used
	}
	if off >= state.off {
		switch {
		case off < state.place(0):
			return stateName
		case pending(state, stateFile):
			return stateContents
		}
		return other // with a journal nothing depends on it
	}
	switch record, _, _ := kernels.recordOff(kernelB); {
	case kernels.kind == FAT && off == record:
		return kernelPlace
	case off < kernels.place(0):
		return kernelName
	case pending(kernels, kernelB):
		return kernelContents
	}
	return kernelPlace
}

func (m *mutant) WriteAt(p []byte, off int64) (int, error) {
	if off < m.r.size {
		m.pending = m.kind(off)
	}
	return m.Memory.WriteAt(p, off)
}

func (m *mutant) FlushRange(off, n int64) error {
	kind := m.pending
	if off < m.r.size {
		m.pending = atStart
	} else {
		kind = m.fileKind(off)
	}
	if slices.Contains(m.without, kind) {
		m.dropped++
		return nil
	}
	return m.Memory.FlushRange(off, n)
}

// mutate runs the update, and it killed at every operation, on a disk that leaves flushes out, and returns the first thing that goes wrong.
func mutate(t *testing.T, sector int, boot FileSystem, strict, kills bool, without ...string) error {
	t.Helper()
	opt := Options{All: 5, Random: 10}
	build := func() (*rig, *mutant) {
		r, err := newRig(sector, Healthy, boot, InTable, nil)
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
			boot          FileSystem
			strict, kills bool
			without       []string
		}{
			{Journal, false, true, []string{atStart}},
			{Journal, false, false, []string{"the primary entries"}},
			{Journal, false, false, []string{"the primary header"}},
			{Journal, false, false, []string{"the backup entries"}},
			{Journal, false, false, []string{"the backup header"}},
			// Behind the flush of the data there are two more before the primary header makes the slot bootable: at the start of the activation, and after
			// the primary entries. No power cut sees it missing; reading back past the cache does.
			{Journal, true, false, []string{ofData}},
			// With the kernel's contents it is the same: the file is flushed again in its place.
			{Journal, true, false, []string{kernelContents}},
			{Journal, false, false, []string{kernelContents, kernelPlace}},
			{Journal, false, false, []string{kernelName}},
			{FAT, true, false, []string{kernelContents}},
			{FAT, false, false, []string{kernelPlace}},
			{Journal, false, false, []string{stateContents}},
			{Journal, false, false, []string{stateName}},
		} {
			err := mutate(t, sector, tt.boot, tt.strict, tt.kills, tt.without...)
			if err == nil {
				t.Errorf("sectors of %d, kernels on %s: without the flush after %q nothing fails", sector, tt.boot, tt.without)
				continue
			}
			t.Logf("sectors of %d, kernels on %s, without the flush after %q: %v", sector, tt.boot, tt.without, err)
		}
	}
}

// TestMutationNothing: the same run with every flush in its place sees nothing.
func TestMutationNothing(t *testing.T) {
	for _, boot := range []FileSystem{Journal, FAT} {
		for _, strict := range []bool{false, true} {
			if err := mutate(t, 512, boot, strict, false); err != nil {
				t.Errorf("kernels on %s: %v", boot, err)
			}
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

// TestMutationOrder: with any two neighbouring steps on the disk swapped the enumeration sees a failure.
func TestMutationOrder(t *testing.T) {
	for _, sector := range sectorSizes() {
		r, err := newRig(sector, Healthy, Journal, InTable, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.update(Good); err != nil {
			t.Fatal(err)
		}
		m := &mutant{Memory: r.dev, r: r}
		firmware := bootOps(r.calls)
		boots := func(i int) bool { return i < len(r.dev.Log) && firmware(i) }
		type step struct {
			from, to int // operations, the flush included
			kind     string
		}
		var steps []step
		from := 0
		for i, op := range r.dev.Log {
			if op.Off >= r.size { // of a file system
				from = i + 1
			}
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
					seen = errors.Join(o.boots(s.image), o.armed(s.image), o.order(s))
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

// TestMutationBlocks: the slot's data and its kernel are written between the two changes of its boot bits. Moved before the first or behind the second,
// the enumeration sees a failure.
func TestMutationBlocks(t *testing.T) {
	for _, boot := range []FileSystem{Journal, FAT} {
		r, err := newRig(512, Healthy, boot, InTable, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.update(Good); err != nil {
			t.Fatal(err)
		}
		var begin, activate call
		for _, c := range r.calls {
			switch c.name {
			case "begin":
				begin = c
			case "activate":
				activate = c
			}
		}
		kernels := r.kernelsOf(r.dev)
		for name, member := range map[string]func(off int64) bool{
			"the slot's data": func(off int64) bool { s := r.layout.Parts[2]; return off >= s.Start && off < s.Start+s.Size },
			"the kernel":      func(off int64) bool { return off >= kernels.off && off < kernels.off+kernels.size() },
		} {
			var block, before, rest []devicetest.Op
			for i, op := range r.dev.Log[:activate.to] {
				switch {
				case op.Off >= r.size && !member(op.Off): // the state has tests of its own
				case member(op.Off):
					block = append(block, op)
				case i < begin.from:
					before = append(before, op)
				default:
					rest = append(rest, op)
				}
			}
			block = append(block, devicetest.Op{Kind: devicetest.Flush})
			for where, log := range map[string][]devicetest.Op{
				"before the slot is unbootable": slices.Concat(before, block, rest),
				"behind its activation":         slices.Concat(before, rest, block),
			} {
				o := newOracle(r, r.base)
				var seen error
				crashes(r.base, 512, log, func(int) bool { return false }, limits{6, 20}, 1, func(s state) {
					if seen == nil {
						seen = errors.Join(o.boots(s.image), o.armed(s.image))
					}
				})
				if seen == nil {
					t.Errorf("kernels on %s: %s %s, and nothing fails", boot, name, where)
					continue
				}
				t.Logf("kernels on %s, %s %s: %v", boot, name, where, seen)
			}
		}
	}
}

// TestFaults: every operation fails once, in every way. The update says so, and what is left is as after a power cut there.
func TestFaults(t *testing.T) {
	for _, sector := range sectorSizes() {
		for _, boot := range []FileSystem{Journal, FAT} {
			for _, fault := range []struct {
				name  string
				err   error
				short bool
			}{{"EIO", errIO, false}, {"ENOSPC", errSpace, false}, {"a short write", errIO, true}} {
				count, stride := 0, 1
				if !long() && (boot != FAT || fault.err != errIO) {
					stride = 7
				}
				if testing.Short() {
					stride = 23
				}
				for at := 0; ; at += stride {
					r, err := newRig(sector, Healthy, boot, InTable, nil)
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
					where := fmt.Sprintf("sectors of %d, kernels on %s: %s at operation %d", sector, boot, fault.name, at)
					if err == nil {
						t.Errorf("%s and the update went through", where)
						continue
					}
					r.front = r.dev
					o := newOracle(r, r.base)
					image := r.dev.Bytes()
					if err := errors.Join(o.boots(image), o.armed(image), o.state(state{1 << 29, image})); err != nil {
						t.Errorf("%s: %v", where, err)
					}
					if _, err := o.recovers(state{at, image}); err != nil {
						t.Errorf("%s: %v", where, err)
					}
					// The data may be written and the flush may have failed: what comes after must not build upon it.
					var c Counts
					c.judgeFault(r, at)
					for _, v := range c.Violations {
						t.Errorf("%s: %s", where, v)
					}
				}
				t.Logf("sectors of %d, kernels on %s: %s at each of %d operations", sector, boot, fault.name, count)
			}
		}
	}
}

var (
	errIO    = errors.New("input/output error")
	errSpace = errors.New("no space left on device")
)

// judgeFault enumerates a power cut after a fault at an operation. Where in a change it came is not looked at.
func (c *Counts) judgeFault(r *rig, at int) {
	o := newOracle(r, r.base)
	crashes(r.base, r.sector, r.dev.Log, bootOps(r.calls), limits{4, 5}, 1, func(s state) {
		if s.cut < at {
			return // as in an update that goes well
		}
		c.States++
		if err := errors.Join(o.boots(s.image), o.armed(s.image), o.state(s)); err != nil && len(c.Violations) < maxViolations {
			c.Violations = append(c.Violations, fmt.Sprintf("power cut at operation %d: %v", s.cut, err))
		}
	})
}

// TestLyingDisk: a disk that says that data is on the medium when it is not, and loses it with the power, gets a weaker promise. If it loses parts of the
// new release and of its kernel, in whatever order, the trial boot fails and the boot after it is of the old release. If it keeps the order and
// loses only the end, everything holds that holds for an honest disk but that what was reported as done is done.
func TestLyingDisk(t *testing.T) {
	for _, boot := range []FileSystem{Journal, FAT} {
		r, err := newRig(512, Healthy, boot, InTable, nil)
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
		o := newOracle(r, r.base)
		table, lost := bytes.Clone(r.base), []devicetest.Op(nil)
		var inOrder []devicetest.Op
		for _, op := range r.dev.Log {
			if op.Kind == devicetest.Flush {
				continue
			}
			inOrder = append(inOrder, op)
			if m := (&mutant{Memory: r.dev, r: r}); op.Off < r.size && m.kind(op.Off) != ofData {
				copy(table[op.Off:], op.Data)
			} else {
				lost = append(lost, op)
			}
		}
		bad := 0
		crashes(table, 512, lost, func(int) bool { return false }, limits{6, 500}, 1, func(s state) {
			dev := o.view(s.image)
			first, _, err := bootsim.Choose(dev, partition.GRUB)
			if err != nil || first.Label != slotB {
				t.Fatalf("the trial boots %q, %v", first.Label, err)
			}
			if o.whole(s.image, slotB) != nil {
				bad++
			}
			second, _, err := bootsim.Choose(dev, partition.GRUB)
			if err == nil && second.Label != slotA {
				err = fmt.Errorf("%s boots", second.Label)
			}
			if err := errors.Join(err, o.whole(s.image, slotA)); err != nil {
				t.Fatalf("after the trial: %v", err)
			}
		})
		if bad < 500 {
			t.Errorf("only %d disks with an incomplete release: the test does not do what it says", bad)
		}
		cuts := 0
		crashes(r.base, 512, inOrder, func(int) bool { return true }, limits{}, 1, func(s state) {
			cuts++
			if err := errors.Join(o.boots(s.image), o.armed(s.image)); err != nil {
				t.Errorf("cut off at write %d: %v", s.cut, err)
			}
		})
		t.Logf("kernels on %s: %d disks that lost parts of the new release, %d that lost the end", boot, bad, cuts)
	}
}
