// Package powercut is the proof of Flipside's claim about power cuts: it records every write and flush of whole updates, makes the
// disks that a power cut could have left at every point, and lets the boot loader, its specification and the production code's own
// recovery judge each.
//
// The model of a disk: a sector is written whole or not at all; a flush that returned brought everything before it to the medium; of what was
// written since, any part may be there, sector by sector and in any order. The boot partition with the kernels and the file system with the saved state
// are models, too, one with a journal and one like FAT; what is flushed there is one file, or the names of a directory. The firmware's own writes, when the boot loader spends a try, are cut
// and torn in their order, since nothing that an operating system does changes them.
package powercut

import (
	"bytes"
	"hash/maphash"
	"math/rand/v2"

	"github.com/flipside-linux/flipside/partition/devicetest"
)

// limits bound what is enumerated of one epoch, the writes between two flushes.
type limits struct {
	all    int // sectors up to which all subsets are tried
	random int // subsets of larger epochs, beside none, all, each alone and all but each
}

// state is what a power cut may leave.
type state struct {
	cut   int // operations of the log that were issued
	image []byte
}

// sectorWrite is one sector of a write.
type sectorWrite struct {
	off     int64
	data    []byte
	ordered bool // it is never there without those before it
}

// sectors splits an operation.
func sectors(op devicetest.Op, size int, ordered bool) []sectorWrite {
	var list []sectorWrite
	for i := 0; i < len(op.Data); i += size {
		end := min(i+size, len(op.Data))
		list = append(list, sectorWrite{op.Off + int64(i), op.Data[i:end], ordered})
	}
	return list
}

// crashes calls visit with every disk that a power cut during log could leave, once each for every cut that it is new at. ordered says which
// operations are only cut and torn, not reordered. The image is visit's only until it returns.
func crashes(base []byte, sector int, log []devicetest.Op, ordered func(op int) bool, lim limits, seed uint64, visit func(state)) {
	durable := bytes.Clone(base)
	scratch := bytes.Clone(base) // the same, but while a state is looked at
	random := rand.New(rand.NewPCG(seed, 2))
	var h maphash.Hash
	seen := map[uint64]bool{}
	cut := 0
	try := func(pending []sectorWrite, pick func(i int) bool) {
		for i, w := range pending {
			if pick(i) {
				copy(scratch[w.off:], w.data)
			}
		}
		h.Reset()
		for _, w := range pending {
			h.Write(scratch[w.off : w.off+int64(len(w.data))])
		}
		if sum := h.Sum64(); !seen[sum] {
			seen[sum] = true
			visit(state{cut, scratch})
		}
		for _, w := range pending {
			copy(scratch[w.off:w.off+int64(len(w.data))], durable[w.off:])
		}
	}
	var pending []sectorWrite
	// subsets are of what may be there in any order; of the rest all is.
	subsets := func() {
		var loose []int
		for i, w := range pending {
			if !w.ordered {
				loose = append(loose, i)
			}
		}
		place := make([]int, len(pending))
		for k, i := range loose {
			place[i] = k
		}
		try := func(pick func(k int) bool) {
			try(pending, func(i int) bool { return pending[i].ordered || pick(place[i]) })
		}
		n := len(loose)
		if n <= lim.all {
			for mask := range uint64(1) << n {
				try(func(i int) bool { return mask>>i&1 == 1 })
			}
			return
		}
		for k := range n {
			try(func(i int) bool { return i == k })
			try(func(i int) bool { return i != k })
		}
		mask := make([]bool, n)
		for range lim.random {
			for i := range mask {
				mask[i] = random.IntN(2) == 1
			}
			try(func(i int) bool { return mask[i] })
		}
	}
	try(nil, nil)
	reordered := false
	for i, op := range log {
		cut = i + 1
		// At every cut a disk counts as new: what is right depends on how far the update had come.
		clear(seen)
		if op.Kind == devicetest.Flush {
			rest := pending[:0]
			for _, w := range pending {
				if op.Len == 0 || w.off >= op.Off && w.off < op.Off+op.Len {
					copy(durable[w.off:], w.data)
					copy(scratch[w.off:], w.data)
				} else {
					rest = append(rest, w)
				}
			}
			pending = rest
			reordered = len(pending) > 0 && reordered
			try(nil, nil)
			if reordered {
				subsets()
			}
			continue
		}
		before := len(pending)
		pending = append(pending, sectors(op, sector, ordered(i))...)
		reordered = reordered || !ordered(i)
		for k := before; k <= len(pending); k++ {
			try(pending, func(i int) bool { return i < k })
		}
		last := i+1 == len(log) || log[i+1].Kind == devicetest.Flush
		if last && reordered {
			subsets()
		}
	}
}
