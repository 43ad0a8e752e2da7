package build

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"slices"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/bsdiff"
	"github.com/flipside-linux/flipside/payload/metadata"
)

// Operations of deltas, as their numbers in the manifest.
const (
	kindMove         payload.Kind = 2 // major 1, in place
	kindBsdiff       payload.Kind = 3
	kindSourceCopy   payload.Kind = 4
	kindSourceBsdiff payload.Kind = 5
	kindBrotliBsdiff payload.Kind = 10
)

// Bounds of a delta's operations, in blocks. What an operation reads is at most four times what it writes, so that applying one
// takes little memory.
const (
	maxUnit   = 512  // that an operation writes
	maxWindow = 1024 // that it reads
	absorb    = 16   // copied blocks between changed ones that become part of the patch: they cost less in it than as extents
)

// run is a run of blocks.
type run struct{ start, n int }

// What a block's origin is if it is no block of the old image.
const (
	fresh = -1 // nowhere in it
	zero  = -2 // zeros
)

// plan says where each block of the new image comes from.
type plan struct {
	old, new Image
	oldSum   [32]byte
	newSum   [32]byte
	origin   []int32 // for each new block: the old one, or zero, or fresh
	oldZero  []bool
}

// planDelta reads both images once and finds every block of the new one that is anywhere in the old one. It keeps 16 bytes for each old
// block and 4 for each new one.
func planDelta(ctx context.Context, old, new Image, progress func(int64)) (*plan, error) {
	p := &plan{old: old, new: new, origin: make([]int32, new.Size/blockSize), oldZero: make([]bool, old.Size/blockSize)}
	seed := maphash.MakeSeed() // a place found by it is compared byte by byte, so nothing depends on the seed
	type place struct {
		hash  uint64
		block int32
	}
	places := make([]place, 0, len(p.oldZero))
	var err error
	p.oldSum, err = eachBlock(ctx, old, func(i int, b []byte) error {
		if allZero(b) {
			p.oldZero[i] = true
		} else {
			places = append(places, place{maphash.Bytes(seed, b), int32(i)})
		}
		return nil
	}, progress)
	if err != nil {
		return nil, fmt.Errorf("reading the old image: %w", err)
	}
	slices.SortFunc(places, func(a, b place) int { return cmp.Or(cmp.Compare(a.hash, b.hash), cmp.Compare(a.block, b.block)) })
	buf := make([]byte, blockSize)
	same := func(block int, b []byte) (bool, error) {
		if err := readBlocks(old, block, buf); err != nil {
			return false, err
		}
		return bytes.Equal(buf, b), nil
	}
	before := fresh // origin of the block before
	p.newSum, err = eachBlock(ctx, new, func(i int, b []byte) error {
		if allZero(b) {
			p.origin[i], before = zero, fresh
			return nil
		}
		h := maphash.Bytes(seed, b)
		at, _ := slices.BinarySearchFunc(places, h, func(p place, h uint64) int { return cmp.Compare(p.hash, h) })
		end := at
		for end < len(places) && places[end].hash == h {
			end++
		}
		found := fresh
		// Going on where the block before came from makes one extent of two; the same place is the next best.
		for _, want := range []int{before + 1, i} {
			if before == fresh && want != i || found != fresh {
				continue
			}
			if _, ok := slices.BinarySearchFunc(places[at:end], int32(want), func(p place, b int32) int { return cmp.Compare(p.block, b) }); ok {
				found = want
			}
		}
		if found == fresh && at < end {
			found = int(places[at].block)
		}
		if found != fresh {
			if ok, err := same(found, b); err != nil {
				return fmt.Errorf("reading the old image: %w", err)
			} else if !ok {
				found = fresh
			}
		}
		p.origin[i], before = int32(found), found
		return nil
	}, progress)
	if err != nil {
		return nil, fmt.Errorf("reading the new image: %w", err)
	}
	return p, nil
}

// eachBlock reads an image from its beginning to its end and returns its SHA-256.
func eachBlock(ctx context.Context, img Image, do func(i int, b []byte) error, progress func(int64)) ([32]byte, error) {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < img.Size; off += int64(len(buf)) {
		if err := ctx.Err(); err != nil {
			return [32]byte{}, err
		}
		b := buf[:min(int64(len(buf)), img.Size-off)]
		if err := readAt(img, off, b); err != nil {
			return [32]byte{}, err
		}
		h.Write(b)
		for i := 0; i < len(b); i += blockSize {
			if err := do(int(off/blockSize)+i/blockSize, b[i:i+blockSize]); err != nil {
				return [32]byte{}, err
			}
		}
		progress(int64(len(b)))
	}
	return [32]byte(h.Sum(nil)), nil
}

func readAt(img Image, off int64, b []byte) error {
	n, err := img.Data.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("at byte %d: %w", off+int64(n), err)
}

func readBlocks(img Image, block int, b []byte) error { return readAt(img, int64(block)*blockSize, b) }

var zeroBlock [blockSize]byte

func allZero(b []byte) bool {
	for len(b) > blockSize {
		if !bytes.Equal(b[:blockSize], zeroBlock[:]) {
			return false
		}
		b = b[blockSize:]
	}
	return bytes.Equal(b, zeroBlock[:len(b)])
}

// unit is what one operation with data makes: some blocks of the new image, that belong together.
type unit struct {
	blocks []int // in the order in which they are written; some of them may be copied instead, where that is cheaper
	file   []int // blocks of the old file of the same name, if that is known
	at     int   // where the middle of the unit is in its file, in blocks
}

// units divides the changed blocks: those of one file together, in the order of the file, and all others by their place.
func (p *plan) units(files []pair) []unit {
	taken := make([]bool, len(p.origin))
	var all []unit
	add := func(blocks, file []int) {
		// From the first changed block to the last; copied ones between are part of it where they are few.
		var now []int
		first := 0 // of them, in the file
		flush := func() {
			if len(now) > 0 {
				all = append(all, unit{blocks: now, file: file, at: first + len(now)/2})
			}
			now = nil
		}
		for i := 0; i < len(blocks); {
			if b := blocks[i]; p.origin[b] == fresh && !taken[b] {
				if len(now) == maxUnit {
					flush()
				}
				if len(now) == 0 {
					first = i
				}
				now = append(now, b)
				taken[b] = true
				i++
				continue
			}
			gap := i
			for gap < len(blocks) && p.origin[blocks[gap]] >= 0 && !taken[blocks[gap]] && gap-i <= absorb {
				gap++
			}
			if gap < len(blocks) && p.origin[blocks[gap]] == fresh && !taken[blocks[gap]] && gap-i <= absorb && len(now) > 0 && len(now)+gap-i < maxUnit {
				for _, b := range blocks[i:gap] {
					taken[b] = true
				}
				now = append(now, blocks[i:gap]...)
				i = gap
				continue
			}
			i = max(gap, i+1)
		}
		flush()
	}
	for _, f := range files {
		add(f.new, f.old)
	}
	rest := make([]int, len(p.origin))
	for i := range rest {
		rest[i] = i
	}
	add(rest, nil)
	return all
}

// runs makes runs of a list of blocks, in its order.
func runs(blocks []int) []run {
	var list []run
	for _, b := range blocks {
		if k := len(list) - 1; k >= 0 && list[k].start+list[k].n == b {
			list[k].n++
		} else {
			list = append(list, run{start: b, n: 1})
		}
	}
	return list
}

func extents(list []run) []*metadata.Extent {
	out := make([]*metadata.Extent, len(list))
	for i, r := range list {
		out[i] = &metadata.Extent{StartBlock: proto.Uint64(uint64(r.start)), NumBlocks: proto.Uint64(uint64(r.n))}
	}
	return out
}

func readRuns(img Image, list []run) ([]byte, error) {
	n := 0
	for _, r := range list {
		n += r.n
	}
	data := make([]byte, n*blockSize)
	at := 0
	for _, r := range list {
		if err := readBlocks(img, r.start, data[at:at+r.n*blockSize]); err != nil {
			return nil, err
		}
		at += r.n * blockSize
	}
	return data, nil
}

// made is an operation with its data.
type made struct {
	op   *metadata.InstallOperation
	data []byte
	at   int64 // where the data is in the scratch file, once it is there
	n    int
	unit unit // that a patch makes
}

func (m made) size() int { return len(m.data) + proto.Size(m.op) + 3 }

// deltaMaker makes the operations of one partition.
type deltaMaker struct {
	*plan
	major   int
	similar *similarity
}

// encodeUnit makes the smallest of what can make a unit: a patch, or the whole data with the copied blocks left to be copied. It returns the blocks that
// are to be copied after all.
func (d *deltaMaker) encodeUnit(e *encoder, u unit) (made, []int, error) {
	patched, ok, err := d.patchUnit(u)
	if err != nil {
		return made{}, nil, err
	}
	dst, copied := d.freshOf(u)
	data, err := readRuns(d.new, dst)
	if err != nil {
		return made{}, nil, err
	}
	c := e.encode(data)
	if c.err != nil {
		return made{}, nil, c.err
	}
	whole := made{op: &metadata.InstallOperation{Type: proto.Int32(int32(c.kind)), DstExtents: extents(dst)}, data: c.data}
	if ok && patched.size() < whole.size()+8*len(runs(copied)) {
		return patched, nil, nil
	}
	return whole, copied, nil
}

// freshOf divides a unit into what is nowhere in the old image, and what can be copied from it.
func (d *deltaMaker) freshOf(u unit) (dst []run, copied []int) {
	var blocks []int
	for _, b := range u.blocks {
		if d.origin[b] == fresh {
			blocks = append(blocks, b)
		} else {
			copied = append(copied, b)
		}
	}
	return runs(blocks), copied
}

// patchUnit makes a patch from whatever in the old image is likely to be like the unit.
func (d *deltaMaker) patchUnit(u unit) (made, bool, error) {
	data, err := readRuns(d.new, runs(u.blocks))
	if err != nil {
		return made{}, false, err
	}
	return d.patchFrom(u, data, d.window(u, data, nil))
}

// patchFrom makes a patch of a unit, whose data is given, from some old blocks.
func (d *deltaMaker) patchFrom(u unit, data []byte, blocks []int) (made, bool, error) {
	window := runs(blocks)
	if len(window) == 0 {
		return made{}, false, nil
	}
	old, err := readRuns(d.old, window)
	if err != nil {
		return made{}, false, err
	}
	p := bsdiff.Diff(old, data)
	window = trim(p, window)
	if len(window) == 0 {
		return made{}, false, nil
	}
	if old, err = readRuns(d.old, window); err != nil {
		return made{}, false, err
	}
	op := &metadata.InstallOperation{SrcExtents: extents(window), DstExtents: extents(runs(u.blocks))}
	var patch []byte
	if d.major == 1 {
		op.Type = proto.Int32(int32(kindBsdiff))
		op.SrcLength, op.DstLength = proto.Uint64(uint64(len(old))), proto.Uint64(uint64(len(data)))
		patch, err = p.Classic()
	} else {
		op.Type = proto.Int32(int32(kindBrotliBsdiff))
		sum := sha256.Sum256(old)
		op.SrcSha256Hash = sum[:]
		patch, err = p.BSDF2()
	}
	return made{op: op, data: patch, unit: u}, true, err
}

// trim leaves out of the window what the patch does not use, and moves the patch's steps to where their data is then. A small hole stays:
// reading a few blocks more costs less than one more extent.
func trim(p *bsdiff.Patch, window []run) []run {
	const hole = 8
	var blocks []int
	for _, r := range window {
		for i := range r.n {
			blocks = append(blocks, r.start+i)
		}
	}
	used := make([]bool, len(blocks))
	for _, s := range p.Steps {
		for b := s.Old / blockSize; s.Add > 0 && b <= (s.Old+s.Add-1)/blockSize; b++ {
			used[b] = true
		}
	}
	for i, last := 0, -1; i < len(used); i++ {
		if !used[i] {
			continue
		}
		if last >= 0 && i-last <= hole && blocks[i]-blocks[last] == i-last {
			for k := last; k < i; k++ {
				used[k] = true
			}
		}
		last = i
	}
	place := make([]int, len(blocks)) // of a kept block in what is left
	var kept []int
	for i, b := range blocks {
		place[i] = len(kept)
		if used[i] {
			kept = append(kept, b)
		}
	}
	for i, s := range p.Steps {
		if s.Add > 0 {
			p.Steps[i].Old = place[s.Old/blockSize]*blockSize + s.Old%blockSize
		} else if i > 0 {
			p.Steps[i].Old = p.Steps[i-1].Old + p.Steps[i-1].Add
		} else {
			p.Steps[i].Old = 0
		}
	}
	return runs(kept)
}

// window chooses the blocks of the old image that a unit is compared with, of those that are there (nil: all are), in the order of the old image, or of the old file.
func (d *deltaMaker) window(u unit, data []byte, there func(block int) bool) []int {
	limit := min(maxWindow, max(64, 4*len(u.blocks)))
	chosen := map[int]bool{}
	take := func(b int) {
		if b >= 0 && b < len(d.oldZero) && !d.oldZero[b] && len(chosen) < limit && (there == nil || there(b)) {
			chosen[b] = true
		}
	}
	// What follows the old place of the block before, and precedes that of the block after.
	for _, r := range runs(u.blocks) {
		if b := r.start - 1; b >= 0 && d.origin[b] >= 0 {
			for i := range min(r.n+4, limit/4) {
				take(int(d.origin[b]) + 1 + i)
			}
		}
		if b := r.start + r.n; b < len(d.origin) && d.origin[b] >= 0 {
			for i := range min(r.n+4, limit/4) {
				take(int(d.origin[b]) - 1 - i)
			}
		}
	}
	for _, b := range u.blocks {
		if d.origin[b] >= 0 {
			take(int(d.origin[b]))
		}
	}
	for _, b := range d.similar.find(data) {
		take(b - 1)
		take(b)
		take(b + 1)
	}
	at := min(u.at, len(u.file)) // around the same place in the file, the nearest first
	for i := 0; i < limit && i < len(u.file); i++ {
		if at+i < len(u.file) {
			take(u.file[at+i])
		}
		if at-1-i >= 0 {
			take(u.file[at-1-i])
		}
	}
	for _, b := range u.blocks {
		take(b)
	}
	list := make([]int, 0, len(chosen))
	for b := range chosen {
		list = append(list, b)
	}
	slices.Sort(list)
	return list
}

// copyOperations makes SOURCE_COPY of all blocks that are copied, in the order of the new image, each of at most maxUnit blocks.
func (d *deltaMaker) copyOperations(inUnit []bool) ([]made, error) {
	var list []made
	var src, dst []run
	total := 0
	flush := func() error {
		if total == 0 {
			return nil
		}
		op := &metadata.InstallOperation{Type: proto.Int32(int32(kindSourceCopy)), SrcExtents: extents(src), DstExtents: extents(dst)}
		if d.major == 1 {
			op.Type = proto.Int32(int32(kindMove))
			op.SrcLength, op.DstLength = proto.Uint64(uint64(total*blockSize)), proto.Uint64(uint64(total*blockSize))
		} else {
			data, err := readRuns(d.old, src)
			if err != nil {
				return err
			}
			sum := sha256.Sum256(data)
			op.SrcSha256Hash = sum[:]
		}
		list = append(list, made{op: op})
		src, dst, total = nil, nil, 0
		return nil
	}
	for b, from := range d.origin {
		if from < 0 || inUnit[b] || d.major == 1 && int(from) == b {
			continue // in place, what stays where it is needs no operation
		}
		if k := len(dst) - 1; d.major == 1 && k >= 0 && (dst[k].start+dst[k].n != b || src[k].start+src[k].n != int(from)) {
			if err := flush(); err != nil { // one run each, or more of them would wait for each other
				return nil, err
			}
		}
		if k := len(dst) - 1; k >= 0 && dst[k].start+dst[k].n == b {
			dst[k].n++
		} else {
			dst = append(dst, run{start: b, n: 1})
		}
		if k := len(src) - 1; k >= 0 && src[k].start+src[k].n == int(from) {
			src[k].n++
		} else {
			src = append(src, run{start: int(from), n: 1})
		}
		if total++; total == maxUnit {
			if err := flush(); err != nil {
				return nil, err
			}
		}
	}
	return list, flush()
}

// maxMessages is how many operations and extents a manifest may hold that is read by somebody who knows no key for it, as every reader of major 1 is.
const maxMessages = 1 << 18

// messages is how many an operation takes.
func messages(op *metadata.InstallOperation) int { return 1 + len(op.SrcExtents) + len(op.DstExtents) }

// giveUpCopies leaves only so many runs of blocks to be copied, the longest. The others are handled as if they were new: many short ones
// together take less of the manifest then, if more data.
func (p *plan) giveUpCopies(most int, inPlace bool) {
	var copied []run
	for b, from := range p.origin {
		if from < 0 || inPlace && int(from) == b {
			continue
		}
		if k := len(copied) - 1; k >= 0 && copied[k].start+copied[k].n == b && p.origin[b-1]+1 == from {
			copied[k].n++
		} else {
			copied = append(copied, run{start: b, n: 1})
		}
	}
	if len(copied) <= most {
		return
	}
	slices.SortStableFunc(copied, func(a, b run) int { return cmp.Compare(a.n, b.n) })
	for _, r := range copied[:len(copied)-most] {
		for b := range r.n {
			p.origin[r.start+b] = fresh
		}
	}
}

// giveUpPatches gives operations their whole data, those first that read in the most places, until all of them take only so many messages.
func (b *builder) giveUpPatches(d *deltaMaker, ops []made, most int) error {
	total := 0
	var patches []int
	for i, m := range ops {
		total += messages(m.op)
		if len(m.unit.blocks) > 0 {
			patches = append(patches, i)
		}
	}
	if total <= most {
		return nil
	}
	e, err := newEncoder(b.spec.Compression)
	if err != nil {
		return err
	}
	slices.SortStableFunc(patches, func(i, j int) int { return cmp.Compare(len(ops[j].op.SrcExtents), len(ops[i].op.SrcExtents)) })
	for _, i := range patches {
		if total <= most {
			return nil
		}
		if err := b.ctx.Err(); err != nil {
			return err
		}
		total -= messages(ops[i].op)
		if ops[i], err = d.encodeFrom(e, ops[i].unit, nil); err != nil {
			return err
		}
		if err := b.spill(&ops[i]); err != nil {
			return err
		}
		total += messages(ops[i].op)
	}
	return nil
}

// delta makes one partition out of its old image. Its operations are to take no more than so many messages of the manifest.
func (b *builder) delta(img Image, most int) (*metadata.PartitionUpdate, error) {
	old := *img.Old
	p, err := planDelta(b.ctx, old, img, b.advance)
	if err != nil {
		return nil, err
	}
	// Half of them for copies; those take two extents each, and in place an operation.
	if b.spec.Major == 1 {
		p.giveUpCopies(most/2/3, true)
	} else {
		p.giveUpCopies(most/2/2, false)
	}
	d := &deltaMaker{plan: p, major: b.spec.Major}
	if d.similar, err = newSimilarity(b.ctx, p); err != nil {
		return nil, fmt.Errorf("reading the old image: %w", err)
	}
	var files []pair
	if !b.spec.IgnoreFiles {
		if files, err = pairs(b.ctx, old, img); err != nil {
			return nil, err
		}
	}
	units := p.units(files)
	results := make([]made, len(units))
	inUnit := make([]bool, len(p.origin))
	for _, u := range units {
		for _, blk := range u.blocks {
			inUnit[blk] = true
		}
	}
	if err := b.eachUnit(d, units, results, inUnit); err != nil {
		return nil, err
	}
	ops, err := d.copyOperations(inUnit)
	if err != nil {
		return nil, fmt.Errorf("reading the old image: %w", err)
	}
	ops = append(ops, results...)
	if err := b.giveUpPatches(d, ops, most*3/4); err != nil { // the rest is for blocks that are moved out of the way, and for zeros
		return nil, err
	}
	byPlace := func(x, y made) int {
		return cmp.Compare(x.op.DstExtents[0].GetStartBlock(), y.op.DstExtents[0].GetStartBlock())
	}
	slices.SortStableFunc(ops, byPlace)
	if d.major == 1 {
		if ops, err = b.inPlace(d, ops); err != nil {
			return nil, err
		}
	}
	zeros, err := b.zeroOperations(d)
	if err != nil {
		return nil, err
	}
	ops = append(ops, zeros...)
	if d.major != 1 {
		slices.SortStableFunc(ops, byPlace)
	}
	part := &metadata.PartitionUpdate{
		PartitionName:    proto.String(img.Name),
		OldPartitionInfo: &metadata.PartitionInfo{Size: proto.Uint64(uint64(old.Size)), Hash: p.oldSum[:]},
		NewPartitionInfo: &metadata.PartitionInfo{Size: proto.Uint64(uint64(img.Size)), Hash: p.newSum[:]},
	}
	for _, m := range ops {
		if err := b.take(&m); err != nil {
			return nil, err
		}
		if err := b.put(m.op, m.data); err != nil {
			return nil, err
		}
		part.Operations = append(part.Operations, m.op)
	}
	return part, nil
}

// eachUnit encodes the units, several at a time.
func (b *builder) eachUnit(d *deltaMaker, units []unit, results []made, inUnit []bool) error {
	ctx, cancel := context.WithCancelCause(b.ctx)
	defer cancel(nil)
	next := make(chan int)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range b.workers() {
		e, err := newEncoder(b.spec.Compression)
		if err != nil {
			cancel(err)
			break
		}
		wg.Go(func() {
			for i := range next {
				m, copied, err := d.encodeUnit(e, units[i])
				if err != nil {
					cancel(err)
					return
				}
				mu.Lock()
				if err := b.spill(&m); err != nil {
					cancel(err)
				}
				results[i] = m
				for _, blk := range copied {
					inUnit[blk] = false
				}
				b.advance(int64(len(units[i].blocks)) * blockSize)
				mu.Unlock()
			}
		})
	}
	for i := range units {
		select {
		case next <- i:
		case <-ctx.Done():
		}
	}
	close(next)
	wg.Wait()
	return context.Cause(ctx)
}

// spill moves an operation's data to the scratch file.
func (b *builder) spill(m *made) error {
	if _, err := b.scratch.WriteAt(m.data, b.scratchLen); err != nil {
		return err
	}
	m.at, m.n, m.data = b.scratchLen, len(m.data), nil
	b.scratchLen += int64(m.n)
	return nil
}

// take brings it back.
func (b *builder) take(m *made) error {
	if m.n == 0 {
		return nil
	}
	m.data = make([]byte, m.n)
	_, err := b.scratch.ReadAt(m.data, m.at)
	return err
}

// zeroOperations clears blocks. Major 1 has no operation for it: there it is the smallest way to write zeros.
func (b *builder) zeroOperations(d *deltaMaker) ([]made, error) {
	var blocks []int
	for i, from := range d.origin {
		if from == zero && !(d.major == 1 && i < len(d.oldZero) && d.oldZero[i]) {
			blocks = append(blocks, i)
		}
	}
	if len(blocks) == 0 {
		return nil, nil
	}
	if d.major != 1 {
		return []made{{op: &metadata.InstallOperation{Type: proto.Int32(int32(payload.Zero)), DstExtents: extents(runs(blocks))}}}, nil
	}
	e, err := newEncoder(b.spec.Compression)
	if err != nil {
		return nil, err
	}
	var list []made
	for len(blocks) > 0 {
		n := min(len(blocks), maxUnit)
		c := e.encode(make([]byte, n*blockSize))
		if c.err != nil {
			return nil, c.err
		}
		list = append(list, made{op: &metadata.InstallOperation{Type: proto.Int32(int32(c.kind)), DstExtents: extents(runs(blocks[:n]))}, data: c.data})
		blocks = blocks[n:]
	}
	return list, nil
}
