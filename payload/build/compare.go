package build

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
)

// Change is what became of a file.
type Change struct {
	Path   string
	Kind   string // added, removed, changed, moved or mode
	From   string // of a moved one: what it was called
	Old    int64  // size before, in bytes
	New    int64  // size after
	Blocks int    // of the new file that are nowhere in the old image: what an update has to carry
}

// Comparison is what is different between two images.
type Comparison struct {
	OldSize, NewSize int64
	Blocks           int // of the new image
	Same             int // that are at the same place in the old one
	Moved            int // that are somewhere else in it
	Zero             int
	Changed          int      // that are nowhere in it
	Files            []Change // by path, where the file systems can be read
	FilesKnown       bool
	Other            int // changed blocks that belong to no file
}

// Compare says what an update from one image to another has to carry.
func Compare(ctx context.Context, old, new Image) (Comparison, error) {
	p, err := planDelta(ctx, old, new, func(int64) {})
	if err != nil {
		return Comparison{}, fmt.Errorf("comparing images: %w", err)
	}
	c := Comparison{OldSize: old.Size, NewSize: new.Size, Blocks: len(p.origin)}
	for i, from := range p.origin {
		switch {
		case from == zero:
			c.Zero++
		case from == fresh:
			c.Changed++
		case int(from) == i:
			c.Same++
		default:
			c.Moved++
		}
	}
	before, err := Files(ctx, old)
	var after []File
	if err == nil {
		after, err = Files(ctx, new)
	}
	if errors.Is(err, ErrNoFileSystem) {
		return c, nil
	}
	if err != nil {
		return Comparison{}, fmt.Errorf("comparing images: %w", err)
	}
	c.FilesKnown = true
	c.files(p, before, after)
	return c, nil
}

// files fills in what became of each file.
func (c *Comparison) files(p *plan, before, after []File) {
	known, current := map[string]File{}, map[string]bool{}
	content := map[[32]byte]string{} // an old file with it
	for _, f := range before {
		known[f.Path] = f
		content[f.SHA256] = f.Path
	}
	for _, f := range after {
		current[f.Path] = true
	}
	counted := make([]bool, len(p.origin))
	inFiles, moved := 0, map[string]bool{}
	for _, f := range after {
		ch := Change{Path: f.Path, New: f.Size}
		for _, b := range f.Blocks {
			if p.origin[b] == fresh {
				ch.Blocks++
				if !counted[b] {
					counted[b] = true
					inFiles++
				}
			}
		}
		o, ok := known[f.Path]
		ch.Old = o.Size
		switch from := content[f.SHA256]; {
		case !ok && from != "" && !current[from] && !moved[from] && f.Size > 0:
			ch.Kind, ch.From, ch.Old = "moved", from, f.Size
			moved[from] = true
		case !ok:
			ch.Kind = "added"
		case o.SHA256 != f.SHA256:
			ch.Kind = "changed"
		case o.Mode != f.Mode:
			ch.Kind = "mode"
		default:
			continue
		}
		c.Files = append(c.Files, ch)
	}
	for _, f := range before {
		if !current[f.Path] && !moved[f.Path] {
			c.Files = append(c.Files, Change{Path: f.Path, Kind: "removed", Old: f.Size})
		}
	}
	c.Other = c.Changed - inFiles
	slices.SortFunc(c.Files, func(a, b Change) int { return cmp.Compare(a.Path, b.Path) })
}
