package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/partition/bls"
	"github.com/flipside-linux/flipside/partition/bootsim"
	"github.com/flipside-linux/flipside/partition/install"
	"github.com/flipside-linux/flipside/partition/mounted"
	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/postinstall"
)

// installer is the disk as the engine uses it. The disk is opened for each job and not kept open.
type installer struct {
	conf    config.Config
	http    *omaha.HTTP
	log     *slog.Logger
	path    string // of the disk
	running string // label of the running slot
	bootID  string
	version string
	guard   *guard
	deadman deadman

	addresses addresses

	mu      sync.Mutex
	disk    *partition.Disk // stays open while a proof for it is kept
	ready   install.Ready
	proofOf [32]byte // payload that the proof is of
	number  int64    // its max_timestamp
}

// open opens the disk. The caller closes it.
func (in *installer) open(readOnly bool) (*partition.Disk, error) {
	return OpenDisk(in.conf, in.path, readOnly)
}

// OpenDisk opens a disk with slots as the configuration has it: which partitions are slots, and where their boot bits are. The caller closes it.
func OpenDisk(c config.Config, path string, readOnly bool) (*partition.Disk, error) {
	typ, err := uuid.Parse(c.Slots.Type)
	if err != nil {
		return nil, fmt.Errorf("slots.type %q: %w", c.Slots.Type, err)
	}
	opt := partition.Options{ReadOnly: readOnly, TypeGUID: typ}
	if c.Boot.Backend == "bls" {
		opt.Bits = &bls.Entries{Dir: atomicfile.OS(c.Boot.Entries), Template: c.Boot.Entry}
	}
	return partition.OpenDisk(path, opt)
}

// locate finds the disk and the running slot: what the configuration names, or what /usr is mounted from.
func (in *installer) locate(root fs.FS) error {
	in.path, in.running = in.conf.Slots.Disk, in.conf.Slots.Running
	if in.path != auto && in.running != auto {
		return nil
	}
	usr, err := mounted.Usr(root)
	if err != nil {
		return fmt.Errorf("%w; slots.disk and slots.running can name them", err)
	}
	if in.path == auto {
		in.path = usr.Disk
	}
	d, err := in.open(true)
	if err != nil {
		return err
	}
	defer d.Close()
	slots, err := d.Slots()
	if err != nil {
		return err
	}
	for _, s := range slots {
		if s.Index == usr.Index {
			if in.running == auto {
				in.running = s.Label
			}
			if in.running != s.Label {
				return fmt.Errorf("slots.running is %s, and /usr is mounted from %s", in.running, s.Label)
			}
			return nil
		}
	}
	return fmt.Errorf("/usr is mounted from %s, which is not a slot of type %s on %s", usr.Name, in.conf.Slots.Type, in.path)
}

// auto stands in the configuration for what can be found out.
const auto = "auto"

func (in *installer) proof(d *partition.Disk) (partition.Running, error) {
	return d.RunningFromLabel(in.running)
}

func (in *installer) Facts(context.Context) (updater.Facts, error) {
	f := updater.Facts{BootID: in.bootID, Version: in.version, Slots: map[string]updater.SlotFacts{}}
	d, err := in.open(true)
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
		return f, fmt.Errorf("disk %s has one slot, %s; an update needs another one", in.path, f.Running)
	}
	return f, nil
}

func (in *installer) Slots(context.Context) ([]updater.SlotStatus, error) {
	d, err := in.open(true)
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
			Running: s.Label == in.running, Next: bootable && s.Index == next.Index,
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
	for _, e := range []error{payload.ErrSource, payload.ErrTarget, errDisk, payload.ErrNoKey, postinstall.ErrTemporary, errGuard} {
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

// errDisk marks errors of the slot itself.
var errDisk = errors.New("the slot cannot be used")

func (in *installer) apply(ctx context.Context, u updater.Update, src payload.Source, checkpoint func(json.RawMessage), progress func(updater.Progress)) (err error) {
	offer := u.Offer
	believed, err := in.guard.options(ctx)
	if err != nil {
		return err
	}
	believed.MetadataSignature = offer.MetadataSignature
	// Everything that can be known to be wrong is found before the slot is touched: until then it stays a slot to go back to.
	p, err := payload.Open(ctx, src, believed)
	if err != nil {
		return err
	}
	c, err := in.contents(p)
	if err != nil {
		return err
	}
	in.forget() // a disk that is kept open keeps its claim on the slot
	d, err := in.open(false)
	if err != nil {
		return fmt.Errorf("%w: %w", errDisk, err)
	}
	keep := false
	defer func() {
		if !keep {
			d.Close()
		}
	}()
	run, err := in.proof(d)
	if err != nil {
		return fmt.Errorf("%w: %w", errDisk, err)
	}
	slot, err := d.Slot(u.ToSlot)
	if err != nil {
		return fmt.Errorf("%w: %w", errDisk, err)
	}
	if c.slot.Size > slot.Size {
		return fmt.Errorf("%w: the image has %d bytes, slot %s has %d", payload.ErrSize, c.slot.Size, slot.Label, slot.Size)
	}
	sources, closeSources, err := in.sources(p, c, run.Slot())
	if err != nil {
		return err
	}
	defer closeSources()
	meter := newMeter(progress)
	show := func(q payload.Progress) { meter.set(q.Bytes, q.Total, q.Resumed, string(q.Step)) }
	if err := p.CheckSources(ctx, sources, show); err != nil {
		return err
	}
	tx, err := install.Begin(d, run, u.ToSlot, install.Options{Files: c.files, PostInstall: in.postInstall(c, offer.Version, meter)})
	if err != nil {
		return fmt.Errorf("%w: %w", errDisk, err)
	}
	defer func() {
		if err != nil && !transient(ctx, err) {
			err = errors.Join(err, tx.Discard())
			return
		}
		tx.Close()
	}()
	targets, images := map[string]payload.Target{c.slot.Name: tx.Slot()}, map[string]install.Image{}
	for _, q := range p.Partitions {
		if q.Name == c.slot.Name {
			continue
		}
		if err := tx.Reserve(q.Name, q.Size); err != nil {
			return fmt.Errorf("%w: %w", errDisk, err)
		}
		targets[q.Name], images[q.Name] = tx.File(q.Name), install.Image{Size: q.Size, SHA256: q.SHA256}
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
		Targets: targets,
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
	ready, err := tx.Finish(ctx, install.Image{Size: c.slot.Size, SHA256: c.slot.SHA256}, images)
	if err != nil {
		return err
	}
	meter.step("preparing the secrets of")
	if err := in.guard.prepare(ctx, slot.Label, offer.Version, c.paths(slot.Label)); err != nil {
		return err
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.disk, in.ready, in.proofOf, in.number = d, ready, offer.SHA256, p.MaxTimestamp
	keep = true
	return nil
}

// forget gives a proof up.
func (in *installer) forget() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.disk != nil {
		in.disk.Close()
	}
	in.disk, in.ready, in.proofOf = nil, install.Ready{}, [32]byte{}
}

func (in *installer) Arm(ctx context.Context, u updater.Update) error {
	defer in.forget()
	if err := in.deadman.set(u.Offer.Version); err != nil {
		in.log.Warn("a release on which flipsided does not run would not be gone back from by itself", "error", err)
	}
	if u.Rollback != "" {
		return in.goBack(ctx, u)
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.disk == nil || in.proofOf != u.Offer.SHA256 {
		return fmt.Errorf("release %s was not verified by this process", u.Offer.Version)
	}
	if err := in.guard.propose(u, in.number); err != nil {
		return err
	}
	return in.ready.Arm(int(in.conf.Slots.Tries))
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
	return in.guard.admits(f.Other)
}

// goBack makes a slot that was good before boot next. What is asked before an update is armed is asked here too: whether the release is too old, which
// a person may pass over, and whether the secrets of the next boot will open.
func (in *installer) goBack(ctx context.Context, u updater.Update) error {
	if !u.BelowFloor {
		if err := in.guard.admits(u.ToSlot); err != nil {
			return err
		}
	}
	files := contents{files: in.places()}.paths(u.ToSlot)
	for part, path := range files {
		if _, err := os.Stat(path); err != nil {
			delete(files, part) // the release brought none
		}
	}
	var env []string
	if _, err := omaha.CompareVersions(u.Offer.Version, u.Offer.Version); err == nil { // what is on a slot that this host never wrote is not known
		env = append(env, "VERSION="+u.Offer.Version)
	}
	if err := in.guard.opens(ctx, u.ToSlot, files, env...); err != nil {
		return err
	}
	d, err := in.open(false)
	if err != nil {
		return err
	}
	defer d.Close()
	run, err := in.proof(d)
	if err != nil {
		return err
	}
	return d.GoBack(run, u.ToSlot, int(in.conf.Slots.Tries))
}

func (in *installer) Disarm(ctx context.Context, slot string) error {
	in.guard.disarmed(ctx, slot)
	d, err := in.open(false)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.MarkBad(slot); err != nil {
		return err
	}
	in.withoutDeadman()
	return nil
}

// Stay keeps the slot that a rollback would have booted as what it was before: good, and what the running one falls back to. Its secrets stay as
// they are. One that may have been booted since, and is not known to have come up, is made unbootable.
func (in *installer) Stay(ctx context.Context, slot string, booted bool) error {
	d, err := in.open(false)
	if err != nil {
		return err
	}
	defer d.Close()
	run, err := in.proof(d)
	if err != nil {
		return err
	}
	tries := 0
	if booted {
		tries = int(in.conf.Slots.Tries)
	}
	err = d.Stay(run, slot, tries)
	if errors.Is(err, partition.ErrTried) {
		in.guard.disarmed(ctx, slot)
		err = d.MarkBad(slot)
	}
	if err != nil {
		return err
	}
	in.withoutDeadman()
	return nil
}

func (in *installer) Confirm(ctx context.Context) error {
	d, err := in.open(false)
	if err != nil {
		return err
	}
	defer d.Close()
	run, err := in.proof(d)
	if err != nil {
		return err
	}
	if err := d.MarkSuccessful(run); err != nil {
		return err
	}
	in.withoutDeadman()
	in.guard.confirmed(ctx, run.Slot().Label, in.version)
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
