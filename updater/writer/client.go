package writer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/updater/wire"
)

// ErrGone means that the writer has ended, or never began. What it did is given up; another one may be asked.
var ErrGone = errors.New("the process that writes to the disk is gone")

// patience is how long a writer may take to give up what is under way: a program to end, a flush to come back.
const patience = 20 * time.Second

// Client is the agent's end of the socket to a writer, for one update or one change of boot bits. Its methods may be called from several goroutines.
type Client struct {
	conn *net.UnixConn
	send sync.Mutex // a frame at a time

	mu    sync.Mutex
	last  uint32
	calls map[uint32]chan answer
	step  func(string)
	gone  error         // why the socket is of no use any more
	end   chan struct{} // closed when the writer's end is
}

// NewClient speaks with the writer at the other end of conn, and closes it.
func NewClient(conn *net.UnixConn) *Client {
	c := &Client{conn: conn, calls: map[uint32]chan answer{}, step: func(string) {}, end: make(chan struct{})}
	go c.read()
	return c
}

// read hands the replies out.
func (c *Client) read() {
	defer close(c.end)
	err := c.replies()
	if errors.Is(err, syscall.ECONNRESET) {
		err = io.EOF
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = fmt.Errorf("%w: %w", ErrGone, err)
	for _, reply := range c.calls {
		close(reply)
	}
	c.calls = nil
}

func (c *Client) replies() error {
	for {
		h, body, err := wire.Read(c.conn, maxBody)
		if err != nil {
			return err
		}
		c.mu.Lock()
		reply, step := c.calls[h.ID], c.step
		c.mu.Unlock()
		switch {
		case h.Kind == aStep:
			step(string(body))
		case h.Kind == aReply && reply != nil:
			var a answer
			if err := wire.Decode(body, &a); err != nil {
				return err
			}
			c.mu.Lock()
			delete(c.calls, h.ID)
			c.mu.Unlock()
			reply <- a
		default:
			return fmt.Errorf("%w: a frame of kind %d with number %d", wire.ErrFrame, h.Kind, h.ID)
		}
	}
}

// call asks for something and waits for the answer. When ctx ends before that, the answer is lost, and the client is only good to be closed.
func (c *Client) call(ctx context.Context, what call) error {
	_, err := c.ask(ctx, what)
	return err
}

func (c *Client) ask(ctx context.Context, what call) (answer, error) {
	body, err := json.Marshal(what)
	if err != nil {
		return answer{}, err
	}
	reply := make(chan answer, 1)
	c.mu.Lock()
	if c.gone != nil {
		c.mu.Unlock()
		return answer{}, c.gone
	}
	c.last++
	id := c.last
	c.calls[id] = reply
	c.mu.Unlock()
	if err := c.frame(wire.Head{Kind: aCall, ID: id}, body); err != nil {
		return answer{}, err
	}
	select {
	case a, ok := <-reply:
		if !ok {
			c.mu.Lock()
			defer c.mu.Unlock()
			return answer{}, c.gone
		}
		return a, a.err()
	case <-ctx.Done():
		return answer{}, context.Cause(ctx)
	}
}

func (c *Client) frame(h wire.Head, body []byte) error {
	c.send.Lock()
	defer c.send.Unlock()
	if err := wire.Send(c.conn, h, body); err != nil {
		return fmt.Errorf("%w: %w", ErrGone, err)
	}
	return nil
}

// onStep sets who is told what is being done.
func (c *Client) onStep(step func(string)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.step = step
}

// Begin is [Writer.Begin].
func (c *Client) Begin(ctx context.Context, r Release) error {
	for left := r.Metadata; len(left) > 0; {
		n := min(len(left), maxBody)
		if err := c.frame(wire.Head{Kind: aMetadata}, left[:n]); err != nil {
			return err
		}
		left = left[n:]
	}
	return c.call(ctx, call{Do: doBegin, Release: &r})
}

// Targets are where the images of a payload go, by the names of its partitions, once Begin was asked for it.
func (c *Client) Targets(p *payload.Payload, slot string) map[string]payload.Target {
	targets := map[string]payload.Target{}
	for i, q := range p.Partitions {
		t := target{c, uint8(i)}
		targets[q.Name] = t
		if q.Name == slot {
			targets[q.Name] = slotTarget{t}
		}
	}
	return targets
}

// target is one image. What could not be written is told by Flush.
type target struct {
	c    *Client
	part uint8
}

func (t target) WriteAt(p []byte, off int64) (int, error) {
	for done := 0; done < len(p); {
		n := min(len(p)-done, maxBody)
		if err := t.c.frame(wire.Head{Kind: aData, Part: t.part, Off: off + int64(done)}, p[done:done+n]); err != nil {
			return done, err
		}
		done += n
	}
	return len(p), nil
}

func (t target) Flush() error {
	return t.c.call(context.Background(), call{Do: doFlush, Part: int(t.part)})
}

type slotTarget struct{ target }

var _ payload.Settler = slotTarget{}

func (t slotTarget) Settle(upto int64) error {
	return t.c.call(context.Background(), call{Do: doSettle, Part: int(t.part), Upto: upto})
}

// Finish is [Writer.Finish]. step is told what is being done.
func (c *Client) Finish(ctx context.Context, step func(string)) error {
	c.onStep(step)
	return c.call(ctx, call{Do: doFinish})
}

// Prepare is [Writer.Prepare].
func (c *Client) Prepare(ctx context.Context) error { return c.call(ctx, call{Do: doPrepare}) }

// Arm is [Writer.Arm].
func (c *Client) Arm(ctx context.Context) error { return c.call(ctx, call{Do: doArm}) }

// Discard gives an update up, and what is left of its files with it.
func (c *Client) Discard(ctx context.Context) error {
	return c.call(ctx, call{Do: doClose, Discard: true})
}

// GoBack is [Writer.GoBack].
func (c *Client) GoBack(ctx context.Context, b Back) error {
	return c.call(ctx, call{Do: doBack, Back: &b})
}

// Disarm is [Writer.Disarm].
func (c *Client) Disarm(ctx context.Context, slot string) error {
	return c.call(ctx, call{Do: doDisarm, Slot: slot})
}

// Stay is [Writer.Stay].
func (c *Client) Stay(ctx context.Context, slot string, booted bool) error {
	return c.call(ctx, call{Do: doStay, Slot: slot, Booted: booted})
}

// Confirm is [Writer.Confirm].
func (c *Client) Confirm(ctx context.Context, version string) error {
	return c.call(ctx, call{Do: doConfirm, Version: version})
}

// Raise is [Writer.Raise].
func (c *Client) Raise(ctx context.Context) (rose bool, err error) {
	a, err := c.ask(ctx, call{Do: doRaise})
	return a.Rose, err
}

// Close lets the writer end, and waits until it has: then its locks on the disk are gone. What is under way is given up.
func (c *Client) Close() error {
	c.conn.CloseWrite()
	defer c.conn.Close()
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-c.end:
		return nil
	case <-late.C:
		return fmt.Errorf("the process that writes to the disk did not end within %s", patience)
	}
}
