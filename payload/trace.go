package payload

import (
	"sync"
	"time"
)

// Where an Apply spends its time.
const (
	TraceRead   = "read the payload"
	TraceSource = "read the old image"
	TraceHash   = "hash"
	TraceWrite  = "write"
	TraceFlush  = "flush for checkpoints"
	TraceVerify = "flush and read back"
)

// Trace sums up where the time of an Apply goes, over all its goroutines: with several of them the sum is more than the time that passes. Its zero
// value is ready for use.
type Trace struct {
	mu    sync.Mutex
	times map[string]time.Duration
	kinds map[Kind]Decoding
}

// Decoding is what decoding the operations of one kind took.
type Decoding struct {
	Operations int
	Bytes      int64 // that they write
	Time       time.Duration
}

// Times returns the sums by step.
func (t *Trace) Times() map[string]time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := map[string]time.Duration{}
	for k, v := range t.times {
		out[k] = v
	}
	return out
}

// Decoded returns the sums by kind of operation.
func (t *Trace) Decoded() map[Kind]Decoding {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := map[Kind]Decoding{}
	for k, v := range t.kinds {
		out[k] = v
	}
	return out
}

func nothing() {}

// time measures until what it returns is called.
func (t *Trace) time(step string) func() {
	if t == nil {
		return nothing
	}
	from := time.Now()
	return func() { t.Add(step, time.Since(from)) }
}

// Add adds to the sum of a step.
func (t *Trace) Add(step string, d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.times == nil {
		t.times = map[string]time.Duration{}
	}
	t.times[step] += d
}

func (t *Trace) decode(k Kind) func() {
	if t == nil {
		return nothing
	}
	from := time.Now()
	return func() { t.sum(k, Decoding{Time: time.Since(from)}) }
}

func (t *Trace) output(k Kind, bytes int64) {
	if t != nil {
		t.sum(k, Decoding{Operations: 1, Bytes: bytes})
	}
}

func (t *Trace) sum(k Kind, d Decoding) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.kinds == nil {
		t.kinds = map[Kind]Decoding{}
	}
	s := t.kinds[k]
	t.kinds[k] = Decoding{s.Operations + d.Operations, s.Bytes + d.Bytes, s.Time + d.Time}
}
