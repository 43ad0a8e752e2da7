// Package build makes and signs payloads: full ones and deltas, of major version 2 and, for older hosts, 1.
//
// The same input and keys give the same bytes: images are cut at fixed places, each piece is compressed by one goroutine, and what they make is
// written in the order of the image. RSA signatures (PKCS #1 v1.5) are deterministic; ECDSA ones are not, and a payload signed with
// such a key differs in them.
//
// Images are read in pieces, and what was made of them is kept in temporary files. Memory does not grow with the image but for
// the index of a delta: 20 bytes for each block of 4096, and 32 MiB at most for what is similar.
//
// # Deltas
//
// A block of the new image that is anywhere in the old one is copied. The others are taken together, by file where the file system can be read and
// by place where not, and for each unit the blocks of the old image that are likely to be like it are looked for: those of the file of the
// same name, the neighbours of what was copied, and those that share bytes with it. Whatever is smallest is taken: a patch, or the data itself.
//
// # Signatures
//
// [Sign] signs a payload with private keys at hand. For keys that are elsewhere, [Digests] says what is to be signed, and [Attach] puts in
// what came back. Both take payloads that are signed already, and leave all but the signatures as it is.
package build

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/dsnet/compress/bzip2"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/metadata"
	"github.com/flipside-linux/flipside/payload/toxz"
)

// Compression is how the data of an image is compressed.
type Compression string

// The compressions. Zstd decodes many times faster than the others, and is read by Flipside only. Smallest is, for each
// piece, the smaller one of xz and bzip2.
const (
	Zstd     Compression = "zstd"
	XZ       Compression = "xz"
	Bzip2    Compression = "bzip2"
	None     Compression = "none"
	Smallest Compression = "smallest"
)

// Image is one partition of a payload.
type Image struct {
	Name string // such as usr
	Data io.ReaderAt
	Size int64  // bytes, a multiple of 4096; of the kernel and the PCR policy in major 1, any
	Old  *Image // what a delta starts from; nil: the whole image is in the payload
	// PostInstall is the path of a program in the image's file system that a host runs before it makes the image bootable; "" for none.
	// Major 1 does not say; there it is payload.PostInstallDefault.
	PostInstall string
}

// Spec says what a payload is made of.
type Spec struct {
	// Images in the order in which they are applied. Major 1 has usr, and may have kernel and pcr_policy.
	Images       []Image
	Major        int         // 0 means 2
	Compression  Compression // "" means zstd, or bzip2 in major 1, which knows nothing else
	MaxTimestamp int64       // a number of the release that only rises; 0 for none
	Product      string      // what the payload is for; hosts that name theirs take no other. "" says nothing
	// Keys sign: RSA, or ECDSA on P-256 in major 2. Unsigned payloads, which every host refuses, are made to be signed later.
	Keys     []crypto.Signer
	Unsigned bool
	TempDir  string // for compressed data; "" means the system's
	Progress func(done, total int64)
	Workers  int // 0: one for each processor
	// IgnoreFiles makes deltas as if the file systems in the images could not be read.
	IgnoreFiles bool

	messages int // that a delta tries to do with; 0: maxMessages
}

// Result describes a payload that was made.
type Result struct {
	Size           int64
	SHA256         [32]byte
	MetadataSize   int64
	MetadataSHA256 [32]byte
	Delta          bool
}

const (
	blockSize = 4096
	chunkV1   = 1 << 20 // what older hosts are used to
	chunkV2   = 2 << 20
)

// Create writes a payload to w.
func Create(ctx context.Context, w io.Writer, s Spec) (Result, error) {
	if len(s.Keys) == 0 && !s.Unsigned {
		return Result{}, errors.New("a payload without a signature would be refused by every host: no key given")
	}
	if err := s.check(); err != nil {
		return Result{}, fmt.Errorf("making a payload: %w", err)
	}
	b := &builder{spec: s, ctx: ctx}
	for _, f := range []**os.File{&b.blobs, &b.scratch} {
		tmp, err := os.CreateTemp(s.TempDir, "payload-data-")
		if err != nil {
			return Result{}, fmt.Errorf("making a payload: %w", err)
		}
		defer os.Remove(tmp.Name())
		defer tmp.Close()
		*f = tmp
	}
	delta := false
	for _, img := range s.Images {
		b.total += img.Size
		if img.Old != nil {
			delta = true
			b.total += img.Size + img.Old.Size
		}
	}
	var parts []*metadata.PartitionUpdate
	left := cmp.Or(s.messages, maxMessages)
	for i, img := range s.Images {
		end := b.done + img.Size
		var part *metadata.PartitionUpdate
		var err error
		if img.Old != nil {
			end += img.Size + img.Old.Size
			part, err = b.delta(img, max(left, 0)/(len(s.Images)-i))
		} else {
			part, err = b.image(img)
		}
		if err != nil {
			return Result{}, fmt.Errorf("making a payload of %q: %w", img.Name, err)
		}
		b.advance(end - b.done)
		if img.PostInstall != "" {
			part.RunPostinstall, part.PostinstallPath = proto.Bool(true), proto.String(img.PostInstall)
		}
		parts = append(parts, part)
		for _, op := range part.Operations {
			left -= messages(op)
		}
	}
	c := &container{major: s.Major, data: io.NewSectionReader(b.blobs, 0, b.offset)}
	var timestamp *int64
	if s.MaxTimestamp != 0 {
		timestamp = &s.MaxTimestamp
	}
	var product *metadata.ImageInfo
	if s.Product != "" {
		product = &metadata.ImageInfo{Board: &s.Product}
	}
	if s.Major == 1 {
		c.v1 = manifestV1(parts)
		c.v1.MaxTimestamp, c.v1.NewImageInfo = timestamp, product
	} else {
		c.v2 = &metadata.Manifest{BlockSize: proto.Uint32(blockSize), MinorVersion: proto.Uint32(0), Partitions: parts, MaxTimestamp: timestamp, NewImageInfo: product}
		if delta {
			c.v2.MinorVersion = proto.Uint32(4)
		}
		if delta && b.offset >= 1<<32 {
			c.v2.MinorVersion = proto.Uint32(6) // older readers have 32 bits for an offset
		}
	}
	if s.Major == 1 && b.offset >= 1<<32 {
		return Result{}, fmt.Errorf("making a payload: %d bytes of data are more than major version 1 can hold", b.offset)
	}
	slots := keySlots(s.Major, s.Keys)
	if err := c.readable(ctx, slots); err != nil {
		advice := "make it of a smaller image"
		if delta {
			advice = "make a full payload of the image"
		}
		return Result{}, fmt.Errorf("making a payload that hosts can read: %w: %s", err, advice)
	}
	res, err := c.write(ctx, w, slots)
	res.Delta = delta
	return res, err
}

// Full writes a full payload to w. It is [Create] for images of which none has an old one.
func Full(ctx context.Context, w io.Writer, s Spec) (Result, error) {
	for _, img := range s.Images {
		if img.Old != nil {
			return Result{}, fmt.Errorf("making a full payload: image %q has an old one", img.Name)
		}
	}
	return Create(ctx, w, s)
}

// check looks for mistakes, and fills in what was left out.
func (s *Spec) check() error {
	if len(s.Images) == 0 {
		return errors.New("no image given")
	}
	if s.MaxTimestamp < 0 {
		return fmt.Errorf("the number of the release is %d, want one from 1 on, or 0 for none", s.MaxTimestamp)
	}
	switch s.Major {
	case 0:
		s.Major = 2
	case 1, 2:
	default:
		return fmt.Errorf("major version %d, want 1 or 2", s.Major)
	}
	if s.Compression == "" {
		s.Compression = Zstd
		if s.Major == 1 {
			s.Compression = Bzip2
		}
	}
	if s.Major == 1 {
		if s.Compression != Bzip2 && s.Compression != None {
			return fmt.Errorf("compression %q in major version 1, which knows bzip2 and none", s.Compression)
		}
	}
	order := map[string]int{"usr": 1, "kernel": 2, "pcr_policy": 3}
	last := 0
	seen := map[string]bool{}
	for _, img := range s.Images {
		if img.PostInstall != "" && !filepath.IsLocal(img.PostInstall) {
			return fmt.Errorf("the post-install program %q of image %q is not a path inside the image", img.PostInstall, img.Name)
		}
		if img.PostInstall != "" && s.Major == 1 {
			return fmt.Errorf("image %q: major version 1 cannot name a post-install program", img.Name)
		}
		if seen[img.Name] {
			return fmt.Errorf("image %q is given twice", img.Name)
		}
		seen[img.Name] = true
		switch {
		case !payload.ValidName(img.Name):
			return fmt.Errorf("an image is called %q: want at most 36 small letters, digits, _ and -", img.Name)
		case img.Size <= 0:
			return fmt.Errorf("image %q is empty", img.Name)
		case img.Old != nil && img.Old.Size <= 0:
			return fmt.Errorf("the old image %q is empty", img.Name)
		}
		if img.Size%blockSize != 0 && (s.Major != 1 || img.Name == "usr") {
			return fmt.Errorf("image %q has %d bytes, want a multiple of %d: fill the file up with: truncate -s %%%d FILE", img.Name, img.Size, blockSize, blockSize)
		}
		if img.Old != nil && (img.Old.Size%blockSize != 0 || img.Size%blockSize != 0) {
			return fmt.Errorf("the old image %q has %d bytes, want a multiple of %d: fill the file up with: truncate -s %%%d FILE", img.Name, img.Old.Size, blockSize, blockSize)
		}
		if s.Major == 1 && img.Old != nil && max(img.Size, img.Old.Size) > maxInPlace {
			return fmt.Errorf("image %q: a delta of major version 1 is of %d GiB at most: make a full payload, or one of major version 2", img.Name, int64(maxInPlace>>30))
		}
		if img.Size > maxImage || img.Old != nil && img.Old.Size > maxImage {
			return fmt.Errorf("image %q has more than %d bytes", img.Name, int64(maxImage))
		}
		if s.Major == 1 {
			if order[img.Name] <= last {
				return fmt.Errorf("image %q: major version 1 has usr, kernel and pcr_policy, in this order, and begins with usr", img.Name)
			}
			last = order[img.Name]
			if img.Name != "usr" && img.Old != nil {
				return fmt.Errorf("image %q: major version 1 has deltas of usr only", img.Name)
			}
		}
	}
	if s.Major == 1 && s.Images[0].Name != "usr" {
		return errors.New("major version 1 needs an image usr")
	}
	return nil
}

// maxImage is what readers accept of one partition, in bytes.
const maxImage = 1 << 40

// maxInPlace is what readers accept of the images of a delta of major 1, in bytes.
const maxInPlace = 8 << 30

type builder struct {
	spec        Spec
	blobs       *os.File // the data of all operations, in their order
	scratch     *os.File // of operations whose order is not known yet
	scratchLen  int64
	ctx         context.Context
	offset      int64
	done, total int64
}

func (b *builder) workers() int {
	if b.spec.Workers > 0 {
		return b.spec.Workers
	}
	return runtime.GOMAXPROCS(0)
}

func (b *builder) advance(n int64) {
	b.done += n
	if b.spec.Progress != nil {
		b.spec.Progress(b.done, b.total)
	}
}

// put appends an operation's data, and says in the operation where it is.
func (b *builder) put(op *metadata.InstallOperation, data []byte) error {
	if len(data) == 0 {
		return nil
	}
	sum := sha256.Sum256(data)
	op.DataOffset, op.DataLength, op.DataSha256Hash = proto.Uint64(uint64(b.offset)), proto.Uint64(uint64(len(data))), sum[:]
	_, err := b.blobs.Write(data)
	b.offset += int64(len(data))
	return err
}

type chunk struct {
	kind payload.Kind
	data []byte
	err  error
}

// image compresses one image, several chunks at a time, and writes their data in order.
func (b *builder) image(img Image) (*metadata.PartitionUpdate, error) {
	part := &metadata.PartitionUpdate{PartitionName: proto.String(img.Name)}
	whole := sha256.New()
	size := int64(chunkV2)
	if b.spec.Major == 1 {
		size = chunkV1
	}
	chunks := (img.Size + size - 1) / size
	free := make(chan *encoder, b.workers())
	for range b.workers() {
		e, err := newEncoder(b.spec.Compression)
		if err != nil {
			return nil, err
		}
		free <- e
	}
	results := make(chan chan chunk, 2*b.workers())
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel() // before the wait, which nothing else ends after an error
	wg.Go(func() {
		defer close(results)
		for i := range chunks {
			raw := make([]byte, min(size, img.Size-i*size))
			err := readAt(img, i*size, raw)
			whole.Write(raw)
			res := make(chan chunk, 1)
			select {
			case results <- res:
			case <-ctx.Done():
				return
			}
			if err != nil {
				res <- chunk{err: err}
				return
			}
			e := <-free
			wg.Go(func() {
				res <- e.encode(raw)
				free <- e
			})
		}
	})
	var i int64
	for res := range results {
		c := <-res
		if c.err == nil {
			c.err = ctx.Err()
		}
		if c.err != nil {
			return nil, c.err
		}
		n := min(size, img.Size-i*size)
		blocks := uint64(n / blockSize)
		if b.spec.Major == 1 {
			blocks = chunkV1 / blockSize // the last one claims a whole chunk, whatever is left
		}
		op := &metadata.InstallOperation{
			Type:       proto.Int32(int32(c.kind)),
			DstExtents: []*metadata.Extent{{StartBlock: proto.Uint64(uint64(i * size / blockSize)), NumBlocks: proto.Uint64(blocks)}},
		}
		if err := b.put(op, c.data); err != nil {
			return nil, err
		}
		part.Operations = append(part.Operations, op)
		i++
		b.advance(n)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	part.NewPartitionInfo = &metadata.PartitionInfo{Size: proto.Uint64(uint64(img.Size)), Hash: whole.Sum(nil)}
	return part, nil
}

// encoder compresses chunks.
type encoder struct {
	how  Compression
	zstd *zstd.Encoder
	xz   toxz.Encoder
}

func newEncoder(how Compression) (*encoder, error) {
	e := &encoder{how: how}
	switch how {
	case Zstd:
		var err error
		e.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderCRC(false))
		return e, err
	case XZ, Bzip2, None, Smallest:
		return e, nil
	}
	return nil, fmt.Errorf("unknown compression %q, want zstd, xz, bzip2, smallest or none", how)
}

// encode compresses a chunk, or leaves it as it is where that is smaller.
func (e *encoder) encode(raw []byte) chunk {
	best := chunk{kind: payload.Replace, data: raw}
	try := func(kind payload.Kind, data []byte, err error) {
		if err != nil {
			best.err = err
		} else if len(data) < len(best.data) {
			best.kind, best.data = kind, data
		}
	}
	switch e.how {
	case Zstd:
		if allZero(raw) {
			return chunk{kind: payload.Zero}
		}
		try(payload.Zstd, e.zstd.EncodeAll(raw, nil), nil)
	case XZ, Smallest:
		try(payload.ReplaceXZ, e.xz.Append(nil, raw), nil)
	}
	if e.how == Bzip2 || e.how == Smallest {
		data, err := packBzip2(raw)
		try(payload.ReplaceBZ, data, err)
	}
	return best
}

func packBzip2(raw []byte) ([]byte, error) {
	var out bytes.Buffer
	w, err := bzip2.NewWriter(&out, &bzip2.WriterConfig{Level: 9})
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(raw); err != nil {
		return nil, err
	}
	err = w.Close()
	return out.Bytes(), err
}
