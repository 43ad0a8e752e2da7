package locktest

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/flipside-linux/flipside/lock"
)

func (e env) newKey() crypto.Signer {
	e.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	e.must(err)
	return key
}

// signed runs a group whose policy an owner has signed: its hosts say by their own keys what they do, and the store must tell an old record from the last.
func signed(e env) {
	owner := e.newKey()
	op := e.b.Open(e.T, lock.Options{Now: e.clock.Now, Owner: owner})
	hosts := map[string]*lock.Keeper{}
	e.must(op.Sign(e.ctx, e.group))
	for i := range 3 {
		name := fmt.Sprintf("h%d", i)
		hosts[name] = e.b.Open(e.T, lock.Options{Now: e.clock.Now, Owners: []crypto.PublicKey{owner.Public()}, Signer: e.newKey()})
		e.must(hosts[name].Enrol(e.ctx, e.group, name))
		e.must(hosts[name].Enrol(e.ctx, e.group, name)) // changes nothing
		if _, err := op.Accept(e.ctx, e.group, name, ""); err != nil {
			e.Fatal(err)
		}
	}
	last := int64(0)
	for range 2 {
		for name, k := range hosts {
			st, err := k.Request(e.ctx, e.claim(name))
			if err != nil || !st.Granted || st.Token <= last {
				e.Fatalf("%s: %+v, %v", name, st, err)
			}
			last = st.Token
			e.must(k.Mark(e.ctx, e.group, name, lock.Mark{Phase: lock.Rebooting, Token: st.Token}))
			for other, o := range hosts {
				if other == name {
					continue
				}
				if err := o.Mark(e.ctx, e.group, other, lock.Mark{Phase: lock.Rebooting}); !errors.Is(err, lock.ErrNotHeld) {
					e.Errorf("%s goes down beside %s: %v", other, name, err)
				}
				if err := o.Release(e.ctx, e.group, name, lock.Verdict{Outcome: lock.Healthy}); !errors.Is(err, lock.ErrUnsigned) {
					e.Errorf("%s gives the slot of %s back: %v", other, name, err)
				}
			}
			if _, err := e.k.Request(e.ctx, e.claim("x")); !errors.Is(err, lock.ErrUnsigned) {
				e.Errorf("who names no owner's key: %v", err)
			}
			e.must(k.Release(e.ctx, e.group, name, lock.Verdict{Outcome: lock.Healthy, Token: st.Token}))
		}
	}
	st, err := op.State(e.ctx, e.group)
	if err != nil || len(st.Tampered) > 0 || len(st.Holders) > 0 {
		e.Errorf("%+v, %v", st, err)
	}
	if keys, err := op.Keys(e.ctx, e.group); err != nil || len(keys) != len(hosts) || keys[0].Problem != "" || keys[0].Fingerprint == "" {
		e.Errorf("%+v, %v", keys, err)
	}
}
