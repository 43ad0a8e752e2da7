package build

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/metadata"
)

// container is a payload file with its signatures left out.
type container struct {
	major int
	v1    *metadata.ManifestV1 // one of the two
	v2    *metadata.Manifest
	data  *io.SectionReader // of all operations

	metadataSize int64 // that the file has
}

// delta reports whether the payload starts from an old image.
func (c *container) delta() bool {
	if c.major == 1 {
		return c.v1.OldPartitionInfo != nil
	}
	return slices.ContainsFunc(c.v2.Partitions, func(p *metadata.PartitionUpdate) bool { return p.OldPartitionInfo != nil })
}

// sparse is the first block of an extent that is nowhere.
const sparse = ^uint64(0)

// manifestV1 puts partitions into the form of major 1. Its oldest readers look only at the first list of operations, so all data that
// does not belong to it, the signatures too, is covered by operations of another list which lead nowhere.
func manifestV1(parts []*metadata.PartitionUpdate) *metadata.ManifestV1 {
	m := &metadata.ManifestV1{BlockSize: proto.Uint32(blockSize)}
	for i, p := range parts {
		if i == 0 {
			m.PartitionOperations, m.OldPartitionInfo, m.NewPartitionInfo = p.Operations, p.OldPartitionInfo, p.NewPartitionInfo
			continue
		}
		kind := int32(0) // KERNEL
		if p.GetPartitionName() == "pcr_policy" {
			kind = 1
		}
		m.Procedures = append(m.Procedures, &metadata.InstallProcedure{Type: proto.Int32(kind), Operations: p.Operations, NewInfo: p.NewPartitionInfo})
		for _, op := range p.Operations {
			m.NoopOperations = append(m.NoopOperations, noop(op.GetDataOffset(), op.GetDataLength(), op.DataSha256Hash))
		}
	}
	return m
}

func noop(off, n uint64, sum []byte) *metadata.InstallOperation {
	return &metadata.InstallOperation{
		Type: proto.Int32(0), DataOffset: proto.Uint64(off), DataLength: proto.Uint64(n), DataSha256Hash: sum,
		DstExtents: []*metadata.Extent{{StartBlock: proto.Uint64(sparse), NumBlocks: proto.Uint64((n + blockSize - 1) / blockSize)}},
	}
}

// maxMetadata bounds what is read of a file before anything is known about it.
const maxMetadata = 64 << 20

// openContainer reads the metadata of a payload, signed or not. It checks what it needs to find its parts; whether the manifest makes sense
// is for package payload to say.
func openContainer(src io.ReaderAt, size int64) (*container, error) {
	head := make([]byte, 24)
	if _, err := src.ReadAt(head[:20], 0); err != nil {
		return nil, fmt.Errorf("reading the header: %w", noEOF(err))
	}
	if string(head[:4]) != "CrAU" {
		return nil, fmt.Errorf("this is no payload: it begins with %q", head[:4])
	}
	c := &container{}
	start, metaSig := int64(20), int64(0)
	switch major := binary.BigEndian.Uint64(head[4:]); major {
	case 1:
		c.major = 1
	case 2:
		c.major, start = 2, 24
		if _, err := src.ReadAt(head[20:], 20); err != nil {
			return nil, fmt.Errorf("reading the header: %w", noEOF(err))
		}
		metaSig = int64(binary.BigEndian.Uint32(head[20:]))
	default:
		return nil, fmt.Errorf("major version %d, want 1 or 2", major)
	}
	n := binary.BigEndian.Uint64(head[12:])
	if n > maxMetadata || metaSig > maxMetadata || start+int64(n)+metaSig > size {
		return nil, fmt.Errorf("a manifest of %d bytes and a signature of %d in a file of %d", n, metaSig, size)
	}
	manifest := make([]byte, n)
	if _, err := src.ReadAt(manifest, start); err != nil {
		return nil, fmt.Errorf("reading the manifest: %w", noEOF(err))
	}
	var off *uint64
	var message proto.Message
	if c.major == 1 {
		c.v1 = &metadata.ManifestV1{}
		message = c.v1
	} else {
		c.v2 = &metadata.Manifest{}
		message = c.v2
	}
	if err := proto.Unmarshal(manifest, message); err != nil {
		return nil, fmt.Errorf("reading the manifest: %w", err)
	}
	if c.major == 1 {
		off = c.v1.SignaturesOffset
		if k := len(c.v1.NoopOperations) - 1; off != nil && k >= 0 && c.v1.NoopOperations[k].GetDataOffset() == *off {
			c.v1.NoopOperations = c.v1.NoopOperations[:k] // that of the signatures
		}
	} else {
		off = c.v2.SignaturesOffset
	}
	c.metadataSize = start + int64(n)
	from := c.metadataSize + metaSig
	length := size - from
	if off != nil {
		if *off > uint64(length) {
			return nil, fmt.Errorf("the signatures are said to be at %d, of %d bytes of data", *off, length)
		}
		length = int64(*off)
	}
	c.data = io.NewSectionReader(src, from, length)
	return c, nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// metadata encodes header and manifest for signatures of the given size in bytes; 0 is for none.
func (c *container) metadata(signatures int) ([]byte, error) {
	var message proto.Message
	off, size := proto.Uint64(uint64(c.data.Size())), proto.Uint64(uint64(signatures))
	if signatures == 0 {
		off, size = nil, nil
	}
	if c.major == 1 {
		m := proto.CloneOf(c.v1)
		m.SignaturesOffset, m.SignaturesSize = off, size
		if signatures > 0 {
			m.NoopOperations = append(m.NoopOperations, noop(*off, *size, nil))
		}
		message = m
	} else {
		m := proto.CloneOf(c.v2)
		m.SignaturesOffset, m.SignaturesSize = off, size
		message = m
	}
	manifest, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
	if err != nil {
		return nil, fmt.Errorf("encoding the manifest: %w", err)
	}
	meta := binary.BigEndian.AppendUint64([]byte("CrAU"), uint64(c.major))
	meta = binary.BigEndian.AppendUint64(meta, uint64(len(manifest)))
	if c.major == 2 {
		meta = binary.BigEndian.AppendUint32(meta, uint32(signatures))
	}
	return append(meta, manifest...), nil
}

// readable checks what a reader checks of the metadata, before the payload is written.
func (c *container) readable(ctx context.Context, slots []slot) error {
	blank, err := message(c.major, slots, nil)
	if err != nil {
		return err
	}
	meta, err := c.metadata(len(blank))
	if err != nil {
		return err
	}
	size := int64(len(meta)+len(blank)) + c.data.Size()
	if c.major == 2 {
		meta = append(meta, blank...)
		size += int64(len(blank))
	}
	_, err = payload.Inspect(ctx, claim{meta, size})
	if len(slots) == 0 && errors.Is(err, payload.ErrUnsigned) { // which is looked at last
		return nil
	}
	return err
}

// claim is the beginning of a payload.
type claim struct {
	head []byte
	size int64
}

func (c claim) Size() int64 { return c.size }

func (c claim) Open(_ context.Context, offset int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(c.head[offset:])), nil
}

// write puts the parts together. The sizes of the signatures are in the manifest, so they are fixed before anything is hashed.
func (c *container) write(ctx context.Context, w io.Writer, slots []slot) (Result, error) {
	blank, err := message(c.major, slots, nil)
	if err != nil {
		return Result{}, err
	}
	meta, err := c.metadata(len(blank))
	if err != nil {
		return Result{}, err
	}
	file, signed := sha256.New(), sha256.New()
	res := Result{MetadataSize: int64(len(meta)), MetadataSHA256: sha256.Sum256(meta)}
	out := &counter{w: io.MultiWriter(w, file), ctx: ctx}
	_, err = io.MultiWriter(out, signed).Write(meta)
	if err == nil && c.major == 2 && len(blank) > 0 {
		var sig []byte
		if sig, err = message(c.major, slots, &toSign{ofMetadata, res.MetadataSHA256}); err != nil {
			return Result{}, err
		}
		_, err = out.Write(sig)
	}
	if err == nil {
		_, err = io.Copy(io.MultiWriter(out, signed), io.NewSectionReader(c.data, 0, c.data.Size()))
	}
	if err == nil && len(blank) > 0 {
		var sig []byte
		if sig, err = message(c.major, slots, &toSign{ofPayload, [32]byte(signed.Sum(nil))}); err != nil {
			return Result{}, err
		}
		_, err = out.Write(sig)
	}
	if err != nil {
		return Result{}, fmt.Errorf("writing the payload: %w", err)
	}
	res.Size, res.SHA256 = out.n, [32]byte(file.Sum(nil))
	return res, nil
}

type counter struct {
	w   io.Writer
	ctx context.Context
	n   int64
}

func (c *counter) Write(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
