package bsdiff

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/andybalholm/brotli"

	"github.com/flipside-linux/flipside/payload/unbzip2"
)

// What can be wrong with a patch.
var (
	ErrCorrupt     = errors.New("damaged patch")
	ErrUnsupported = errors.New("unsupported patch")
)

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}

const headerSize = 32

// Header is what a patch says of itself.
type Header struct {
	Format      string  // BSDIFF40 or BSDF2
	Compressors [3]byte // of control, difference and extra: 0 none, 1 bzip2, 2 brotli
	NewSize     int64   // bytes that it makes
	Control     int64   // bytes of the three streams as they are stored
	Diff        int64
	Extra       int64
}

// ReadHeader reads and checks the first bytes of a patch.
func ReadHeader(patch []byte) (Header, error) {
	var h Header
	if len(patch) < headerSize {
		return h, corrupt("%d bytes are no patch", len(patch))
	}
	switch {
	case string(patch[:8]) == "BSDIFF40":
		h.Format, h.Compressors = "BSDIFF40", [3]byte{1, 1, 1}
	case string(patch[:5]) == "BSDF2":
		h.Format, h.Compressors = "BSDF2", [3]byte(patch[5:8])
		for _, c := range h.Compressors {
			if c > 2 {
				return h, fmt.Errorf("%w: compressor %d", ErrUnsupported, c)
			}
		}
	default:
		return h, corrupt("it begins with %q", patch[:8])
	}
	h.Control, h.Diff, h.NewSize = number(patch[8:]), number(patch[16:]), number(patch[24:])
	rest := int64(len(patch) - headerSize)
	if h.Control < 0 || h.Control > rest || h.Diff < 0 || h.Diff > rest-h.Control {
		return h, corrupt("streams of %d and %d bytes in a patch of %d", h.Control, h.Diff, len(patch))
	}
	if h.NewSize < 0 {
		return h, corrupt("it makes %d bytes", h.NewSize)
	}
	h.Extra = rest - h.Control - h.Diff
	return h, nil
}

// number reads a number as bsdiff has it: the lowest byte first, and the sign in the highest bit.
func number(b []byte) int64 {
	v := binary.LittleEndian.Uint64(b)
	n := int64(v &^ (1 << 63))
	if v>>63 != 0 {
		return -n
	}
	return n
}

// Patcher applies one patch after the other. Its zero value is ready for use; it keeps the decoders' tables.
type Patcher struct {
	// Bzip2 has the tables that bzip2 takes, for whoever decodes other things with them as well. nil: the patcher's own.
	Bzip2 *unbzip2.Decoder
}

// Apply is [Patcher.Apply] for one patch.
func Apply(dst, old, patch []byte) error { return new(Patcher).Apply(dst, old, patch) }

// Apply applies a patch to old and fills dst. A patch that makes more or less than that, refers to bytes that old does not have, or has
// anything left over, is refused. Memory does not depend on what the patch claims: 1 MB for each of its
// three streams, or about 20 MB for one of brotli, whose window may have 16, and the decoders' tables.
func (p *Patcher) Apply(dst, old, patch []byte) error {
	h, err := ReadHeader(patch)
	if err != nil {
		return err
	}
	if h.NewSize != int64(len(dst)) {
		return corrupt("it makes %d bytes, want %d", h.NewSize, len(dst))
	}
	if p.Bzip2 == nil {
		p.Bzip2 = new(unbzip2.Decoder)
	}
	body := patch[headerSize:]
	control := p.open(h.Compressors[0], body[:h.Control])
	diff := p.open(h.Compressors[1], body[h.Control:][:h.Diff])
	extra := p.open(h.Compressors[2], body[h.Control+h.Diff:])
	var triple [24]byte
	at := int64(0) // in old
	for n, empty := 0, 0; n < len(dst); {
		if _, err := io.ReadFull(control, triple[:]); err != nil {
			return fmt.Errorf("%w: its control ends after %d of %d bytes: %w", ErrCorrupt, n, len(dst), err)
		}
		add, insert, seek := number(triple[:]), number(triple[8:]), number(triple[16:])
		left := int64(len(dst) - n)
		if add < 0 || add > left || insert < 0 || insert > left-add {
			return corrupt("it makes %d and %d bytes where %d are left", add, insert, left)
		}
		if add > 0 && (at < 0 || at > int64(len(old)) || add > int64(len(old))-at) {
			return corrupt("it reads %d bytes at %d of %d old ones", add, at, len(old))
		}
		// Triples that make nothing keep it busy. Encoders do write some, where the old data repeats itself, but no more than the new has bytes.
		if add+insert == 0 {
			if empty++; empty > len(dst) {
				return corrupt("it goes on without making anything")
			}
		}
		to := dst[n : n+int(add)]
		if _, err := io.ReadFull(diff, to); err != nil {
			return fmt.Errorf("%w: its differences end too soon: %w", ErrCorrupt, err)
		}
		if add > 0 {
			sum(to, old[at:at+add])
		}
		n += int(add)
		if _, err := io.ReadFull(extra, dst[n:n+int(insert)]); err != nil {
			return fmt.Errorf("%w: its extra bytes end too soon: %w", ErrCorrupt, err)
		}
		n += int(insert)
		if at += add; seek > 0 && at > int64(len(old)) || seek > 1<<40 || seek < -(1<<40) {
			return corrupt("it looks for old bytes %d away from %d", seek, at)
		}
		at += seek
	}
	for _, s := range []struct {
		name string
		r    io.Reader
	}{{"control", control}, {"differences", diff}, {"extra bytes", extra}} {
		if n, err := io.ReadFull(s.r, triple[:1]); n > 0 {
			return corrupt("it has %s left over", s.name)
		} else if err != io.EOF {
			return fmt.Errorf("%w: the end of its %s: %w", ErrCorrupt, s.name, err)
		}
	}
	return nil
}

// sum adds old to dst, byte by byte: eight at a time, with the carries kept from crossing.
func sum(dst, old []byte) {
	old = old[:len(dst)]
	i := 0
	for ; i+8 <= len(dst); i += 8 {
		a, b := binary.LittleEndian.Uint64(dst[i:]), binary.LittleEndian.Uint64(old[i:])
		const low = 0x7f7f7f7f7f7f7f7f
		binary.LittleEndian.PutUint64(dst[i:], (a&low+b&low)^(a^b)&^low)
	}
	for ; i < len(dst); i++ {
		dst[i] += old[i]
	}
}

// open reads one of the streams. Empty bytes are an empty stream, whatever the compressor.
func (p *Patcher) open(compressor byte, data []byte) io.Reader {
	switch {
	case compressor == 0 || len(data) == 0:
		return bytes.NewReader(data)
	case compressor == 1:
		return p.Bzip2.NewReader(data)
	default:
		return brotli.NewReader(bytes.NewReader(data))
	}
}
