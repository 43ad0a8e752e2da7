package writer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/wire"
)

// buffers is how many pieces of data may have been read and not yet been written.
const buffers = 3

// Serve is the writer's end of conn. It returns when the agent's end is closed, with whatever was under way given up, and closes conn. The configuration
// is read once, when something is asked for.
func Serve(ctx context.Context, conn net.Conn, load func() (config.Config, error), log *slog.Logger) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer conn.Close()
	// What was under way is given up before the agent's end sees that this one is closed: then another writer can begin.
	defer context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Now()) })()
	s := &session{conn: conn, load: load, log: log, turns: make(chan struct{}, 2)}
	err := s.run(ctx, cancel)
	if s.writer != nil {
		err = errors.Join(err, s.writer.Close(false))
	}
	return err
}

type session struct {
	conn     net.Conn
	load     func() (config.Config, error)
	log      *slog.Logger
	writer   *Writer
	metadata bytes.Buffer
	failed   error // of data
	settling sync.WaitGroup
	turns    chan struct{} // of settling, of which there are two: one flushes while the other reads back
	send     sync.Mutex    // a frame at a time
}

type frame struct {
	wire.Head
	body []byte
}

// run carries out what comes, in its order. Somebody else reads meanwhile, so that the end of the socket is seen while something takes long.
func (s *session) run(ctx context.Context, cancel func()) error {
	free, frames := make(chan []byte, buffers), make(chan frame)
	for range buffers {
		free <- nil
	}
	end := make(chan error, 1)
	go func() {
		defer close(frames)
		defer cancel()
		end <- s.read(ctx, free, frames)
	}()
	var err error
	for f := range frames {
		if err == nil {
			err = s.do(ctx, f)
			if err != nil {
				cancel() // and with that nothing more is read
			}
		}
		free <- f.body
	}
	s.settling.Wait()
	if err != nil {
		return err
	}
	return <-end
}

// read passes frames on until there are no more. Each is in one of the buffers, which grow to what is needed.
func (s *session) read(ctx context.Context, free <-chan []byte, frames chan<- frame) error {
	for {
		h, err := wire.ReadHead(s.conn, maxBody)
		if errors.Is(err, io.EOF) || ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		buf := <-free
		if uint32(cap(buf)) < h.Size {
			buf = partition.Buffer(int(h.Size))
		}
		buf = buf[:h.Size]
		if err := h.ReadBody(s.conn, buf); err != nil {
			return err
		}
		frames <- frame{h, buf}
	}
}

// do carries out one frame. Its error is one of the socket.
func (s *session) do(ctx context.Context, f frame) error {
	switch f.Kind {
	case aMetadata:
		if s.metadata.Len()+len(f.body) > maxMetadata {
			return fmt.Errorf("%w: more than %d bytes of metadata", wire.ErrFrame, maxMetadata)
		}
		s.metadata.Write(f.body)
		return nil
	case aData:
		if s.failed == nil {
			s.failed = s.write(f)
		}
		return nil
	case aCall:
		var c call
		if err := wire.Decode(f.body, &c); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil // whoever asked is gone: what was read before that is not carried out any more
		}
		return s.call(ctx, f.ID, c)
	}
	return fmt.Errorf("%w: the writer is sent a frame of kind %d", wire.ErrFrame, f.Kind)
}

func (s *session) write(f frame) error {
	if s.writer == nil {
		return fmt.Errorf("%w: data, and no release was begun", ErrOrder)
	}
	return s.writer.WriteAt(int(f.Part), f.body, f.Off)
}

// call carries out a call and answers it. Only to settle takes its time while other things go on.
func (s *session) call(ctx context.Context, id uint32, c call) error {
	if c.Do == doSettle && s.writer != nil && s.failed == nil {
		select {
		case s.turns <- struct{}{}:
		default:
			return s.reply(id, fmt.Errorf("%w: it is settling", ErrOrder))
		}
		w := s.writer
		s.settling.Go(func() {
			err := w.Settle(c.Part, c.Upto)
			<-s.turns
			_ = s.reply(id, err) // a socket that is gone is found out by whoever reads
		})
		return nil
	}
	if c.Do != doFlush {
		s.settling.Wait()
	}
	if c.Do == doRaise {
		rose, err := s.raise(ctx)
		a := answerOf(err)
		a.Rose = rose
		return s.answer(id, a)
	}
	return s.reply(id, s.carryOut(ctx, c))
}

func (s *session) raise(ctx context.Context) (bool, error) {
	if err := s.begin(); err != nil {
		return false, err
	}
	return s.writer.Raise(ctx)
}

// begin makes the writer, once.
func (s *session) begin() error {
	if s.writer == nil {
		conf, err := s.load()
		if err != nil {
			return fmt.Errorf("%w: the writer's configuration: %w", ErrGuard, err)
		}
		if s.writer, err = New(conf, s.log); err != nil {
			return fmt.Errorf("%w: %w", ErrGuard, err)
		}
	}
	return nil
}

func (s *session) carryOut(ctx context.Context, c call) error {
	if err := s.begin(); err != nil {
		return err
	}
	w := s.writer
	if s.failed != nil && c.Do != doBegin && c.Do != doClose { // what was sent is not what is there
		return s.failed
	}
	switch {
	case c.Do == doBegin && c.Release != nil:
		r := *c.Release
		r.Metadata = bytes.Clone(s.metadata.Bytes())
		s.metadata, s.failed = bytes.Buffer{}, nil
		return w.Begin(ctx, r, s.step)
	case c.Do == doBack && c.Back != nil:
		return w.GoBack(ctx, *c.Back)
	}
	switch c.Do {
	case doFlush:
		return w.Flush(c.Part)
	case doSettle:
		return w.Settle(c.Part, c.Upto)
	case doFinish:
		return w.Finish(ctx)
	case doPrepare:
		return w.Prepare(ctx)
	case doArm:
		return w.Arm()
	case doClose:
		return w.Close(c.Discard)
	case doDisarm:
		return w.Disarm(ctx, c.Slot)
	case doStay:
		return w.Stay(ctx, c.Slot, c.Booted)
	case doConfirm:
		return w.Confirm(ctx, c.Version)
	}
	return fmt.Errorf("%w: there is no %q", ErrOrder, c.Do)
}

func (s *session) reply(id uint32, err error) error {
	return s.answer(id, answerOf(err))
}

func (s *session) answer(id uint32, a answer) error {
	body, err := json.Marshal(a)
	if err != nil {
		return err
	}
	return s.frame(wire.Head{Kind: aReply, ID: id}, body)
}

func (s *session) step(text string) {
	_ = s.frame(wire.Head{Kind: aStep}, []byte(text[:min(len(text), maxText)])) // as above
}

func (s *session) frame(h wire.Head, body []byte) error {
	s.send.Lock()
	defer s.send.Unlock()
	return wire.Send(s.conn, h, body)
}
