package server

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// PCRs are what a boot of a release must have measured, as far as the release decides: by the number of the PCR, in two digits, the values that are right. There may be
// several, for two slots or two boot loaders.
type PCRs map[string][]string

// What a proof says about a boot, when somebody has said what its release must measure.
const (
	AsReleased = "as released"
	Differs    = "differs"
)

// maxValues bounds what is kept for one release.
const maxValues = 64

// check brings numbers and values into one form.
func (p PCRs) check() (PCRs, error) {
	out := PCRs{}
	n := 0
	for number, values := range p {
		i, err := strconv.ParseUint(number, 10, 8) // takes no sign
		if err != nil || i > 23 {
			return nil, fmt.Errorf("there is no PCR %q", clean(number))
		}
		key := fmt.Sprintf("%02d", i)
		for _, v := range values {
			v = strings.ToLower(strings.TrimPrefix(v, "0x"))
			if raw, err := hex.DecodeString(v); err != nil || len(raw) != 32 {
				return nil, fmt.Errorf("PCR %d: %q is not a SHA-256 value of 64 hexadecimal digits", i, clean(v))
			}
			if !slices.Contains(out[key], v) {
				out[key] = append(out[key], v)
				n++
			}
		}
	}
	if n > maxValues {
		return nil, fmt.Errorf("%d values of PCRs, at most %d", n, maxValues)
	}
	return out, nil
}

// differing lists the PCRs of a proof that are not as they must be. One that was not quoted differs.
func (p PCRs) differing(proof map[string]string) (list []string) {
	for _, n := range slices.Sorted(maps.Keys(p)) {
		if len(p[n]) > 0 && !slices.Contains(p[n], proof[n]) {
			list = append(list, n)
		}
	}
	return list
}

// pcrFile is DIR/pcrs/VERSION.toml.
type pcrFile struct {
	PCRs PCRs `toml:"pcrs"`
}

const pcrHead = "# What a boot of this release must have measured: for each PCR the SHA-256 values that are right. Edit it as you like: a running server notices.\n\n"

func readPCRs(dir, version string) (PCRs, error) {
	var f pcrFile
	err := readTOML(filepath.Join(dir, "pcrs", version+".toml"), &f)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	p, err := f.PCRs.check()
	if err != nil {
		return nil, fmt.Errorf("%s.toml: %w", version, err)
	}
	return p, nil
}

// Measure says what a boot of a published release must have measured. Without any PCR nothing is asked of it any more.
func (p *Publisher) Measure(version string, edit func(PCRs) (PCRs, error)) (PCRs, error) {
	fail := func(err error) (PCRs, error) {
		return nil, fmt.Errorf("the PCRs of release %s: %w", clean(version), err)
	}
	if err := checkVersion(version); err != nil {
		return nil, err
	}
	if _, err := readRelease(p.Dir, version); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			err = ErrUnknown
		}
		return fail(err)
	}
	unlock, err := p.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	was, err := readPCRs(p.Dir, version)
	if err != nil {
		return fail(err)
	}
	now, err := edit(was)
	if err != nil {
		return fail(err)
	}
	if now, err = now.check(); err != nil {
		return fail(err)
	}
	if maps.EqualFunc(now, was, slices.Equal) {
		return now, nil
	}
	path := filepath.Join(p.Dir, "pcrs", version+".toml")
	if len(now) == 0 {
		err = os.Remove(path)
	} else if err = makeDir(filepath.Dir(path)); err == nil {
		err = writeTOML(path, pcrFile{now}, pcrHead)
	}
	if err != nil {
		return fail(err)
	}
	return now, p.audit("say what a release measures", map[string]any{"version": version, "pcrs": now})
}

// judge says of a copy of a host whether its last boot was that of its release.
func (c *catalog) judge(h *Host) {
	if h.Proof == nil {
		return
	}
	p := *h.Proof
	p.Boot, p.Differs = c.verdict(&p)
	h.Proof = &p
}

// verdict is "" for a boot of which nobody has said what it must measure, or that was not proven.
func (c *catalog) verdict(p *Proof) (string, []string) {
	want := c.releases[p.Version].PCRs
	if p.At.IsZero() || len(want) == 0 {
		return "", nil
	}
	if d := want.differing(p.PCRs); len(d) > 0 {
		return Differs, d
	}
	return AsReleased, nil
}

// Words says in a few words what the last proof says about a boot.
func (p *Proof) Words() string {
	switch {
	case p == nil:
		return ""
	case p.Boot == Differs:
		numbers := make([]string, len(p.Differs))
		for i, n := range p.Differs {
			numbers[i] = strings.TrimPrefix(n, "0")
		}
		return "differs in PCR " + strings.Join(numbers, ", ")
	case p.Boot == AsReleased:
		return "boots as released"
	}
	return ""
}

// measured counts a host whose boot of its channel's release was not that release's. A boot of a floor does not count: a host may have been there since before the
// rollout began, and proves that boot again whenever its daemon starts. Server.mu is held.
func (s *Server) measured(h *Host) {
	r := s.rollouts[h.Channel]
	if r == nil || h.Proof == nil || h.Proof.Version != r.Version {
		return
	}
	v, _ := s.catalog.Load().verdict(h.Proof)
	switch was := r.Differs[h.ID]; {
	case v == Differs && !was:
		r.Differs[h.ID] = true
	case v != Differs && was:
		delete(r.Differs, h.ID)
	default:
		return
	}
	s.touchRollout(h.Channel)
}

// remeasure looks at all hosts of a channel again when somebody has said anew what its release must measure, also while no server ran. Server.mu is held.
func (s *Server) remeasure(c *catalog) {
	if s.measuredBy == c {
		return
	}
	s.measuredBy = c
	anew := map[string]*rollout{}
	for name, ch := range c.channels {
		if s.rollouts[name] == nil {
			continue
		}
		r := s.of(name, ch) // one that was resumed counts from zero
		if want := c.releases[r.Version].PCRs; !maps.EqualFunc(want, r.Measured, slices.Equal) {
			r.Measured, anew[name] = want, r
			s.touchRollout(name)
		}
	}
	if len(anew) == 0 {
		return
	}
	for _, h := range s.hosts {
		if anew[h.Channel] != nil {
			s.measured(h)
		}
	}
	for name, r := range anew {
		s.stop(name, c.channels[name], r)
	}
}
