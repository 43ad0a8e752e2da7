package reboot

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Panel asks the same gates again and again. It bounds the time that each may take to answer, also one that hangs in a call that cannot be
// cut off, and it remembers since when each has been against the reboot.
type Panel struct {
	// Gates look at this host and change nothing; they are all asked each time.
	Gates []Gate
	// Last are asked in order, each only if everything before it says go; see [Ask].
	Last []Gate
	// Limit is how long a gate may take; 0 is a minute and a half, because the programs of [Commands] have a minute each.
	Limit time.Duration

	mu    sync.Mutex
	since map[string]Answer    // by gate: its first answer of the kind that it gives now
	hangs map[string]time.Time // gates that have not answered yet
}

// Ask asks the gates, and then the gates in more as the last of all.
func (p *Panel) Ask(ctx context.Context, now time.Time, more ...Gate) []Answer {
	answers := Ask(ctx, now, p.bound(p.Gates), append(p.bound(p.Last), more...)...)
	p.Remember(now, answers)
	return answers
}

// Remember adds since when each answer has been against it, as far as answers were shown to it before.
func (p *Panel) Remember(now time.Time, answers []Answer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	was := p.since
	p.since = map[string]Answer{}
	for i := range answers {
		a := &answers[i]
		if a.Verdict == Go {
			continue
		}
		if old, ok := was[a.Gate]; ok && old.Verdict == a.Verdict && !now.Before(old.Since) {
			if a.Since.IsZero() {
				a.Since = old.Since
			}
		} else if a.Since.IsZero() {
			a.Since = now
		}
		p.since[a.Gate] = *a
	}
}

// Local asks the gates that only look, once more. It is for the last instant before a reboot: the windows are looked at again when all
// have answered, because programs take their time.
func (p *Panel) Local(ctx context.Context, now func() time.Time) []Answer {
	answers := Ask(ctx, now(), p.bound(p.Gates))
	for _, g := range p.Gates {
		if w, ok := g.(Window); ok {
			answers = append(answers, ask(ctx, now(), w))
		}
	}
	return answers
}

func (p *Panel) bound(gates []Gate) []Gate {
	list := make([]Gate, 0, len(gates))
	for _, g := range gates {
		list = append(list, bounded{g, p})
	}
	return list
}

// bounded is a gate that answers in time.
type bounded struct {
	Gate
	p *Panel
}

// Withdraw implements [Withdrawer], for the gates that are.
func (b bounded) Withdraw(ctx context.Context, reason string) error {
	if w, ok := b.Gate.(Withdrawer); ok {
		return w.Withdraw(ctx, reason)
	}
	return nil
}

func (b bounded) Ask(ctx context.Context, now time.Time) Answer {
	limit := b.p.Limit
	if limit <= 0 {
		limit = 90 * time.Second
	}
	name := b.Name()
	b.p.mu.Lock()
	asked, hangs := b.p.hangs[name]
	if !hangs {
		if b.p.hangs == nil {
			b.p.hangs = map[string]time.Time{}
		}
		b.p.hangs[name] = now
	}
	b.p.mu.Unlock()
	if hangs {
		return Answer{Verdict: Unknown, Why: fmt.Sprintf("it was asked %s ago and has not answered", rounded(now.Sub(asked))), Since: asked, Hint: hungHint, Evidence: hungEvidence}
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	answered := make(chan Answer, 1)
	go func() {
		a := b.Gate.Ask(ctx, now)
		b.p.mu.Lock()
		delete(b.p.hangs, name)
		b.p.mu.Unlock()
		answered <- a
	}()
	select {
	case a := <-answered:
		return a
	case <-ctx.Done():
	}
	select { // it may have answered that it was cut off
	case a := <-answered:
		return a
	case <-time.After(100 * time.Millisecond):
		return Answer{Verdict: Unknown, Why: fmt.Sprintf("it has not answered within %s", rounded(limit)), Hint: hungHint, Evidence: hungEvidence}
	}
}

// What is said of a gate that says nothing.
const (
	hungHint     = "end what it waits for, or systemctl restart flipsided"
	hungEvidence = "journalctl -u flipsided"
)
