package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/partition/bootsim"
	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/postinstall"
	"github.com/flipside-linux/flipside/updater/writer"
)

// installer is the disk as the engine uses it. It opens the disk for reading, for each job; what is written is written by a writer, which is started
// for each job, too.
type installer struct {
	conf    config.Config
	http    *omaha.HTTP
	log     *slog.Logger
	where   writer.Where
	bootID  string
	version string
	guard   *guard
	deadman deadman
	start   writer.Start

	addresses addresses

	mu      sync.Mutex
	ready   *writer.Client // of a release that it has found complete; it holds the slot
	proofOf [32]byte       // payload that it is of
}

// open opens the disk for reading. The caller closes it.
func (in *installer) open() (*partition.Disk, error) {
	return writer.OpenDisk(in.conf, in.where.Disk, true)
}

// write starts a writer, lets do ask it for something, and waits for its end.
func (in *installer) write(ctx context.Context, do func(*writer.Client) error) error {
	w, err := in.start(ctx)
	if err != nil {
		return err
	}
	return errors.Join(do(w), w.Close())
}

func (in *installer) proof(d *partition.Disk) (partition.Running, error) {
	return d.RunningFromLabel(in.where.Running)
}

func (in *installer) Facts(context.Context) (updater.Facts, error) {
	f := updater.Facts{BootID: in.bootID, Version: in.version, Slots: map[string]updater.SlotFacts{}}
	d, err := in.open()
	if err != nil {
		return f, err
	}
	defer d.Close()
	run, err := in.proof(d)
	if err != nil {
		return f, err
	}
	f.Running = run.Slot().Label
	slots, err := d.Slots()
	if err != nil {
		return f, err
	}
	// The other slot is the one that is worth least: not bootable before bootable, then the lowest priority.
	for _, s := range slots {
		f.Slots[s.Label] = updater.SlotFacts{Priority: s.Priority, Tries: s.Tries, Successful: s.Successful}
		if s.Label == f.Running {
			continue
		}
		if old, ok := f.Slots[f.Other]; !ok || (old.Bootable() && !s.Bootable()) || (old.Bootable() == s.Bootable() && s.Priority < old.Priority) {
			f.Other = s.Label
		}
	}
	if f.Other == "" {
		return f, fmt.Errorf("disk %s has one slot, %s; an update needs another one", in.where.Disk, f.Running)
	}
	return f, nil
}

func (in *installer) Slots(context.Context) ([]updater.SlotStatus, error) {
	d, err := in.open()
	if err != nil {
		return nil, err
	}
	defer d.Close()
	slots, err := d.Slots()
	if err != nil {
		return nil, err
	}
	next, bootable := bootsim.Next(slots)
	var list []updater.SlotStatus
	for _, s := range slots {
		list = append(list, updater.SlotStatus{
			Label: s.Label, UUID: s.UUID.String(), Size: s.Size, Priority: s.Priority, Tries: s.Tries, Successful: s.Successful,
			Running: s.Label == in.where.Running, Next: bootable && s.Index == next.Index,
		})
	}
	return list, nil
}

func (in *installer) Apply(ctx context.Context, u updater.Update, checkpoint func(json.RawMessage), progress func(updater.Progress)) error {
	in.forget()
	offer := u.Offer
	offer.URLs = in.addresses.order(offer.URLs)
	src := omaha.NewDownload(in.http, &offer, in.downloadOptions())
	var err error
	for n := 1; ; n++ {
		if err = in.apply(ctx, u, src, checkpoint, progress); err == nil {
			in.addresses.well(src.Address())
			return nil
		}
		if mismatch(err) && len(u.Checkpoint) > 0 && ctx.Err() == nil {
			// What an earlier run had written is not what is there now: that says nothing about the release either.
			in.log.Warn("what an earlier run had written has changed since; the download begins anew", "error", err)
			u.Checkpoint = nil
			n--
			continue
		}
		if n >= len(offer.URLs) || !badContent(err) || ctx.Err() != nil {
			break
		}
		// One mirror that serves something else says nothing about the release.
		in.log.Warn("what an address serves is not the release; trying the next one", "error", err)
		in.addresses.failed(src.Address(), err)
		src.NextURL()
		u.Checkpoint = nil
	}
	ae := &updater.ApplyError{Err: err, Code: payload.OmahaCode(err), Transient: transient(ctx, err)}
	switch {
	case errors.Is(err, partition.ErrMismatch):
		ae.Code = 15
	case errors.Is(err, atomicfile.ErrMismatch):
		ae.Code = 16
	case errors.Is(err, postinstall.ErrFailed), errors.Is(err, postinstall.ErrTimeout):
		ae.Code = 5
	case errors.Is(err, postinstall.ErrTemporary):
		ae.Code = 5
	}
	return ae
}

// mismatch reports whether the slot, or a file that belongs to it, does not hold what it should.
func mismatch(err error) bool {
	return errors.Is(err, partition.ErrMismatch) || errors.Is(err, atomicfile.ErrMismatch)
}

// transient reports whether the same payload may be tried again: what the network or this machine did may be different the next time; what a payload
// is will not.
func transient(ctx context.Context, err error) bool {
	for _, e := range []error{payload.ErrSource, payload.ErrTarget, writer.ErrDisk, writer.ErrGone, payload.ErrNoKey, postinstall.ErrTemporary, writer.ErrGuard} {
		if errors.Is(err, e) {
			return true
		}
	}
	return ctx.Err() != nil
}

// badContent reports whether an error may be that of the address and not of the release.
func badContent(err error) bool {
	return errors.Is(err, payload.ErrHash) || errors.Is(err, payload.ErrMalformed) || errors.Is(err, payload.ErrSignature) || errors.Is(err, payload.ErrUnsigned)
}

func (in *installer) apply(ctx context.Context, u updater.Update, src payload.Source, checkpoint func(json.RawMessage), progress func(updater.Progress)) (err error) {
	offer := u.Offer
	believed, err := in.guard.options(ctx)
	if err != nil {
		return err
	}
	believed.MetadataSignature = offer.MetadataSignature
	// Everything that can be known to be wrong is found before the slot is touched: until then it stays a slot to go back to. The writer finds it out once more.
	p, err := payload.Open(ctx, src, believed)
	if err != nil {
		return err
	}
	c, err := writer.ContentsOf(p, in.conf)
	if err != nil {
		return err
	}
	run, slot, err := in.slots(u.ToSlot)
	if err != nil {
		return fmt.Errorf("%w: %w", writer.ErrDisk, err)
	}
	if c.Slot.Size > slot.Size {
		return fmt.Errorf("%w: the image has %d bytes, slot %s has %d", payload.ErrSize, c.Slot.Size, slot.Label, slot.Size)
	}
	sources, closeSources, err := in.sources(p, c, run)
	if err != nil {
		return err
	}
	defer closeSources()
	meter := newMeter(progress)
	show := func(q payload.Progress) { meter.set(q.Bytes, q.Total, q.Resumed, string(q.Step)) }
	if err := p.CheckSources(ctx, sources, show); err != nil {
		return err
	}
	in.forget() // a writer that is kept holds the slot
	w, err := in.start(ctx)
	if err != nil {
		return err
	}
	keep := false
	defer func() {
		if keep {
			return
		}
		if !transient(ctx, err) {
			err = errors.Join(err, w.Discard(ctx))
		}
		err = errors.Join(err, w.Close())
	}()
	err = w.Begin(ctx, writer.Release{
		Slot: u.ToSlot, Version: offer.Version, Size: p.Size, MetadataSignature: offer.MetadataSignature, Metadata: p.Metadata(),
	})
	if err != nil {
		return err
	}
	var resume *payload.Checkpoint
	if len(u.Checkpoint) > 0 {
		var c payload.Checkpoint
		if err := json.Unmarshal(u.Checkpoint, &c); err != nil {
			in.log.Warn("a checkpoint cannot be read; the download begins anew", "error", err)
		} else {
			resume = &c
		}
	}
	expected := offer.SHA256
	err = p.Apply(ctx, payload.ApplyOptions{
		Targets: w.Targets(p, c.Slot.Name),
		Sources: sources, SourcesChecked: true,
		Resume: resume,
		Checkpoint: func(c payload.Checkpoint) error {
			data, err := json.Marshal(c)
			if err != nil {
				return err
			}
			checkpoint(data)
			return nil
		},
		Progress:       show,
		ExpectedSHA256: &expected,
	})
	if err != nil {
		return err
	}
	meter.step("reading back")
	if err := w.Finish(ctx, meter.step); err != nil {
		return err
	}
	if t := in.guard.conf.Trust; t.Unlock != "" || len(t.PCRKeys) > 0 || t.PCRPolicy != "" {
		meter.step("preparing the secrets of")
	}
	if path, ok := c.Paths(slot.Label)[writer.PolicyPart]; ok {
		if err := in.guard.handOn(ctx, offer.Version, path); err != nil {
			return err
		}
	}
	if err := w.Prepare(ctx); err != nil {
		return err
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.ready, in.proofOf = w, offer.SHA256
	keep = true
	return nil
}

// slots looks at the running slot, and at the one that an update goes to.
func (in *installer) slots(to string) (running, slot partition.Slot, err error) {
	d, err := in.open()
	if err != nil {
		return running, slot, err
	}
	defer d.Close()
	run, err := in.proof(d)
	if err != nil {
		return running, slot, err
	}
	slot, err = d.Slot(to)
	return run.Slot(), slot, err
}

// sources opens what a delta changes, for reading only: the running slot, and the files that belong to it.
func (in *installer) sources(p *payload.Payload, c writer.Contents, running partition.Slot) (map[string]io.ReaderAt, func(), error) {
	sources, files := map[string]io.ReaderAt{}, []*os.File{}
	closeAll := func() {
		for _, f := range files {
			f.Close()
		}
	}
	old := c.Paths(running.Label)
	for _, q := range p.Partitions {
		if q.OldSize == 0 {
			continue
		}
		path, slot := old[q.Name], q.Name == c.Slot.Name
		if slot {
			path = in.where.Disk
		}
		f, err := os.Open(path)
		if err != nil {
			closeAll()
			return nil, nil, fmt.Errorf("%w: the running system's %s: %w", payload.ErrBase, q.Name, err)
		}
		files, sources[q.Name] = append(files, f), f
		if slot {
			if q.OldSize > running.Size {
				closeAll()
				return nil, nil, fmt.Errorf("%w: it had %d bytes, and the running slot %s has %d", payload.ErrBase, q.OldSize, running.Label, running.Size)
			}
			sources[q.Name] = io.NewSectionReader(f, running.Start, running.Size)
		}
	}
	return sources, closeAll, nil
}

// forget gives a release that is complete and not armed up.
func (in *installer) forget() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.ready != nil {
		if err := in.ready.Close(); err != nil {
			in.log.Warn(err.Error())
		}
	}
	in.ready, in.proofOf = nil, [32]byte{}
}

func (in *installer) Arm(ctx context.Context, u updater.Update) error {
	defer in.forget()
	if err := in.deadman.set(u.Offer.Version); err != nil {
		in.log.Warn("a release on which flipsided does not run would not be gone back from by itself", "error", err)
	}
	if u.Rollback != "" {
		return in.write(ctx, func(w *writer.Client) error {
			return w.GoBack(ctx, writer.Back{Slot: u.ToSlot, Version: u.Offer.Version, BelowFloor: u.BelowFloor})
		})
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.ready == nil || in.proofOf != u.Offer.SHA256 {
		return fmt.Errorf("release %s was not verified by this process", u.Offer.Version)
	}
	return in.ready.Arm(ctx)
}

// mayGoBack says why the other slot's release may not run again, if it was ever good.
func (in *installer) mayGoBack(ctx context.Context) error {
	f, err := in.Facts(ctx)
	if err != nil {
		return err
	}
	if !f.Slots[f.Other].Successful {
		return nil // the engine finds nothing to go back to
	}
	if err := in.guard.Admits(f.Other); err != nil {
		return fmt.Errorf("%w: %w", updater.ErrBelowFloor, err)
	}
	return nil
}

func (in *installer) Disarm(ctx context.Context, slot string) error {
	if err := in.write(ctx, func(w *writer.Client) error { return w.Disarm(ctx, slot) }); err != nil {
		return err
	}
	in.withoutDeadman()
	return nil
}

// Stay keeps the slot that a rollback would have booted as what it was before: good, and what the running one falls back to.
func (in *installer) Stay(ctx context.Context, slot string, booted bool) error {
	if err := in.write(ctx, func(w *writer.Client) error { return w.Stay(ctx, slot, booted) }); err != nil {
		return err
	}
	in.withoutDeadman()
	return nil
}

func (in *installer) Confirm(ctx context.Context) error {
	if err := in.write(ctx, func(w *writer.Client) error { return w.Confirm(ctx, in.version) }); err != nil {
		return err
	}
	in.withoutDeadman()
	in.guard.confirmed(ctx, in.where.Running, in.version)
	return nil
}

// withoutDeadman is called when no slot is on trial any more. The note that could not be taken away is taken away at the next start.
func (in *installer) withoutDeadman() {
	if err := in.deadman.clear(); err != nil {
		in.log.Warn(err.Error())
	}
}

// meter turns progress into rates, and passes on no more than anyone can read.
type meter struct {
	out  func(updater.Progress)
	mu   sync.Mutex
	now  updater.Progress
	last time.Time
	from time.Time
}

func newMeter(out func(updater.Progress)) *meter { return &meter{out: out, from: time.Now()} }

func (m *meter) set(done, total, resumed int64, step string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now = updater.Progress{Done: done, Total: total, Step: step, Resumed: resumed}
	now := time.Now()
	if s := now.Sub(m.from).Seconds(); s > 0 {
		m.now.Rate = float64(done-resumed) / s
	}
	if now.Sub(m.last) < 50*time.Millisecond && done < total {
		return
	}
	m.last = now
	m.out(m.now)
}

func (m *meter) step(step string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now.Step = step
	m.out(m.now)
}

// readLine reads the first line of a small file such as /etc/machine-id.
func readLine(what, path string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("reading the %s: %w", what, err)
	}
	line, _, _ := strings.Cut(string(data), "\n")
	line = strings.TrimSpace(line)
	if line == "" || len(line) > 128 {
		return "", fmt.Errorf("reading the %s: %s does not hold one", what, path)
	}
	return line, nil
}
