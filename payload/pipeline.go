package payload

import (
	"context"
	"encoding"
	"fmt"
	"io"
	"sync"
	"time"
)

// budget bounds the memory of the operations under way.
type budget struct {
	mu    sync.Mutex
	freed *sync.Cond
	total int64
	used  int64
}

func newBudget(total int64) *budget {
	b := &budget{total: total}
	b.freed = sync.NewCond(&b.mu)
	return b
}

// take waits until there is room for n bytes, or nothing else is under way, or ctx ends.
func (b *budget) take(ctx context.Context, n int64) error {
	stop := context.AfterFunc(ctx, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.freed.Broadcast()
	})
	defer stop()
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.used > 0 && b.used+n > b.total {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b.freed.Wait()
	}
	b.used += n
	return nil
}

func (b *budget) give(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= n
	b.freed.Broadcast()
}

type job struct {
	i    int
	data []byte
}

// run reads, hands out to the workers, and ends.
func (a *apply) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r, err := a.p.src.Open(ctx, a.p.blobs+a.offset)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrSource, err)
	}
	defer r.Close()
	jobs := make(chan job)
	free := make(chan []byte, a.opt.Workers+1)
	for range a.opt.Workers + 1 {
		free <- nil
	}
	a.last = time.Now()
	var wg, settling sync.WaitGroup
	settling.Go(func() {
		if err := a.settle.run(ctx, a.trace); err != nil {
			cancel(err)
		}
	})
	for range a.opt.Workers {
		wg.Go(func() {
			w := &worker{apply: a}
			w.patcher.Bzip2 = &w.decoder.bzip2 // one operation at a time: they can share the tables
			defer w.close()
			for j := range jobs {
				if ctx.Err() == nil {
					err := w.do(j)
					if err == nil {
						err = a.finished(j.i)
					}
					if err != nil {
						cancel(err)
					}
				}
				w.trim()
				if cap(j.data) > keepBuffer {
					j.data = nil
				}
				a.budget.give(a.ops[j.i].cost())
				free <- j.data
			}
		})
	}
	readErr := a.readBlobs(ctx, r, jobs, free)
	close(jobs)
	wg.Wait()
	a.settle.stop()
	settling.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if readErr != nil {
		return readErr
	}
	return a.end(r)
}

// keepBuffer is the largest buffer that is kept for the next operation.
const keepBuffer = 4 << 20

// readBlobs reads the blobs in order, hashes them, and hands them out.
func (a *apply) readBlobs(ctx context.Context, r io.Reader, jobs chan<- job, free <-chan []byte) error {
	// Buffers are made as large as they will ever have to be, but for those that are not kept: growing would leave the smaller ones behind.
	room := int64(0)
	for i := range a.ops {
		if n := a.ops[i].n; n <= keepBuffer {
			room = max(room, n)
		}
	}
	pos := a.offset
	for i := a.first; i < len(a.ops); i++ {
		op := &a.ops[i]
		var buf []byte
		select {
		case buf = <-free:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if err := a.budget.take(ctx, op.cost()); err != nil {
			return err
		}
		if int64(cap(buf)) < op.n {
			buf = make([]byte, max(op.n, room))
		}
		buf = buf[:op.n]
		for at := 0; at < len(buf); { // in pieces, so that progress moves and memory stays in the cache
			stop := a.trace.time(TraceRead)
			piece := buf[at:min(len(buf), at+256<<10)]
			n, err := io.ReadFull(r, piece)
			stop()
			if err != nil {
				return fmt.Errorf("%w at byte %d: %w", ErrSource, a.p.blobs+pos+int64(at+n), err)
			}
			at += n
			stop = a.trace.time(TraceHash)
			a.signed.Write(piece)
			if a.file != nil {
				a.file.Write(piece)
			}
			stop()
			a.mu.Lock()
			a.read = pos + int64(at)
			a.mu.Unlock()
			a.progress()
		}
		pos += op.n
		s := state{offset: pos}
		s.signed, _ = a.signed.(encoding.BinaryMarshaler).MarshalBinary()
		if a.file != nil {
			s.file, _ = a.file.(encoding.BinaryMarshaler).MarshalBinary()
		}
		a.mu.Lock()
		a.states[i] = s
		a.mu.Unlock()
		select {
		case jobs <- job{i, buf}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if op.n == 0 {
			a.progress()
		}
	}
	return nil
}

// finished moves the mark, says what is final, and makes a checkpoint if one is due.
func (a *apply) finished(i int) error {
	a.mu.Lock()
	a.done[i] = true
	a.written += a.ops[i].out
	if len(a.ops[i].src) > 0 {
		a.copied += a.ops[i].out
	}
	for a.mark < len(a.done) && a.done[a.mark] {
		delete(a.states, a.mark-1) // what a checkpoint needs is the state at the mark
		a.mark++
	}
	mark := a.mark
	due := a.opt.Checkpoint != nil && mark > a.first && time.Since(a.last) >= a.opt.CheckpointEvery
	a.mu.Unlock()
	a.settle.reached(mark)
	// Whoever finds a checkpoint being made has nothing to add.
	if !due || !a.checkpointing.TryLock() {
		return nil
	}
	defer a.checkpointing.Unlock()
	return a.checkpoint()
}

// checkpoint flushes the targets and keeps how far everything had come before that. Others go on writing meanwhile.
func (a *apply) checkpoint() error {
	a.mu.Lock()
	mark := a.mark
	s, ok := a.states[mark-1]
	a.mu.Unlock()
	if !ok {
		return nil
	}
	if err := a.flush(); err != nil {
		return err
	}
	err := a.opt.Checkpoint(Checkpoint{Manifest: a.p.ManifestSHA256[:], Operations: mark, Offset: s.offset, SignedHash: s.signed, FileHash: s.file})
	if err != nil {
		return fmt.Errorf("keeping a checkpoint: %w", err)
	}
	a.mu.Lock()
	a.last = time.Now()
	a.mu.Unlock()
	return nil
}

func (a *apply) flush() error {
	defer a.trace.time(TraceFlush)()
	for name, t := range a.opt.Targets {
		if err := t.Flush(); err != nil {
			return fmt.Errorf("%w: flushing partition %q: %w", ErrTarget, name, err)
		}
	}
	return nil
}
