package powercut

import (
	"bytes"
	"fmt"
	"sync"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/devicetest"
)

// Options choose what is enumerated.
type Options struct {
	Sectors []int // sector sizes
	Starts  []Start
	Paths   []Path
	Boots   []FileSystem // of the boot partition
	Bits    []Backend    // none: those in the table
	All     int          // all subsets of epochs up to this many sectors
	Random  int          // subsets of larger ones
	Kill    int          // at every how many operations of a change the process is killed
	Deep    int          // of every how many recoveries the crashes are enumerated too
	Again   int          // every how many states a whole new update is run upon it
	Workers int

	// Saved is what is in the state file after a step; nil: the step's name.
	Saved func(Step) []byte
	// Judge looks at what a power cut and the recovery after it left, beside what is looked at anyway; nil: nobody.
	Judge func(Left) error
}

// Left is what a host finds at the start after a power cut.
type Left struct {
	Running string           // label of the slot that booted
	Slots   []partition.Slot // as they are then
	State   []byte           // what the state file holds
}

// Short is done in seconds, Long in minutes.
func Short() Options {
	return Options{Sectors: []int{512, 4096}, Starts: []Start{Healthy, PrimaryBad, BackupBad}, Paths: []Path{Good, Failed}, Boots: []FileSystem{Journal, FAT}, Bits: []Backend{InTable, InEntries}, All: 4, Random: 6, Kill: 5, Deep: 6, Again: 97, Workers: 2}
}

// Long is the proof.
func Long() Options {
	o := Short()
	o.All, o.Random, o.Kill, o.Deep, o.Again = 12, 4000, 1, 1, 41
	return o
}

// Counts is what was done.
type Counts struct {
	Runs       int // whole updates that were recorded
	Operations int // writes and flushes of them
	States     int // disks after a power cut
	Recoveries int // of them that a recovery had to write to
	Second     int // disks after a power cut during a recovery
	Updates    int // whole new updates on what a power cut left
	Violations []string
}

// Total is the number of disks that were judged.
func (c Counts) Total() int { return c.States + c.Second }

// String is for people.
func (c Counts) String() string {
	return fmt.Sprintf("%d updates, %d operations: %d crash states + %d crash states of %d recoveries = %d, %d new updates on what was left; %d without a complete, verified, bootable slot",
		c.Runs, c.Operations, c.States, c.Second, c.Recoveries, c.Total(), c.Updates, len(c.Violations))
}

func (c *Counts) add(o Counts) {
	c.Runs += o.Runs
	c.Operations += o.Operations
	c.States += o.States
	c.Recoveries += o.Recoveries
	c.Second += o.Second
	c.Updates += o.Updates
	c.Violations = append(c.Violations, o.Violations...)
}

// maxViolations that are told of one run. One is too many.
const maxViolations = 3

// Enumerate records whole updates and judges every disk that a power cut may leave.
func Enumerate(opt Options) (Counts, error) {
	type job struct {
		sector int
		start  Start
		path   Path
		boot   FileSystem
		bits   Backend
	}
	if len(opt.Bits) == 0 {
		opt.Bits = []Backend{InTable}
	}
	jobs := make(chan job)
	go func() {
		defer close(jobs)
		for _, sector := range opt.Sectors {
			for _, start := range opt.Starts {
				for _, path := range opt.Paths {
					for _, boot := range opt.Boots {
						for _, bits := range opt.Bits {
							if bits == InEntries && start == BackupBad {
								continue // the table only says where slots are: one repair beside the entries is enough
							}
							jobs <- job{sector, start, path, boot, bits}
						}
					}
				}
			}
		}
	}()
	var mu sync.Mutex
	var all Counts
	var failed error
	var wg sync.WaitGroup
	for range max(1, opt.Workers) {
		wg.Go(func() {
			for j := range jobs {
				c, err := enumerate(opt, j.sector, j.start, j.path, j.boot, j.bits)
				mu.Lock()
				all.add(c)
				if err != nil && failed == nil {
					failed = fmt.Errorf("sectors of %d, %s, %s, kernels on %s, %s: %w", j.sector, j.start, j.path, j.boot, j.bits, err)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return all, failed
}

// enumerate does one update, and the same with the process killed at every operation of its changes of the table.
func enumerate(opt Options, sector int, start Start, path Path, boot FileSystem, bits Backend) (Counts, error) {
	var c Counts
	r, err := newRig(sector, start, boot, bits, opt.Saved)
	if err != nil {
		return c, err
	}
	if err := r.update(path); err != nil {
		return c, err
	}
	calls := r.calls
	c.judge(opt, r, r.base, r.dev.Log, fmt.Sprintf("%d, %s, %s, kernels on %s, %s", sector, start, path, boot, bits))
	for _, k := range calls {
		for op := k.from; op < k.to && !k.boot && opt.Kill > 0; op += opt.Kill {
			if err := c.killed(opt, sector, start, path, boot, bits, k.from, op); err != nil {
				return c, err
			}
		}
	}
	return c, nil
}

// killed runs an update until its process is killed at one operation, and another process begins anew on what the kernel has in its cache. Then
// the power goes.
func (c *Counts) killed(opt Options, sector int, start Start, path Path, boot FileSystem, bits Backend, from, op int) error {
	r, err := newRig(sector, start, boot, bits, opt.Saved)
	if err != nil {
		return err
	}
	r.front = &devicetest.Faulty{Device: r.dev, At: op, Err: errKilled, Dead: true}
	r.restart()
	if err := r.update(path); err == nil {
		return fmt.Errorf("an update that was killed at operation %d went through", op)
	}
	r.front = r.dev
	r.restart()
	if err := r.recover(); err != nil {
		return err
	}
	// What came before the change that was killed is on the medium, and was judged with the whole update.
	base, calls := bytes.Clone(r.base), []call(nil)
	for _, op := range r.dev.Log[:from] {
		copy(base[op.Off:], op.Data)
	}
	for _, k := range r.calls {
		if k.from >= from {
			k.from, k.to = k.from-from, k.to-from
			calls = append(calls, k)
		}
	}
	for i := range r.saves {
		r.saves[i].from, r.saves[i].to = r.saves[i].from-from, r.saves[i].to-from
	}
	r.calls, r.dev.Log = calls, r.dev.Log[from:]
	c.judge(opt, r, base, r.dev.Log, fmt.Sprintf("%d, %s, %s, kernels on %s, %s, killed at operation %d", sector, start, path, boot, bits, op))
	return nil
}

// judge enumerates the crashes of a log.
func (c *Counts) judge(opt Options, r *rig, base []byte, log []devicetest.Op, name string) {
	o := newOracle(r, base)
	ordered := r.firmware(r.calls)
	c.Runs++
	c.Operations += len(log)
	told := 0
	tell := func(s state, err error) {
		if told++; told <= maxViolations {
			c.Violations = append(c.Violations, fmt.Sprintf("%s, power cut at operation %d: %v", name, s.cut, err))
		}
	}
	lim, deep := limits{opt.All, opt.Random}, opt.Deep
	if r.backend == InEntries && deep > 0 {
		deep = max(deep, Short().Deep) // what a recovery writes there is the table, which the other backend's enumeration has whole
	}
	crashes(base, r.sector, log, ordered, lim, uint64(len(log)), func(s state) {
		c.States++
		if err := o.check(s); err != nil {
			tell(s, err)
			return
		}
		rec, err := o.recovers(s)
		if err != nil {
			tell(s, err)
			return
		}
		if opt.Judge != nil {
			if err := o.judge(s, opt.Judge); err != nil {
				tell(s, err)
				return
			}
		}
		if rec != nil {
			c.Recoveries++
		}
		if rec != nil && deep > 0 && c.Recoveries%deep == 0 {
			second := newOracle(rec, s.image)
			crashes(s.image, r.sector, rec.dev.Log, ordered2, limits{6, 10}, 1, func(t state) {
				c.Second++
				if err := second.check(t); err != nil {
					tell(s, fmt.Errorf("power cut at operation %d of the recovery: %w", t.cut, err))
				}
			})
		}
		if opt.Again > 0 && c.States%opt.Again == 0 {
			c.Updates++
			if err := o.again(s); err != nil {
				tell(s, err)
			}
		}
	})
}

// firmware says which operations of a log are cut and torn, and not reordered: those of a boot loader that writes to sectors of its own. One that renames
// a file leaves the order to a file system.
func (r *rig) firmware(calls []call) func(int) bool {
	if r.backend == InEntries {
		return ordered2
	}
	return bootOps(calls)
}

// bootOps says which operations of a log are the firmware's.
func bootOps(calls []call) func(int) bool {
	return func(op int) bool {
		for _, c := range calls {
			if c.boot && op >= c.from && op < c.to {
				return true
			}
		}
		return false
	}
}

func ordered2(int) bool { return false }
