package server

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"
)

// catalog is one consistent reading of the directory. It is never changed, only replaced.
type catalog struct {
	channels map[string]Channel
	releases map[string]Release
	deltas   map[change]Release
	payloads map[string]Release // by file name
	named    map[string]bool    // all versions that the files name
	problems []string           // files that cannot be read, in words
	print    string             // what the directory looked like
}

// change is what a delta does.
type change struct{ from, to string }

func readChannel(dir, name string) (Channel, error) {
	var c Channel
	if err := readTOML(filepath.Join(dir, "channels", name+".toml"), &c); err != nil {
		return c, err
	}
	if err := c.check(); err != nil {
		return c, fmt.Errorf("%s.toml: %w", name, err)
	}
	return c, nil
}

// fingerprint tells whether any file was added, replaced, edited or removed, without opening one.
func fingerprint(dir string) (string, error) {
	var b strings.Builder
	for _, sub := range []string{"channels", "releases", "deltas", "pcrs"} {
		entries, err := os.ReadDir(filepath.Join(dir, sub))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		for _, e := range entries {
			info, err := e.Info()
			if err != nil {
				continue
			}
			fmt.Fprintf(&b, "%s/%s %d %d\n", sub, e.Name(), info.Size(), info.ModTime().UnixNano())
		}
	}
	return b.String(), nil
}

// load reads the directory. A file that is wrong keeps what old held in its place, and is named in problems.
func load(dir string, old *catalog) (*catalog, error) {
	print, err := fingerprint(dir)
	if err != nil {
		return nil, err
	}
	if old != nil && old.print == print {
		return old, nil
	}
	c := &catalog{channels: map[string]Channel{}, releases: map[string]Release{}, deltas: map[change]Release{}, payloads: map[string]Release{}, print: print}
	for _, version := range names(filepath.Join(dir, "releases")) {
		r, err := readRelease(dir, version)
		if err == nil {
			err = sameSize(filepath.Join(dir, "payloads", r.Payload), r.Size)
		}
		if err != nil {
			c.problems = append(c.problems, "releases/"+err.Error())
			if old == nil {
				continue
			}
			if r, err = old.release(version); err != nil {
				continue
			}
		}
		if r.PCRs, err = readPCRs(dir, version); err != nil {
			c.problems = append(c.problems, "pcrs/"+err.Error())
			if kept, err := old.release(version); err == nil {
				r.PCRs = kept.PCRs
			}
		}
		c.releases[version] = r
		c.payloads[r.Payload] = r
	}
	for _, name := range names(filepath.Join(dir, "deltas")) {
		r, err := readFile(dir, filepath.Join("deltas", name))
		if err == nil {
			err = sameSize(filepath.Join(dir, "payloads", r.Payload), r.Size)
		}
		if err != nil { // hosts are given the whole payload
			c.problems = append(c.problems, "deltas/"+err.Error())
			continue
		}
		c.deltas[change{r.From, r.Version}] = r
		c.payloads[r.Payload] = r
	}
	for _, name := range names(filepath.Join(dir, "channels")) {
		ch, err := readChannel(dir, name)
		if err == nil && !namePattern.MatchString(name) {
			err = fmt.Errorf("%q is not a name for a channel", name)
		}
		if err == nil && ch.Version != "" {
			_, err = c.release(ch.Version)
		}
		for _, f := range ch.Floors {
			if err == nil {
				_, err = c.release(f)
			}
		}
		if err != nil {
			c.problems = append(c.problems, fmt.Sprintf("channels/%s: %v", name, err))
			if old == nil {
				continue
			}
			kept, ok := old.channels[name]
			if !ok {
				continue
			}
			ch = kept
		}
		c.channels[name] = ch
	}
	sort.Strings(c.problems)
	c.name()
	return c, nil
}

// name collects the versions that the files name.
func (c *catalog) name() {
	c.named = map[string]bool{}
	for v := range c.releases {
		c.named[v] = true
	}
	for d := range c.deltas {
		c.named[d.from] = true
	}
	for _, ch := range c.channels {
		for _, v := range ch.Previous {
			c.named[v] = true
		}
	}
}

func (c *catalog) release(version string) (Release, error) {
	if c == nil {
		return Release{}, ErrUnknown
	}
	r, ok := c.releases[version]
	if !ok {
		return r, fmt.Errorf("version %q: %w", version, ErrUnknown)
	}
	return r, nil
}

// sorted returns all releases, oldest version first.
func (c *catalog) sorted() []Release {
	return slices.SortedFunc(maps.Values(c.releases), func(a, b Release) int { return compareVersions(a.Version, b.Version) })
}

// changes returns all deltas, by the version that they make.
func (c *catalog) changes() []Release {
	return slices.SortedFunc(maps.Values(c.deltas), func(a, b Release) int {
		return cmp.Or(compareVersions(a.Version, b.Version), compareVersions(a.From, b.From))
	})
}

// payload chooses what a host that runs a version is given of a release: the delta, if there is one and the host takes it.
func (c *catalog) payload(rel Release, running string, deltas bool) Release {
	if d, ok := c.deltas[change{running, rel.Version}]; ok && deltas {
		return d
	}
	return rel
}

// channel finds what a host on track with board gets.
func (c *catalog) channel(track, board string) (string, Channel, bool) {
	if ch, ok := c.channels[track+"@"+board]; ok {
		return track + "@" + board, ch, true
	}
	ch, ok := c.channels[track]
	return track, ch, ok
}

func names(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".toml"); ok && !strings.HasPrefix(name, ".") && !e.IsDir() {
			out = append(out, name)
		}
	}
	return out
}

func sameSize(path string, size int64) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.Size() != size {
		return fmt.Errorf("payload %q has %d bytes, not %d", filepath.Base(path), info.Size(), size)
	}
	return nil
}

// refresh reads the directory again when it changed. It looks at most once per interval.
func (s *Server) refresh(now time.Time) error {
	s.loadMu.Lock()
	defer s.loadMu.Unlock()
	if now.Sub(s.loaded) < s.opt.Refresh && !now.Before(s.loaded) && s.catalog.Load() != nil {
		return nil
	}
	return s.reload(now)
}

func (s *Server) reload(now time.Time) error {
	old := s.catalog.Load()
	c, err := load(s.dir, old)
	if err != nil {
		return fmt.Errorf("read %q: %w", s.dir, err)
	}
	s.loaded = now
	if c != old {
		for _, p := range c.problems {
			s.log.Error("a file of the release directory cannot be used", "problem", p)
		}
		s.catalog.Store(c)
	}
	return nil
}
