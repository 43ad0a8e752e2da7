package etcd

import (
	"context"
	"errors"
	"fmt"

	"github.com/flipside-linux/flipside/lock"
)

// Takeover moves the semaphore of a group from an older reboot manager to this one. At no moment can more hosts be down than Max,
// however many of them ask here and how many there: what one side gives out is lowered before that of the other is raised, and hosts
// that are down by a slot of the older one are counted until it has it back.
type Takeover struct {
	From      Predecessor
	FromGroup string // there
	Group     string // here
	Leave     int    // slots that the older one keeps, for hosts that cannot ask here yet
	Max       int    // of both together; 0: what the older one has, if this group was never used here
}

// ErrNothing means that the older reboot manager keeps no semaphore for the group.
var ErrNothing = errors.New("there is no semaphore to take over")

// ErrDown means that slots cannot go back to the older reboot manager yet.
var ErrDown = errors.New("too many hosts are down here")

// takeoverAttempts bounds how often it begins again because the older semaphore has changed meanwhile.
const takeoverAttempts = 200

// Run does what can be done now, and returns who is still down by a slot of the older one. Run it again until nobody is. After a failure in
// the middle the group here is paused, or has less than it may: run it again.
func (t Takeover) Run(ctx context.Context, k *lock.Keeper) (holders []string, err error) {
	st, err := k.State(ctx, t.Group)
	if err != nil {
		return nil, err
	}
	for range takeoverAttempts {
		old, err := t.From.Read(ctx, t.FromGroup)
		if err != nil {
			return nil, err
		}
		if old == nil {
			return nil, fmt.Errorf("%s, group %q: %w", t.From.Name(), t.FromGroup, ErrNothing)
		}
		if t.Max == 0 && st.Seq == 0 { // and so it stays, though the next attempt finds the group used
			t.Max = old.Max
		}
		err = t.once(ctx, k, old)
		if errors.Is(err, lock.ErrConflict) {
			continue
		}
		return old.Holders, err
	}
	return nil, fmt.Errorf("taking group %q over from %s: %w", t.FromGroup, t.From.Name(), lock.ErrConflict)
}

func (t Takeover) once(ctx context.Context, k *lock.Keeper, old *Old) error {
	total := t.Max
	switch {
	case old.Max == 0 && t.Leave == 0:
		// It admits nobody already; only who has come back is to be noted. Our max is right, or is set now.
		limit := -1
		if t.Max > 0 {
			limit = t.Max
		}
		return k.Adopt(ctx, t.Group, old.Holders, limit)
	case total == 0:
		return fmt.Errorf("%w: group %q was used here before; say how many hosts may be down in all", lock.ErrInvalid, t.Group)
	case t.Leave > total:
		return fmt.Errorf("%w: %d slots cannot be left of %d", lock.ErrInvalid, t.Leave, total)
	case old.Max > t.Leave:
		if err := k.SetMax(ctx, t.Group, 0); err != nil {
			return err
		}
		// Read again, so that as little time as possible lies between reading and changing.
		now, err := t.From.Read(ctx, t.FromGroup)
		if err != nil {
			return err
		}
		if now == nil {
			return lock.ErrConflict
		}
		if *old = *now; old.Max <= t.Leave {
			return lock.ErrConflict // somebody else is at it
		}
		if err := t.From.SetMax(ctx, t.FromGroup, old, t.Leave); err != nil {
			return err
		}
	case old.Max < t.Leave:
		// Slots go back to the older one: first nobody here may use them any more.
		if err := k.SetMax(ctx, t.Group, total-t.Leave); err != nil {
			return err
		}
		st, err := k.State(ctx, t.Group)
		if err != nil {
			return err
		}
		if n := len(st.Holders); n > total-t.Leave {
			return fmt.Errorf("%w: %d, and %d may be from now on; run it again when they are back", ErrDown, n, total-t.Leave)
		}
		return t.From.SetMax(ctx, t.FromGroup, old, t.Leave)
	}
	if t.Leave == 0 {
		return k.Adopt(ctx, t.Group, old.Holders, total)
	}
	// Its holders are fewer from now on, never more than it has slots or holders now.
	return k.SetMax(ctx, t.Group, max(0, total-max(t.Leave, len(old.Holders))))
}
