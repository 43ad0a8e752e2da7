package lock

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Enrol leaves the key of this keeper's signer with the group, under the name of a host, for an owner to accept. A group that has accepted it is left as it is.
// It may be called at any time, and does nothing without a signer.
func (k *Keeper) Enrol(ctx context.Context, group, host string) error {
	if err := errors.Join(CheckGroup(group), CheckHost(host)); err != nil || k.opt.Signer == nil {
		return err
	}
	k.mu.Lock()
	marked := k.marked[group+"/"+host]
	k.mu.Unlock()
	if marked {
		return nil // it has just said that it goes down
	}
	fail := func(err error) error {
		return fmt.Errorf("leaving the key of %q with group %q: %w", host, group, err)
	}
	mine, err := Fingerprint(k.opt.Signer.Public())
	if err != nil {
		return fail(err)
	}
	for range attempts {
		v, err := k.store.Read(ctx, group, "", 0)
		if err != nil {
			return fail(err)
		}
		list, err := k.store.Records(ctx, group, host)
		if err != nil {
			return fail(err)
		}
		r := Record{Name: host}
		if len(list) > 0 {
			r = list[0]
		}
		if st, by, err := r.last(group); err == nil && by == mine && (st.Says == up || st.Says == down) {
			return nil
		}
		s, err := decodeState(v.State, v.StateRev)
		if err != nil {
			return fail(err)
		}
		accepted, err := k.accepted(ctx, group, host)
		if err != nil && !errors.Is(err, ErrUnsigned) {
			return fail(err) // whether the key is accepted is not known, and so not whether saying that all is well would free a slot
		}
		switch accepted {
		case mine:
			return nil // what is wrong with its record is put right by its next verdict, not by its word that all is well
		case "":
		default:
			return fail(fmt.Errorf("%w: the key that is accepted for this name is %s, and this one is %s; flipside fleet forget takes the old one out", ErrUnsigned, accepted, mine))
		}
		if r, err = seal(k.opt.Signer, r, statement{Group: group, Name: host, At: k.opt.Now().UTC().Round(0), Says: up}); err != nil {
			return fail(err)
		}
		if err := k.putRecords(ctx, group, v, s, r); err != nil && !errors.Is(err, ErrConflict) {
			return fail(err)
		}
	}
	return fail(ErrConflict)
}

// accepted is the fingerprint of the key that an owner has accepted for a host, "" if there is none. It asks for the owner's record alone: what the other hosts say
// does not matter to it, and they may be many.
func (k *Keeper) accepted(ctx context.Context, group, host string) (string, error) {
	owners, err := k.owners()
	if err != nil || len(owners) == 0 {
		return "", err
	}
	l := &ledger{group: group, records: map[string]Record{}}
	if err := l.read(ctx, k.store, ownerRecord); err != nil {
		return "", err
	}
	if err := l.verifyOwner(k, owners); err != nil {
		return "", err
	}
	return l.keys[host], nil
}

// Sign makes the policy of a group, as it is, one that an owner has signed: from then on its hosts say by their own keys that they go down and that they are well,
// and nobody else can for them. It takes the owner's key, and that no host is down that has not signed so. It may be called again, with another owner's key too,
// by a keeper that knows both. After somebody without a key has changed or deleted what an owner had signed, and after [Keeper.Unsign], the hosts' keys are to be
// accepted again. A policy that somebody has signed whom this keeper does not know is an error ([ErrUnsigned]); see [Keeper.SignOver].
func (k *Keeper) Sign(ctx context.Context, group string) error {
	return k.signPolicy(ctx, group, false)
}

// SignOver is [Keeper.Sign] also over a policy that is signed by a key which is no owner's here. It drops the keys of all hosts that were accepted by that key.
func (k *Keeper) SignOver(ctx context.Context, group string) error {
	return k.signPolicy(ctx, group, true)
}

func (k *Keeper) signPolicy(ctx context.Context, group string, over bool) error {
	return k.resign(ctx, group, "signed", func(s *step, l *ledger) ([]Record, error) {
		signed, err := l.holds(k)
		switch {
		case signed:
			l.reconcile(s)
		case err != nil && !(over && errors.Is(err, ErrUnsigned)):
			return nil, err
		default:
			var down []string
			for _, h := range s.Holders {
				if h.Phase != Granted {
					down = append(down, h.Host)
				}
			}
			if len(down) > 0 {
				return nil, fmt.Errorf("%w: no policy that holds says who may free the slots of %q; wait until these hosts are back, or, where they are and cannot say so, look at each and then: flipside fleet force-release --group %s --owner-key FILE --reason TEXT HOST",
					ErrInvalid, down, group)
			}
		}
		s.Schema = signedSchema
		r, err := k.signOwner(l, s.now, s.Policy, l.keys)
		return []Record{r}, err
	})
}

// Unsign lets a group be used without signatures again, by those who name no owner's key. What was signed is void from then on: to who names one, the group is not
// signed, and when it is signed again that is the policy which it has then.
func (k *Keeper) Unsign(ctx context.Context, group string) error {
	return k.resign(ctx, group, "not signed any more", func(s *step, l *ledger) ([]Record, error) {
		signed, err := l.holds(k)
		if err != nil {
			return nil, err
		}
		if signed {
			l.reconcile(s) // who has signed that it is down keeps its slot
		}
		s.Schema = schema
		old := l.record(ownerRecord)
		if old.Version == 0 {
			return nil, nil
		}
		r, err := seal(k.opt.Owner, old, statement{Group: group, Name: ownerRecord, At: s.now})
		return []Record{r}, err
	})
}

// holds reports whether what an owner has signed holds. It is an error if it is somebody else who has.
func (l *ledger) holds(k *Keeper) (bool, error) {
	owners, err := k.owners()
	if err != nil {
		return false, err
	}
	if l.verify(k, owners) == nil {
		return true, nil
	}
	st, by, err := k.last(l.group, l.record(ownerRecord))
	if err == nil && st.Policy != nil && !slices.Contains(owners, by) {
		return false, fmt.Errorf("%w: the policy and the keys of %d hosts are signed by %s, which is no owner's key here; name it too (--owner, lock.owners), or drop all that it has signed with flipside fleet sign --force",
			ErrUnsigned, len(st.Keys), by)
	}
	return false, nil
}

// forced is an owner's verdict in a group where nothing that holds is signed, so that no host can give its slot back and the policy cannot be signed either. It
// frees the slot in the state, which is all that there is. cause is why it could not be done the usual way.
func (k *Keeper) forced(ctx context.Context, group, host string, v Verdict, cause error) error {
	return k.resign(ctx, group, "", func(s *step, l *ledger) ([]Record, error) {
		if signed, err := l.holds(k); signed || err != nil || s.holder(host) < 0 {
			return nil, cause
		}
		return nil, s.verdict(host, v)
	})
}

// resign changes whether a group is signed, or what it takes for that. It does not ask whether what was signed still holds.
func (k *Keeper) resign(ctx context.Context, group, what string, f func(*step, *ledger) ([]Record, error)) error {
	fail := func(err error) error { return fmt.Errorf("changing who signs for group %q: %w", group, err) }
	if err := CheckGroup(group); err != nil {
		return err
	}
	if k.opt.Owner == nil {
		return fail(fmt.Errorf("%w: it takes an owner's key", ErrUnsigned))
	}
	for range attempts {
		v, err := k.store.Read(ctx, group, "", 0)
		if err != nil {
			return fail(err)
		}
		s, err := decodeState(v.State, v.StateRev)
		if err != nil {
			return fail(err)
		}
		l, err := k.readLedger(ctx, group)
		if err != nil {
			return fail(err)
		}
		st := s.begin(k.opt.Now(), k.opt.By)
		records, err := f(st, l)
		if err != nil {
			return fail(err)
		}
		again := len(records) > 0 && records[0].Version == 0
		if again {
			err = k.putRecords(ctx, group, v, s, records...)
		} else {
			if what != "" {
				st.log(what, "", "", "", "")
			}
			st.signal = true
			c, e := st.commit()
			if e != nil {
				return fail(e)
			}
			c.Records = records
			_, _, err = k.store.Commit(ctx, group, "", 0, v, c)
		}
		switch {
		case errors.Is(err, ErrConflict) || err == nil && again:
		case err != nil:
			return fail(err)
		default:
			return nil
		}
	}
	return fail(ErrConflict)
}

// Accept enters the key of a host into the signed policy. The host has left it with [Keeper.Enrol]; fingerprint is the one that it should have, or "" for whatever
// it is. The fingerprint that was entered is returned.
func (k *Keeper) Accept(ctx context.Context, group, host, fingerprint string) (string, error) {
	if err := CheckHost(host); err != nil {
		return "", err
	}
	if fingerprint != "" {
		if err := checkFingerprint(fingerprint); err != nil {
			return "", err
		}
	}
	entered := ""
	err := k.edit(ctx, group, func(s *step) error {
		if err := s.ledger.read(ctx, k.store, host); err != nil {
			return err
		}
		by, err := s.ledger.left(s.ledger.record(host))
		switch {
		case err != nil:
			return fmt.Errorf("the key of %q: %w", host, err)
		case fingerprint != "" && by != fingerprint:
			return fmt.Errorf("the key of %q: %w: it has left %s", host, ErrUnsigned, by)
		}
		entered = by
		if s.ledger.keys[host] != by {
			s.accept(HostKey{Host: host, Fingerprint: by})
		}
		return nil
	})
	return entered, err
}

// AcceptAll enters the keys of all hosts that have left one and have none accepted, whatever they are, in one change. It returns them in order of the hosts' names.
func (k *Keeper) AcceptAll(ctx context.Context, group string) ([]HostKey, error) {
	var entered []HostKey
	err := k.edit(ctx, group, func(s *step) error {
		list, err := k.store.Records(ctx, group)
		if err != nil {
			return err
		}
		entered = nil
		for _, r := range list {
			if s.ledger.keys[r.Name] != "" || CheckHost(r.Name) != nil {
				continue
			}
			if by, err := s.ledger.left(r.Bounded()); err == nil {
				entered = append(entered, HostKey{Host: r.Name, Fingerprint: by})
			}
		}
		slices.SortFunc(entered, func(a, b HostKey) int { return strings.Compare(a.Host, b.Host) })
		s.accept(entered...)
		return nil
	})
	return entered, err
}

// left is the key that a host has left, by its record.
func (l *ledger) left(r Record) (fingerprint string, err error) {
	st, by, err := r.last(l.group)
	switch {
	case err != nil:
		return "", err
	case slices.Contains(l.owners, by):
		return "", fmt.Errorf("%w: its record is an owner's; the host leaves its key with flipside fleet enrol, or when it wants to reboot", ErrUnsigned)
	case st.Says != up && st.Says != down: // a host that is down keeps its slot until it says otherwise
		return "", fmt.Errorf("%w: it says %q", ErrUnsigned, st.Says)
	}
	return by, nil
}

// accept enters keys. The trail names so many hosts that something else is left in it.
func (s *step) accept(list ...HostKey) {
	if len(list) == 0 {
		return
	}
	if s.keys = maps.Clone(s.ledger.keys); s.keys == nil {
		s.keys = map[string]string{}
	}
	s.signal = true
	for i, h := range list {
		s.keys[h.Host] = h.Fingerprint
		switch {
		case i < named:
			s.log("key accepted", h.Host, "", "", h.Fingerprint)
		case i == named:
			s.log("keys accepted", "", "", "", fmt.Sprintf("of %d more hosts; flipside fleet keys lists them", len(list)-named))
		}
	}
}

// Forget takes the key of a host out of the signed policy, and with it the slot that it may hold.
func (k *Keeper) Forget(ctx context.Context, group, host, why string) error {
	return k.edit(ctx, group, func(s *step) error {
		if _, ok := s.ledger.keys[host]; !ok {
			return fmt.Errorf("%w: the group knows no key of %q", ErrInvalid, host)
		}
		s.keys = maps.Clone(s.ledger.keys)
		delete(s.keys, host)
		s.Holders = slices.DeleteFunc(s.Holders, func(h Holder) bool { return h.Host == host })
		s.log("key forgotten", host, "", "", clip(why))
		return nil
	})
}

// edit changes what an owner has signed.
func (k *Keeper) edit(ctx context.Context, group string, f func(*step) error) error {
	return k.change(ctx, group, "", "", func(s *step) error {
		if s.ledger == nil {
			return fmt.Errorf("%w: it takes an owner's key", ErrUnsigned)
		}
		return f(s)
	})
}

// named is how many hosts the audit trail names whose keys are accepted in one change.
const named = 64

// HostKey is a key that a host has left with a group.
type HostKey struct {
	Host        string    `json:"host"`
	Fingerprint string    `json:"fingerprint,omitempty"` // that is accepted
	Left        string    `json:"left,omitempty"`        // that the host has left, if it is another one
	Says        string    `json:"says,omitempty"`        // "up", "down"
	At          time.Time `json:"at,omitzero"`
	Problem     string    `json:"problem,omitempty"` // why its record is not believed
}

// Keys lists the hosts that have left a key, and those that have one accepted.
func (k *Keeper) Keys(ctx context.Context, group string) ([]HostKey, error) {
	if err := CheckGroup(group); err != nil {
		return nil, err
	}
	owners, err := k.owners()
	if err != nil {
		return nil, err
	}
	l, err := k.readLedger(ctx, group)
	if err != nil {
		return nil, fmt.Errorf("reading the keys of group %q: %w", group, err)
	}
	if err := l.read(ctx, k.store); err != nil { // with those that wait to be accepted
		return nil, fmt.Errorf("reading the keys of group %q: %w", group, err)
	}
	signed := len(owners) > 0 && l.verify(k, owners) == nil
	names := map[string]bool{}
	for name := range l.records {
		names[name] = name != ownerRecord
	}
	for name := range l.keys {
		names[name] = true
	}
	list := []HostKey{}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if !names[name] {
			continue
		}
		h := HostKey{Host: name}
		st, by, err := k.last(group, l.record(name))
		if err == nil {
			h.Says, h.At = string(st.Says), st.At
		}
		if signed {
			h.Fingerprint = l.keys[name]
			if is, ok := l.known[name]; ok && err == nil {
				err = is.err
			}
		}
		if by != h.Fingerprint && !slices.Contains(owners, by) {
			h.Left = by
		}
		if err != nil {
			h.Problem = err.Error()
		}
		list = append(list, h)
	}
	return list, nil
}

func (k *Keeper) signOwner(l *ledger, now time.Time, p Policy, keys map[string]string) (Record, error) {
	if k.opt.Owner == nil {
		return Record{}, fmt.Errorf("%w: the policy of the group is signed, and only an owner can change it", ErrUnsigned)
	}
	return seal(k.opt.Owner, l.record(ownerRecord), statement{Group: l.group, Name: ownerRecord, At: now, Policy: &p, Keys: keys})
}
