package bsdiff

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/andybalholm/brotli"
	"github.com/dsnet/compress/bzip2"
)

// Step is one step of a patch: Add bytes of the old data are taken from Old on, each with a byte of the difference added to it, and then Copy
// bytes come as they are.
type Step struct {
	Old, Add, Copy int
}

// Patch is a patch that is not yet encoded.
type Patch struct {
	Steps []Step
	Diff  []byte // the differences of all steps
	Extra []byte // the bytes that come as they are
}

// Diff returns a patch that makes new out of old. Memory is about twelve times the length of old beside its arguments; old must be
// shorter than 2 GiB.
func Diff(old, new []byte) *Patch {
	return newIndex(old).diff(new)
}

// gram is how many bytes a match has at least. A shorter one could never be worth leaving a run for.
const gram = 8

// chain bounds how many places with the same beginning are looked at.
const chain = 48

// index finds long matches in the old data: the places where each sequence of eight bytes is, in chains. A suffix array would find
// the longest match of all; it takes ten times as long to build, and the patches are hardly smaller.
type index struct {
	old   []byte
	shift int
	head  []int32 // first place with a hash; one more than it, and 0 for none
	next  []int32 // the following one
}

func newIndex(old []byte) *index {
	b := min(max(bits.Len(uint(len(old))), 8), 24)
	x := &index{old: old, shift: 64 - b, head: make([]int32, 1<<b), next: make([]int32, max(0, len(old)-gram+1))}
	for i := len(x.next) - 1; i >= 0; i-- {
		g := binary.LittleEndian.Uint64(old[i:])
		if i > 0 && g == binary.LittleEndian.Uint64(old[i-1:]) {
			continue // inside a run of one byte, its beginning is enough
		}
		h := x.hash(g)
		x.next[i], x.head[h] = x.head[h], int32(i+1)
	}
	return x
}

func (x *index) hash(g uint64) uint64 { return g * 0x9e3779b97f4a7c15 >> x.shift }

func common(a, b []byte) int {
	n := min(len(a), len(b))
	i := 0
	for ; i+8 <= n; i += 8 {
		if binary.LittleEndian.Uint64(a[i:]) != binary.LittleEndian.Uint64(b[i:]) {
			break
		}
	}
	for i < n && a[i] == b[i] {
		i++
	}
	return i
}

// longest returns where in the old data a long match with the beginning of s is, and its length. It looks at the place expected first.
func (x *index) longest(s []byte, expected int) (pos, n int) {
	if len(s) < gram {
		return 0, 0
	}
	if expected >= 0 && expected < len(x.old) {
		pos, n = expected, common(x.old[expected:], s)
	}
	g := binary.LittleEndian.Uint64(s)
	at := x.head[x.hash(g)]
	for tries := chain; at != 0 && tries > 0 && n < len(s); tries-- {
		i := int(at - 1)
		if i+n < len(x.old) && x.old[i+n] == s[n] && binary.LittleEndian.Uint64(x.old[i:]) == g {
			if l := common(x.old[i:], s); l > n {
				pos, n = i, l
			}
		}
		at = x.next[i]
	}
	return pos, n
}

const (
	worth    = 8  // bytes by which a match must be better than going on as before
	patience = 64 // near-misses in a row before a match is taken anyway: repetitive data would cost quadratic time
)

// diff walks over the new data. A run goes on at the same distance from the old data, through bytes that differ, until some
// match elsewhere explains the coming bytes clearly better; then the border between the two runs is put where the fewest bytes differ.
func (x *index) diff(data []byte) *Patch {
	p := &Patch{}
	same := func(old, new int) bool {
		return old >= 0 && old < len(x.old) && x.old[old] == data[new]
	}
	runNew, runOld := 0, 0 // where the current run began
	pos, n := 0, 0
	for scan := 0; scan < len(data); {
		// Find the next place that is worth going to.
		scan += n
		good, counted, near := 0, scan, 0
		shift := runOld - runNew
		for n = 0; scan < len(data); scan++ {
			pos, n = x.longest(data[scan:], scan+shift)
			for ; counted < scan+n; counted++ {
				if same(counted+shift, counted) {
					good++
				}
			}
			if n == good && n != 0 || n > good+worth {
				break
			}
			if n > good {
				if near++; near > patience {
					break
				}
			} else {
				near = 0
			}
			if same(scan+shift, scan) {
				good--
			}
		}
		if n == good && scan < len(data) {
			continue // it is the current run that goes on
		}
		// How far does the current run reach forward, and the next one back?
		ahead := 0
		for i, score, best := 0, 0, 0; runNew+i < scan && runOld+i < len(x.old); {
			if x.old[runOld+i] == data[runNew+i] {
				score++
			}
			i++
			if score*2-i > best*2-ahead {
				best, ahead = score, i
			}
		}
		back := 0
		if scan < len(data) {
			for i, score, best := 1, 0, 0; i <= scan-runNew && i <= pos; i++ {
				if x.old[pos-i] == data[scan-i] {
					score++
				}
				if score*2-i > best*2-back {
					best, back = score, i
				}
			}
		}
		if over := runNew + ahead - (scan - back); over > 0 {
			cut := 0
			for i, score, best := 0, 0, 0; i < over; i++ {
				if data[runNew+ahead-over+i] == x.old[runOld+ahead-over+i] {
					score++
				}
				if data[scan-back+i] == x.old[pos-back+i] {
					score--
				}
				if score > best {
					best, cut = score, i+1
				}
			}
			ahead += cut - over
			back -= cut
		}
		p.step(x.old, data, runOld, runNew, ahead, scan-back-(runNew+ahead))
		runNew, runOld = scan-back, pos-back
	}
	return p
}

func (p *Patch) step(old, data []byte, from, to, add, copied int) {
	for i := range add {
		p.Diff = append(p.Diff, data[to+i]-old[from+i])
	}
	p.Extra = append(p.Extra, data[to+add:to+add+copied]...)
	if add+copied > 0 {
		p.Steps = append(p.Steps, Step{from, add, copied})
	}
}

// Size is how many bytes the patch makes.
func (p *Patch) Size() int { return len(p.Diff) + len(p.Extra) }

// controls encodes the steps: how much to add, how much to copy, how far to go in the old data then.
func (p *Patch) controls() []byte {
	at := 0
	var out []byte
	put := func(n int) { out = binary.LittleEndian.AppendUint64(out, signed(n)) }
	steps := p.Steps
	if len(steps) > 0 && steps[0].Old != 0 { // a patch begins at the start of the old data
		steps = append([]Step{{}}, steps...)
	}
	for i, s := range steps {
		at = s.Old + s.Add
		next := at
		if i+1 < len(steps) {
			next = steps[i+1].Old
		}
		put(s.Add)
		put(s.Copy)
		put(next - at)
	}
	return out
}

// signed encodes a number as the format has it: the sign is a bit of its own.
func signed(n int) uint64 {
	if n < 0 {
		return uint64(-n) | 1<<63
	}
	return uint64(n)
}

// Classic encodes the patch as BSDIFF40, with bzip2.
func (p *Patch) Classic() ([]byte, error) {
	return p.encode("BSDIFF40", func(raw []byte, _ int) ([]byte, byte, error) {
		data, err := packBzip2(raw)
		return data, compressorBzip2, err
	})
}

// BSDF2 encodes the patch as BSDF2, each stream with bzip2 or brotli, whichever is smaller.
func (p *Patch) BSDF2() ([]byte, error) {
	return p.encode("BSDF2", func(raw []byte, long int) ([]byte, byte, error) {
		bz, err := packBzip2(raw)
		if err != nil {
			return nil, 0, err
		}
		br, err := packBrotli(raw, long)
		if err != nil {
			return nil, 0, err
		}
		if len(br) < len(bz) {
			return br, compressorBrotli, nil
		}
		return bz, compressorBzip2, nil
	})
}

// Compressors of the streams of a BSDF2 patch, as numbers in its header.
const (
	compressorBzip2  = 1
	compressorBrotli = 2
)

func (p *Patch) encode(magic string, pack func(raw []byte, long int) ([]byte, byte, error)) ([]byte, error) {
	out := make([]byte, 32)
	copy(out, magic)
	var sizes [3]int
	for i, raw := range [][]byte{p.controls(), p.Diff, p.Extra} {
		long := longDiff
		if i == 2 {
			long = longExtra
		}
		data, with, err := pack(raw, long)
		if err != nil {
			return nil, fmt.Errorf("compressing a patch: %w", err)
		}
		if len(magic) == 5 {
			out[5+i] = with
		}
		sizes[i] = len(data)
		out = append(out, data...)
	}
	binary.LittleEndian.PutUint64(out[8:], signed(sizes[0]))
	binary.LittleEndian.PutUint64(out[16:], signed(sizes[1]))
	binary.LittleEndian.PutUint64(out[24:], signed(p.Size()))
	return out, nil
}

func packBzip2(raw []byte) ([]byte, error) {
	var b bytes.Buffer
	w, err := bzip2.NewWriter(&b, &bzip2.WriterConfig{Level: 9})
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(raw); err != nil {
		return nil, err
	}
	err = w.Close()
	return b.Bytes(), err
}

const (
	// window is the largest that the format's usual readers allow for brotli, as a power of two.
	window = 20
	// From these lengths on a lower quality of brotli is used. The best one takes a second for each MiB, and gains nothing on differences, most of
	// which are zeros.
	longDiff  = 64 << 10
	longExtra = 512 << 10
)

func packBrotli(raw []byte, long int) ([]byte, error) {
	var b bytes.Buffer
	quality := brotli.BestCompression
	if len(raw) > long {
		quality = 9
	}
	w := brotli.NewWriterOptions(&b, brotli.WriterOptions{Quality: quality, LGWin: window})
	if _, err := w.Write(raw); err != nil {
		return nil, err
	}
	err := w.Close()
	return b.Bytes(), err
}
