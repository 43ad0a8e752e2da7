package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/reboot/health"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/metrics"
	"github.com/flipside-linux/flipside/updater/wire"
	"github.com/flipside-linux/flipside/updater/writer"
)

// An errand is what the agent has a process do that keeps its rights, beside writing to the disk. The agent says which one, and the configuration, which that process has
// from elsewhere, says what it is: which programs run, which file is written. For each there is a process, which ends with it.
//
// Each end sends one frame, with JSON. The agent's end is closed to give an errand up.
type errand struct {
	Do string `json:"do"`
	// Text is the reason of a reboot, or what the metrics are now.
	Text string `json:"text,omitempty"`
}

// The errands.
const (
	doHealth  = "health"  // judge this boot: health.units, health.dir
	doGates   = "gates"   // run the programs of reboot.gate_dir
	doReboot  = "reboot"  // through logind
	doMetrics = "metrics" // replace metrics.textfile, or remove it
	doOwn     = "own"     // give the agent its files in paths.state
)

// outcome is how it went.
type outcome struct {
	Failed bool            `json:"failed,omitempty"`
	Text   string          `json:"text,omitempty"`
	Check  *health.Failure `json:"check,omitempty"` // the check that found it so
}

// The frames.
const (
	anErrand wire.Kind = 1 + iota
	anOutcome
)

const (
	maxErrand  = 1 << 20   // bytes of an errand: metrics are the longest ones
	maxOutcome = 256 << 10 // bytes of an outcome: the output of a program, and what JSON makes of it
)

// Errand does the one errand that comes over conn. own gives the agent its files; nil where they are this process's as well.
func Errand(ctx context.Context, conn net.Conn, load func() (config.Config, error), own func(config.Config) error) error {
	defer conn.Close()
	var e errand
	if err := receive(conn, anErrand, maxErrand, &e); err != nil {
		return fmt.Errorf("an errand for the agent: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer cancel() // nobody waits for it any more
		conn.Read(make([]byte, 1))
	}()
	err := e.run(ctx, load, own)
	o := outcome{Failed: err != nil}
	if err != nil {
		o.Text = err.Error()[:min(len(err.Error()), 16<<10)]
		if errors.As(err, &o.Check) {
			o.Check.Reason = o.Check.Reason[:min(len(o.Check.Reason), 16<<10)]
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	return send(conn, anOutcome, o)
}

func (e errand) run(ctx context.Context, load func() (config.Config, error), own func(config.Config) error) error {
	c, err := load()
	if err != nil {
		return fmt.Errorf("the configuration: %w", err)
	}
	switch e.Do {
	case doHealth, doGates:
		// They are the operator's programs, and still have what the agent may write to before them: they run with no more rights than it has.
		Confinement(c).Self() // what is lacking is said by the agent, which lacks the same
		if e.Do == doGates {
			return gatePrograms(c).Run(ctx)
		}
		version, err := writer.RunningVersion(c)
		if err != nil {
			return err
		}
		return healthChecks(c, version).Run(ctx)
	case doReboot:
		if c.Reboot.Method != "logind" {
			return fmt.Errorf("a reboot by logind was asked for, and reboot.method is %q", c.Reboot.Method)
		}
		return reboot.Logind{}.Reboot(ctx, omaha.Printable(e.Text)) // everybody who is logged in is shown it
	case doMetrics:
		if c.Metrics.Textfile == "" {
			return errors.New("metrics.textfile is not set")
		}
		if e.Text == "" {
			return metrics.Remove(c.Metrics.Textfile)
		}
		return metrics.Replace(c.Metrics.Textfile, []byte(e.Text))
	case doOwn:
		if own == nil {
			return nil
		}
		return own(c)
	}
	return fmt.Errorf("there is no errand %q", e.Do)
}

// errands is the agent's side: connect starts a process for one.
type errands struct {
	connect func() (*net.UnixConn, error)
}

// do has an errand done. A check that failed is a *[health.Failure]. What can be done twice is tried again if its process has not begun or was ended on the way: that says nothing about
// what was asked, and the signal that stops a service reaches all that is just being started.
func (s errands) do(ctx context.Context, e errand) error {
	for again := 1; ; again++ {
		conn, err := s.connect()
		if err != nil {
			return fmt.Errorf("%w (%s): %w", errUnasked, e.Do, err)
		}
		err = e.over(ctx, conn)
		if !errors.Is(err, errUnasked) || e.Do == doReboot || again == 5 {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Duration(again) * time.Second / 4):
		}
	}
}

// over has an errand done by the process at the other end of conn, and closes that.
func (e errand) over(ctx context.Context, conn net.Conn) error {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	var o outcome
	err := send(conn, anErrand, e)
	if err == nil {
		err = receive(conn, anOutcome, maxOutcome, &o)
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return fmt.Errorf("%w (%s): %w", errUnasked, e.Do, err)
	case !o.Failed:
		return nil
	case o.Check != nil:
		return o.Check
	}
	return errors.New(o.Text)
}

// Reboot implements [reboot.Rebooter].
func (s errands) Reboot(ctx context.Context, reason string) error {
	return s.do(ctx, errand{Do: doReboot, Text: reason})
}

// health judges this boot.
func (s errands) health(ctx context.Context) error { return s.do(ctx, errand{Do: doHealth}) }

// gates runs the programs of a directory, which is the one that is configured, if there are any.
func (s errands) gates(dir string) func(context.Context) error {
	return func(ctx context.Context) error {
		if list, err := os.ReadDir(dir); errors.Is(err, fs.ErrNotExist) || err == nil && len(list) == 0 {
			return nil
		}
		return s.do(ctx, errand{Do: doGates})
	}
}

// errUnasked means that an errand may not have been done at all.
var errUnasked = errors.New("the part of the daemon that keeps its rights cannot be asked")

func send(conn net.Conn, kind wire.Kind, what any) error {
	body, err := json.Marshal(what)
	if err != nil {
		return err
	}
	return wire.Send(conn, wire.Head{Kind: kind}, body)
}

func receive(conn net.Conn, kind wire.Kind, limit uint32, to any) error {
	h, body, err := wire.Read(conn, limit)
	if err != nil {
		return err
	}
	if h.Kind != kind {
		return fmt.Errorf("%w: a frame of kind %d, where one of kind %d should be", wire.ErrFrame, h.Kind, kind)
	}
	return wire.Decode(body, to)
}
