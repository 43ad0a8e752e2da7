// Package build makes and signs payloads of major version 2.
//
// The same input and keys give the same bytes: chunks are cut at fixed places, compressed by one goroutine each, and written in the order of the
// image. RSA signatures (PKCS #1 v1.5) are deterministic; ECDSA ones are not, and a payload signed with such a key differs in them.
package build

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/dsnet/compress/bzip2"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/metadata"
)

// Compression is how the data of an image is compressed.
type Compression string

// The compressions. Zstd decodes many times faster than the others.
const (
	Zstd  Compression = "zstd"
	XZ    Compression = "xz"
	Bzip2 Compression = "bzip2"
	None  Compression = "none"
)

// Image is one partition of a payload.
type Image struct {
	Name string // such as usr
	Data io.ReaderAt
	Size int64 // bytes, a multiple of 4096
	// PostInstall is the path of a program in the image's file system that a host runs before it makes the image bootable; "" for none.
	PostInstall string
}

// Spec says what a payload is made of.
type Spec struct {
	Images       []Image
	Compression  Compression // "" means zstd
	MaxTimestamp int64
	Product      string          // what the payload is for; hosts that name theirs take no other. "" says nothing
	Keys         []crypto.Signer // RSA or ECDSA P-256; at least one
	TempDir      string          // for compressed data; "" means the system's
	Progress     func(done, total int64)
	Workers      int
}

// Result describes a payload that was made.
type Result struct {
	Size         int64
	SHA256       [32]byte
	MetadataSize int64
}

const (
	blockSize = 4096
	chunkSize = 1 << 20
)

// Full writes a full payload to w.
func Full(ctx context.Context, w io.Writer, s Spec) (Result, error) {
	if len(s.Keys) == 0 {
		return Result{}, errors.New("a payload without a signature would be refused by every host: no key given")
	}
	if s.Compression == "" {
		s.Compression = Zstd
	}
	blobs, err := os.CreateTemp(s.TempDir, "payload-blobs-")
	if err != nil {
		return Result{}, fmt.Errorf("making a payload: %w", err)
	}
	defer os.Remove(blobs.Name())
	defer blobs.Close()
	m := &metadata.Manifest{BlockSize: proto.Uint32(blockSize), MinorVersion: proto.Uint32(0)}
	if s.MaxTimestamp != 0 {
		m.MaxTimestamp = proto.Int64(s.MaxTimestamp)
	}
	if s.Product != "" {
		m.NewImageInfo = &metadata.ImageInfo{Board: proto.String(s.Product)}
	}
	b := &builder{spec: s, blobs: blobs, ctx: ctx}
	for _, img := range s.Images {
		b.total += img.Size
	}
	for _, img := range s.Images {
		part, err := b.image(img)
		if err != nil {
			return Result{}, fmt.Errorf("making a payload of %q: %w", img.Name, err)
		}
		m.Partitions = append(m.Partitions, part)
	}
	if len(m.Partitions) == 0 {
		return Result{}, errors.New("making a payload: no image given")
	}
	return b.write(w, m)
}

type builder struct {
	spec        Spec
	blobs       *os.File
	ctx         context.Context
	offset      int64
	done, total int64
}

type chunk struct {
	kind payload.Kind
	data []byte
	sum  [32]byte
	err  error
}

// image compresses one image, several chunks at a time, and writes their data in order.
func (b *builder) image(img Image) (*metadata.PartitionUpdate, error) {
	if img.Size <= 0 || img.Size%blockSize != 0 {
		return nil, fmt.Errorf("the image has %d bytes, want a multiple of %d", img.Size, blockSize)
	}
	workers := b.spec.Workers
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	part := &metadata.PartitionUpdate{PartitionName: proto.String(img.Name)}
	if img.PostInstall != "" {
		if !filepath.IsLocal(img.PostInstall) {
			return nil, fmt.Errorf("the post-install program %q is not a path inside the image", img.PostInstall)
		}
		part.RunPostinstall, part.PostinstallPath = proto.Bool(true), proto.String(img.PostInstall)
	}
	whole := sha256.New()
	chunks := (img.Size + chunkSize - 1) / chunkSize
	free := make(chan *encoder, workers)
	for range workers {
		e, err := newEncoder(b.spec.Compression)
		if err != nil {
			return nil, err
		}
		free <- e
	}
	results := make(chan chan chunk, 2*workers)
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		defer close(results)
		for i := range chunks {
			raw := make([]byte, min(chunkSize, img.Size-i*chunkSize))
			_, err := img.Data.ReadAt(raw, i*chunkSize)
			if err == io.EOF {
				err = nil
			}
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
			cancel()
			return nil, fmt.Errorf("at byte %d: %w", i*chunkSize, c.err)
		}
		n := min(chunkSize, img.Size-i*chunkSize)
		op := &metadata.InstallOperation{
			Type:       proto.Int32(int32(c.kind)),
			DstExtents: []*metadata.Extent{{StartBlock: proto.Uint64(uint64(i * chunkSize / blockSize)), NumBlocks: proto.Uint64(uint64(n / blockSize))}},
		}
		if len(c.data) > 0 {
			op.DataOffset, op.DataLength, op.DataSha256Hash = proto.Uint64(uint64(b.offset)), proto.Uint64(uint64(len(c.data))), c.sum[:]
			if _, err := b.blobs.Write(c.data); err != nil {
				return nil, err
			}
			b.offset += int64(len(c.data))
		}
		part.Operations = append(part.Operations, op)
		i++
		b.done += n
		if b.spec.Progress != nil {
			b.spec.Progress(b.done, b.total)
		}
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
}

func newEncoder(how Compression) (*encoder, error) {
	e := &encoder{how: how}
	switch how {
	case Zstd:
		var err error
		e.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedBetterCompression), zstd.WithEncoderCRC(false))
		return e, err
	case XZ, Bzip2, None:
		return e, nil
	}
	return nil, fmt.Errorf("unknown compression %q, want zstd, xz, bzip2 or none", how)
}

// encode compresses a chunk, or leaves it as it is where that is smaller.
func (e *encoder) encode(raw []byte) chunk {
	if e.how == Zstd && len(bytes.TrimLeft(raw, "\x00")) == 0 {
		return chunk{kind: payload.Zero}
	}
	var out bytes.Buffer
	kind := payload.Replace
	var w io.WriteCloser
	var err error
	switch e.how {
	case Zstd:
		kind = payload.Zstd
		out.Write(e.zstd.EncodeAll(raw, nil))
	case XZ:
		kind = payload.ReplaceXZ
		w, err = xz.WriterConfig{DictCap: chunkSize, CheckSum: xz.CRC32}.NewWriter(&out)
	case Bzip2:
		kind = payload.ReplaceBZ
		w, err = bzip2.NewWriter(&out, &bzip2.WriterConfig{Level: 9})
	}
	if err == nil && w != nil {
		_, err = w.Write(raw)
		err = errors.Join(err, w.Close())
	}
	if err != nil {
		return chunk{err: err}
	}
	data := out.Bytes()
	if e.how == None || len(data) >= len(raw) {
		kind, data = payload.Replace, raw
	}
	return chunk{kind: kind, data: data, sum: sha256.Sum256(data)}
}

// write puts the parts together. The sizes of the signatures are in the manifest, so they are fixed before anything is hashed.
func (b *builder) write(w io.Writer, m *metadata.Manifest) (Result, error) {
	blank, err := b.signatures(nil)
	if err != nil {
		return Result{}, err
	}
	m.SignaturesOffset, m.SignaturesSize = proto.Uint64(uint64(b.offset)), proto.Uint64(uint64(len(blank)))
	manifest, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return Result{}, fmt.Errorf("encoding the manifest: %w", err)
	}
	meta := append([]byte("CrAU"), binary.BigEndian.AppendUint64(nil, 2)...)
	meta = binary.BigEndian.AppendUint64(meta, uint64(len(manifest)))
	meta = binary.BigEndian.AppendUint32(meta, uint32(len(blank)))
	meta = append(meta, manifest...)
	metaSum := sha256.Sum256(meta)
	metaSig, err := b.signatures(&metaSum)
	if err != nil {
		return Result{}, err
	}
	file, signed := sha256.New(), sha256.New()
	out := &counter{w: io.MultiWriter(w, file)}
	put := func(data []byte, also ...hash.Hash) error {
		for _, h := range also {
			h.Write(data)
		}
		_, err := out.Write(data)
		return err
	}
	if err := errors.Join(put(meta, signed), put(metaSig)); err != nil {
		return Result{}, fmt.Errorf("writing the payload: %w", err)
	}
	if _, err := b.blobs.Seek(0, io.SeekStart); err != nil {
		return Result{}, err
	}
	if _, err := io.Copy(io.MultiWriter(out, signed), io.LimitReader(b.blobs, b.offset)); err != nil {
		return Result{}, fmt.Errorf("writing the payload: %w", err)
	}
	sum := [32]byte(signed.Sum(nil))
	sigs, err := b.signatures(&sum)
	if err != nil {
		return Result{}, err
	}
	if err := put(sigs); err != nil {
		return Result{}, fmt.Errorf("writing the payload: %w", err)
	}
	return Result{Size: out.n, SHA256: [32]byte(file.Sum(nil)), MetadataSize: int64(len(meta))}, nil
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// signatures makes the Signatures message over a digest, or one of the same size for no digest.
func (b *builder) signatures(digest *[32]byte) ([]byte, error) {
	var m metadata.Signatures
	for _, key := range b.spec.Keys {
		var size int
		switch pub := key.Public().(type) {
		case *rsa.PublicKey:
			size = pub.Size()
		case *ecdsa.PublicKey:
			size = 72 // the longest DER form on P-256
		default:
			return nil, fmt.Errorf("signing with a key of type %T", pub)
		}
		data := make([]byte, size)
		n := size
		if digest != nil {
			sig, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
			if err != nil {
				return nil, fmt.Errorf("signing: %w", err)
			}
			if len(sig) > size {
				return nil, fmt.Errorf("signing: a signature of %d bytes, at most %d", len(sig), size)
			}
			n = copy(data, sig)
		}
		m.Signatures = append(m.Signatures, &metadata.Signatures_Signature{Data: data, UnpaddedSignatureSize: proto.Uint32(uint32(n))})
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(&m)
}
