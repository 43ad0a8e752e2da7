package server

import (
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/renameio/v2"
)

// Publisher writes releases into a directory, whether or not a server runs on it.
type Publisher struct {
	Dir string
	Now func() time.Time // nil for the real clock
	// Who is written into the audit log beside each change.
	Who      string
	patience time.Duration // with which the lock is waited for; 0 is lockWait

	// Verify looks at a payload before it is published, such as at its signature; nil accepts any well-formed one. For a whole payload, which must be no
	// delta, of is nil.
	Verify func(ctx context.Context, path string, of *Delta) error
}

// Delta says what a delta must agree with.
type Delta struct {
	Whole string // path of the whole payload of its release, which makes the same images
	Base  string // path of the whole payload of what it changes; empty if that was never published here
}

// Add stores the payload file at path as version. The same file again is not an error; another one is [ErrExists].
func (p *Publisher) Add(ctx context.Context, version, path string) (Release, error) {
	rel, _, err := p.Publish(ctx, Release{Version: version}, path, "")
	return rel, err
}

// AddDelta stores the delta at path that makes a published version out of another one. Hosts that run this other version, and take deltas, are
// offered it instead of the whole payload.
func (p *Publisher) AddDelta(ctx context.Context, version, from, path string) (Release, error) {
	rel, _, err := p.Publish(ctx, Release{Version: version, From: from}, path, "")
	return rel, err
}

// Publish is Add, or AddDelta for what has a From, and then Move of a channel if it has a name; nobody else changes anything in between. Of what only
// the version and From count.
func (p *Publisher) Publish(ctx context.Context, what Release, path, channel string) (Release, Channel, error) {
	rel := Release{Version: what.Version, From: what.From}
	fail := func(err error) (Release, Channel, error) {
		if what.From != "" {
			return Release{}, Channel{}, fmt.Errorf("publish %s as a delta from %s: %w", what.Version, what.From, err)
		}
		return Release{}, Channel{}, fmt.Errorf("publish %s: %w", what.Version, err)
	}
	if err := checkVersion(rel.Version); err != nil {
		return Release{}, Channel{}, err
	}
	if channel != "" {
		if err := checkChannel(channel); err != nil {
			return Release{}, Channel{}, err
		}
	}
	src, err := os.Open(path)
	if err != nil {
		return fail(err)
	}
	defer src.Close()
	info, err := src.Stat()
	if err != nil {
		return fail(err)
	}
	if !info.Mode().IsRegular() {
		return fail(fmt.Errorf("%q is not a file", path))
	}
	header, err := readHeader(src, info.Size())
	if err != nil {
		return fail(fmt.Errorf("%q: %w", path, err))
	}
	var of *Delta
	if rel.From != "" {
		if of, err = p.delta(rel); err != nil {
			return fail(err)
		}
	}
	if p.Verify != nil {
		if err := p.Verify(ctx, path, of); err != nil {
			return fail(fmt.Errorf("%q: %w", path, err))
		}
	}
	if _, err := src.Seek(0, io.SeekStart); err != nil {
		return fail(err)
	}
	if err := makeDirs(p.Dir); err != nil {
		return fail(err)
	}
	rel.Payload = filepath.Base(rel.file()) + ".payload"
	tmp, err := pending(filepath.Join(p.Dir, "payloads", rel.Payload))
	if err != nil {
		return fail(err)
	}
	defer tmp.Cleanup()
	hash, sum1 := sha256.New(), sha1.New()
	if rel.Size, err = io.Copy(io.MultiWriter(tmp, hash, sum1), &ctxReader{ctx, src}); err != nil {
		return fail(err)
	}
	if err := tmp.Sync(); err != nil { // that takes its time, and is not to be waited for with the lock
		return fail(err)
	}
	rel.SHA256, rel.SHA1 = hex.EncodeToString(hash.Sum(nil)), base64.StdEncoding.EncodeToString(sum1.Sum(nil))
	rel.MetadataSize, rel.Published = header.metadataSize, p.now().UTC().Truncate(time.Second)

	unlock, err := p.lock()
	if err != nil {
		return fail(err)
	}
	defer unlock()
	if rel, err = p.store(tmp, rel); err != nil {
		return fail(err)
	}
	if channel == "" {
		return rel, Channel{}, nil
	}
	ch, err := p.change(channel, func(c *Channel) error { c.move(rel.Version, p.now()); return nil })
	if err != nil && !errors.Is(err, errUnlogged) {
		err = fmt.Errorf("release %s is published, but channel %s does not hold it: %w", rel.Version, channel, err)
	}
	return rel, ch, err
}

// delta finds what a delta must agree with.
func (p *Publisher) delta(rel Release) (*Delta, error) {
	if err := checkVersion(rel.From); err != nil {
		return nil, err
	}
	if rel.From == rel.Version {
		return nil, errors.New("a version is no delta of itself")
	}
	whole, err := readRelease(p.Dir, rel.Version)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("its whole payload must be published first: version %q: %w", rel.Version, ErrUnknown)
	}
	if err != nil {
		return nil, err
	}
	of := &Delta{Whole: filepath.Join(p.Dir, "payloads", whole.Payload)}
	base, err := readRelease(p.Dir, rel.From)
	if errors.Is(err, os.ErrNotExist) {
		return of, nil
	}
	of.Base = filepath.Join(p.Dir, "payloads", base.Payload)
	return of, err
}

// store puts a payload in its place and writes the release's file, in this order: a release always finds its payload. The lock is held.
func (p *Publisher) store(payload *renameio.PendingFile, rel Release) (Release, error) {
	old, err := readFile(p.Dir, rel.file())
	known := err == nil
	switch {
	case known && old.SHA256 != rel.SHA256:
		return Release{}, fmt.Errorf("%w: %s", ErrExists, old.SHA256)
	case known && old.Payload != rel.Payload && sameSize(filepath.Join(p.Dir, "payloads", old.Payload), old.Size) == nil:
		return old, nil // somebody has given the file another name
	case !known && !errors.Is(err, os.ErrNotExist):
		return Release{}, err
	}
	if err := payload.CloseAtomicallyReplace(); err != nil { // also of a known release: what is there may be damaged
		return Release{}, err
	}
	if err := syncDir(filepath.Join(p.Dir, "payloads")); err != nil {
		return Release{}, err
	}
	if known && old.Payload == rel.Payload {
		rel = old
	} else if err := writeTOML(filepath.Join(p.Dir, rel.file()+".toml"), rel, releaseHead); err != nil {
		return Release{}, err
	}
	what := map[string]any{"version": rel.Version, "sha256": rel.SHA256, "size": rel.Size}
	if rel.From != "" {
		what["from"] = rel.From
	}
	return rel, p.audit("publish", what)
}

// published says whether hosts can be given a version.
func (p *Publisher) published(version string) error {
	rel, err := readRelease(p.Dir, version)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("version %q: %w", version, ErrUnknown)
	}
	if err != nil {
		return err
	}
	return sameSize(filepath.Join(p.Dir, "payloads", rel.Payload), rel.Size)
}

// move lets a channel hold a version.
func (c *Channel) move(version string, now time.Time) {
	if c.Version != version {
		if c.Version != "" {
			c.Previous = append([]string{c.Version}, c.Previous...)[:min(len(c.Previous)+1, 10)]
		}
		c.Version = version
		c.resume(now)
	}
	c.Moved = now.UTC().Truncate(time.Second)
}

// Move lets a channel point at a published version. What else its file says about the rollout stays.
func (p *Publisher) Move(channel, version string) (Channel, error) {
	if err := checkChannel(channel); err != nil {
		return Channel{}, err
	}
	if err := p.published(version); err != nil {
		return Channel{}, fmt.Errorf("move channel %s: %w", channel, err)
	}
	return p.Change(channel, func(c *Channel) error { c.move(version, p.now()); return nil })
}

// Change reads a channel's file, lets edit change it, and writes it back whole.
func (p *Publisher) Change(channel string, edit func(*Channel) error) (Channel, error) {
	if err := checkChannel(channel); err != nil {
		return Channel{}, err
	}
	if err := makeDirs(p.Dir); err != nil {
		return Channel{}, err
	}
	unlock, err := p.lock()
	if err != nil {
		return Channel{}, err
	}
	defer unlock()
	return p.change(channel, edit)
}

// change is Change for who holds the lock. What a channel comes to name has to be there: a server would take a file that names nothing for a mistake.
func (p *Publisher) change(channel string, edit func(*Channel) error) (Channel, error) {
	c, err := readChannel(p.Dir, channel)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return Channel{}, err
	}
	old := c
	if err := edit(&c); err != nil {
		return Channel{}, err
	}
	if err := c.check(); err != nil {
		return Channel{}, fmt.Errorf("channel %s: %w", channel, err)
	}
	for _, version := range append([]string{c.Version}, c.Floors...) {
		if version != "" && version != old.Version && !slices.Contains(old.Floors, version) {
			if err := p.published(version); err != nil {
				return Channel{}, fmt.Errorf("channel %s: %w", channel, err)
			}
		}
	}
	if err := writeTOML(filepath.Join(p.Dir, "channels", channel+".toml"), c, channelHead); err != nil {
		return Channel{}, err
	}
	if err := p.audit("channel", map[string]any{"channel": channel, "state": c}); err != nil {
		return c, fmt.Errorf("channel %s %w: %w", channel, errUnlogged, err)
	}
	return p.stopped(channel, c)
}

// Channel reads a channel's file, and whether the server has stopped the rollout.
func (p *Publisher) Channel(name string) (Channel, error) {
	if err := checkChannel(name); err != nil {
		return Channel{}, err
	}
	c, err := readChannel(p.Dir, name)
	if errors.Is(err, os.ErrNotExist) {
		return c, fmt.Errorf("channel %q: %w", name, ErrUnknown)
	}
	if err != nil {
		return c, err
	}
	return p.stopped(name, c)
}

// Rollback moves a channel back to the version it held before, or further, past versions that are withdrawn or gone. With downgrade it is offered to
// newer hosts as well.
func (p *Publisher) Rollback(name string, downgrade bool) (Channel, error) {
	if _, err := p.Channel(name); err != nil {
		return Channel{}, err
	}
	return p.Change(name, func(c *Channel) error {
		i, err := p.back(*c)
		if err != nil {
			return fmt.Errorf("channel %s %w", name, err)
		}
		c.Version, c.Previous = c.Previous[i], c.Previous[i+1:]
		c.resume(p.now())
		c.Downgrade, c.Moved = downgrade, p.now().UTC().Truncate(time.Second)
		return nil
	})
}

// back finds which of the versions that a channel held before a rollback goes to.
func (p *Publisher) back(c Channel) (int, error) {
	if len(c.Previous) == 0 {
		return 0, fmt.Errorf("has held no other version: %w", ErrUnknown)
	}
	var why error
	for i, version := range c.Previous {
		err := p.published(version)
		if slices.Contains(c.Blacklist, version) {
			err = fmt.Errorf("version %q is withdrawn", version)
		}
		if err == nil && version != c.Version {
			return i, nil
		}
		why = errors.Join(why, err)
	}
	if why == nil {
		why = ErrUnknown // all of them are what it holds
	}
	return 0, fmt.Errorf("has held nothing that it could go back to: %w", why)
}

// Pause stops or resumes a channel's rollout. Resuming also lifts a stop that the server decided by itself.
func (p *Publisher) Pause(name string, pause bool) (Channel, error) {
	if _, err := p.Channel(name); err != nil {
		return Channel{}, err
	}
	return p.Change(name, func(c *Channel) error {
		c.Paused = pause
		if !pause {
			c.resume(p.now())
		}
		return nil
	})
}

func (p *Publisher) now() time.Time {
	if p.Now != nil {
		return p.Now()
	}
	return time.Now()
}

// ctxReader ends a copy when its context ends.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
