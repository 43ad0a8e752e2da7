package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/bus"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/control"
	"github.com/flipside-linux/flipside/updater/history"
	"github.com/flipside-linux/flipside/updater/writer"
)

// operator is what the control socket and the message bus see: the engine, and the settings of the host that can be changed at run time.
type operator struct {
	engine *updater.Engine
	conf   config.Config
	target *target
	load   func() (config.Config, error) // for a reload; nil if there is none
	reload func()                        // asks for it
	now    func() time.Time

	warnings []string // that stay while the daemon runs

	keysMu      sync.Mutex // what was last seen of the pinned keys
	keysAt      time.Time
	keyWarnings []string
	keysEnd     time.Time

	own func(context.Context) error // makes the agent's files its own again; nil: they are

	choosing  sync.Mutex                  // one choice at a time: the file holds them all
	mayGoBack func(context.Context) error // why the other slot's release may not run again; nil asks nobody
}

var _ control.Daemon = (*operator)(nil)

// target is the channel that the server is asked for, and the pin. An operator may change them while the engine runs.
type target struct {
	mu           sync.Mutex
	channel, pin string
}

func (t *target) get() (channel, pin string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.channel, t.pin
}

func (t *target) set(channel, pin string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.channel, t.pin = channel, pin
}

// Status implements control.Daemon.
func (d *operator) Status(ctx context.Context) (updater.Status, <-chan struct{}) {
	st, changed := d.engine.Status(ctx)
	st.Channel, st.Pin = d.target.get()
	st.Warnings, st.KeysEnd = d.keys()
	st.Warnings = slices.Concat(d.warnings, st.Warnings)
	if st.Phase != updater.Idle {
		return st, changed
	}
	a := pauseGate{d.conf.PauseFile()}.Ask(ctx, d.now())
	a.Gate = (pauseGate{}).Name()
	return sayPaused(st, a), changed
}

// sayPaused says in the status of an idle host that it is paused. Such a host asks its gates only about an offer, and that it is paused is worth saying before there
// is one, and before an error of the last check: without it the host would not move either.
func sayPaused(st updater.Status, a reboot.Answer) updater.Status {
	if a.Verdict == reboot.Go {
		return st
	}
	listed := slices.ContainsFunc(st.Gates, func(g reboot.Answer) bool { return g.Gate == a.Gate && g.Verdict != reboot.Go })
	if errored := st.LastError != "" && !st.ErrorAt.Before(st.LastCheck); errored || !listed {
		st.Why = a.Why
	}
	if !listed {
		st.Stage, st.Blocked = updater.BeforeDownload, true
		st.Gates = append([]reboot.Answer{a}, st.Gates...)
	}
	return st
}

// keysEvery is how often the key files are looked at for their ends.
const keysEvery = 10 * time.Minute

// keys says what the pinned keys need people for. Why none of them counts is said where a payload is refused.
func (d *operator) keys() ([]string, time.Time) {
	d.keysMu.Lock()
	defer d.keysMu.Unlock()
	now := d.now()
	if age := now.Sub(d.keysAt); d.keysAt.IsZero() || age < 0 || age > keysEvery {
		d.keysAt, d.keyWarnings, d.keysEnd = now, nil, time.Time{}
		if k, err := writer.Keys(d.conf, 0); err == nil {
			d.keyWarnings, d.keysEnd = k.Warnings(now), k.End()
		}
	}
	return d.keyWarnings, d.keysEnd
}

// Do implements control.Daemon.
func (d *operator) Do(ctx context.Context, by string, c control.Command) error {
	switch c.Action {
	case control.Check:
		return d.engine.CheckNow(ctx, by, c.Forgive...)
	case control.Pause:
		if !c.Until.IsZero() && !c.Until.After(d.now()) {
			return fmt.Errorf("%w: the pause would end at %s, which is over", control.ErrBadCommand, c.Until.Format(time.DateTime))
		}
		p := pause{Reason: c.Reason, By: by, Until: c.Until}
		if err := d.write(ctx, func() error { return p.write(d.conf.PauseFile()) }); err != nil {
			return err
		}
		return d.engine.Reconsider(ctx)
	case control.Resume:
		if err := d.write(ctx, func() error { return unpause(d.conf.PauseFile()) }); err != nil {
			return err
		}
		return d.engine.Reconsider(ctx)
	case control.SetChannel:
		return d.choose(ctx, by, "channel", c.Value, func(ch *config.Choices) **string { return &ch.Channel })
	case control.SetPin:
		return d.choose(ctx, by, "pin", c.Value, func(ch *config.Choices) **string { return &ch.Pin })
	case control.Cancel:
		return d.engine.Cancel(ctx, by)
	case control.Rollback:
		if st, _ := d.engine.Status(ctx); st.Phase == updater.Idle && !c.BelowFloor && d.mayGoBack != nil {
			if err := d.mayGoBack(ctx); err != nil { // it is asked again before the slot is armed, but here somebody listens
				return err
			}
		}
		return d.engine.GoBack(ctx, by, c.BelowFloor)
	case control.Reboot, control.RebootNow:
		return d.engine.RebootNow(ctx, by, c.Action == control.RebootNow)
	case control.Reload:
		if d.load == nil || d.reload == nil {
			return fmt.Errorf("%w: this daemon has no configuration to read again", updater.ErrNothing)
		}
		if _, err := d.load(); err != nil { // said to whoever asks, and not only to the journal
			return fmt.Errorf("the configuration cannot be used; the old one stays: %w", err)
		}
		d.reload()
		return nil
	}
	return fmt.Errorf("%w: unknown action %q", control.ErrBadCommand, c.Action)
}

// write changes a file in the state directory. One that root made there, with touch or an editor, is made the agent's own first.
func (d *operator) write(ctx context.Context, change func() error) error {
	err := change()
	if d.own == nil || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	if oerr := d.own(ctx); oerr != nil {
		return errors.Join(err, oerr)
	}
	return change()
}

// choose changes one of the operator's choices, durably first, and asks the server at once.
func (d *operator) choose(ctx context.Context, by, what, value string, field func(*config.Choices) **string) error {
	if len(value) > 64 || strings.ContainsFunc(value, func(r rune) bool { return r > unicode.MaxASCII || !unicode.IsPrint(r) || r == ' ' }) {
		return fmt.Errorf("%w: %s %q: want at most 64 printable ASCII characters without spaces", control.ErrBadCommand, what, value)
	}
	if err := d.write(ctx, func() error { return d.decide(value, field) }); err != nil {
		return err
	}
	return d.engine.CheckNow(ctx, by)
}

// decide saves a choice and aims at what follows from it.
func (d *operator) decide(value string, field func(*config.Choices) **string) error {
	d.choosing.Lock()
	defer d.choosing.Unlock()
	choices, err := config.ReadChoices(d.conf.Paths.State)
	if err != nil {
		return err
	}
	if *field(&choices) = &value; value == "" {
		*field(&choices) = nil
	}
	if err := choices.Save(d.conf.Paths.State); err != nil {
		return err
	}
	conf := d.conf
	if d.load != nil {
		if conf, err = d.load(); err != nil {
			return fmt.Errorf("the choice is saved, but the configuration cannot be used: %w", err)
		}
	} else {
		conf.Update.Channel, conf.Update.Pin = cmp.Or(deref(choices.Channel), conf.Update.Channel), cmp.Or(deref(choices.Pin), conf.Update.Pin)
	}
	d.target.set(conf.Update.Channel, conf.Update.Pin)
	return nil
}

func deref(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// Plan implements control.Daemon.
func (d *operator) Plan(ctx context.Context, channel string) (updater.Plan, error) {
	own, pin := d.target.get()
	srv := d.engine.Server
	if s, ok := srv.(*server); ok && channel != "" && channel != own {
		other := *s
		other.target = &target{channel: channel, pin: pin}
		srv = &other
	}
	p, err := d.engine.Plan(ctx, srv)
	if err != nil {
		return updater.Plan{}, fmt.Errorf("asking the server for a plan: %w", errors.Join(err, ctx.Err()))
	}
	p.Channel = cmp.Or(channel, own)
	return p, nil
}

// serveBus puts the daemon on the message bus, unless the configuration is against it.
func serveBus(ctx context.Context, d control.Daemon, c config.Config, log *slog.Logger) {
	if c.Host.Bus == "off" || (c.Host.Bus == "auto" && c.Reboot.Method != "logind") {
		return
	}
	bus.Run(ctx, d, bus.Options{Log: log, History: func(n int) ([]history.Record, error) {
		records, _, err := history.Last(c.Paths.State, n)
		return records, err
	}})
}
