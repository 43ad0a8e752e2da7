package payload

import (
	"bytes"
	"compress/bzip2"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// decoder turns the data of one operation at a time into what it writes. It keeps its buffers.
type decoder struct {
	out  []byte
	zstd *zstd.Decoder
}

// maxWindow is the largest zstd window, and xz dictionary, that is accepted.
const maxWindow = 64 << 20

// decode returns exactly want bytes, or fewer where atMost is set (major 1, whose last chunk may be short), or an error. It never
// makes more than want, whatever the data claims.
func (d *decoder) decode(kind Kind, data []byte, want int64, atMost bool) ([]byte, error) {
	if int64(cap(d.out)) < want {
		d.out = make([]byte, want)
	}
	out := d.out[:want]
	var n int
	var err error
	switch kind {
	case Replace:
		if int64(len(data)) > want {
			return nil, fmt.Errorf("%d bytes of data for %d bytes of image", len(data), want)
		}
		n = copy(out, data)
	case ReplaceBZ:
		src := bytes.NewReader(data)
		n, err = fill(out, bzip2.NewReader(src))
		if err == nil && src.Len() > 0 {
			err = fmt.Errorf("%d bytes after the end of the stream", src.Len())
		}
	case ReplaceXZ:
		n, err = decodeXZ(out, data)
	case Zstd:
		if d.zstd == nil {
			if d.zstd, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(maxOutput)); err != nil {
				return nil, err
			}
		}
		var h zstd.Header
		if err = h.Decode(data); err != nil {
			break
		}
		if !h.HasFCS || h.FrameContentSize > uint64(want) {
			err = fmt.Errorf("the frame says that it holds %d bytes, want %d", h.FrameContentSize, want)
			break
		}
		var got []byte
		if got, err = d.zstd.DecodeAll(data, out[:0]); err == nil && int64(len(got)) > want {
			err = errors.New("it holds more than it says")
		}
		n = len(got)
	default:
		return nil, fmt.Errorf("%w: %s", ErrUnsupported, kind)
	}
	if err != nil {
		return nil, err
	}
	if int64(n) != want && !(atMost && n > 0) {
		return nil, fmt.Errorf("%d bytes, want %d", n, want)
	}
	return out[:n], nil
}

// fill reads until out is full or r ends, and makes sure that r has nothing more.
func fill(out []byte, r io.Reader) (int, error) {
	n, err := io.ReadFull(r, out)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return n, nil
	}
	if err != nil {
		return n, err
	}
	var more [1]byte
	switch _, err := io.ReadFull(r, more[:]); err {
	case io.EOF:
		return n, nil
	case nil:
		return n, errors.New("the stream holds more than the image has room for")
	default:
		return n, err
	}
}

func decodeXZ(out, data []byte) (int, error) {
	if err := checkXZ(data); err != nil {
		return 0, err
	}
	src := bytes.NewReader(data)
	r, err := xz.ReaderConfig{SingleStream: true}.NewReader(src)
	if err != nil {
		return 0, err
	}
	n, err := fill(out, r)
	if err == nil && src.Len() > 0 {
		err = fmt.Errorf("%d bytes after the end of the stream", src.Len())
	}
	return n, err
}

// checkXZ looks at the first block's header before the library does: a declared dictionary is memory, and only LZMA2 is known.
func checkXZ(data []byte) error {
	if len(data) < 24 {
		return errors.New("the stream ends too soon")
	}
	header := data[12:]
	size := (int(header[0]) + 1) * 4
	if header[0] == 0 || size > len(header) {
		return errors.New("the stream holds no block")
	}
	at := 2
	for _, bit := range []byte{0x40, 0x80} { // compressed and uncompressed size, if they are there
		if header[1]&bit != 0 {
			_, n := binary.Uvarint(header[at:size])
			if n <= 0 {
				return errors.New("a damaged block header")
			}
			at += n
		}
	}
	if header[1]&3 != 0 || at+3 > size || header[at] != 0x21 || header[at+1] != 1 {
		return fmt.Errorf("%w: an xz filter other than LZMA2", ErrUnsupported)
	}
	bits := header[at+2]
	if bits > 40 {
		return errors.New("a damaged block header")
	}
	if dict := uint64(2|bits&1) << (bits/2 + 11); dict > maxWindow {
		return fmt.Errorf("%w: an xz dictionary of %d MiB, at most %d", ErrUnsupported, dict>>20, maxWindow>>20)
	}
	return nil
}
