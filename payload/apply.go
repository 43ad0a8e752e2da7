package payload

import (
	"context"
	"crypto/sha256"
	"encoding"
	"fmt"
	"hash"
	"io"
	"runtime"
	"sync"
	"time"
)

// Target is where an image is written.
type Target interface {
	io.WriterAt
	// Flush makes what was written durable.
	Flush() error
}

// Checkpoint says how far an Apply has come. Everything before it is durable on the targets.
type Checkpoint struct {
	Manifest   []byte `json:"manifest"`    // SHA-256 of header and manifest: a checkpoint is of one payload only
	Operations int    `json:"operations"`  // that are done, over all partitions
	Offset     int64  `json:"offset"`      // of the first blob byte that is not
	SignedHash []byte `json:"signed_hash"` // state of the running SHA-256 of what the signature covers
	FileHash   []byte `json:"file_hash"`   // state of that of the whole file
}

// Progress says how far an Apply is.
type Progress struct {
	Bytes, Total                int64 // of the payload, and how many of them there are
	Operations, TotalOperations int
	Resumed                     int64 // bytes that an earlier run had done
}

// ApplyOptions say where images go to, and what happens on the way.
type ApplyOptions struct {
	Targets map[string]Target // by partition name, one for each
	Resume  *Checkpoint       // nil: from the beginning
	// Checkpoint keeps a checkpoint durably. It is called at most once in CheckpointEvery, after the targets were flushed.
	Checkpoint      func(Checkpoint) error
	CheckpointEvery time.Duration // 0 means one second
	Progress        func(Progress)
	// ExpectedSHA256 is that of the whole file, as the server announced it; nil if unknown.
	ExpectedSHA256 *[32]byte
	Workers        int // 0: one for each processor
}

// Apply writes the images. When it returns nil, the signature of a pinned key holds for every byte that was obeyed, every operation's data
// had its hash, and the targets are flushed. Whether the medium holds what was written is for the caller to find out, by reading it back and
// comparing with Partition.SHA256.
func (p *Payload) Apply(ctx context.Context, opt ApplyOptions) error {
	if p.keys.Len() == 0 {
		return ErrNoKey
	}
	for _, q := range p.Partitions {
		if opt.Targets[q.Name] == nil {
			return fmt.Errorf("%w: nowhere to write partition %q to", ErrTarget, q.Name)
		}
	}
	if opt.CheckpointEvery == 0 {
		opt.CheckpointEvery = time.Second
	}
	if opt.Workers <= 0 {
		opt.Workers = runtime.GOMAXPROCS(0)
	}
	var ops []operation
	for _, q := range p.Partitions {
		ops = append(ops, q.ops...)
	}
	a := &apply{p: p, opt: opt, ops: ops, signed: sha256.New(), file: sha256.New(), done: make([]bool, len(ops)), states: make([]state, len(ops))}
	a.signed.Write(p.metadata)
	a.file.Write(p.metadata)
	a.file.Write(p.metaSig)
	if err := a.resume(); err != nil {
		return err
	}
	return a.run(ctx)
}

type state struct {
	offset       int64
	signed, file []byte
}

type apply struct {
	p            *Payload
	opt          ApplyOptions
	ops          []operation
	signed, file hash.Hash
	first        int   // operation to begin with
	offset       int64 // of its blob

	mu     sync.Mutex
	done   []bool
	states []state // after each operation's blob was read
	mark   int     // all operations before it are done
	last   time.Time
}

// resume takes over a checkpoint of the same payload. One of another payload is no error: the work begins anew.
func (a *apply) resume() error {
	c := a.opt.Resume
	if c == nil || string(c.Manifest) != string(a.p.ManifestSHA256[:]) {
		return nil
	}
	if c.Operations < 0 || c.Operations > len(a.ops) || c.Offset < 0 || c.Offset > a.p.sigOff {
		return nil
	}
	var want int64
	for _, op := range a.ops[:c.Operations] {
		want += op.n
	}
	signed, file := sha256.New(), sha256.New()
	if want != c.Offset || signed.(encoding.BinaryUnmarshaler).UnmarshalBinary(c.SignedHash) != nil || file.(encoding.BinaryUnmarshaler).UnmarshalBinary(c.FileHash) != nil {
		return nil
	}
	// A state that was made up cannot help anybody: the signature at the end is over what was really hashed, and the image is read back.
	a.signed, a.file, a.first, a.offset, a.mark = signed, file, c.Operations, c.Offset, c.Operations
	for i := range a.first {
		a.done[i] = true
	}
	return nil
}

type job struct {
	i    int
	data []byte
}

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
	var wg sync.WaitGroup
	for range a.opt.Workers {
		wg.Go(func() {
			d := &decoder{}
			defer func() {
				if d.zstd != nil {
					d.zstd.Close()
				}
			}()
			for j := range jobs {
				if ctx.Err() == nil {
					if err := a.do(d, j); err != nil {
						cancel(err)
					} else if err := a.finished(ctx, j.i); err != nil {
						cancel(err)
					}
				}
				free <- j.data
			}
		})
	}
	readErr := a.read(ctx, r, jobs, free)
	close(jobs)
	wg.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if readErr != nil {
		return readErr
	}
	return a.end(ctx, r)
}

// read reads the blobs in order, hashes them, and hands them out.
func (a *apply) read(ctx context.Context, r io.Reader, jobs chan<- job, free <-chan []byte) error {
	pos := a.offset
	for i := a.first; i < len(a.ops); i++ {
		op := a.ops[i]
		var buf []byte
		select {
		case buf = <-free:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if int64(cap(buf)) < op.n {
			buf = make([]byte, op.n)
		}
		buf = buf[:op.n]
		for at := 0; at < len(buf); { // in pieces, so that progress moves and memory stays in the cache
			n, err := io.ReadFull(r, buf[at:min(len(buf), at+256<<10)])
			if err != nil {
				return fmt.Errorf("%w at byte %d: %w", ErrSource, a.p.blobs+pos+int64(at+n), err)
			}
			at += n
			a.progress(pos + int64(at))
		}
		a.signed.Write(buf)
		a.file.Write(buf)
		pos += op.n
		s := state{offset: pos}
		s.signed, _ = a.signed.(encoding.BinaryMarshaler).MarshalBinary()
		s.file, _ = a.file.(encoding.BinaryMarshaler).MarshalBinary()
		a.mu.Lock()
		a.states[i] = s
		a.mu.Unlock()
		select {
		case jobs <- job{i, buf}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

func (a *apply) progress(blob int64) {
	if a.opt.Progress == nil {
		return
	}
	a.mu.Lock()
	mark := a.mark
	a.mu.Unlock()
	resumed := int64(0)
	if a.first > 0 {
		resumed = a.p.blobs + a.offset
	}
	a.opt.Progress(Progress{Bytes: a.p.blobs + blob, Total: a.p.Size, Operations: mark, TotalOperations: len(a.ops), Resumed: resumed})
}

// do checks, decodes and writes one operation.
func (a *apply) do(d *decoder, j job) error {
	op := a.ops[j.i]
	part := &a.p.Partitions[op.part]
	fail := func(kind error, err error) error {
		return fmt.Errorf("%w: partition %q, operation %d (%s): %w", kind, part.Name, j.i, op.kind, err)
	}
	target := a.opt.Targets[part.Name]
	if op.kind == Zero || op.kind == Discard {
		zeros := make([]byte, min(op.out, 1<<20))
		for _, e := range op.dst {
			for at := int64(0); at < e.n; at += int64(len(zeros)) {
				if _, err := target.WriteAt(zeros[:min(int64(len(zeros)), e.n-at)], e.off+at); err != nil {
					return fail(ErrTarget, err)
				}
			}
		}
		return nil
	}
	if got := sha256.Sum256(j.data); got != op.hash {
		return fail(ErrHash, fmt.Errorf("data has SHA-256 %x, want %x", got, op.hash))
	}
	out, err := d.decode(op.kind, j.data, op.out, a.p.Major == 1)
	if err != nil {
		return fail(ErrMalformed, err)
	}
	if rest := len(out) % blockSize; rest != 0 { // major 1 pads the last block with zeros
		out = append(out, make([]byte, blockSize-rest)...)
	}
	for _, e := range op.dst {
		n := min(e.n, int64(len(out)))
		if n == 0 {
			break
		}
		if _, err := target.WriteAt(out[:n], e.off); err != nil {
			return fail(ErrTarget, err)
		}
		out = out[n:]
	}
	return nil
}

// finished moves the mark and makes a checkpoint if one is due.
func (a *apply) finished(ctx context.Context, i int) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.done[i] = true
	for a.mark < len(a.done) && a.done[a.mark] {
		a.mark++
	}
	if a.opt.Checkpoint == nil || a.mark == a.first || time.Since(a.last) < a.opt.CheckpointEvery {
		return nil
	}
	return a.checkpoint()
}

// checkpoint flushes the targets and keeps how far everything has come. The caller holds the lock.
func (a *apply) checkpoint() error {
	mark := a.mark
	if mark == 0 || a.states[mark-1].signed == nil {
		return nil
	}
	if err := a.flush(); err != nil {
		return err
	}
	s := a.states[mark-1]
	err := a.opt.Checkpoint(Checkpoint{Manifest: a.p.ManifestSHA256[:], Operations: mark, Offset: s.offset, SignedHash: s.signed, FileHash: s.file})
	if err != nil {
		return fmt.Errorf("keeping a checkpoint: %w", err)
	}
	a.last = time.Now()
	return nil
}

func (a *apply) flush() error {
	for name, t := range a.opt.Targets {
		if err := t.Flush(); err != nil {
			return fmt.Errorf("%w: flushing partition %q: %w", ErrTarget, name, err)
		}
	}
	return nil
}

// end reads the signatures and checks them over everything that was obeyed.
func (a *apply) end(ctx context.Context, r io.Reader) error {
	if err := a.flush(); err != nil {
		return err
	}
	if a.opt.Checkpoint != nil {
		a.mu.Lock()
		err := a.checkpoint()
		a.mu.Unlock()
		if err != nil {
			return err
		}
	}
	sigs := make([]byte, a.p.sigSize)
	if _, err := io.ReadFull(r, sigs); err != nil {
		return fmt.Errorf("%w: reading the signatures: %w", ErrSource, err)
	}
	a.file.Write(sigs)
	if want := a.opt.ExpectedSHA256; want != nil {
		if got := [32]byte(a.file.Sum(nil)); got != *want {
			return fmt.Errorf("%w: the payload has SHA-256 %x, want %x", ErrHash, got, *want)
		}
	}
	signers, err := a.p.keys.verify(sigs, [32]byte(a.signed.Sum(nil)))
	if err == nil {
		err = a.p.keys.judge(signers, a.p.MaxTimestamp, a.p.floor)
	}
	if err != nil {
		return fmt.Errorf("the payload's signature: %w", err)
	}
	a.progress(a.p.sigOff + a.p.sigSize)
	return nil
}
