package build

import "testing"

// A unit in the middle of a large file that changed everywhere is compared with the same part of the old file, wherever in the image both are.
func TestWindowIsAtTheSamePlaceInTheFile(t *testing.T) {
	const blocks, moved = 4000, 300
	p := &plan{origin: make([]int32, blocks+moved), oldZero: make([]bool, blocks)}
	var f pair
	for b := range blocks {
		f.old, f.new = append(f.old, b), append(f.new, b+moved)
	}
	for i := range p.origin {
		p.origin[i] = fresh
	}
	d := &deltaMaker{plan: p, similar: &similarity{mask: 63}}
	n := 0
	for _, u := range p.units([]pair{f}) {
		if u.file == nil {
			continue
		}
		n++
		in := map[int]bool{}
		for _, b := range d.window(u, nil, nil) {
			in[b] = true
		}
		for _, b := range u.blocks {
			if !in[b-moved] {
				t.Fatalf("block %d of the file is in a unit that is not compared with it", b-moved)
			}
		}
	}
	if n != (blocks+maxUnit-1)/maxUnit {
		t.Errorf("%d units, want %d", n, (blocks+maxUnit-1)/maxUnit)
	}
}
