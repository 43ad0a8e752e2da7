package payload

import (
	"errors"
	"fmt"

	"github.com/klauspost/compress/zstd"

	"github.com/flipside-linux/flipside/payload/unbzip2"
	"github.com/flipside-linux/flipside/payload/unxz"
)

// decoder turns the data of one operation at a time into what it writes. It keeps its buffers.
type decoder struct {
	out   pages
	bzip2 unbzip2.Decoder
	xz    *unxz.Decoder
	zstd  *zstd.Decoder
}

// maxWindow is the largest zstd window that is accepted.
const maxWindow = 64 << 20

// buffer returns a buffer of n bytes, which the next call gives again.
func (d *decoder) buffer(n int64) []byte { return d.out.room(n) }

func (d *decoder) trim() {
	if cap(d.out.buf) > keepBuffer {
		d.out.free()
	}
}

func (d *decoder) close() {
	d.out.free()
	if d.zstd != nil {
		d.zstd.Close()
	}
}

// decode returns exactly want bytes, or fewer where atMost is set (major 1, whose last chunk may be short), or an error. It never
// makes more than want, whatever the data claims.
func (d *decoder) decode(kind Kind, data []byte, want int64, atMost bool) ([]byte, error) {
	out := d.buffer(want)
	var n int
	var err error
	switch kind {
	case Replace:
		if int64(len(data)) > want {
			return nil, fmt.Errorf("%d bytes of data for %d bytes of image", len(data), want)
		}
		out, n = data, len(data)
	case ReplaceBZ:
		n, err = d.bzip2.Decode(out, data)
	case ReplaceXZ:
		if d.xz == nil {
			d.xz = new(unxz.Decoder)
		}
		n, err = d.xz.Decode(out, data)
	case Zstd:
		n, err = d.decodeZstd(out, data)
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

func (d *decoder) decodeZstd(out, data []byte) (int, error) {
	if d.zstd == nil {
		var err error
		if d.zstd, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(maxOutput)); err != nil {
			return 0, err
		}
	}
	var h zstd.Header
	if err := h.Decode(data); err != nil {
		return 0, err
	}
	if !h.HasFCS || h.FrameContentSize > uint64(len(out)) {
		return 0, fmt.Errorf("the frame says that it holds %d bytes, want %d", h.FrameContentSize, len(out))
	}
	got, err := d.zstd.DecodeAll(data, out[:0])
	if err == nil && len(got) > len(out) {
		err = errors.New("it holds more than it says")
	}
	return len(got), err
}
