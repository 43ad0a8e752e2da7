package lock

import (
	"cmp"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"
)

// Keeper is the [Semaphore] on a [Store].
type Keeper struct {
	store Store
	opt   Options

	mu      sync.Mutex
	asked   map[string]asked              // by group and host
	opened  map[string]opened             // by group and name: the record that was verified last
	marked  map[string]bool               // by group and host: it goes down
	named   map[string][]string           // by group: the hosts that the owner has named last, in order
	watched map[string]map[string]watched // by group and host: the holders as they were seen last
	unsure  bool                          // the clock was, then
}

var _ Semaphore = (*Keeper)(nil)

// Options are what a Keeper takes from the outside world. The zero value is that of a host.
type Options struct {
	Now func() time.Time // nil: the clock of this machine
	// Synchronised reports whether Now is right, as far as anybody can tell. nil: what the kernel says of the clock of this machine; yes of another.
	Synchronised func() bool
	Pause        func(ctx context.Context, d time.Duration) error // nil: waits; for the time between attempts after a conflict
	By           string                                           // who is named in the audit trail; the host itself if empty
	Recheck      time.Duration                                    // the longest that Wait waits; 0: five minutes

	// Owners are the keys of those who may sign a group's policy; with any, nothing is believed that they, or the hosts that they have accepted, have not
	// signed. Signer is the key of this host, and Owner that of an operator. See the package's section on signatures.
	Owners []crypto.PublicKey
	Signer crypto.Signer
	Owner  crypto.Signer
}

// asked is what this keeper knows of a claim that it has made.
type asked struct {
	seen   int64 // the revision of the last standing
	joined bool  // its place in the queue was written by this keeper
}

// maxAsked bounds the claims that are remembered, for a server that asks for others: their names are theirs to choose. One that is forgotten is asked for again.
const maxAsked = 10000

// On returns the semaphore that a store keeps. Closing it closes the store.
func On(store Store, opt Options) *Keeper {
	if opt.Synchronised == nil {
		opt.Synchronised = func() bool { is, _ := Synchronised(); return is }
		if opt.Now != nil {
			opt.Synchronised = func() bool { return true }
		}
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.Pause == nil {
		opt.Pause = pause
	}
	if opt.Recheck <= 0 {
		opt.Recheck = askAgain
	}
	return &Keeper{store: store, opt: opt, asked: map[string]asked{}, opened: map[string]opened{}, marked: map[string]bool{}, named: map[string][]string{}, watched: map[string]map[string]watched{}}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

const (
	// attempts bounds how often a change is tried again after a conflict. A conflict means that somebody else got on.
	attempts = 200
	// page is how much of the queue is read to find those who are served next.
	page = 64
	// trail is how many audit entries a group keeps.
	trail = 512
)

// Close closes the store.
func (k *Keeper) Close() error { return k.store.Close() }

// Request implements [Semaphore].
func (k *Keeper) Request(ctx context.Context, c Claim) (Standing, error) {
	c, err := c.check()
	if err != nil {
		return Standing{}, err
	}
	st, err := k.request(ctx, c)
	if err != nil {
		return Standing{}, fmt.Errorf("requesting a reboot slot of group %q for %q: %w", c.Group, c.Host, err)
	}
	return st, nil
}

func (k *Keeper) request(ctx context.Context, c Claim) (Standing, error) {
	if err := k.Enrol(ctx, c.Group, c.Host); err != nil {
		return Standing{}, err
	}
	v, err := k.store.Read(ctx, c.Group, c.Host, 0)
	if err != nil {
		return Standing{}, err
	}
	now := k.opt.Now()
	s, l, err := k.look(ctx, c.Group, v, now)
	if err != nil {
		return Standing{}, err
	}
	if l != nil && k.signerOf(l.keys[c.Host]) == nil {
		k.saw(c, v.Rev)
		st := s.standing(c, 0, now)
		st.Granted, st.Blocked = false, fmt.Sprintf("the key of this host is not accepted in group %s; flipside fleet accept --group %[1]s %s", c.Group, c.Host)
		return st, nil
	}
	spoilt := l != nil && l.known[c.Host].err != nil
	if h, held := s.Holder(c.Host); held && !spoilt && (c.To == "" || h.To == c.To) {
		k.saw(c, v.Rev)
		return s.standing(c, 0, now), nil
	} else if held {
		// The host wants another reboot than it was granted, and nobody has judged the first one; or it is down only because its record is not its own,
		// and what the state says of it is anybody's word. It queues again.
		why := "it asks for another reboot, to " + c.To
		if spoilt {
			why = "it asks to reboot, so it is up; " + unknownReason
		}
		if err := k.Release(ctx, c.Group, c.Host, Verdict{Outcome: Cancelled, Reason: why, Token: h.Token}); err != nil {
			return Standing{}, err
		}
		return k.request(ctx, c)
	}
	if _, halted := s.Halts[c.To]; halted {
		if v.Own != nil {
			// All who wait for the version leave at once: none of them may read the whole queue to do so.
			leave := func(st *step) error { st.remove = append(st.remove, c.Host); return nil }
			if _, _, err := k.changed(ctx, c.Group, "", c.Host, false, leave); err != nil {
				return Standing{}, err
			}
		}
		k.saw(c, v.Rev)
		return s.standing(c, 0, now), nil
	}
	if v, err = k.enqueue(ctx, c, v, now, l); err != nil {
		return Standing{}, err
	}
	if s, _, err = k.look(ctx, c.Group, v, now); err != nil {
		return Standing{}, err
	}
	// Whoever gives a slot back serves the queue. So this is only for slots that are free already, and for holders who are late.
	seen := v.Rev
	if k.open(s, c.Group, now) {
		if s, seen, err = k.changed(ctx, c.Group, "", "", true, nil); err != nil {
			return Standing{}, err
		}
	}
	k.saw(c, seen)
	if _, held := s.Holder(c.Host); held {
		return s.standing(c, 0, now), nil
	}
	position, err := k.position(ctx, s, c, v)
	if err != nil {
		return Standing{}, err
	}
	return s.standing(c, position, now), nil
}

// enqueue takes a place in the queue, or says that the host still wants the one it has; that is only written now and then, and by a keeper that has just begun: a store may let
// places go with the client that has written them last.
func (k *Keeper) enqueue(ctx context.Context, c Claim, v View, now time.Time, l *ledger) (View, error) {
	k.mu.Lock()
	joined := k.asked[c.Group+"/"+c.Host].joined
	k.mu.Unlock()
	w := Waiter{Claim: c, Since: now.UTC().Round(0), Asked: now.UTC().Round(0), Unsure: !k.opt.Synchronised()}
	if v.Own != nil {
		var old Waiter
		if err := json.Unmarshal(v.Own.Data, &old); err == nil && !old.Since.IsZero() {
			w.Since = old.Since
			if age := now.Sub(old.Asked); old.Claim == c && joined && age >= 0 && age < askAgain && old.Unsure == w.Unsure && (l != nil) == (len(old.Proof) > 0) {
				return v, nil
			}
		}
	}
	if l != nil {
		var err error
		if w.Proof, err = sign(k.opt.Signer, statement{Place: l.place(), Group: c.Group, Name: c.Host, At: w.Asked, Says: wants, Claim: &c}); err != nil {
			return View{}, err
		}
	}
	data, err := json.Marshal(w)
	if err != nil {
		return View{}, err
	}
	if v, err = k.store.Enqueue(ctx, c.Group, c.Host, data); err == nil {
		k.remember(c, func(a *asked) { a.joined = true })
	}
	return v, err
}

// open reports whether a change may serve somebody, or has a late holder to note.
func (k *Keeper) open(s State, group string, now time.Time) bool {
	st := k.begin(s, group, now, "")
	if len(s.Holders) < s.Policy.Max {
		return true
	}
	st.findLate()
	st.takeBack()
	return st.changed()
}

// position is the place of a claim in the queue. v is what joining the queue has shown.
func (k *Keeper) position(ctx context.Context, s State, c Claim, v View) (int, error) {
	if len(s.Policy.Classes) == 0 && v.Own != nil {
		if v.Length > 0 && v.Own.Arrival >= v.Rev { // it has come just now: it is the last
			return v.Length, nil
		}
		n, err := k.store.Ahead(ctx, c.Group, v.Own.Arrival)
		return n + 1, err
	}
	queue, err := k.queue(ctx, c.Group, s.Policy)
	if err != nil {
		return 0, err
	}
	return 1 + max(0, slices.IndexFunc(queue, func(w Waiter) bool { return w.Host == c.Host })), nil
}

func (k *Keeper) queue(ctx context.Context, group string, p Policy) ([]Waiter, error) {
	v, err := k.store.Read(ctx, group, "", -1)
	if err != nil {
		return nil, err
	}
	queue := waiters(v.Queue)
	p.order(queue)
	return queue, nil
}

// waiters decodes a queue. An item that cannot be read is served nobody: it is left out.
func waiters(items []Item) []Waiter {
	queue := make([]Waiter, 0, len(items))
	for _, it := range items {
		var w Waiter
		if err := json.Unmarshal(it.Data, &w); err != nil || w.Host != it.Host {
			continue
		}
		w.Arrival = it.Arrival
		queue = append(queue, w)
	}
	return queue
}

// look reads a state as it counts: in a group that is signed, by what is signed.
func (k *Keeper) look(ctx context.Context, group string, v View, now time.Time) (State, *ledger, error) {
	s, err := decodeState(v.State, v.StateRev)
	if err != nil {
		return State{}, nil, err
	}
	l, err := k.ledger(ctx, group, s)
	if err != nil || l == nil {
		return s, nil, err
	}
	st := k.begin(s, group, now, "")
	l.reconcile(st)
	return st.State, l, nil
}

func (k *Keeper) saw(c Claim, rev int64) { k.remember(c, func(a *asked) { a.seen = rev }) }

func (k *Keeper) remember(c Claim, what func(*asked)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.asked) >= maxAsked {
		clear(k.asked)
	}
	a := k.asked[c.Group+"/"+c.Host]
	what(&a)
	k.asked[c.Group+"/"+c.Host] = a
}

// Wait implements [Semaphore]. It returns after some minutes at the latest, so that nothing depends on a watch alone.
func (k *Keeper) Wait(ctx context.Context, c Claim) error {
	c, err := c.check()
	if err != nil {
		return err
	}
	k.mu.Lock()
	a, ok := k.asked[c.Group+"/"+c.Host]
	k.mu.Unlock()
	if !ok {
		return nil // it has never asked
	}
	watch, cancel := context.WithTimeout(ctx, k.opt.Recheck)
	defer cancel()
	err = k.store.Watch(watch, c.Group, c.Host, a.seen)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil, watch.Err() != nil:
		return nil
	}
	return fmt.Errorf("waiting for a reboot slot of group %q: %w", c.Group, err)
}

// Mark implements [Semaphore].
func (k *Keeper) Mark(ctx context.Context, group, host string, m Mark) error {
	if err := errors.Join(CheckGroup(group), CheckHost(host)); err != nil {
		return err
	}
	if _, _, err := k.changed(ctx, group, host, "", false, func(s *step) error { return s.mark(host, m) }); err != nil {
		return fmt.Errorf("changing group %q: %w", group, err)
	}
	if m.Phase == Rebooting {
		k.mu.Lock()
		k.marked[group+"/"+host] = true
		k.mu.Unlock()
	}
	return nil
}

// Release implements [Semaphore].
func (k *Keeper) Release(ctx context.Context, group, host string, v Verdict) error {
	if err := CheckHost(host); err != nil {
		return err
	}
	by := v.By
	if by == "" {
		by = host
	}
	err := k.change(ctx, group, by, host, func(s *step) error {
		if err := s.verdict(host, v); err != nil {
			return err
		}
		if s.queued {
			s.remove = append(s.remove, host)
		}
		return nil
	})
	if errors.Is(err, ErrUnsigned) && v.Outcome == Forced && k.opt.Owner != nil {
		err = k.forced(ctx, group, host, v, err)
	}
	if err == nil {
		k.mu.Lock()
		delete(k.marked, group+"/"+host)
		k.mu.Unlock()
	}
	return err
}

// SetMax changes how many hosts may be down at once. 0 pauses the group. Holders stay holders.
func (k *Keeper) SetMax(ctx context.Context, group string, max int) error {
	return k.change(ctx, group, "", "", func(s *step) error {
		p := s.Policy
		if p.Max == max {
			return nil
		}
		p.Max = max
		return s.setPolicy(p, "")
	})
}

// SetPolicy replaces the policy of a group. Holders stay holders.
func (k *Keeper) SetPolicy(ctx context.Context, group string, p Policy, why string) error {
	return k.change(ctx, group, "", "", func(s *step) error { return s.setPolicy(p, why) })
}

// EditPolicy changes the policy of a group by a function, which may be called several times.
func (k *Keeper) EditPolicy(ctx context.Context, group, why string, edit func(*Policy) error) error {
	return k.change(ctx, group, "", "", func(s *step) error {
		p := s.Policy
		if err := edit(&p); err != nil {
			return err
		}
		return s.setPolicy(p, why)
	})
}

// Pause lets no further host reboot, until Unpause.
func (k *Keeper) Pause(ctx context.Context, group, why string) error {
	return k.change(ctx, group, "", "", func(s *step) error {
		p := s.Policy
		if p.Max == 0 {
			return nil
		}
		p.Max, p.PausedMax = 0, p.Max
		return s.setPolicy(p, strings.TrimSuffix("paused: "+why, ": "))
	})
}

// Unpause gives a group that was paused its max back. One that has none on record, because its max was set to 0, is an error.
func (k *Keeper) Unpause(ctx context.Context, group, why string) error {
	return k.change(ctx, group, "", "", func(s *step) error {
		p := s.Policy
		if p.Max > 0 {
			return nil
		}
		if p.PausedMax == 0 {
			return fmt.Errorf("%w: it is not on record what max was before; set it", ErrInvalid)
		}
		p.Max = p.PausedMax
		return s.setPolicy(p, strings.TrimSuffix("goes on: "+why, ": "))
	})
}

// Resume lifts the halt of a version ("" means all) and forgets its failures.
func (k *Keeper) Resume(ctx context.Context, group, version, why string) error {
	return k.change(ctx, group, "", "", func(s *step) error { s.resume(version, clip(why)); return nil })
}

// State returns the whole state of a group. A group that nobody has used is empty and has the default policy. Holders that are late by
// now are shown as late, whether or not that has been committed.
func (k *Keeper) State(ctx context.Context, group string) (State, error) {
	if err := CheckGroup(group); err != nil {
		return State{}, err
	}
	v, err := k.store.Read(ctx, group, "", -1)
	if err != nil {
		return State{}, fmt.Errorf("reading the state of group %q: %w", group, err)
	}
	s, err := decodeState(v.State, v.StateRev)
	if err != nil {
		return State{}, fmt.Errorf("reading the state of group %q: %w", group, err)
	}
	st := k.begin(s, group, k.opt.Now(), "")
	switch l, err := k.ledger(ctx, group, s); {
	case errors.Is(err, ErrUnsigned):
		st.Tampered = append(st.Tampered, err.Error())
	case err != nil:
		return State{}, fmt.Errorf("reading the state of group %q: %w", group, err)
	case l != nil:
		l.reconcile(st)
	}
	st.findLate()
	s = st.State
	s.Queue = slices.DeleteFunc(waiters(v.Queue), func(w Waiter) bool { return s.holder(w.Host) >= 0 })
	s.Policy.order(s.Queue)
	return s, nil
}

// Tick notes holders that are late by now, and serves the queue if a window has opened. Anybody may call it at any time.
func (k *Keeper) Tick(ctx context.Context, group string) error {
	return k.change(ctx, group, "", "", nil)
}

// History returns the audit trail of a group, the oldest entry first. It goes back a few hundred entries.
func (k *Keeper) History(ctx context.Context, group string) ([]Entry, error) {
	if err := CheckGroup(group); err != nil {
		return nil, err
	}
	raw, err := k.store.History(ctx, group)
	if err != nil {
		return nil, fmt.Errorf("reading the history of group %q: %w", group, err)
	}
	entries := make([]Entry, 0, len(raw))
	for _, data := range raw {
		var e Entry
		if err := json.Unmarshal(data, &e); err != nil {
			return nil, fmt.Errorf("reading the history of group %q: %w: %w", group, ErrSchema, err)
		}
		entries = append(entries, e)
	}
	slices.SortFunc(entries, func(a, b Entry) int { return cmp.Compare(a.Seq, b.Seq) })
	return entries, nil
}

// Follow calls changed with the state of a group now and after every change, until ctx ends or it returns false.
func (k *Keeper) Follow(ctx context.Context, group string, changed func(State) bool) error {
	v, err := k.store.Read(ctx, group, "", 0)
	if err != nil {
		return err
	}
	show := func(int64) bool {
		s, e := k.State(ctx, group)
		if e != nil {
			err = e
			return false
		}
		return changed(s)
	}
	if !show(v.Rev) {
		return err
	}
	return errors.Join(k.store.Follow(ctx, group, v.Rev, show), err)
}

// Groups lists the groups of the store.
func (k *Keeper) Groups(ctx context.Context) ([]string, error) { return k.store.Groups(ctx) }

func (k *Keeper) change(ctx context.Context, group, by, host string, f func(*step) error) error {
	if err := CheckGroup(group); err != nil {
		return err
	}
	if _, _, err := k.changed(ctx, group, by, host, true, f); err != nil {
		return fmt.Errorf("changing group %q: %w", group, err)
	}
	return nil
}

// changed makes one change: what f does, then what follows from the time, then the free slots to those who wait, all in one
// commit. It begins again after a conflict. host is the one whose place in the queue matters to f. A change that cannot free a slot
// need not serve the queue.
func (k *Keeper) changed(ctx context.Context, group, by, host string, serve bool, f func(*step) error) (State, int64, error) {
	if k.opt.By != "" {
		by = k.opt.By
	}
	limit := page
	if !serve {
		limit = 0
	}
	v, err := k.store.Read(ctx, group, host, limit)
	for try := range attempts {
		if err != nil {
			return State{}, 0, err
		}
		s, err := decodeState(v.State, v.StateRev)
		if err != nil {
			return State{}, 0, err
		}
		st := k.begin(s, group, k.opt.Now(), by)
		st.queued = v.Own != nil
		l, err := k.ledger(ctx, group, s)
		if err != nil {
			return State{}, 0, err
		}
		if l != nil {
			// A state that is not there can be made by anybody, also by two hosts at once. One that is there changes with everything that a key says: so a
			// commit on top of it rests on all that was said. What is put into a record past it is not that host's last word, whatever it is (Record.last).
			// Then the host counts as down, and does not go down before it has said something again (mayGoDown).
			if v.StateRev == 0 {
				return State{}, 0, fmt.Errorf("%w: the state of the group is gone; flipside fleet sign makes a new one", ErrUnsigned)
			}
			l.reconcile(st)
		}
		st.findLate()
		if f != nil {
			if err := f(st); err != nil {
				return State{}, 0, err
			}
		}
		st.takeBack()
		left := false
		if serve {
			left = st.admit(slices.DeleteFunc(waiters(v.Queue), func(w Waiter) bool { return slices.Contains(st.remove, w.Host) }))
		}
		if v.More && (left || len(s.Policy.Classes) > 0) {
			limit = -1 // the first page does not decide it
			if v, err = k.store.Read(ctx, group, host, limit); err != nil {
				return State{}, 0, err
			}
			continue
		}
		if !st.changed() {
			return st.State, v.Rev, nil
		}
		c, err := st.commit()
		if err != nil {
			return State{}, 0, err
		}
		c.Exclusive = left
		if l != nil {
			var again bool
			if c.Records, again, err = k.signs(st); err != nil {
				return State{}, 0, err
			}
			if again {
				if err := k.putRecords(ctx, group, v, s, c.Records...); err != nil && !errors.Is(err, ErrConflict) {
					return State{}, 0, err
				}
				if v, err = k.store.Read(ctx, group, host, limit); err != nil {
					return State{}, 0, err
				}
				continue
			}
		}
		rev, now, err := k.store.Commit(ctx, group, host, limit, v, c)
		if errors.Is(err, ErrConflict) {
			v = now
			if try > 2 { // many change the group at once; spread them, the more the longer it lasts
				most := time.Duration(min(try, 10)+min(5*max(0, try-10), 90)) * time.Millisecond
				if err := k.opt.Pause(ctx, rand.N(most)); err != nil {
					return State{}, 0, err
				}
			}
			continue
		}
		if err != nil {
			return State{}, 0, err
		}
		for i := range st.Holders {
			if st.Holders[i].Token == 0 {
				st.Holders[i].Token = rev
			}
		}
		return st.State, rev, nil
	}
	return State{}, 0, fmt.Errorf("%w: gave up after %d attempts", ErrConflict, attempts)
}

// commit encodes the change for a store.
func (s *step) commit() (Change, error) {
	state := s.State
	state.Tampered = nil
	data, err := json.Marshal(state)
	if err != nil {
		return Change{}, err
	}
	c := Change{State: data, Remove: s.remove, Signal: s.signal, Audit: map[int][]byte{}}
	for _, e := range s.audit {
		line, err := json.Marshal(e)
		if err != nil {
			return Change{}, err
		}
		c.Audit[int(e.Seq%trail)] = line
	}
	return c, nil
}
