package updater

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
)

// bench is a host for the engine: in memory, with everything that an effect can reach.
type bench struct {
	mu       sync.Mutex
	facts    Facts
	offer    *omaha.Offer
	applyErr []error // one for each Apply, then nil
	applied  int
	resumed  []string
	armed    bool
	events   []omaha.Event
	verdicts []Verdict
	gates    chan struct{} // closed when the semaphore frees
	asked    int           // times that the reboot gates were asked
	hasty    bool          // the watch returns at once, without reason
	sick     string
	slow     time.Duration // that the server thinks
	stuck    error         // what Stay and Disarm end with
}

func (b *bench) Check(context.Context, AskServer) Answered {
	time.Sleep(b.slow)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.offer == nil || b.offer.Version == b.facts.Version {
		return Answered{Reason: "up to date"}
	}
	return Answered{Offer: b.offer}
}

func (b *bench) Report(_ context.Context, ev omaha.Event) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.events = append(b.events, ev)
	return nil
}

func (b *bench) Facts(context.Context) (Facts, error) { return b.facts, nil }

func (b *bench) Apply(_ context.Context, u Update, checkpoint func(json.RawMessage), progress func(Progress)) error {
	b.mu.Lock()
	n := b.applied
	b.applied++
	b.resumed = append(b.resumed, string(u.Checkpoint))
	b.mu.Unlock()
	progress(Progress{Done: 50, Total: 100, Step: "writing"})
	checkpoint(json.RawMessage(`50`))
	if n < len(b.applyErr) {
		return b.applyErr[n]
	}
	return nil
}

func (b *bench) Arm(context.Context, Update) error           { b.armed = true; return nil }
func (b *bench) Stay(context.Context, string, bool) error    { b.armed = false; return b.stuck }
func (b *bench) Disarm(context.Context, string) error        { b.armed = false; return b.stuck }
func (b *bench) Confirm(context.Context) error               { return nil }
func (b *bench) Slots(context.Context) ([]SlotStatus, error) { return nil, nil }

func (b *bench) Forecast(context.Context, Stage, omaha.Offer) []reboot.Answer { return nil }

func (b *bench) Ask(_ context.Context, stage Stage, _ omaha.Offer, _ bool) GatesAnswered {
	a := reboot.Answer{Gate: "semaphore", Verdict: reboot.Go}
	if stage == BeforeReboot {
		b.mu.Lock()
		b.asked++
		b.mu.Unlock()
	}
	if stage == BeforeReboot && b.gates != nil {
		select {
		case <-b.gates:
		default:
			a = reboot.Answer{Gate: "semaphore", Verdict: reboot.Wait, Why: "host-a holds the only slot"}
		}
	}
	return GatesAnswered{Stage: stage, Answers: []reboot.Answer{a}}
}

func (b *bench) Changed(ctx context.Context, _ omaha.Offer) error {
	if b.hasty {
		return nil
	}
	if b.gates == nil {
		<-ctx.Done()
		return ctx.Err()
	}
	select {
	case <-b.gates:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (b *bench) Rebooting(context.Context, omaha.Offer, bool) error { return nil }
func (b *bench) Booted(context.Context) error                       { return nil }
func (b *bench) Leave(context.Context, string) error                { return nil }
func (b *bench) Verdict(_ context.Context, v Verdict) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.verdicts = append(b.verdicts, v)
	return nil
}

// questions counts how often the reboot gates were asked.
func (b *bench) questions() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.asked
}

// pass lets d go by and everything that it causes happen.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// Reboot ends the process, as in a container.
func (b *bench) Reboot(context.Context, string) error {
	return &reboot.ExitError{Status: reboot.ExitStatus}
}

func (b *bench) engine(t *testing.T, store Store) *Engine {
	t.Helper()
	st, err := store.Load()
	if err != nil {
		t.Fatal(err)
	}
	return &Engine{
		Core: &Core{State: st, Timing: DefaultTiming()}, Store: store, Server: b, Installer: b, Gates: b, Rebooter: b,
		Health: func(context.Context) (bool, string) { return b.sick != b.facts.Version, "it is sick" },
		Log:    slog.New(slog.DiscardHandler),
	}
}

func newBench() *bench {
	return &bench{
		facts: Facts{BootID: "b1", Running: "USR-A", Other: "USR-B", Version: "1.0.0", Slots: map[string]SlotFacts{"USR-A": {1, 0, true}, "USR-B": {}}},
		offer: &omaha.Offer{Version: "2.0.0", Size: 100},
	}
}

func TestEngineTakesAnUpdateThroughAReboot(t *testing.T) {
	store := Store{filepath.Join(t.TempDir(), "state.json")}
	synctest.Test(t, func(t *testing.T) {
		b := newBench()
		b.applyErr = []error{&ApplyError{Err: errors.New("connection reset"), Code: 9, Transient: true}}
		b.gates = make(chan struct{})
		e := b.engine(t, store)
		ended := make(chan error, 1)
		go func() { ended <- e.Run(t.Context()) }()

		pass(15 * time.Minute) // first check after 7, the retry after another
		st, changed := e.Status(t.Context())
		if st.Phase != Armed || st.Why != "release 2.0.0 is in place on USR-B and waits to reboot: host-a holds the only slot" {
			t.Fatalf("phase %s, why %q", st.Phase, st.Why)
		}
		if got := b.resumed; len(got) != 2 || got[1] != "50" {
			t.Errorf("the second attempt resumed from %q, want the checkpoint of the first", got)
		}
		asked := time.Now()
		close(b.gates)
		err := <-ended
		var exit *reboot.ExitError
		if !errors.As(err, &exit) {
			t.Fatalf("Run = %v, want the exit of the rebooter", err)
		}
		if d := time.Since(asked); d > time.Second {
			t.Errorf("the reboot came %v after the semaphore was free; the watch must wake the host at once", d)
		}
		select {
		case <-changed:
		default:
			t.Error("nobody who watches was told")
		}

		b.facts = Facts{BootID: "b2", Running: "USR-B", Other: "USR-A", Version: "2.0.0", Slots: map[string]SlotFacts{"USR-A": {1, 0, true}, "USR-B": {2, 0, false}}}
		ctx, cancel := context.WithCancel(t.Context())
		e = b.engine(t, store)
		go func() { ended <- e.Run(ctx) }()
		pass(time.Minute)
		if st, _ := e.Status(ctx); st.Phase != Idle || st.LastUpdate == nil || !st.LastUpdate.Good {
			t.Errorf("after the trial: phase %s, last update %+v", st.Phase, st.LastUpdate)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run = %v after a stop, want nil", err)
		}
		if n := len(b.verdicts); n == 0 || !b.verdicts[n-1].Healthy || b.verdicts[n-1].Version != "2.0.0" {
			t.Errorf("verdicts = %+v", b.verdicts)
		}
		// The first attempt broke off, after which the server's idea of this host is cleared: the second begins anew.
		want := []omaha.Event{omaha.DownloadStarted(), omaha.DownloadStarted(), omaha.DownloadFinished(), omaha.Installed(), omaha.Booted("1.0.0")}
		if len(b.events) != len(want) {
			t.Fatalf("events = %+v, want %+v", b.events, want)
		}
		for i, ev := range want {
			if b.events[i] != ev {
				t.Errorf("event %d = %+v, want %+v", i, b.events[i], ev)
			}
		}
	})
}

// Nothing may go on while the state cannot be saved: a slot that is written to without a record would be a slot that nobody resumes.
func TestEngineWaitsUntilTheStateCanBeSaved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	synctest.Test(t, func(t *testing.T) {
		b := newBench()
		e := b.engine(t, Store{filepath.Join(dir, "state.json")})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- e.Run(ctx) }()
		pass(time.Hour)
		if b.applied != 0 {
			t.Error("an update began although the state could not be saved")
		}
		if st, _ := e.Status(ctx); st.LastError == "" {
			t.Error("the status says nothing about it")
		}
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		pass(time.Hour)
		if b.applied == 0 {
			t.Error("it did not go on when the state could be saved again")
		}
		cancel()
		<-ended
	})
}

// A watch that has nothing to tell and returns all the same costs a few questions a second, not a processor.
func TestEngineDoesNotSpin(t *testing.T) {
	store := Store{filepath.Join(t.TempDir(), "state.json")}
	synctest.Test(t, func(t *testing.T) {
		b := newBench()
		b.gates, b.hasty = make(chan struct{}), true
		e := b.engine(t, store)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- e.Run(ctx) }()
		pass(8 * time.Minute)
		before := b.questions()
		pass(time.Minute)
		if n := b.questions() - before; n == 0 || n > 60*5 {
			t.Errorf("the gates were asked %d times in a minute", n)
		}
		cancel()
		<-ended
	})
}

func TestCheckNowForgives(t *testing.T) {
	store := Store{filepath.Join(t.TempDir(), "state.json")}
	synctest.Test(t, func(t *testing.T) {
		b := newBench()
		b.applyErr = []error{&ApplyError{Err: errors.New("signature by no pinned key"), Code: 18}}
		b.gates = make(chan struct{})
		e := b.engine(t, store)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- e.Run(ctx) }()
		pass(2 * time.Hour)
		if b.applied != 1 {
			t.Fatalf("a refused release was tried %d times within its quarantine", b.applied)
		}
		if err := e.CheckNow(ctx, "test", "2.0.0"); err != nil {
			t.Fatal(err)
		}
		pass(time.Minute)
		if st, _ := e.Status(ctx); st.Phase != Armed {
			t.Errorf("phase = %s after forgiving, want armed: %s", st.Phase, st.Why)
		}
		cancel()
		<-ended
	})
}

// An order that comes while the server is asked waits for the answer, and not for ever. What fails of an order is told to whoever gave it.
func TestOrders(t *testing.T) {
	store := Store{filepath.Join(t.TempDir(), "state.json")}
	synctest.Test(t, func(t *testing.T) {
		b := newBench()
		b.offer, b.slow = nil, 5*time.Second
		b.facts.Slots["USR-B"] = SlotFacts{1, 0, true}
		e := b.engine(t, store)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- e.Run(ctx) }()
		pass(time.Hour)
		b.slow = time.Minute
		if err := e.CheckNow(ctx, "test"); err != nil {
			t.Fatal(err)
		}
		if err := e.GoBack(ctx, "somebody", false); !errors.Is(err, ErrUnderWay) {
			t.Errorf("a server that thinks for a minute: %v", err)
		}
		pass(time.Minute)
		b.slow = 5 * time.Second
		if err := e.CheckNow(ctx, "test"); err != nil {
			t.Fatal(err)
		}
		b.gates = make(chan struct{})
		if err := e.GoBack(ctx, "somebody", false); err != nil {
			t.Errorf("a server that thinks for seconds: %v", err)
		}
		pass(time.Minute)
		b.stuck = errors.New("the table cannot be written")
		if err := e.Cancel(ctx, "somebody"); !errors.Is(err, b.stuck) {
			t.Errorf("Stay fails: %v", err)
		}
		pass(time.Hour)
		cancel()
		<-ended

		if err := os.Remove(store.Path); err != nil {
			t.Fatal(err)
		}
		b = newBench()
		b.gates = make(chan struct{})
		e = b.engine(t, store)
		ctx, cancel = context.WithCancel(t.Context())
		go func() { ended <- e.Run(ctx) }()
		pass(2 * time.Hour)
		b.stuck = errors.New("the table cannot be written")
		if err := e.Cancel(ctx, "somebody"); !errors.Is(err, b.stuck) {
			t.Errorf("Disarm fails: %v", err)
		}
		cancel()
		<-ended
	})
}

func TestStoreRefusesWhatItCannotRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	for _, body := range []string{"", "{", `{"schema":"flipside.state/v9"}`} {
		if err := os.WriteFile(path, []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := (Store{path}).Load(); !errors.Is(err, ErrState) {
			t.Errorf("Load of %q = %v, want ErrState", body, err)
		}
	}
}
