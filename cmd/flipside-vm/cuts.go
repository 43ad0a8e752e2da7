package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/flipside-linux/flipside/updater"
)

// life is a host from its installation to the newest release, with the stages in which its power is cut: a list for each release on the way.
type life struct {
	number int
	legs   [][]stage
	tries  int  // lives in which none of these stages came
	bls    bool // its boot loader is systemd-boot
}

func (n life) name() string {
	if n.bls {
		return fmt.Sprintf("bls-cuts-%d", n.number)
	}
	return fmt.Sprintf("cuts-%d", n.number)
}

// legsOfLife is how many releases a host goes through in which its power is cut.
const legsOfLife = 4

// deal spreads cuts evenly over the stages and deals them to at least as many lives as are lived side by side. A cut in a trial boot is a leg's last: the
// host goes back, and does not take that release again. A host whose power goes when the slot is armed is in its trial boot when it comes back: the
// stages before that do not come again.
func deal(cuts, jobs int, random *rand.Rand) []life {
	var legs [][]stage
	for cuts > 0 {
		n := min(cuts, len(stages))
		cuts -= n
		late := slices.Clone(trialStages)
		early := slices.DeleteFunc(slices.Clone(stages), func(s stage) bool { return slices.Contains(trialStages, s) })
		for _, list := range [][]stage{late, early} {
			random.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		}
		late = late[:(n*len(late)+len(stages)/2)/len(stages)]
		early = early[:n-len(late)]
		var block [][]stage
		for _, s := range late {
			block = append(block, []stage{s})
		}
		for _, s := range early {
			if i := slices.IndexFunc(block, func(b []stage) bool { return slices.Contains(b, confirming) }); s == flipping && i >= 0 {
				block[i] = append(block[i], s)
			} else if s == flipping || s == stopping {
				block = append(block, []stage{s})
			}
		}
		for _, s := range early {
			if s == downloading || s == writing {
				if len(block) == 0 {
					block = append(block, nil)
				}
				i := random.IntN(len(block))
				block[i] = append(block[i], s)
			}
		}
		for _, b := range block {
			inOrder(b)
		}
		legs = append(legs, block...)
	}
	lives := make([]life, max(min(jobs, len(legs)), (len(legs)+legsOfLife-1)/legsOfLife))
	for i, leg := range legs {
		n := i * len(lives) / len(legs)
		lives[n].number, lives[n].legs = n+1, append(lives[n].legs, leg)
	}
	for _, l := range lives { // what a host comes out of on the new release is last: then it needs no other one to go on to
		slices.SortStableFunc(l.legs, func(a, b []stage) int { return onTrial(b) - onTrial(a) })
	}
	return lives
}

// onTrial is 1 for a leg that ends in a trial boot, and otherwise 0.
func onTrial(leg []stage) int {
	if slices.Contains(trialStages, leg[len(leg)-1]) {
		return 1
	}
	return 0
}

// cuts lets hosts update, several side by side, and cuts their power in every stage on the way. What boots next is in their partition tables.
func cuts(ctx context.Context, l *lab) error { return l.cutPower(ctx, false) }

// cutsOnEntries is the same with hosts whose boot loader is systemd-boot.
func cutsOnEntries(ctx context.Context, l *lab) error { return l.cutPower(ctx, true) }

func (l *lab) cutPower(ctx context.Context, bls bool) error {
	queue := deal(l.cuts, l.jobs, rand.New(rand.NewPCG(l.seed, 0)))
	for i := range queue {
		queue[i].bls = bls
	}
	var (
		mu   sync.Mutex
		errs []error
		last = len(queue)
		work sync.WaitGroup
	)
	next := func() (life, bool) {
		mu.Lock()
		defer mu.Unlock()
		if len(queue) == 0 || len(errs) > 0 || ctx.Err() != nil {
			return life{}, false
		}
		n := queue[0]
		queue = queue[1:]
		return n, true
	}
	for range l.jobs {
		work.Go(func() {
			for {
				n, ok := next()
				if !ok {
					return
				}
				left, err := n.live(ctx, l)
				mu.Lock()
				if err != nil {
					errs = append(errs, err)
				}
				if len(left.legs) > 0 {
					last++
					left.number = last
					queue = append(queue, left)
				}
				mu.Unlock()
			}
		})
	}
	work.Wait()
	return errors.Join(errs...)
}

// live plays a life. It returns the stages that did not come, as another life.
func (n life) live(ctx context.Context, l *lab) (left life, err error) {
	left.bls = n.bls
	base, err := l.release("base")
	if err != nil {
		return left, err
	}
	later := l.later()
	if len(later) < 2 {
		return left, errors.New("power cuts need two releases after the first one")
	}
	name := n.name()
	if err := l.publish(ctx, name, base); err != nil {
		return left, err
	}
	m, err := l.machine(ctx, name, name, n.bls)
	if err != nil {
		return left, err
	}
	defer m.close()
	m.random = rand.New(rand.NewPCG(l.seed, uint64(n.number)))
	if err := m.on(ctx); err != nil {
		return left, err
	}
	if err := m.until(ctx, bootLimit, "the host is up on release "+base.version, confirmed(base.version)); err != nil {
		return left, err
	}
	runs, newest, failed, seen := base, base, false, 0
	for i, leg := range n.legs {
		if i == len(later)-1 { // the last release is there to go on to
			left.legs = append(left.legs, n.legs[i:]...)
			break
		}
		newest = later[i]
		var missed []stage
		if missed, failed, err = m.leg(ctx, leg, runs, newest); err != nil {
			return left, err
		}
		if seen += len(leg) - len(missed); len(missed) > 0 {
			left.legs = append(left.legs, missed)
		}
		if !failed {
			runs = newest
		} else if i == min(len(n.legs), len(later)-1)-1 {
			newest = later[i+1]
		}
	}
	if len(left.legs) > 0 && seen == 0 {
		if left.tries = n.tries + 1; left.tries == 3 {
			return left, fmt.Errorf("%s: in %d lives of a host nobody has seen it in stage %q", m.name, left.tries, left.legs[0][0])
		}
	}
	// And it goes on, to the newest release that there is.
	if failed {
		if err := l.publish(ctx, name, newest); err != nil {
			return left, err
		}
		if err := m.until(ctx, updateLimit, "the host runs the newest release, "+newest.version+", confirmed", confirmed(newest.version)); err != nil {
			return left, err
		}
	}
	if err := m.offOn(ctx, newest.version); err != nil {
		return left, err
	}
	return left, os.Remove(m.disk())
}

// leg lets a host go from one release to another, and cuts its power on the way. A power cut in a trial boot takes it back: that release has failed
// here, until a person says otherwise. It returns the stages that did not come.
func (m *machine) leg(ctx context.Context, in []stage, from, to *release) (missed []stage, failed bool, err error) {
	if err := m.lab.publish(ctx, m.name, to); err != nil {
		return nil, false, err
	}
	back := func(v view) bool {
		_, failed := v.status.Quarantine[to.version]
		return v.up && v.status.Phase == updater.Idle && failed
	}
	over := func(v view) bool { return confirmed(to.version)(v) || back(v) }
	for i, s := range in {
		came, err := m.cutIn(ctx, s, over)
		if err != nil {
			return nil, false, err
		}
		if !came {
			m.lab.say("%s: it is through before stage %s has come: another one gets that", m.name, s)
			missed = in[i:]
			break
		}
		if err := m.comesBack(ctx, from.version, to.version); err != nil {
			if ctx.Err() == nil {
				m.lab.lose()
			}
			return nil, false, err
		}
	}
	if err := m.until(ctx, updateLimit, "the update to "+to.version+" is through", over); err != nil {
		return nil, false, err
	}
	return missed, back(m.view()), nil
}

// near is how many entries of the record around a change of what boots next are looked at closely.
const near = 24

// cutIn waits for a stage and cuts the power in it: at some moment of the time that it usually takes, or, where it changes what boots next, after
// some write of that change. It reports whether the stage came before the update was through.
func (m *machine) cutIn(ctx context.Context, want stage, over func(view) bool) (came bool, err error) {
	late := slices.Contains(trialStages, want)
	in := func(v view) bool { return v.stage == want && (v.trial || !late) }
	err = m.until(ctx, updateLimit, "stage "+string(want)+" comes", func(v view) bool {
		came = in(v)
		return came || over(v)
	})
	if err != nil || !came {
		return false, err
	}
	wait := time.Duration(m.random.Int64N(int64(m.lab.typical(want))))
	byWrite := m.random.IntN(4) > 0
	switch want {
	case flipping, booting, confirming:
	default:
		byWrite = false
	}
	if byWrite {
		wait = time.Duration(m.random.Int64N(int64(100 * time.Millisecond)))
		if err := m.until(ctx, updateLimit, "stage "+string(want)+" writes", func(v view) bool { return v.changes || !in(v) }); err != nil {
			return false, err
		}
	}
	select {
	case <-time.After(wait):
	case <-ctx.Done():
		return false, ctx.Err()
	}
	return true, m.cut(want, byWrite)
}

// cut cuts the power. What was not flushed may be lost. With byWrite it was cut a little earlier: within the writes with which a stage changes what
// boots next.
func (m *machine) cut(want stage, byWrite bool) error {
	seen := m.view().stage // before it ends: a download ends with it
	if !m.end() {
		return fmt.Errorf("%s: QEMU ended by itself", m.name)
	}
	m.mu.Lock()
	at, end := m.at, m.at.tape.length()
	first := at.firstOf(want)
	m.mu.Unlock()
	if byWrite && first >= 0 {
		end = first + m.random.IntN(min(end-first, near)+1)
		if seen = want; end == first && want == flipping {
			seen = writing
		}
	}
	lost, err := replay(m.disk(), m.path("writes.log"), end, m.random)
	if err := errors.Join(err, os.Remove(m.path("run.img")), os.Remove(m.path("writes.log"))); err != nil {
		return err
	}
	m.lab.cutSeen(seen)
	m.lab.mark(m, "cut", fmt.Sprintf("in %s, the last write to %s; %v", seen, at.tape.last(end), lost))
	return nil
}

// cutSeen counts a power cut by the stage that it was seen to fall into.
func (l *lab) cutSeen(s stage) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count.cuts++
	l.fell[s]++
}

// comesBack looks at the disk after a power cut, switches the machine on, and waits until it is up, on what the disk was to boot.
func (m *machine) comesBack(ctx context.Context, versions ...string) error {
	v, err := m.whole(ctx)
	if err != nil {
		return fmt.Errorf("%s: after a power cut: %w", m.name, err)
	}
	if !slices.Contains(versions, v) {
		return fmt.Errorf("%s: after a power cut the disk boots into release %s", m.name, v)
	}
	if err := m.on(ctx); err != nil {
		return err
	}
	m.mu.Lock()
	m.at.trial = v != versions[0]
	m.mu.Unlock()
	var now view
	err = m.until(ctx, bootLimit, "the host is up after a power cut", func(v view) bool { now = v; return v.up })
	if err == nil && (now.status.Version != v || now.resets > 0) {
		err = fmt.Errorf("%s: after a power cut it runs release %s, after %d resets, and its disk was to boot %s", m.name, now.status.Version, now.resets, v)
	}
	return err
}
