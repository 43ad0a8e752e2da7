package reboot

import (
	"context"
	"time"
)

// Verdict is a gate's answer in a word. The zero value is none of them, and does not count as go.
type Verdict string

// The three answers. A gate that cannot be asked answers Unknown, never Go.
const (
	Go      Verdict = "go"
	Wait    Verdict = "wait"
	Unknown Verdict = "unknown"
)

// Answer is what a gate says: may we go on; if not, why, and when should we ask again?
type Answer struct {
	Gate    string    `json:"gate"`
	Verdict Verdict   `json:"verdict"`
	Why     string    `json:"why,omitempty"`
	Ask     time.Time `json:"ask,omitzero"`   // when to ask again; zero means on change, or in a while
	Since   time.Time `json:"since,omitzero"` // since when the answer is so
	Hint    string    `json:"hint,omitempty"` // what a person can do about it

	Evidence string `json:"evidence,omitempty"` // where it can be seen: a setting, a file, a program
}

// Gate is something that may be against a reboot. Ask answers within ctx; it does not wait for the answer to become another.
type Gate interface {
	Name() string
	Ask(ctx context.Context, now time.Time) Answer
}

// Withdrawer is a gate that takes something by being asked (a place in a queue, a slot), and can give it back.
type Withdrawer interface {
	Withdraw(ctx context.Context, reason string) error
}

// First returns the first answer that is not Go, and whether there is one.
func First(answers []Answer) (Answer, bool) {
	for _, a := range answers {
		if a.Verdict != Go {
			return a, true
		}
	}
	return Answer{}, false
}

// Ask asks all gates, in order, so that a status can show everything that stands against a reboot. The gates in last are only
// asked while everything before them says Go: what they give out is shared, and held as short as possible. If something is against
// it, what they gave out before is given back.
func Ask(ctx context.Context, now time.Time, gates []Gate, last ...Gate) []Answer {
	answers := make([]Answer, 0, len(gates)+len(last))
	for _, g := range gates {
		answers = append(answers, ask(ctx, now, g))
	}
	for _, g := range last {
		if a, stop := First(answers); stop {
			if w, ok := g.(Withdrawer); ok {
				if err := w.Withdraw(ctx, a.Gate+": "+a.Why); err != nil {
					answers = append(answers, Answer{Gate: g.Name(), Verdict: Unknown, Why: "what it gave out could not be given back: " + err.Error(), Hint: hungHint, Evidence: hungEvidence})
				}
			}
			continue
		}
		answers = append(answers, ask(ctx, now, g))
	}
	return answers
}

func ask(ctx context.Context, now time.Time, g Gate) Answer {
	a := g.Ask(ctx, now)
	a.Gate = g.Name()
	if a.Verdict != Go && a.Verdict != Wait {
		a.Verdict = Unknown
	}
	if a.Verdict != Go && a.Why == "" {
		a.Why = "it does not say why"
	}
	return a
}
