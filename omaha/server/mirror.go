package server

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/flipside-linux/flipside/omaha"
)

// Upstream is another release server whose channel is to be mirrored: Flatcar's, a Nebraska, or one of these.
type Upstream struct {
	HTTP  *omaha.HTTP
	URL   string
	AppID string
	Track string
	Board string
	// Since is the version from which the oldest host has to be brought up. Upstream then names the steps on the way,
	// which become the channel's floors. Empty means 0.0.0.
	Since string
	// Progress is called while a payload is fetched; nil for nobody.
	Progress func(version string, done, size int64)
}

// maxSteps bounds the way from the oldest version to the newest: a server that always has one more is not believed.
const maxSteps = 16

// Mirror brings a channel up to what upstream holds, with every step on the way, and returns the releases that are new
// here. What is already here is not fetched again; what is fetched passes [Publisher.Verify] before it counts.
func (p *Publisher) Mirror(ctx context.Context, up Upstream, channel string) ([]Release, error) {
	client := &omaha.Client{
		URL: up.URL, AppID: up.AppID, Track: up.Track, Board: up.Board, HTTP: up.HTTP,
		Version: up.Since, MachineID: "flipside-mirror", MachineAlias: "mirror",
	}
	if client.Version == "" {
		client.Version = "0.0.0"
	}
	if err := makeDirs(p.Dir); err != nil {
		return nil, fmt.Errorf("mirror %q: %w", up.URL, err)
	}
	var fresh []Release
	var steps []string
	for {
		answer, err := client.Check(ctx, omaha.CheckRequest{OnDemand: true})
		if err != nil {
			return fresh, fmt.Errorf("mirror: %w", err)
		}
		if answer.Offer == nil {
			if answer.Reason.Kind != omaha.UpToDate {
				return fresh, fmt.Errorf("mirror %q: %s", up.URL, answer.Reason)
			}
			break
		}
		if len(steps) == maxSteps {
			return fresh, fmt.Errorf("mirror %q: more than %d steps to the newest version", up.URL, maxSteps)
		}
		rel, added, err := p.fetch(ctx, up, answer.Offer)
		if err != nil {
			return fresh, fmt.Errorf("mirror %s: %w", answer.Offer.Version, err)
		}
		if added {
			fresh = append(fresh, rel)
		}
		steps = append(steps, rel.Version)
		client.Version = rel.Version
	}
	if len(steps) == 0 {
		return nil, fmt.Errorf("mirror %q: it has nothing newer than %s", up.URL, client.Version)
	}
	newest, floors := steps[len(steps)-1], steps[:len(steps)-1]
	_, err := p.Change(channel, func(c *Channel) error {
		// A channel that was moved here since, such as back, stays where somebody put it until upstream moves on.
		if c.Version == newest || c.Mirrored == newest {
			return errAsIs
		}
		c.move(newest, p.now())
		c.Floors, c.Mirrored = floors, newest
		return nil
	})
	if errors.Is(err, errAsIs) {
		err = nil
	}
	return fresh, err
}

// errAsIs is why an edit leaves a channel as it is.
var errAsIs = errors.New("nothing is to be changed")

// followRetry is how soon a mirror run that failed is tried again; the wait doubles up to the interval.
const followRetry = time.Minute

// Follow keeps channels as upstream holds them until ctx ends: now, and then in every interval. A run that fails is
// logged and tried again; what hosts get does not depend on it.
func (s *Server) Follow(ctx context.Context, up Upstream, channels []string, every time.Duration) {
	failures := 0
	s.mu.Lock()
	s.changes = true
	s.mu.Unlock()
	for {
		wait, err := every, error(nil)
		for _, name := range channels {
			up.Track = name
			p := s.as("mirror")
			fresh, e := p.Mirror(ctx, up, name)
			for _, r := range fresh {
				s.log.Info("mirrored", "channel", name, "version", r.Version, "bytes", r.Size)
			}
			if err = errors.Join(err, e); e != nil && ctx.Err() == nil {
				s.log.Error("the channel could not be mirrored", "channel", name, "error", e)
			}
		}
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			failures = 0
			s.metrics.mirrored.SetToCurrentTime()
		} else {
			wait = min(followRetry<<min(failures, 10), every)
			failures++
		}
		if err := s.Reload(); err != nil {
			s.log.Error("the release directory cannot be read", "error", err)
		}
		timer := time.NewTimer(wait - wait/20 + rand.N(wait/10+1)) // many mirrors do not ask at the same moment
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

// fetch downloads a payload, whole, and publishes it. A mirror that delivers the wrong bytes is left for the next one.
func (p *Publisher) fetch(ctx context.Context, up Upstream, offer *omaha.Offer) (Release, bool, error) {
	if old, err := readRelease(p.Dir, offer.Version); err == nil {
		if old.SHA256 != hex.EncodeToString(offer.SHA256[:]) {
			return old, false, ErrExists
		}
		return old, false, nil
	}
	f, err := os.CreateTemp(filepath.Join(p.Dir, "payloads"), ".mirror-")
	if err != nil {
		return Release{}, false, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	d := omaha.NewDownload(up.HTTP, offer, omaha.DownloadOptions{})
	for range offer.URLs {
		if err = download(ctx, d, f, offer, up.Progress); err == nil {
			rel, err := p.Add(ctx, offer.Version, f.Name())
			return rel, err == nil, err
		}
		if ctx.Err() != nil {
			break
		}
		d.NextURL()
	}
	return Release{}, false, err
}

func download(ctx context.Context, d *omaha.Download, f *os.File, offer *omaha.Offer, progress func(string, int64, int64)) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	body, err := d.Open(ctx, 0)
	if err != nil {
		return err
	}
	defer body.Close()
	hash := sha256.New()
	w := io.MultiWriter(f, hash)
	for done := int64(0); ; {
		n, err := io.CopyN(w, body, 1<<20)
		done += n
		if progress != nil {
			progress(offer.Version, done, offer.Size)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	if sum := hash.Sum(nil); !bytes.Equal(sum, offer.SHA256[:]) {
		address, _ := d.URL()
		return fmt.Errorf("the payload from %q has SHA-256 %x, announced was %x", address, sum, offer.SHA256)
	}
	return nil
}

// Export writes releases as one tar archive: for each its file and its payload, and at the end which channels point at them.
// It is the way over an air gap.
func (p *Publisher) Export(w io.Writer, channels ...string) error {
	tw := tar.NewWriter(w)
	done := map[string]bool{}
	for _, name := range channels {
		ch, err := p.Channel(name)
		if err != nil {
			return err
		}
		for _, version := range append(append([]string{}, ch.Floors...), ch.Version) {
			if version == "" || done[version] {
				continue
			}
			done[version] = true
			if err := p.exportRelease(tw, version); err != nil {
				return fmt.Errorf("export %s: %w", version, err)
			}
		}
	}
	for _, name := range channels {
		ch, err := p.Channel(name)
		if err != nil {
			return err
		}
		// Only what the channel holds travels. How fast it is rolled out is decided where it is rolled out.
		if err := exportTOML(tw, "channels/"+name+".toml", Channel{Version: ch.Version, Floors: ch.Floors}); err != nil {
			return err
		}
	}
	return tw.Close()
}

// exportRelease writes a release, its deltas, and what a boot of it must have measured.
func (p *Publisher) exportRelease(tw *tar.Writer, version string) error {
	if err := p.exportFile(tw, Release{Version: version}.file()); err != nil {
		return err
	}
	for _, name := range names(filepath.Join(p.Dir, "deltas")) {
		if strings.HasPrefix(name, version+"_from_") {
			if err := p.exportFile(tw, filepath.Join("deltas", name)); err != nil {
				return err
			}
		}
	}
	pcrs, err := readPCRs(p.Dir, version)
	if err != nil || len(pcrs) == 0 {
		return err
	}
	return exportTOML(tw, "pcrs/"+version+".toml", pcrFile{pcrs})
}

func (p *Publisher) exportFile(tw *tar.Writer, file string) error {
	rel, err := readFile(p.Dir, file)
	if err != nil {
		return err
	}
	if err := exportTOML(tw, filepath.ToSlash(file)+".toml", rel); err != nil {
		return err
	}
	f, err := os.Open(filepath.Join(p.Dir, "payloads", rel.Payload))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := tw.WriteHeader(&tar.Header{Name: "payloads/" + rel.Payload, Mode: 0o644, Size: rel.Size, ModTime: rel.Published}); err != nil {
		return err
	}
	if n, err := io.Copy(tw, f); err != nil || n != rel.Size {
		return errors.Join(err, fmt.Errorf("%d of %d bytes", n, rel.Size))
	}
	return nil
}

func exportTOML(tw *tar.Writer, name string, v any) error {
	var b bytes.Buffer
	if err := toml.NewEncoder(&b).Encode(v); err != nil {
		return err
	}
	if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(b.Len())}); err != nil {
		return err
	}
	_, err := tw.Write(b.Bytes())
	return err
}

// Import reads an archive that [Publisher.Export] wrote. Every payload is checked against its release and by
// [Publisher.Verify]; channels move only when everything before them was fine. Nothing in the archive is used as a path.
func (p *Publisher) Import(ctx context.Context, r io.Reader) ([]Release, error) {
	if err := makeDirs(p.Dir); err != nil {
		return nil, fmt.Errorf("import: %w", err)
	}
	tr := tar.NewReader(r)
	var pending *Release // its payload comes next
	var got []Release
	complete := false
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return got, fmt.Errorf("import: %w", err)
		}
		kind, name, _ := strings.Cut(h.Name, "/")
		switch kind {
		case "releases", "deltas":
			rel := Release{}
			if err := importTOML(tr, &rel); err != nil {
				return got, fmt.Errorf("import %q: %w", h.Name, err)
			}
			if err := rel.check(filepath.Join(kind, strings.TrimSuffix(name, ".toml"))); err != nil {
				return got, fmt.Errorf("import %q: %w", h.Name, err)
			}
			pending = &rel
		case "payloads":
			if pending == nil || name != pending.Payload || h.Size != pending.Size {
				return got, fmt.Errorf("import: payload %q belongs to no release before it", h.Name)
			}
			rel, err := p.importPayload(ctx, tr, *pending)
			if err != nil {
				return got, fmt.Errorf("import %s: %w", pending.Version, err)
			}
			got, pending = append(got, rel), nil
		case "pcrs":
			var f pcrFile
			if err := importTOML(tr, &f); err != nil {
				return got, fmt.Errorf("import %q: %w", h.Name, err)
			}
			if _, err := p.Measure(strings.TrimSuffix(name, ".toml"), func(PCRs) (PCRs, error) { return f.PCRs, nil }); err != nil {
				return got, fmt.Errorf("import %q: %w", h.Name, err)
			}
		case "channels":
			ch := Channel{}
			if err := importTOML(tr, &ch); err != nil {
				return got, fmt.Errorf("import %q: %w", h.Name, err)
			}
			if err := checkVersion(ch.Version); err != nil {
				return got, fmt.Errorf("import %q: %w", h.Name, err)
			}
			_, err := p.Change(strings.TrimSuffix(name, ".toml"), func(c *Channel) error {
				c.move(ch.Version, p.now())
				c.Floors = ch.Floors
				return nil
			})
			if err != nil {
				return got, fmt.Errorf("import %q: %w", h.Name, err)
			}
			complete = true
		default:
			return got, fmt.Errorf("import: the archive holds %q, which is not part of a bundle", h.Name)
		}
	}
	if !complete { // channels come last, so a bundle without one was cut off
		return got, fmt.Errorf("import: the archive ends before its channels: %w", io.ErrUnexpectedEOF)
	}
	return got, nil
}

func (p *Publisher) importPayload(ctx context.Context, r io.Reader, want Release) (Release, error) {
	f, err := os.CreateTemp(filepath.Join(p.Dir, "payloads"), ".import-")
	if err != nil {
		return Release{}, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	hash := sha256.New()
	if _, err := io.Copy(io.MultiWriter(f, hash), &ctxReader{ctx, r}); err != nil {
		return Release{}, err
	}
	if sum := hex.EncodeToString(hash.Sum(nil)); sum != want.SHA256 {
		return Release{}, fmt.Errorf("its payload has SHA-256 %s, and its release says %s", sum, want.SHA256)
	}
	rel, _, err := p.Publish(ctx, want, f.Name(), "")
	return rel, err
}

func importTOML(r io.Reader, v any) error {
	data, err := io.ReadAll(io.LimitReader(r, maxRequest))
	if err != nil {
		return err
	}
	return decodeTOML(data, v)
}
