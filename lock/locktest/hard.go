package locktest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/window"
)

func windows(e env) {
	w, err := window.Parse("Thu 04:00", "1h", "UTC")
	e.must(err)
	e.policy(func(p *lock.Policy) {
		p.Windows, p.RebootTime, p.GrantDeadline = []window.Window{w}, lock.Duration(10*time.Minute), 0
	})
	opens := time.Date(2026, 11, 26, 4, 0, 0, 0, time.UTC)
	if st := e.waits("a", 1); !st.Ask.Equal(opens) || st.Blocked == "" {
		e.Errorf("outside the window: %+v, want to be asked at %s", st, opens)
	}
	e.clock.advance(opens.Add(55 * time.Minute).Sub(e.clock.Now())) // open, but a reboot does not fit any more
	e.waits("a", 1)
	e.clock.advance(7*24*time.Hour - 55*time.Minute)
	e.granted("a")
	e.clock.advance(2 * time.Hour)
	if err := e.k.Mark(e.ctx, e.group, "a", lock.Mark{Phase: lock.Rebooting}); !errors.Is(err, lock.ErrClosed) {
		e.Errorf("Mark when the window has closed = %v, want ErrClosed", err)
	}
}

func marks(e env) {
	old := e.granted("a").Token
	e.release("a", lock.Cancelled)
	token := e.granted("a").Token
	e.clock.advance(time.Minute)
	if err := e.k.Mark(e.ctx, e.group, "a", lock.Mark{Phase: lock.Rebooting, Token: old}); !errors.Is(err, lock.ErrFenced) {
		e.Errorf("Mark with an old token = %v, want ErrFenced", err)
	}
	if err := e.k.Release(e.ctx, e.group, "a", lock.Verdict{Outcome: lock.Healthy, Token: old}); !errors.Is(err, lock.ErrFenced) {
		e.Errorf("Release with an old token = %v, want ErrFenced", err)
	}
	e.must(e.k.Mark(e.ctx, e.group, "a", lock.Mark{Phase: lock.Rebooting, Token: token}))
	e.must(e.k.Mark(e.ctx, e.group, "a", lock.Mark{Phase: lock.Rebooting, Token: token})) // told again
	e.clock.advance(time.Minute)
	e.must(e.k.Mark(e.ctx, e.group, "a", lock.Mark{Phase: lock.Booted, Version: "2.0.0", BootID: "boot-2"}))
	h, _ := e.state().Holder("a")
	if h.Phase != lock.Booted || h.Version != "2.0.0" || h.NewBootID != "boot-2" || h.Booted.Sub(h.Rebooting) != time.Minute || h.Rebooting.Sub(h.Granted) != time.Minute {
		e.Errorf("the record is %+v", h)
	}
	if err := e.k.Mark(e.ctx, e.group, "b", lock.Mark{Phase: lock.Rebooting}); !errors.Is(err, lock.ErrNotHeld) {
		e.Errorf("Mark without a slot = %v, want ErrNotHeld", err)
	}
	if err := e.k.Mark(e.ctx, e.group, "a", lock.Mark{Phase: "dancing"}); !errors.Is(err, lock.ErrInvalid) {
		e.Errorf("Mark of a phase that does not exist = %v", err)
	}
}

// anotherVersion asks for another release than the one that was granted, as a host does that crashed before it could give that back.
func anotherVersion(e env) {
	old := e.granted("a")
	e.waits("b", 1)
	c := e.claim("a")
	c.To = "3.0.0"
	if st := e.request(c); st.Granted || st.Position != 1 {
		e.Errorf("another version: %+v, want it to queue", st)
	}
	if hs := e.holders(); !slices.Equal(hs, []string{"b"}) {
		e.Errorf("holders %v, want b", hs)
	}
	e.release("b", lock.Healthy)
	if st := e.request(c); !st.Granted || st.Token <= old.Token {
		e.Errorf("its turn: %+v", st)
	}
}

func history(e env) {
	e.granted("a")
	e.must(e.k.Mark(e.ctx, e.group, "a", lock.Mark{Phase: lock.Rebooting}))
	e.release("a", lock.Failed)
	e.must(e.k.Resume(e.ctx, e.group, "2.0.0", "looked at"))
	entries, err := e.k.History(e.ctx, e.group)
	e.must(err)
	var what []string
	for _, en := range entries {
		what = append(what, en.What)
	}
	if want := []string{"granted", "rebooting", "failed", "halt", "resume"}; !slices.Equal(what, want) {
		e.Errorf("history %v, want %v", what, want)
	}
	e.policy(func(p *lock.Policy) { p.Max, p.ZoneMax = 3, 1 })
	e.policy(func(*lock.Policy) {}) // changes nothing, and is not in the history
	again, err := e.k.History(e.ctx, e.group)
	e.must(err)
	if last := again[len(again)-1]; len(again) != len(entries)+1 || last.What != "policy" || last.Why != "test: max 1 to 3, zone_max unset to 1" {
		e.Errorf("the last entry of %d is %+v", len(again), last)
	}
	if en := entries[2]; en.Host != "a" || en.By != "a" || en.Version != "2.0.0" || en.Why != "because" || !en.Time.Equal(e.clock.Now()) {
		e.Errorf("entry %+v", en)
	}
}

func badInput(e env) {
	for _, c := range []lock.Claim{
		{Group: "", Host: "a"}, {Group: "..", Host: "a"}, {Group: "a/b", Host: "a"}, {Group: "a b", Host: "a"},
		{Group: e.group, Host: ""}, {Group: e.group, Host: "a/b"}, {Group: e.group, Host: "a\nb"}, {Group: e.group, Host: strings.Repeat("a", 300)},
	} {
		if _, err := e.k.Request(e.ctx, c); !errors.Is(err, lock.ErrInvalid) {
			e.Errorf("Request of %q in %q = %v, want ErrInvalid", c.Host, c.Group, err)
		}
	}
	if err := e.k.Release(e.ctx, e.group, "a", lock.Verdict{Outcome: "maybe"}); !errors.Is(err, lock.ErrInvalid) {
		e.Errorf("an outcome that does not exist: %v", err)
	}
	c := e.claim("a")
	c.Reason = strings.Repeat("long", 10000)
	if st := e.request(c); !st.Granted {
		e.Errorf("a long reason: %+v", st)
	}
	if h, _ := e.state().Holder("a"); len(h.Reason) > 1000 {
		e.Errorf("a host wrote %d bytes into the state", len(h.Reason))
	}
}

// neverMoreThanMax lets many hosts take turns and change max meanwhile. What counts is what the hosts themselves see.
func neverMoreThanMax(e env) {
	const hosts, limit = 12, 3
	e.policy(func(p *lock.Policy) { p.Max = limit })
	var mu sync.Mutex
	down, most := 0, 0
	tokens := map[int64]int{}
	var wg sync.WaitGroup
	for i := range hosts {
		k := e.open()
		c := e.claim(fmt.Sprintf("host-%02d", i))
		wg.Go(func() {
			for range 3 {
				st, err := until(e.ctx, k, c)
				if err != nil {
					e.Errorf("%s: %v", c.Host, err)
					return
				}
				mu.Lock()
				down++
				most = max(most, down)
				tokens[st.Token]++
				mu.Unlock()
				time.Sleep(time.Duration(rand.IntN(3)) * time.Millisecond)
				mu.Lock()
				down--
				mu.Unlock()
				if err := k.Release(e.ctx, c.Group, c.Host, lock.Verdict{Outcome: lock.Healthy}); err != nil {
					e.Errorf("%s: %v", c.Host, err)
					return
				}
			}
		})
	}
	wg.Wait()
	if most > limit {
		e.Errorf("%d hosts were down at once, max is %d", most, limit)
	}
	if most < limit {
		e.Logf("only %d hosts were down at once", most)
	}
	for token, n := range tokens {
		if n > limit {
			e.Errorf("token %d was given %d times", token, n)
		}
	}
	if s := e.state(); len(s.Holders) != 0 || len(s.Queue) != 0 {
		e.Errorf("left behind: %+v", s)
	}
}

// until asks and waits until the claim is granted.
func until(ctx context.Context, k *lock.Keeper, c lock.Claim) (lock.Standing, error) {
	for {
		st, err := k.Request(ctx, c)
		if err != nil || st.Granted {
			return st, err
		}
		if st.Halted != "" {
			return st, fmt.Errorf("halted: %s", st.Halted)
		}
		if err := k.Wait(ctx, c); err != nil {
			return st, err
		}
	}
}

// lostReplies cuts calls off at any moment and repeats them, as a host does whose network fails.
func lostReplies(e env) {
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 40 {
		host := fmt.Sprintf("host-%02d", i%4)
		for _, call := range []func(context.Context) error{
			func(ctx context.Context) error { _, err := e.k.Request(ctx, e.claim(host)); return err },
			func(ctx context.Context) error {
				return e.k.Release(ctx, e.group, host, lock.Verdict{Outcome: lock.Healthy})
			},
		} {
			short, cancel := context.WithTimeout(e.ctx, time.Duration(rng.IntN(2000))*time.Microsecond)
			_ = call(short)
			cancel()
			if n := len(e.state().Holders); n > 1 {
				e.Fatalf("%d holders", n)
			}
			e.must(call(e.ctx))
		}
	}
	if s := e.state(); len(s.Holders) != 0 || len(s.Queue) != 0 {
		e.Errorf("left behind: %+v", s)
	}
}
