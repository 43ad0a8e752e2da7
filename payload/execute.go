package payload

import (
	"crypto/sha256"
	"fmt"
	"io"

	"github.com/flipside-linux/flipside/payload/bsdiff"
)

// worker carries out one operation at a time. It keeps its buffers and the tables of its decoders.
type worker struct {
	*apply
	decoder decoder
	patcher bsdiff.Patcher
	old     []byte
	buf     []byte
}

func (w *worker) close() { w.decoder.close() }

// trim lets go of buffers that only a large operation needed.
func (w *worker) trim() {
	if cap(w.old) > keepBuffer {
		w.old = nil
	}
	w.decoder.trim()
}

// do checks, decodes and writes one operation.
func (w *worker) do(j job) error {
	op := &w.ops[j.i]
	part := &w.p.Partitions[op.part]
	if err := w.operation(op, part, j.data); err != nil {
		return fmt.Errorf("partition %q, operation %d (%s): %w", part.Name, j.i, op.kind, err)
	}
	return nil
}

func (w *worker) operation(op *operation, part *Partition, data []byte) error {
	to := &scatter{w: w.opt.Targets[part.Name], extents: op.dst, trace: w.trace}
	switch op.kind {
	case Zero, Discard:
		return w.zeros(to, op.out)
	case Move, SourceCopy:
		return w.copy(to, op, part)
	}
	stop := w.trace.time(TraceHash)
	got := sha256.Sum256(data)
	stop()
	if got != op.hash {
		return fmt.Errorf("%w: data has SHA-256 %x, want %x", ErrHash, got, op.hash)
	}
	var out []byte
	var err error
	if len(op.src) > 0 {
		out, err = w.patch(op, part, data)
	} else {
		defer w.trace.output(op.kind, op.out)
		stop := w.trace.decode(op.kind)
		out, err = w.decoder.decode(op.kind, data, op.out, w.p.Major == 1)
		stop()
		if err != nil {
			err = fmt.Errorf("%w: %w", ErrMalformed, err)
		}
	}
	if err != nil {
		return err
	}
	if rest := len(out) % blockSize; rest != 0 { // the last block is padded with zeros
		out = append(out, make([]byte, blockSize-rest)...)
	}
	_, err = to.Write(out)
	return err
}

func (w *worker) zeros(to io.Writer, n int64) error {
	buf := w.buffer()
	clear(buf)
	for ; n > 0; n -= int64(len(buf)) {
		if _, err := to.Write(buf[:min(int64(len(buf)), n)]); err != nil {
			return err
		}
	}
	return nil
}

func (w *worker) buffer() []byte {
	if w.buf == nil {
		w.buf = make([]byte, copyBuffer)
	}
	return w.buf
}

// copy copies blocks of the old image. Where there is a hash of them, it is checked before the first one is written: what fits into the buffer is
// read once, more is read twice, and hashed both times.
func (w *worker) copy(to io.Writer, op *operation, part *Partition) error {
	buf := w.buffer()
	pass := func(write bool) error {
		from, h := &gather{r: w.opt.Sources[part.Name], extents: op.src}, sha256.New()
		for left := op.in; left > 0; left -= int64(len(buf)) {
			b := buf[:min(int64(len(buf)), left)]
			if err := w.fetch(from, b); err != nil {
				return err
			}
			if op.srcHash != nil {
				stop := w.trace.time(TraceHash)
				h.Write(b)
				stop()
			}
			if write {
				if _, err := to.Write(b); err != nil {
					return err
				}
			}
		}
		if got := [32]byte(h.Sum(nil)); op.srcHash != nil && got != *op.srcHash {
			return fmt.Errorf("%w: its old blocks have SHA-256 %x, want %x", ErrBase, got, *op.srcHash)
		}
		return nil
	}
	defer w.trace.output(op.kind, op.out)
	if op.in > int64(len(buf)) {
		if op.srcHash != nil {
			if err := pass(false); err != nil {
				return err
			}
		}
		return pass(true)
	}
	if err := pass(false); err != nil {
		return err
	}
	_, err := to.Write(buf[:op.in])
	return err
}

func (w *worker) fetch(from io.Reader, b []byte) error {
	defer w.trace.time(TraceSource)()
	if _, err := io.ReadFull(from, b); err != nil {
		return fmt.Errorf("%w: reading old blocks: %w", ErrBase, err)
	}
	return nil
}

// patch reads the old blocks, checks their hash, and makes the new ones.
func (w *worker) patch(op *operation, part *Partition, data []byte) ([]byte, error) {
	if int64(cap(w.old)) < op.in {
		w.old = make([]byte, op.in)
	}
	old := w.old[:op.in]
	if err := w.fetch(&gather{r: w.opt.Sources[part.Name], extents: op.src}, old); err != nil {
		return nil, err
	}
	if op.srcHash != nil {
		stop := w.trace.time(TraceHash)
		got := sha256.Sum256(old)
		stop()
		if got != *op.srcHash {
			return nil, fmt.Errorf("%w: its old blocks have SHA-256 %x, want %x", ErrBase, got, *op.srcHash)
		}
	}
	out := w.decoder.buffer(op.out)
	defer w.trace.output(op.kind, op.out)
	defer w.trace.decode(op.kind)()
	if err := w.patcher.Apply(out[:op.gives], old[:op.use], data); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return out[:op.gives], nil
}

// gather reads extents one after the other.
type gather struct {
	r       io.ReaderAt
	extents []extent
	pos     int64 // in the first one
}

func (g *gather) Read(p []byte) (int, error) {
	for len(g.extents) > 0 && g.pos == g.extents[0].n {
		g.extents, g.pos = g.extents[1:], 0
	}
	if len(g.extents) == 0 {
		return 0, io.EOF
	}
	e := g.extents[0]
	p = p[:min(int64(len(p)), e.n-g.pos)]
	if e.hole {
		clear(p)
		g.pos += int64(len(p))
		return len(p), nil
	}
	n, err := g.r.ReadAt(p, e.off+g.pos)
	g.pos += int64(n)
	if n == len(p) {
		return n, nil
	}
	// In major 1 the old image may end within its last block; what a patch sees of it ends there as well.
	if err == io.EOF && g.pos > 0 && e.n-g.pos < blockSize {
		clear(p[n:])
		g.pos += int64(len(p) - n)
		return len(p), nil
	}
	return n, err
}

// scatter writes to extents one after the other.
type scatter struct {
	w       io.WriterAt
	extents []extent
	pos     int64 // in the first one
	trace   *Trace
}

func (s *scatter) Write(p []byte) (int, error) {
	defer s.trace.time(TraceWrite)()
	done := 0
	for len(p) > 0 {
		for len(s.extents) > 0 && s.pos == s.extents[0].n {
			s.extents, s.pos = s.extents[1:], 0
		}
		if len(s.extents) == 0 {
			return done, fmt.Errorf("%w: more than the operation has room for", ErrMalformed)
		}
		e := s.extents[0]
		n := min(int64(len(p)), e.n-s.pos)
		if !e.hole {
			if _, err := s.w.WriteAt(p[:n], e.off+s.pos); err != nil {
				return done, fmt.Errorf("%w: %w", ErrTarget, err)
			}
		}
		p, s.pos, done = p[n:], s.pos+n, done+int(n)
	}
	return done, nil
}
