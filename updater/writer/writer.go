package writer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/partition/install"
	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/postinstall"
	"github.com/flipside-linux/flipside/updater/trust"
)

// Errors that callers decide on.
var (
	ErrDisk  = errors.New("the slot cannot be used")          // which says nothing about the release
	ErrOrder = errors.New("the writer was asked out of turn") // which no honest agent does

	ErrBelowFloor = errors.New("the release to go back to may be older than this host accepts")
)

// Release is what the writer must know of a release before it gives a slot up for it. Of all this it believes what a pinned key has signed.
type Release struct {
	Slot              string `json:"slot"`    // that it goes to
	Version           string `json:"version"` // for people and programs
	Size              int64  `json:"size"`    // of the payload
	MetadataSignature []byte `json:"metadata_signature,omitempty"`
	// Metadata is the beginning of the payload: header, manifest, and the metadata's signature. See [payload.Payload.Metadata].
	Metadata []byte `json:"-"`
}

// Writer carries out what an agent asks for, on the host that a configuration describes. Begin, WriteAt, Finish, Prepare and Arm are one update and come in this
// order; each of the other changes of boot bits stands by itself. WriteAt, Flush and Settle may be called from several goroutines.
type Writer struct {
	conf  config.Config
	guard *Guard
	log   *slog.Logger
	where Where
	job   *job // the update under way

	patience time.Duration // with the program that is told of a slot that does not boot any more
}

// job is an update under way.
type job struct {
	release Release
	payload *payload.Payload
	what    Contents
	disk    *partition.Disk
	tx      *install.Install
	ready   install.Ready
	stage   stage
}

// stage says what comes next.
type stage int

const (
	broken stage = iota // something failed: only Close
	writing
	finished
	prepared
)

// New makes the writer of the host that c configures. The disk is not opened yet.
func New(c config.Config, log *slog.Logger) (*Writer, error) {
	guard, err := NewGuard(c, log)
	if err != nil {
		return nil, err
	}
	where, err := Locate(c, os.DirFS("/"))
	if err != nil {
		return nil, err
	}
	return &Writer{conf: c, guard: guard, log: log, where: where, patience: disarmPatience}, nil
}

// beginning is a payload of which only the beginning is there.
type beginning struct {
	data []byte
	size int64
}

func (b beginning) Size() int64 { return b.size }

func (b beginning) Open(_ context.Context, off int64) (io.ReadCloser, error) {
	if off < 0 || off > int64(len(b.data)) {
		return nil, errors.New("only the metadata is there")
	}
	return io.NopCloser(bytes.NewReader(b.data[off:])), nil
}

// idle refuses while an update is under way.
func (w *Writer) idle() error {
	if w.job != nil {
		return fmt.Errorf("%w: release %s is being written", ErrOrder, w.job.release.Version)
	}
	return nil
}

// at returns the update under way, if it is at a stage.
func (w *Writer) at(s stage) (*job, error) {
	if w.job == nil || w.job.stage != s {
		return nil, fmt.Errorf("%w: no release is so far", ErrOrder)
	}
	return w.job, nil
}

// Begin decides whether a release is believed and fits, and gives its slot up for it. When it fails, the slot is what it was before, unless the error is that of the disk.
func (w *Writer) Begin(ctx context.Context, r Release, step func(string)) (err error) {
	if err := w.idle(); err != nil {
		return err
	}
	if _, err := omaha.CompareVersions(r.Version, r.Version); err != nil {
		return fmt.Errorf("%w: a release of version %q: %w", payload.ErrMalformed, r.Version, err)
	}
	believed, err := w.guard.Options()
	if err != nil {
		return err
	}
	believed.MetadataSignature = r.MetadataSignature
	p, err := payload.Open(ctx, beginning{r.Metadata, r.Size}, believed)
	if err != nil {
		return err
	}
	what, err := ContentsOf(p, w.conf)
	if err != nil {
		return err
	}
	d, run, err := w.open()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDisk, err)
	}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	slot, err := d.Slot(r.Slot)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDisk, err)
	}
	if what.Slot.Size > slot.Size {
		return fmt.Errorf("%w: the image has %d bytes, slot %s has %d", payload.ErrSize, what.Slot.Size, slot.Label, slot.Size)
	}
	tx, err := install.Begin(d, run, r.Slot, install.Options{Files: what.Files, PostInstall: w.postInstall(what, r.Version, step)})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDisk, err)
	}
	for _, q := range p.Partitions {
		if q.Name == what.Slot.Name {
			continue
		}
		if err := tx.Reserve(q.Name, q.Size); err != nil {
			return fmt.Errorf("%w: %w", ErrDisk, errors.Join(err, tx.Close()))
		}
	}
	w.job = &job{release: r, payload: p, what: what, disk: d, tx: tx, stage: writing}
	return nil
}

// open opens the disk for writing. The caller closes it.
func (w *Writer) open() (*partition.Disk, partition.Running, error) {
	d, err := OpenDisk(w.conf, w.where.Disk, false)
	if err != nil {
		return nil, partition.Running{}, err
	}
	run, err := d.RunningFromLabel(w.where.Running)
	if err != nil {
		d.Close()
		return nil, run, err
	}
	return d, run, nil
}

const blockSize = 4096 // of a payload; the last block of an image is written whole

// target is where a part of the release goes, by its place in the manifest.
func (j *job) target(part int) (payload.Partition, payload.Target, error) {
	if part < 0 || part >= len(j.payload.Partitions) {
		return payload.Partition{}, nil, fmt.Errorf("%w: the release has no part %d", ErrOrder, part)
	}
	q := j.payload.Partitions[part]
	if q.Name == j.what.Slot.Name {
		return q, j.tx.Slot(), nil
	}
	return q, j.tx.File(q.Name), nil
}

// WriteAt writes bytes of a part of the release. Outside of the image that the manifest describes nothing is written.
func (w *Writer) WriteAt(part int, b []byte, off int64) error {
	j, err := w.at(writing)
	if err != nil {
		return err
	}
	q, t, err := j.target(part)
	if err != nil {
		return err
	}
	if room := (q.Size + blockSize - 1) / blockSize * blockSize; off < 0 || off > room-int64(len(b)) {
		return fmt.Errorf("%w: bytes %d to %d of part %q, which has %d", ErrOrder, off, off+int64(len(b)), q.Name, q.Size)
	}
	_, err = t.WriteAt(b, off)
	return err
}

// Flush makes what was written of a part durable.
func (w *Writer) Flush(part int) error {
	j, err := w.at(writing)
	if err != nil {
		return err
	}
	_, t, err := j.target(part)
	if err != nil {
		return err
	}
	return t.Flush()
}

// Settle reads the bytes of the slot before upto back from the medium. They are not written to any more.
func (w *Writer) Settle(part int, upto int64) error {
	j, err := w.at(writing)
	if err != nil {
		return err
	}
	_, t, err := j.target(part)
	if err != nil {
		return err
	}
	s, ok := t.(payload.Settler)
	if !ok {
		return fmt.Errorf("%w: part %d does not settle", ErrOrder, part)
	}
	return s.Settle(upto)
}

// Finish reads everything back, compares it with what the manifest names, puts the files into their places, and runs the post-install program.
func (w *Writer) Finish(ctx context.Context) error {
	j, err := w.at(writing)
	if err != nil {
		return err
	}
	j.stage = broken
	images := map[string]install.Image{}
	for _, q := range j.payload.Partitions {
		if q.Name != j.what.Slot.Name {
			images[q.Name] = install.Image{Size: q.Size, SHA256: q.SHA256}
		}
	}
	if j.ready, err = j.tx.Finish(ctx, install.Image{Size: j.what.Slot.Size, SHA256: j.what.Slot.SHA256}, images); err != nil {
		for _, e := range []error{partition.ErrMismatch, atomicfile.ErrMismatch, postinstall.ErrFailed, postinstall.ErrTemporary, postinstall.ErrTimeout} {
			if errors.Is(err, e) {
				return err
			}
		}
		return fmt.Errorf("%w: %w", ErrDisk, err) // a medium that fails, no loop device: none of that is the release's
	}
	j.stage = finished
	return nil
}

// Prepare asks whether the secrets of the next boot will open, and prepares them.
func (w *Writer) Prepare(ctx context.Context) error {
	j, err := w.at(finished)
	if err != nil {
		return err
	}
	j.stage = broken
	if err := w.guard.Opens(ctx, j.release.Slot, j.what.Paths(j.release.Slot), "VERSION="+j.release.Version); err != nil {
		return err
	}
	j.stage = prepared
	return nil
}

// Arm makes the slot that was finished boot next, once.
func (w *Writer) Arm() error {
	j, err := w.at(prepared)
	if err != nil {
		return err
	}
	j.stage = broken
	if err := w.guard.floor.Propose(trust.Pending{Number: j.payload.MaxTimestamp, Slot: j.release.Slot, Version: j.release.Version}); err != nil {
		return err
	}
	return j.ready.Arm(int(w.conf.Slots.Tries))
}

// Close gives the update under way up. With discard what is left of its files is removed, for a release that will not be tried again.
func (w *Writer) Close(discard bool) error {
	j := w.job
	if j == nil {
		return nil
	}
	w.job = nil
	end := j.tx.Close
	if discard {
		end = j.tx.Discard
	}
	return errors.Join(end(), j.disk.Close())
}

// Back is a release that was good before and is to run again.
type Back struct {
	Slot       string `json:"slot"`
	Version    string `json:"version"`     // if it is known
	BelowFloor bool   `json:"below_floor"` // a person wants it although it is too old
}

// GoBack makes a slot that was good before boot next. What is asked before an update is armed is asked here too: whether the release is too old, which
// a person may pass over, and whether the secrets of the next boot will open.
func (w *Writer) GoBack(ctx context.Context, b Back) error {
	if err := w.idle(); err != nil {
		return err
	}
	if !b.BelowFloor {
		if err := w.guard.Admits(b.Slot); err != nil {
			return fmt.Errorf("%w: %w", ErrBelowFloor, err)
		}
	}
	files := Contents{Files: places(w.conf)}.Paths(b.Slot)
	for part, path := range files {
		if _, err := os.Stat(path); err != nil {
			delete(files, part) // the release brought none
		}
	}
	var env []string
	if _, err := omaha.CompareVersions(b.Version, b.Version); err == nil { // what is on a slot that this host never wrote is not known
		env = append(env, "VERSION="+b.Version)
	}
	if err := w.guard.Opens(ctx, b.Slot, files, env...); err != nil {
		return err
	}
	d, run, err := w.open()
	if err != nil {
		return err
	}
	defer d.Close()
	return d.GoBack(run, b.Slot, int(w.conf.Slots.Tries))
}

// Disarm makes a slot unbootable, and then tells the host's program for secrets.
func (w *Writer) Disarm(ctx context.Context, slot string) error {
	if err := w.idle(); err != nil {
		return err
	}
	d, err := OpenDisk(w.conf, w.where.Disk, false)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.MarkBad(slot); err != nil {
		return err
	}
	w.disarmed(ctx, slot)
	return nil
}

// disarmPatience is how long the program for secrets may take over a slot that does not boot any more. A sick host waits for it before it goes back, and
// the engine stands still meanwhile.
const disarmPatience = 30 * time.Second

// disarmed comes after the boot bits: nothing that the program does, or does not do, keeps a bad slot bootable.
func (w *Writer) disarmed(ctx context.Context, slot string) {
	short, cancel := context.WithTimeout(ctx, w.patience)
	defer cancel()
	if err := w.guard.secrets(short, "disarm", slot); err != nil {
		if short.Err() != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w: it took longer than %s", err, w.patience)
		}
		w.log.Error("the secrets of a slot that does not boot any more stay as they are", "slot", slot, "error", err)
	}
}

// Stay keeps the slot that a rollback would have booted as what it was before: good, and what the running one falls back to. Its secrets stay as
// they are. One that may have been booted since, and is not known to have come up, is made unbootable.
func (w *Writer) Stay(ctx context.Context, slot string, booted bool) error {
	if err := w.idle(); err != nil {
		return err
	}
	d, run, err := w.open()
	if err != nil {
		return err
	}
	defer d.Close()
	tries := 0
	if booted {
		tries = int(w.conf.Slots.Tries)
	}
	err = d.Stay(run, slot, tries)
	if errors.Is(err, partition.ErrTried) {
		if err = d.MarkBad(slot); err == nil {
			w.disarmed(ctx, slot)
		}
	}
	return err
}

// Confirm marks the running slot successful, and opens its secrets for good. version is that of the release that runs.
func (w *Writer) Confirm(ctx context.Context, version string) error {
	if err := w.idle(); err != nil {
		return err
	}
	d, run, err := w.open()
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.MarkSuccessful(run); err != nil {
		return err
	}
	if err := w.guard.secrets(ctx, "confirm", run.Slot().Label, "VERSION="+version); err != nil {
		w.log.Error("the secrets of the old slot stay as they are", "error", err)
	}
	return nil
}

// Raise raises the floor of releases to the one that runs, if its slot is marked successful, and reports whether it rose. Calling it again does nothing. The agent says when:
// where power or a missing TPM kept it from being done, it is to be done again.
func (w *Writer) Raise(ctx context.Context) (bool, error) {
	if err := w.idle(); err != nil {
		return false, err
	}
	d, err := OpenDisk(w.conf, w.where.Disk, true)
	if err != nil {
		return false, err
	}
	defer d.Close()
	run, err := d.RunningFromLabel(w.where.Running)
	if err != nil {
		return false, err
	}
	if s := run.Slot(); !s.Successful {
		return false, fmt.Errorf("%w: slot %s is not known to be good", ErrOrder, s.Label)
	}
	version, err := RunningVersion(w.conf)
	if err != nil {
		return false, err
	}
	if _, err := w.guard.floor.Level(); err != nil { // which also writes down that a TPM keeps it
		return false, err
	}
	return w.guard.floor.Confirm(ctx, run.Slot().Label, version)
}
