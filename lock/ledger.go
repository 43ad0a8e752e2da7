package lock

import (
	"context"
	"crypto"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"
)

// ledger is what is signed in a group, as far as it holds.
type ledger struct {
	group   string
	policy  Policy
	keys    map[string]string  // fingerprints by host
	records map[string]Record  // by name, whatever they are
	known   map[string]holding // of the hosts that have a key
	owners  []string           // fingerprints of those who may sign for everybody
}

// holding is what the last record of a host says; with an error nobody knows, and the host counts as down.
type holding struct {
	statement
	err error
}

func (h holding) down() bool { return h.err != nil || h.Says == down }

// opened remembers what was verified: a signature is verified once, not at every look.
type opened struct {
	rec   Record
	st    statement
	print string
	err   error
}

func (k *Keeper) last(group string, r Record) (statement, string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	name := group + "/" + r.Name
	if o, ok := k.opened[name]; ok && o.rec.Place == r.Place && o.rec.Born == r.Born && o.rec.Version == r.Version && string(o.rec.Data) == string(r.Data) {
		return o.st, o.print, o.err
	}
	var o opened
	o.rec = r
	o.st, o.print, o.err = r.last(group)
	k.opened[name] = o
	return o.st, o.print, o.err
}

// owners are the fingerprints of those who may sign policies.
func (k *Keeper) owners() ([]string, error) {
	keys := slices.Clone(k.opt.Owners)
	if k.opt.Owner != nil {
		keys = append(keys, k.opt.Owner.Public())
	}
	var list []string
	for _, key := range keys {
		print, err := Fingerprint(key)
		if err != nil {
			return nil, fmt.Errorf("%w owner's key: %w", ErrInvalid, err)
		}
		list = append(list, print)
	}
	return list, nil
}

// ledger reads what is signed. It is nil for a group that asks for no signatures, by a keeper that does not either.
func (k *Keeper) ledger(ctx context.Context, group string, s State) (*ledger, error) {
	owners, err := k.owners()
	if err != nil {
		return nil, err
	}
	if len(owners) == 0 {
		if s.Schema >= signedSchema {
			return nil, fmt.Errorf("%w: the group is signed, and no owner's key is given here to check it by", ErrUnsigned)
		}
		return nil, nil
	}
	l, err := k.readLedger(ctx, group)
	if err != nil {
		return nil, err
	}
	return l, l.verify(k, owners)
}

// readLedger reads what the owner has signed and the records of the hosts that it names: whoever may write to the store can add as many others as they like. The hosts are
// mostly those of the last time, and are asked for in one go.
func (k *Keeper) readLedger(ctx context.Context, group string) (*ledger, error) {
	owners, err := k.owners()
	if err != nil {
		return nil, err
	}
	l := &ledger{group: group, records: map[string]Record{}, known: map[string]holding{}}
	k.mu.Lock()
	asked := k.named[group]
	k.mu.Unlock()
	if err := l.read(ctx, k.store, append([]string{ownerRecord}, asked...)...); err != nil {
		return nil, err
	}
	st, by, err := k.last(group, l.record(ownerRecord))
	if err != nil || !slices.Contains(owners, by) {
		return l, nil // verify says so
	}
	names := slices.Sorted(maps.Keys(st.Keys))
	if slices.Equal(names, asked) {
		return l, nil
	}
	var more []string
	for _, name := range names {
		if _, ok := slices.BinarySearch(asked, name); !ok {
			more = append(more, name)
		}
	}
	if len(more) > 0 {
		if err := l.read(ctx, k.store, more...); err != nil {
			return nil, err
		}
	}
	maps.DeleteFunc(l.records, func(name string, _ Record) bool {
		_, named := st.Keys[name]
		return !named && name != ownerRecord
	})
	k.mu.Lock()
	k.named[group] = names
	k.mu.Unlock()
	return l, nil
}

func (l *ledger) read(ctx context.Context, store Store, names ...string) error {
	list, err := store.Records(ctx, l.group, names...)
	for _, r := range list {
		l.records[r.Name] = r.Bounded()
	}
	return err
}

// verifyOwner finds out what the owner has signed.
func (l *ledger) verifyOwner(k *Keeper, owners []string) error {
	l.owners = owners
	st, print, err := k.last(l.group, l.record(ownerRecord))
	switch {
	case err != nil:
		return fmt.Errorf("the policy of group %q is not signed by an owner: %w", l.group, err)
	case !slices.Contains(owners, print):
		return fmt.Errorf("%w: the policy of group %q is signed by %s, which is no owner's key", ErrUnsigned, l.group, print)
	case st.Policy == nil:
		return fmt.Errorf("%w: an owner has signed that group %q needs no signatures; flipside fleet sign makes it need them again", ErrUnsigned, l.group)
	}
	if err := st.Policy.Check(); err != nil {
		return fmt.Errorf("%w: %w", ErrSchema, err)
	}
	l.policy, l.keys = *st.Policy, st.Keys
	return nil
}

// verify finds out what the owner has signed and where each host stands.
func (l *ledger) verify(k *Keeper, owners []string) error {
	if err := l.verifyOwner(k, owners); err != nil {
		return err
	}
	for host, want := range l.keys {
		h := holding{}
		var by string
		if h.statement, by, h.err = k.last(l.group, l.record(host)); h.err == nil && by != want && !slices.Contains(owners, by) {
			h.err = fmt.Errorf("%w: it is by key %s, which is not the host's", ErrUnsigned, by)
		}
		if h.err == nil && h.Says != up && h.Says != down {
			h.err = fmt.Errorf("%w: it says %q", ErrUnsigned, h.Says)
		}
		l.known[host] = h
	}
	return nil
}

// place is what the store calls itself.
func (l *ledger) place() string { return l.record(ownerRecord).Place }

func (l *ledger) record(name string) Record {
	if r, ok := l.records[name]; ok {
		return r
	}
	return Record{Name: name}
}

// note says that something was found that nobody with the right key has written.
func (s *step) note(what, host, version, why string) {
	s.log(what, host, version, "", clip(why))
	s.Tampered = append(s.Tampered, clip(fmt.Sprintf("%s: %s: %s", host, what, why)))
}

// reconcile makes the state say what is signed. Whoever may write to the store can write anything into the state; what counts is that nobody goes down
// who must not.
func (l *ledger) reconcile(s *step) {
	s.ledger = l
	s.Schema = signedSchema
	if !equalPolicy(s.Policy, l.policy) {
		s.note("policy restored", "", "", s.Policy.changes(l.policy))
		s.Policy = l.policy
		s.signal = true
	}
	seen := map[string]bool{}
	s.Holders = slices.DeleteFunc(s.Holders, func(h Holder) bool {
		why := ""
		switch is, enrolled := l.known[h.Host]; {
		case seen[h.Host]:
			why = "it is there twice"
		case !enrolled:
			why = "the host has no key in the group's signed policy"
		case is.down():
			why = "" // looked at below
		case h.Phase != Granted:
			why = "the host has not signed that it goes down"
		default:
			why = l.granted(s, h)
		}
		seen[h.Host] = true
		if why != "" {
			s.note("removed", h.Host, h.To, why)
		}
		return why != ""
	})
	for _, host := range slices.Sorted(maps.Keys(l.known)) {
		is := l.known[host]
		if !is.down() {
			continue
		}
		want := Holder{Host: host, Phase: Rebooting, Reason: unknownReason, Granted: s.now, Rebooting: s.now}
		if is.err == nil {
			want = is.holder()
		} else {
			s.Tampered = append(s.Tampered, clip(fmt.Sprintf("%s: it counts as down: %v", host, is.err)))
		}
		i := s.holder(host)
		switch {
		case i < 0:
			s.Holders = append(s.Holders, want)
			s.note("restored", host, want.To, "nobody who may has given its slot back")
		case s.Holders[i].Phase == Granted, is.err == nil && !s.Holders[i].same(want):
			s.Holders[i] = want
			s.note("restored", host, want.To, "its record in the state is not what it has signed")
		}
	}
}

// same reports whether two records are about the same reboot.
func (h Holder) same(o Holder) bool {
	return h.Token == o.Token && h.Zone == o.Zone && h.From == o.From && h.To == o.To
}

// unknown reports whether nobody knows if a holder is down, because its record is not its own.
func (s *step) unknown(h Holder) bool { return s.ledger != nil && s.ledger.known[h.Host].err != nil }

const unknownReason = "its signed record is missing or not its own"

// holder is the record in the state that a signed one stands for.
func (s statement) holder() Holder {
	h := Holder{Host: s.Name, Phase: Rebooting, Token: s.Token, Granted: s.At, Rebooting: s.At}
	if c := s.Claim; c != nil {
		h.Zone, h.Class, h.BootID, h.From, h.To, h.Reason = c.Zone, c.Class, c.BootID, c.From, c.To, c.Reason
	}
	return h
}

// granted reports what is wrong with a slot that was granted and not used yet: its host must have asked for it not long ago, in these words.
func (l *ledger) granted(s *step, h Holder) string {
	c := Claim{Group: l.group, Host: h.Host, BootID: h.BootID, From: h.From, To: h.To, Reason: h.Reason, Zone: h.Zone, Class: h.Class}
	limit := forgotten
	if d := time.Duration(s.Policy.GrantDeadline); d > 0 {
		limit += d
	} else {
		limit = 0 // granted for as long as it takes
	}
	return l.wanted(c, h.Proof, s, limit)
}

// wanted reports what is wrong with a claim's proof, "" if nothing is. It may not be older than limit, if there is one; who does not know the time
// leaves that to the others, and to what is signed when a host goes down.
func (l *ledger) wanted(c Claim, proof []byte, s *step, limit time.Duration) string {
	key, ok := l.keys[c.Host]
	if !ok {
		return "the host has no key in the group's signed policy"
	}
	st, by, err := open(proof)
	switch age := s.now.Sub(st.At); {
	case err != nil:
		return err.Error()
	case by != key:
		return "it is signed by another key than the host's"
	case st.Says != wants || st.Place != l.place() || st.Group != l.group || st.Name != c.Host || st.Claim == nil || *st.Claim != c:
		return "the host has signed something else"
	case !s.unsure && (age < -forgotten || limit > 0 && age > limit):
		return "what the host has signed is of another time"
	}
	return ""
}

// admits reports whether a waiter has itself asked for its place.
func (l *ledger) admits(w Waiter, s *step) bool {
	return l == nil || l.wanted(w.Claim, w.Proof, s, forgotten) == ""
}

// mayGoDown is asked in the transaction in which a host says that it goes down: by what is signed, and not by what was granted, because a grant can be forged.
func (s *step) mayGoDown(i int) error {
	if s.ledger == nil {
		return nil
	}
	// A host that the others count by nothing it has said has nothing to commit either, and so nobody would conflict with it. It asks again first, which puts
	// its record right.
	if s.unknown(s.Holders[i]) {
		return fmt.Errorf("%w: %s", ErrNotHeld, unknownReason)
	}
	others, zone := 0, 0
	for j, h := range s.Holders {
		if j == i || h.Phase == Granted {
			continue
		}
		others++
		if h.Zone == s.Holders[i].Zone || s.unknown(h) {
			zone++
		}
	}
	if others >= s.Policy.Max {
		return fmt.Errorf("%w: %d hosts are down already, and the policy allows %d", ErrNotHeld, others, s.Policy.Max)
	}
	if limit := s.Policy.zoneMax(s.Holders[i].Zone); limit >= 0 && zone >= limit {
		return fmt.Errorf("%w: %d hosts of zone %q are down already, and the policy allows %d", ErrNotHeld, zone, s.Holders[i].Zone, limit)
	}
	return nil
}

// signs makes the records that a change needs. again means that some have to be made first, and the change is to be tried again on top of them.
func (k *Keeper) signs(st *step) (records []Record, again bool, err error) {
	l := st.ledger
	if !equalPolicy(st.Policy, l.policy) || st.keys != nil && !maps.Equal(st.keys, l.keys) {
		keys := l.keys
		if st.keys != nil {
			keys = st.keys
		}
		r, err := k.signOwner(l, st.now, st.Policy, keys)
		if err != nil {
			return nil, false, err
		}
		records, again = append(records, r), r.Version == 0
		l = &ledger{group: l.group, keys: keys, records: l.records, known: l.known}
	}
	for _, h := range st.Holders {
		if _, ok := l.keys[h.Host]; !ok && h.Phase != Granted {
			return nil, false, fmt.Errorf("%w: %q has no key in the group's signed policy", ErrUnsigned, h.Host)
		}
	}
	for _, host := range slices.Sorted(maps.Keys(l.keys)) {
		was, ok := l.known[host]
		if !ok {
			continue // accepted just now: what its record says counts from the next change on
		}
		i := st.holder(host)
		is := i >= 0 && st.Holders[i].Phase != Granted
		if is == was.down() {
			continue
		}
		s := statement{Group: l.group, Name: host, At: st.now, Says: up, Outcome: st.outcome}
		if is {
			h := st.Holders[i]
			s.Says, s.Outcome, s.Token = down, "", h.Token
			s.Claim = &Claim{Group: l.group, Host: host, BootID: h.BootID, From: h.From, To: h.To, Reason: h.Reason, Zone: h.Zone, Class: h.Class}
		} else {
			s.Token = was.Token
		}
		key := k.signerOf(l.keys[host])
		if key == nil && !is {
			key = k.opt.Owner
		}
		if key == nil {
			return nil, false, fmt.Errorf("%w: only %q itself, or an owner of the group, can say that it is %s", ErrUnsigned, host, s.Says)
		}
		r, err := seal(key, l.record(host), s)
		if err != nil {
			return nil, false, err
		}
		records, again = append(records, r), again || r.Version == 0
	}
	if again {
		records = slices.DeleteFunc(records, func(r Record) bool { return r.Version > 0 })
	}
	return records, again, nil
}

// signerOf returns the keeper's own key if it has this fingerprint.
func (k *Keeper) signerOf(fingerprint string) crypto.Signer {
	if k.opt.Signer == nil {
		return nil
	}
	if print, err := Fingerprint(k.opt.Signer.Public()); err != nil || print != fingerprint {
		return nil
	}
	return k.opt.Signer
}

// seal signs what replaces a record. The first record under a name can only say hello: the store has not said yet when it was born.
func seal(key crypto.Signer, old Record, s statement) (Record, error) {
	if old.Version == 0 {
		s = statement{Group: s.Group, Name: s.Name, At: s.At, Says: hello}
	}
	s.Born, s.Version, s.Place = old.Born, old.Version+1, old.Place
	data, err := sign(key, s)
	old.Data = data
	return old, err
}

// putRecords writes records and leaves the state as it is.
func (k *Keeper) putRecords(ctx context.Context, group string, v View, s State, records ...Record) error {
	data := v.State
	if v.StateRev == 0 {
		var err error
		if data, err = json.Marshal(s); err != nil {
			return err
		}
	}
	_, _, err := k.store.Commit(ctx, group, "", 0, v, Change{State: data, Records: records})
	return err
}
