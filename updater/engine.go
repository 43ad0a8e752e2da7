package updater

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
)

// Server is the update server as the engine sees it.
type Server interface {
	// Check asks for an update. A failure is in the event's Err.
	Check(ctx context.Context, ask AskServer) Answered
	// Report sends one event.
	Report(ctx context.Context, r omaha.Event) error
}

// Installer is the disk as the engine sees it.
type Installer interface {
	// Facts looks at the boot and the disk.
	Facts(ctx context.Context) (Facts, error)
	// Apply makes the slot of u unbootable, writes the payload to it and verifies what it wrote. Data given to checkpoint is durable
	// on the slot. An *[ApplyError] says whether the same payload may be tried again.
	Apply(ctx context.Context, u Update, checkpoint func(json.RawMessage), progress func(Progress)) error
	// Arm makes the slot that the last Apply verified boot next. Without such an Apply in this process it is an error; but the slot of a
	// rollback was good once, and nothing was written to it since.
	Arm(ctx context.Context, u Update) error
	// Disarm makes a slot that is not running, or whose trial failed, unbootable.
	Disarm(ctx context.Context, slot string) error
	// Stay undoes the Arm of a rollback: the slot is again what the running one falls back to. booted says that the machine was started
	// since, so that the slot may have been tried.
	Stay(ctx context.Context, slot string, booted bool) error
	// Confirm marks the running slot successful.
	Confirm(ctx context.Context) error
	// Slots describes all slots.
	Slots(ctx context.Context) ([]SlotStatus, error)
}

// Gatekeeper asks the gates, and speaks with the cluster's semaphore.
type Gatekeeper interface {
	// With waive, the host's own gates before the reboot are asked but cannot be against it.
	Ask(ctx context.Context, stage Stage, o omaha.Offer, waive bool) GatesAnswered
	// Forecast says what the gates of a stage would answer to an offer, and changes nothing: no place in a queue is taken.
	Forecast(ctx context.Context, stage Stage, o omaha.Offer) []reboot.Answer
	// Changed returns when an answer of the reboot gates may have changed, without polling.
	Changed(ctx context.Context, o omaha.Offer) error
	// Rebooting tells the semaphore that the reboot is about to happen. An error means that the slot is not held any more.
	Rebooting(ctx context.Context, o omaha.Offer, waive bool) error
	// Booted tells the semaphore that the host is up again; whether it is well comes with the verdict.
	Booted(ctx context.Context) error
	// Leave takes the claim back.
	Leave(ctx context.Context, reason string) error
	// Verdict says how the reboot went and frees the slot. Doing it again does nothing.
	Verdict(ctx context.Context, v Verdict) error
}

// ApplyError is a failed Apply.
type ApplyError struct {
	Err       error
	Code      int  // Omaha error code
	Transient bool // the network, not the payload, is to blame
}

func (e *ApplyError) Error() string { return e.Err.Error() }
func (e *ApplyError) Unwrap() error { return e.Err }

// Progress says how far an Apply is.
type Progress struct {
	Done  int64   `json:"done"`  // bytes of the payload
	Total int64   `json:"total"` // size of the payload
	Rate  float64 `json:"rate"`  // bytes per second, lately
	Step  string  `json:"step"`  // what is being done, in a word

	Resumed int64 `json:"resumed,omitempty"` // bytes that an earlier attempt had brought
}

// Engine carries out what [Core] decides.
type Engine struct {
	Core      *Core
	Store     Store
	Server    Server
	Installer Installer
	Gates     Gatekeeper
	Health    func(context.Context) (good bool, reason string)
	Rebooter  reboot.Rebooter
	Log       *slog.Logger
	// Told gets every note, in order, beside the log. Nil is nobody. It must not block for long.
	Told func(Note)

	beat     atomic.Int64 // when the loop was last seen to work, Unix nanoseconds
	start    sync.Once
	events   chan any // Event or request
	mu       sync.Mutex
	view     Status
	watching bool
	change   chan struct{} // closed and replaced when the view changes
}

// request is a function that runs in the loop, between two steps.
type request struct {
	run  func() []Effect
	err  error // what could not be done of it
	done chan struct{}
}

// rebootPatience is how long a reboot may take to kill this process before it counts as failed.
const rebootPatience = 10 * time.Minute

// Run works until ctx is done, which is not an error, or until the rebooter wants the process to end (*[reboot.ExitError]).
func (e *Engine) Run(ctx context.Context) error {
	e.start.Do(func() { e.events = make(chan any, 16) })
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()

	facts, err := e.Installer.Facts(ctx)
	if err != nil {
		return fmt.Errorf("looking at the disk: %w", err)
	}
	exit := make(chan error, 1)
	launch := func(f func(context.Context) Event) {
		wg.Go(func() {
			ev := f(ctx)
			if ev == nil || ctx.Err() != nil {
				return
			}
			select {
			case e.events <- ev:
			case <-ctx.Done():
			}
		})
	}
	if _, err := e.perform(ctx, e.Core.Step(time.Now(), Start{facts}), launch, exit); err != nil {
		return ignoreCancel(ctx, err)
	}
	e.Tell(e.Core.about(Note{Kind: Started, Text: fmt.Sprintf("flipsided runs: release %s from %s, %s", facts.Version, facts.Running, e.Core.State.Phase)}))
	defer func() { e.Tell(e.Core.about(Note{Kind: Stopping, Text: "flipsided ends"})) }()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	watch := sleepwatch{uptime: omaha.Uptime}
	for {
		if slept := watch.look(time.Now()); slept > 0 {
			e.Log.Info("the machine was suspended; what fell due meanwhile is done now", "for", slept.Round(time.Second))
			e.Core.Slept(slept)
		}
		e.publish()
		e.beat.Store(time.Now().UnixNano())
		wait := time.Hour
		if next := e.Core.Next(); !next.IsZero() {
			// Never longer than a minute: a suspend is noticed when the timer next fires.
			wait = max(0, min(time.Until(next), time.Minute))
		}
		timer.Reset(wait)
		var effects []Effect
		var asked *request
		select {
		case <-ctx.Done():
			return nil
		case err := <-exit:
			return err
		case <-timer.C:
			effects = e.Core.Step(time.Now(), Wake{})
		case ev := <-e.events:
			switch ev := ev.(type) {
			case *request:
				effects, asked = ev.run(), ev
			case Event:
				switch ev.(type) {
				case ApplyFailed, ArmedNow, ArmFailed, Confirmed, ConfirmFailed:
					e.look(ctx)
				}
				effects = e.Core.Step(time.Now(), ev)
				if _, ok := ev.(GatesAnswered); ok && e.Core.Queued() {
					e.watchGates(launch) // once for each answer
				}
			}
		}
		failed, err := e.perform(ctx, effects, launch, exit)
		if err != nil {
			return ignoreCancel(ctx, err)
		}
		if asked != nil { // only now: whoever gave an order relies on what is done
			asked.err = failed
			e.publish()
			close(asked.done)
		}
	}
}

// Beat returns when the loop was last seen to work, the zero time if it has not begun. It turns at least once a minute.
func (e *Engine) Beat() time.Time {
	if n := e.beat.Load(); n != 0 {
		return time.Unix(0, n)
	}
	return time.Time{}
}

// Tell writes a note to the log and hands it on.
func (e *Engine) Tell(n Note) {
	level := slog.LevelInfo
	if n.Warn {
		level = slog.LevelWarn
	}
	attrs := []slog.Attr{slog.String("kind", string(n.Kind))}
	for _, a := range []slog.Attr{slog.String("version", n.Version), slog.String("slot", n.Slot), slog.String("phase", string(n.Phase)), slog.String("gate", n.Gate)} {
		if a.Value.String() != "" {
			attrs = append(attrs, a)
		}
	}
	e.Log.LogAttrs(context.Background(), level, n.Text, attrs...)
	if e.Told != nil {
		e.Told(n)
	}
}

// tell is for what goes wrong while an effect is carried out.
func (e *Engine) tell(k Kind, format string, args ...any) {
	e.mu.Lock()
	n := Note{Kind: k, Warn: true, Text: fmt.Sprintf(format, args...), Version: e.view.Version, Phase: e.view.Phase}
	e.mu.Unlock()
	e.Tell(n)
}

func ignoreCancel(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// perform carries out effects in order. Those that take long are launched; they report with an event. What failed of the others is told and
// returned; err is what ends the engine.
func (e *Engine) perform(ctx context.Context, effects []Effect, launch func(func(context.Context) Event), exit chan<- error) (failed, err error) {
	for _, ef := range effects {
		switch ef := ef.(type) {
		case Save:
			if err := e.save(ctx); err != nil {
				return failed, err
			}
		case Note:
			e.Tell(ef)
		case AskServer:
			launch(func(ctx context.Context) Event { return e.Server.Check(ctx, ef) })
		case AskGates:
			launch(func(ctx context.Context) Event { return e.Gates.Ask(ctx, ef.Stage, ef.Offer, ef.Waive) })
		case Apply:
			u := *e.Core.State.Update
			launch(func(ctx context.Context) Event { return e.apply(ctx, u) })
		case Arm:
			u := *e.Core.State.Update
			launch(func(ctx context.Context) Event {
				if err := e.Installer.Arm(ctx, u); err != nil {
					return ArmFailed{err}
				}
				return ArmedNow{}
			})
		case Disarm:
			if err := e.Installer.Disarm(ctx, ef.Slot); err != nil {
				e.tell(SlotTrouble, "slot %s could not be made unbootable: %v", ef.Slot, err)
				failed = errors.Join(failed, err)
			}
			e.look(ctx)
		case Stay:
			if err := e.Installer.Stay(ctx, ef.Slot, ef.Booted); err != nil {
				e.tell(SlotTrouble, "slot %s may still boot next: %v", ef.Slot, err)
				failed = errors.Join(failed, err)
			}
			e.look(ctx)
		case Reboot:
			o := omaha.Offer{}
			if e.Core.State.Update != nil {
				o = e.Core.State.Update.Offer
			}
			first, waive := e.Core.State.Phase == Rebooting, e.Core.waive
			launch(func(ctx context.Context) Event { return e.reboot(ctx, o, ef.Reason, first, waive, exit) })
		case Health:
			launch(func(ctx context.Context) Event {
				if err := e.Gates.Booted(ctx); err != nil {
					e.tell(Semaphore, "the semaphore does not know yet that this host is up again: %v", err)
				}
				good, reason := e.Health(ctx)
				return Judged{good, reason}
			})
		case Confirm:
			launch(func(ctx context.Context) Event {
				if err := e.Installer.Confirm(ctx); err != nil {
					return ConfirmFailed{err}
				}
				return Confirmed{}
			})
		case Deliver:
			rs := append([]omaha.Event(nil), e.Core.State.Reports...)
			launch(func(ctx context.Context) Event {
				for i, r := range rs {
					if err := e.Server.Report(ctx, r); err != nil {
						e.tell(Unreported, "an event did not reach the server and is kept: %v", err)
						return Delivered{i, err}
					}
				}
				return Delivered{len(rs), nil}
			})
		case GiveVerdict:
			v := *e.Core.State.Verdict
			launch(func(ctx context.Context) Event { return VerdictTaken{e.Gates.Verdict(ctx, v)} })
		case LeaveQueue:
			if err := e.Gates.Leave(ctx, ef.Reason); err != nil {
				e.tell(Semaphore, "the claim on the semaphore could not be taken back: %v", err)
			}
		}
	}
	return failed, nil
}

// look reads the boot bits again after something was done to them, or failed: until then the core knows what it expects of them.
func (e *Engine) look(ctx context.Context) {
	f, err := e.Installer.Facts(ctx)
	if err != nil {
		e.Log.Warn("the boot bits cannot be read again; what is expected of them counts", "error", err)
		return
	}
	e.Core.Facts.Slots = f.Slots
}

// save does not give up: nothing that comes after it may begin before the state is on the disk.
func (e *Engine) save(ctx context.Context) error {
	for wait := time.Second; ; wait = min(2*wait, time.Minute) {
		err := e.Store.Save(e.Core.State)
		if err == nil {
			return nil
		}
		e.beat.Store(time.Now().UnixNano()) // it is alive, and knows what is wrong
		e.Log.Error("the state cannot be saved; nothing goes on until it can", "kind", string(StateTrouble), "error", err)
		e.Core.State.LastError, e.Core.State.ErrorAt = err.Error(), time.Now()
		e.publish()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

func (e *Engine) apply(ctx context.Context, u Update) Event {
	checkpoint := func(data json.RawMessage) {
		select {
		case e.events <- Checkpointed{data}:
		case <-ctx.Done():
		}
	}
	progress := func(p Progress) {
		e.mu.Lock()
		e.view.Progress = &p
		e.notify()
		e.mu.Unlock()
	}
	err := e.Installer.Apply(ctx, u, checkpoint, progress)
	var ae *ApplyError
	switch {
	case err == nil:
		return Applied{}
	case errors.As(err, &ae):
		return ApplyFailed{ae.Err, ae.Code, ae.Transient}
	default:
		return ApplyFailed{Err: err, Code: 1, Transient: true}
	}
}

func (e *Engine) reboot(ctx context.Context, o omaha.Offer, reason string, first, waive bool, exit chan<- error) Event {
	if first {
		if err := e.Gates.Rebooting(ctx, o, waive); err != nil {
			return RebootFailed{err}
		}
	}
	err := e.Rebooter.Reboot(ctx, reason)
	var end *reboot.ExitError
	if errors.As(err, &end) {
		exit <- end
		return nil
	}
	if err != nil {
		return RebootFailed{err}
	}
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(rebootPatience):
		return RebootFailed{fmt.Errorf("asked for %s ago, and this machine still runs", rebootPatience)}
	}
}

// watchGates turns a change of the semaphore into an event, so that a host in the queue wakes at once.
func (e *Engine) watchGates(launch func(func(context.Context) Event)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.watching || e.Core.State.Update == nil {
		return
	}
	e.watching = true
	o := e.Core.State.Update.Offer
	launch(func(ctx context.Context) Event {
		err := e.Gates.Changed(ctx, o)
		e.mu.Lock()
		e.watching = false
		e.mu.Unlock()
		if err != nil {
			return nil // asked again in due time
		}
		return GatesChanged{}
	})
}
