package payload

import (
	"context"
	"fmt"
	"math"
	"sync"

	"golang.org/x/sync/errgroup"
)

// settleStep is how many bytes become final before they are read back: enough that flushing them costs little.
const settleStep = 32 << 20

// settling tells targets that can read back early what is final.
type settling struct {
	final   []int64 // for each operation: bytes of its partition that are final when it and all before it are done
	part    []int
	targets []Settler // by partition; nil for those that cannot
	sizes   []int64

	mu     sync.Mutex
	mark   int
	goal   []int64
	ended  bool
	signal chan struct{}

	under int    // calls of Settle under way
	idle  func() // ends the measurement that began with the first of them
}

func newSettling(parts []Partition, targets map[string]Target) *settling {
	s := &settling{signal: make(chan struct{}, 1), goal: make([]int64, len(parts))}
	any := false
	for i, q := range parts {
		t, ok := targets[q.Name].(Settler)
		any = any || ok
		s.targets, s.sizes = append(s.targets, t), append(s.sizes, q.Size)
		// What none of the later operations writes is final.
		final := make([]int64, len(q.ops))
		lowest := int64(math.MaxInt64)
		for j := len(q.ops) - 1; j >= 0; j-- {
			final[j] = min(lowest, q.Size)
			for _, e := range q.ops[j].dst {
				if !e.hole {
					lowest = min(lowest, e.off)
				}
			}
		}
		s.final = append(s.final, final...)
		for range final {
			s.part = append(s.part, i)
		}
	}
	if !any {
		s.final, s.part = nil, nil
	}
	return s
}

// reached says that all operations before mark are done.
func (s *settling) reached(mark int) {
	if s.final == nil {
		return
	}
	s.mu.Lock()
	for ; s.mark < mark; s.mark++ {
		s.goal[s.part[s.mark]] = s.final[s.mark]
	}
	s.mu.Unlock()
	s.wake()
}

func (s *settling) stop() {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.wake()
}

func (s *settling) wake() {
	select {
	case s.signal <- struct{}{}:
	default:
	}
}

// busy measures the time in which anything is flushed and read back: one call waits for the other, and that counts once. It returns what ends a call.
func (s *settling) busy(trace *Trace) func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.under++; s.under == 1 {
		s.idle = trace.time(TraceVerify)
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.under--; s.under == 0 {
			s.idle()
		}
	}
}

// run settles what is final, until stop is called. What is left then is for the one who verifies.
func (s *settling) run(ctx context.Context, trace *Trace) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2) // one flushes while the other reads back
	settled := make([]int64, len(s.targets))
	for {
		select {
		case <-s.signal:
		case <-ctx.Done():
			return g.Wait()
		}
		s.mu.Lock()
		ended, goals := s.ended, append([]int64(nil), s.goal...)
		s.mu.Unlock()
		if ended {
			return g.Wait()
		}
		for i, t := range s.targets {
			// The last bytes are left to the caller, who verifies the whole.
			if t == nil || goals[i]-settled[i] < settleStep || goals[i] >= s.sizes[i] {
				continue
			}
			upto := goals[i]
			settled[i] = upto
			g.Go(func() error {
				defer s.busy(trace)()
				if err := t.Settle(upto); err != nil {
					return fmt.Errorf("%w: %w", ErrTarget, err)
				}
				return nil
			})
		}
	}
}
