package omaha

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// meteredBody reads one connection's answer. It keeps to the rate limit and gives up a connection that falls below the
// minimum rate. Only the time spent waiting for the network counts: a slow disk behind the reader is not the server's fault.
type meteredBody struct {
	d      *Download
	ctx    context.Context
	cancel context.CancelCauseFunc
	body   io.Closer
	buf    *bufio.Reader
	url    string

	got    int64         // bytes in the window that is being measured
	waited time.Duration // how long they took
}

func (m *meteredBody) Close() error {
	m.cancel(context.Canceled)
	return m.body.Close()
}

func (m *meteredBody) Read(p []byte) (int, error) {
	if len(p) > readChunk {
		p = p[:readChunk]
	}
	var n int
	err := m.timed(func() (err error) { n, err = m.buf.Read(p); return err })
	if n > 0 && m.d.http.limiter != nil {
		if err := m.d.http.limiter.WaitN(m.ctx, n); err != nil && m.ctx.Err() != nil {
			return n, context.Cause(m.ctx)
		}
	}
	if err == nil {
		err = m.measure(n)
	} else {
		m.got += int64(n)
	}
	return n, err
}

// timed runs one blocking read. When it takes longer than a whole window the connection is cut.
func (m *meteredBody) timed(read func() error) error {
	start := m.d.opt.Now()
	var watch *time.Timer
	if m.d.opt.MinRate > 0 {
		watch = time.AfterFunc(m.d.opt.Window, func() { m.cancel(ErrTooSlow) })
	}
	err := read()
	if watch != nil {
		watch.Stop()
	}
	m.waited += m.d.opt.Now().Sub(start)
	if err != nil && errors.Is(context.Cause(m.ctx), ErrTooSlow) {
		return m.slow()
	}
	return err
}

func (m *meteredBody) measure(n int) error {
	m.got += int64(n)
	if m.waited < m.d.opt.Window {
		return nil
	}
	if m.d.opt.MinRate > 0 && float64(m.got) < float64(m.d.opt.MinRate)*m.waited.Seconds() {
		return m.slow()
	}
	m.got, m.waited = 0, 0
	return nil
}

func (m *meteredBody) slow() error {
	return fmt.Errorf("%w: %d bytes in %s", ErrTooSlow, m.got, m.waited.Round(time.Millisecond))
}

// peek looks at the beginning of the body without taking it.
func (m *meteredBody) peek(n int) ([]byte, error) {
	var head []byte
	err := m.timed(func() (err error) { head, err = m.buf.Peek(n); return err })
	return head, err
}

// ended says whether the body really ends here: a stream that goes on is not the payload that was announced.
func (m *meteredBody) ended() error {
	var more [1]byte
	var n int
	m.timed(func() (err error) { n, err = m.buf.Read(more[:]); return err })
	if n > 0 {
		return fmt.Errorf("%w: it goes on after %d bytes", ErrSize, m.d.offer.Size)
	}
	return nil // every byte is here; how the connection ends does not matter
}
