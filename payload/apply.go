package payload

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding"
	"fmt"
	"hash"
	"io"
	"runtime"
	"slices"
	"sync"
	"time"
)

// Target is where an image is written. Its methods are called from several goroutines.
type Target interface {
	io.WriterAt
	// Flush makes what was written durable.
	Flush() error
}

// Settler is a [Target] that can read back what is final while the rest is still written. Apply calls Settle with ever larger numbers, and again
// before the last call has returned; the bytes before upto are not written to any more.
type Settler interface {
	Settle(upto int64) error
}

// Checkpoint says how far an Apply has come. Everything before it is durable on the targets.
type Checkpoint struct {
	Manifest   []byte `json:"manifest"`            // SHA-256 of header and manifest: a checkpoint is of one payload only
	Operations int    `json:"operations"`          // that are done, over all partitions
	Offset     int64  `json:"offset"`              // of the first blob byte that is not
	SignedHash []byte `json:"signed_hash"`         // state of the running SHA-256 of what the signature covers
	FileHash   []byte `json:"file_hash,omitempty"` // state of that of the whole file, where it was announced
}

// Step says what an Apply is doing.
type Step string

// The steps of an Apply, in their order.
const (
	StepChecking Step = "checking the old image"
	StepWriting  Step = "writing"
)

// Progress says how far an Apply is.
type Progress struct {
	Step                        Step
	Bytes, Total                int64 // of the payload, and how many of them there are; of the old images while they are checked
	Operations, TotalOperations int
	Resumed                     int64 // bytes that an earlier run had done
	Copied, Written             int64 // bytes of the images that came from the old ones, and all of them
	Elapsed                     time.Duration
}

// ApplyOptions say where images go to, and what happens on the way.
type ApplyOptions struct {
	Targets map[string]Target // by partition name, one for each
	// Sources are the old images, by partition name, for each partition with OldSize > 0. They are only read; before anything is
	// written, their first OldSize bytes must have OldSHA256.
	Sources map[string]io.ReaderAt
	// SourcesChecked says that the caller has had CheckSources find them right.
	SourcesChecked bool
	Resume         *Checkpoint // nil: from the beginning
	// Checkpoint keeps a checkpoint durably. It is called at most once in CheckpointEvery, after the targets were flushed.
	Checkpoint      func(Checkpoint) error
	CheckpointEvery time.Duration // 0 means one second
	// Progress is called often, from one goroutine.
	Progress func(Progress)
	// ExpectedSHA256 is that of the whole file, as the server announced it; nil if unknown.
	ExpectedSHA256 *[32]byte
	Workers        int // 0: one for each processor, eight at most, or four where data is compressed with bzip2 or there are patches
	Trace          *Trace
}

// Bounds of the memory for the decoders' tables on large machines. Those of bzip2, which patches may hold as well, are large.
const (
	maxWorkers      = 8
	maxBzip2Workers = 4
)

// memoryBudget is how many bytes of data, old blocks and images may be in memory at a time. An operation that takes more is carried out alone.
const memoryBudget = 24 << 20

// Apply writes the images. When it returns nil, the signature of a pinned key holds for every byte that was obeyed, every operation's data
// had its hash, and the targets are flushed. Whether the medium holds what was written is for the caller to find out, by reading it back and
// comparing with Partition.SHA256, as [FileTarget] and its Verify do.
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
	var ops []operation
	for _, q := range p.Partitions {
		ops = append(ops, q.ops...)
	}
	if opt.Workers <= 0 {
		opt.Workers = min(runtime.GOMAXPROCS(0), maxWorkers)
		if slices.ContainsFunc(ops, func(op operation) bool { return op.kind == ReplaceBZ || len(op.src) > 0 && op.n > 0 }) {
			opt.Workers = min(opt.Workers, maxBzip2Workers)
		}
	}
	a := &apply{
		p: p, opt: opt, ops: ops, signed: sha256.New(), done: make([]bool, len(ops)), states: map[int]state{},
		budget: newBudget(memoryBudget), settle: newSettling(p.Partitions, opt.Targets), from: time.Now(), trace: opt.Trace,
	}
	a.signed.Write(p.metadata)
	if opt.ExpectedSHA256 != nil {
		a.file = sha256.New()
		a.file.Write(p.metadata)
		a.file.Write(p.metaSig)
	}
	a.resume()
	if !opt.SourcesChecked {
		stop := opt.Trace.time(TraceSource)
		err := p.CheckSources(ctx, opt.Sources, opt.Progress)
		stop()
		if err != nil {
			return err
		}
	}
	return a.run(ctx)
}

type state struct {
	offset       int64
	signed, file []byte
}

type apply struct {
	p      *Payload
	opt    ApplyOptions
	ops    []operation
	signed hash.Hash
	file   hash.Hash // nil if nobody said what it should be
	first  int       // operation to begin with
	offset int64     // of its blob
	budget *budget
	settle *settling
	from   time.Time
	trace  *Trace

	mu              sync.Mutex
	done            []bool
	states          map[int]state // after the blobs of operations that are read and not yet before the mark
	mark            int           // all operations before it are done
	last            time.Time
	read            int64 // of the blobs
	copied, written int64

	checkpointing sync.Mutex
}

// resume takes over a checkpoint of the same payload. One of another payload is no error: the work begins anew.
func (a *apply) resume() {
	c := a.opt.Resume
	if c == nil || !bytes.Equal(c.Manifest, a.p.ManifestSHA256[:]) {
		return
	}
	if c.Operations < 0 || c.Operations > len(a.ops) || c.Offset < 0 || c.Offset > a.p.sigOff {
		return
	}
	var want int64
	for _, op := range a.ops[:c.Operations] {
		want += op.n
	}
	signed, file := sha256.New(), a.file
	if want != c.Offset || signed.(encoding.BinaryUnmarshaler).UnmarshalBinary(c.SignedHash) != nil {
		return
	}
	if file != nil {
		file = sha256.New()
		if file.(encoding.BinaryUnmarshaler).UnmarshalBinary(c.FileHash) != nil {
			return
		}
	}
	// A state that was made up cannot help anybody: the signature at the end is over what was really hashed, and the image is read back.
	a.signed, a.file, a.first, a.offset, a.mark, a.read = signed, file, c.Operations, c.Offset, c.Operations, c.Offset
	for i := range a.first {
		a.done[i] = true
	}
}

// CheckSources makes sure that the old images are those that the payload is made for: that the first OldSize bytes of each have OldSHA256. Apply does
// it before it writes; a caller who gives something up before that, as a host does with its other slot, asks earlier. progress may be nil.
func (p *Payload) CheckSources(ctx context.Context, sources map[string]io.ReaderAt, progress func(Progress)) error {
	var done, total int64
	for _, q := range p.Partitions {
		if total += q.OldSize; q.OldSize > 0 && sources[q.Name] == nil {
			return fmt.Errorf("%w: partition %q needs its old image, and there is none", ErrBase, q.Name)
		}
	}
	if total == 0 {
		return nil
	}
	from, buf := time.Now(), make([]byte, copyBuffer)
	for _, q := range p.Partitions {
		h := sha256.New()
		for off := int64(0); off < q.OldSize; {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			b := buf[:min(int64(len(buf)), q.OldSize-off)]
			if n, err := sources[q.Name].ReadAt(b, off); n < len(b) {
				return fmt.Errorf("%w: reading the old partition %q at byte %d: %w", ErrBase, q.Name, off+int64(n), err)
			}
			h.Write(b)
			off += int64(len(b))
			done += int64(len(b))
			if progress != nil {
				progress(Progress{Step: StepChecking, Bytes: done, Total: total, Elapsed: time.Since(from)})
			}
		}
		if got := [32]byte(h.Sum(nil)); q.OldSize > 0 && got != q.OldSHA256 {
			return fmt.Errorf("%w: the old partition %q has SHA-256 %x, want %x", ErrBase, q.Name, got, q.OldSHA256)
		}
	}
	return nil
}

func (a *apply) progress() {
	if a.opt.Progress == nil {
		return
	}
	a.mu.Lock()
	g := Progress{
		Step: StepWriting, Bytes: a.p.blobs + a.read, Total: a.p.Size, Operations: a.mark, TotalOperations: len(a.ops), Copied: a.copied, Written: a.written, Elapsed: time.Since(a.from),
	}
	a.mu.Unlock()
	if a.first > 0 {
		g.Resumed = a.p.blobs + a.offset
	}
	a.opt.Progress(g)
}

// end reads the signatures and checks them over everything that was obeyed.
func (a *apply) end(r io.Reader) error {
	if err := a.flush(); err != nil {
		return err
	}
	if a.opt.Checkpoint != nil {
		if err := a.checkpoint(); err != nil {
			return err
		}
	}
	sigs := make([]byte, a.p.sigSize)
	if _, err := io.ReadFull(r, sigs); err != nil {
		return fmt.Errorf("%w: reading the signatures: %w", ErrSource, err)
	}
	if want := a.opt.ExpectedSHA256; want != nil {
		a.file.Write(sigs)
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
	a.mu.Lock()
	a.read = a.p.sigOff + a.p.sigSize
	a.mu.Unlock()
	a.progress()
	return nil
}
