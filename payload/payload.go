package payload

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload/metadata"
)

// Limits of what a payload may ask of the reader. They bound memory before anything is believed.
const (
	maxManifest  = 64 << 20 // bytes
	maxMetaSig   = 64 << 10
	maxBlob      = 64 << 20  // data of one operation
	maxOutput    = 256 << 20 // that one operation writes
	maxPartition = 1 << 40

	// Of a payload whose metadata nobody has vouched for: major 1 without a detached signature is obeyed before the signature at its end is there.
	maxManifestUnsigned = 8 << 20
	maxCostUnsigned     = 128 << 20 // data, old blocks and output of one operation
	blockSize           = 4096
	magic               = "CrAU"
)

// Source is where a payload comes from: a file, or a server.
type Source interface {
	Size() int64
	// Open starts reading at offset.
	Open(ctx context.Context, offset int64) (io.ReadCloser, error)
}

// Options say what is believed.
type Options struct {
	Keys *Keyring
	// MinTimestamp is the floor: a payload whose max_timestamp is below it is refused. 0 is no floor.
	MinTimestamp int64
	// Product, if it is not empty, is the product that a payload must say it is for; one that says nothing is refused too.
	Product string
	// MetadataSignature is a detached signature of the metadata (Omaha's MetadataSignatureRsa, decoded). Major 1 carries none of its own.
	MetadataSignature []byte
	// SignedMetadata refuses a payload of major 1 without such a signature, whose manifest only the signature at its end covers.
	SignedMetadata bool
}

// Partition is one image in a payload. Major 1 knows no names: its slot's image is "usr", and the files of its install procedures are "kernel"
// and "pcr_policy".
type Partition struct {
	Name      string
	Size      int64    // bytes
	SHA256    [32]byte // of the image
	OldSize   int64    // of the image that a delta starts from; 0 in a full payload
	OldSHA256 [32]byte
	// PostInstall is the path, inside the image, of a program to run from it before it is made bootable; "" if there is none. Major 1 does not
	// say; there it is PostInstallDefault by convention.
	PostInstall         string
	PostInstallOptional bool // its failure is no reason not to go on
	ops                 []operation
}

// PostInstallDefault is the program's path where a payload does not name it.
const PostInstallDefault = "postinst"

// Operations returns how many operations make the image.
func (p Partition) Operations() int { return len(p.ops) }

// Payload is a payload whose metadata is read, checked whole, and (major 2) known to be signed by a pinned key.
type Payload struct {
	Major, Minor   int
	Partitions     []Partition
	MaxTimestamp   int64
	Product        string // that it says it is for (new_image_info.board); "" if it says nothing
	MetadataSize   int64
	ManifestSHA256 [32]byte // of header and manifest
	Size           int64

	src      Source
	keys     *Keyring
	floor    int64
	vouched  bool  // a pinned key has signed the metadata
	blobs    int64 // offset of the first blob
	sigOff   int64 // of the signatures, relative to blobs
	sigSize  int64
	head     []byte // header, manifest, and the metadata's signature
	metadata []byte // the first two
	metaSig  []byte
}

// Delta reports whether applying needs the old images.
func (p *Payload) Delta() bool {
	for _, q := range p.Partitions {
		if q.OldSize > 0 {
			return true
		}
	}
	return false
}

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, args...))
}

// Open reads and checks a payload's metadata. Nothing is written, and no blob is read. The manifest of major 2 is not looked at before its signature
// holds. Major 1 has no signature there: its manifest is checked in the same way, and what it leads to is believed only when
// Apply has checked the signature at the end, unless opt carries one from elsewhere.
func Open(ctx context.Context, src Source, opt Options) (*Payload, error) {
	if opt.Keys.Len() == 0 {
		return nil, ErrNoKey
	}
	return open(ctx, src, opt)
}

// Inspect reads a payload's metadata and checks everything about it but the signatures. What it returns is a claim, made by whoever
// wrote the file; Apply refuses it.
func Inspect(ctx context.Context, src Source) (*Payload, error) { return open(ctx, src, Options{}) }

func open(ctx context.Context, src Source, opt Options) (*Payload, error) {
	r, err := src.Open(ctx, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSource, err)
	}
	defer r.Close()
	p := &Payload{src: src, keys: opt.Keys, Size: src.Size()}
	head := make([]byte, 24)
	if err := readFull(r, head[:20]); err != nil {
		return nil, fmt.Errorf("reading the header: %w", err)
	}
	if string(head[:4]) != magic {
		return nil, malformed("it begins with %q, not with %q", head[:4], magic)
	}
	switch major := binary.BigEndian.Uint64(head[4:]); major {
	case 1:
		p.Major, head = 1, head[:20]
	case 2:
		p.Major = 2
		if err := readFull(r, head[20:]); err != nil {
			return nil, fmt.Errorf("reading the header: %w", err)
		}
	default:
		return nil, fmt.Errorf("%w: major version %d, want 1 or 2", ErrUnsupported, major)
	}
	manifest, metaSig := binary.BigEndian.Uint64(head[12:]), uint64(0)
	if p.Major == 2 {
		metaSig = uint64(binary.BigEndian.Uint32(head[20:]))
	}
	if manifest == 0 || manifest > maxManifest {
		return nil, malformed("a manifest of %d bytes, at most %d", manifest, maxManifest)
	}
	// A detached signature is looked at only when the whole manifest is there.
	if p.Major == 1 && (len(opt.MetadataSignature) == 0 || opt.Keys.Len() == 0) && manifest > maxManifestUnsigned {
		return nil, malformed("a manifest of %d bytes that nobody has signed, at most %d", manifest, maxManifestUnsigned)
	}
	if metaSig > maxMetaSig {
		return nil, malformed("a metadata signature of %d bytes, at most %d", metaSig, maxMetaSig)
	}
	p.MetadataSize = int64(len(head)) + int64(manifest)
	p.blobs = p.MetadataSize + int64(metaSig)
	if p.blobs > p.Size {
		return nil, malformed("metadata of %d bytes in a file of %d", p.blobs, p.Size)
	}
	// Read in steps, so that memory follows what really arrives and not what the header claims.
	var buf bytes.Buffer
	buf.Write(head)
	if n, err := io.CopyN(&buf, r, int64(manifest)+int64(metaSig)); err != nil {
		return nil, fmt.Errorf("%w: reading the manifest: %w after %d bytes", ErrSource, err, n)
	}
	p.head = buf.Bytes()
	p.metadata, p.metaSig = p.head[:p.MetadataSize], p.head[p.MetadataSize:]
	p.ManifestSHA256 = sha256.Sum256(p.metadata)
	var signers []int
	switch {
	case opt.Keys.Len() == 0:
		// Inspect: nobody is believed, and nothing is applied.
	case len(opt.MetadataSignature) > 0 && opt.Keys.need() == 1:
		// It is one signature; where more are needed, those in the file must do.
		i, ok := opt.Keys.verifyOne(opt.MetadataSignature, p.ManifestSHA256)
		if !ok {
			return nil, fmt.Errorf("the metadata's detached signature: %w", ErrSignature)
		}
		signers = []int{i}
	case p.Major == 2 && metaSig == 0, p.Major == 1 && opt.SignedMetadata:
		return nil, fmt.Errorf("the metadata: %w", ErrUnsigned)
	case p.Major == 2:
		if signers, err = opt.Keys.verify(p.metaSig, p.ManifestSHA256); err != nil {
			return nil, fmt.Errorf("the metadata's signature: %w", err)
		}
	}
	p.vouched = signers != nil
	if p.Major == 1 {
		err = p.readV1(p.metadata[len(head):])
	} else {
		err = p.readV2(p.metadata[len(head):])
	}
	if err != nil {
		return nil, err
	}
	if len(p.Product) > 128 {
		return nil, malformed("the name of its product has %d bytes, at most 128", len(p.Product))
	}
	if signers != nil {
		if err := opt.Keys.judge(signers, p.MaxTimestamp, opt.MinTimestamp); err != nil {
			return nil, fmt.Errorf("the metadata's signature: %w", err)
		}
	}
	if p.MaxTimestamp < opt.MinTimestamp {
		return nil, fmt.Errorf("%w: its timestamp is %d, the floor %d", ErrRollback, p.MaxTimestamp, opt.MinTimestamp)
	}
	if opt.Product != "" && p.Product != opt.Product {
		return nil, fmt.Errorf("%w: it is for %q, this host is %q", ErrProduct, p.Product, opt.Product)
	}
	p.floor = opt.MinTimestamp
	return p, nil
}

func readFull(r io.Reader, b []byte) error {
	if _, err := io.ReadFull(r, b); err != nil {
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return malformed("the file ends too soon")
		}
		return fmt.Errorf("%w: %w", ErrSource, err)
	}
	return nil
}

func (p *Payload) readV2(data []byte) error {
	limit := maxMessagesSigned
	if p.keys.Len() == 0 {
		limit = maxMessagesUnsigned
	}
	if err := bound(data, messageV2(), limit); err != nil {
		return err
	}
	rest, _, operations := split(data, messageV2())
	var m metadata.Manifest
	if err := proto.Unmarshal(rest, &m); err != nil {
		return malformed("the manifest cannot be read: %v", err)
	}
	if m.BlockSize != nil && m.GetBlockSize() != blockSize {
		return malformed("blocks of %d bytes, want %d", m.GetBlockSize(), blockSize)
	}
	if len(m.Partitions) == 0 || len(m.Partitions) > 16 {
		return malformed("%d partitions, want 1 to 16", len(m.Partitions))
	}
	p.Minor, p.MaxTimestamp, p.Product = int(m.GetMinorVersion()), m.GetMaxTimestamp(), m.GetNewImageInfo().GetBoard()
	delta := false
	for _, mp := range m.Partitions {
		delta = delta || mp.OldPartitionInfo != nil
	}
	if !delta && p.Minor != 0 {
		return fmt.Errorf("%w: a full payload of minor version %d, want 0", ErrUnsupported, p.Minor)
	}
	if delta && (p.Minor < 2 || p.Minor > 7) {
		return fmt.Errorf("%w: a delta of minor version %d, want 2 to 7", ErrUnsupported, p.Minor)
	}
	names := map[string]bool{}
	for i, mp := range m.Partitions {
		name := mp.GetPartitionName()
		if !ValidName(name) {
			return malformed("a partition is called %q", name)
		}
		if names[name] {
			return malformed("partition %q is there twice", name)
		}
		names[name] = true
		part, err := newPartition(name, mp.OldPartitionInfo, mp.NewPartitionInfo)
		if err != nil {
			return err
		}
		if mp.GetRunPostinstall() {
			part.PostInstall, part.PostInstallOptional = mp.GetPostinstallPath(), mp.GetPostinstallOptional()
			if mp.PostinstallPath == nil {
				part.PostInstall = PostInstallDefault
			}
			if !filepath.IsLocal(part.PostInstall) || strings.ContainsRune(part.PostInstall, 0) || len(part.PostInstall) > 4096 {
				return malformed("the post-install program of partition %q is at %q, which is not a path inside the image", name, part.PostInstall)
			}
		}
		if err := p.operations(&part, operations[i], &p.sigOff); err != nil {
			return err
		}
		p.Partitions = append(p.Partitions, part)
	}
	return p.readSignaturePlace(m.SignaturesOffset, m.SignaturesSize)
}

func (p *Payload) readV1(data []byte) error {
	if err := bound(data, messageV1(), maxMessagesUnsigned); err != nil {
		return err
	}
	rest, operations, procedures := split(data, messageV1())
	var m metadata.ManifestV1
	if err := proto.Unmarshal(rest, &m); err != nil {
		return malformed("the manifest cannot be read: %v", err)
	}
	if m.BlockSize != nil && m.GetBlockSize() != blockSize {
		return malformed("blocks of %d bytes, want %d", m.GetBlockSize(), blockSize)
	}
	p.MaxTimestamp, p.Product = m.GetMaxTimestamp(), m.GetNewImageInfo().GetBoard()
	part, err := newPartition("usr", m.OldPartitionInfo, m.NewPartitionInfo)
	if err != nil {
		return err
	}
	if err := p.operations(&part, operations, &p.sigOff); err != nil {
		return err
	}
	p.Partitions = append(p.Partitions, part)
	for i, proc := range m.Procedures {
		name, ok := map[int32]string{0: "kernel", 1: "pcr_policy"}[proc.GetType()]
		if !ok {
			return fmt.Errorf("%w: install procedure %d", ErrUnsupported, proc.GetType())
		}
		if slices.ContainsFunc(p.Partitions, func(q Partition) bool { return q.Name == name }) {
			return malformed("it has two images of %q", name)
		}
		part, err := newPartition(name, proc.OldInfo, proc.NewInfo)
		if err != nil {
			return err
		}
		if err := p.operations(&part, procedures[i], &p.sigOff); err != nil {
			return err
		}
		p.Partitions = append(p.Partitions, part)
	}
	return p.readSignaturePlace(m.SignaturesOffset, m.SignaturesSize)
}

// readSignaturePlace checks that the signatures come right after the last blob and end the file.
func (p *Payload) readSignaturePlace(off, size *uint64) error {
	if off == nil || size == nil {
		return fmt.Errorf("the data: %w", ErrUnsigned)
	}
	if *off != uint64(p.sigOff) {
		return malformed("the signatures are said to be at %d, and the data ends at %d", *off, p.sigOff)
	}
	if *size == 0 || *size > maxMetaSig {
		return malformed("signatures of %d bytes, at most %d", *size, maxMetaSig)
	}
	p.sigSize = int64(*size)
	if want := p.blobs + p.sigOff + p.sigSize; want != p.Size {
		return malformed("the file has %d bytes, its manifest describes %d", p.Size, want)
	}
	return nil
}

func newPartition(name string, old, info *metadata.PartitionInfo) (Partition, error) {
	p := Partition{Name: name}
	if info == nil {
		return p, malformed("partition %q has no size and hash", name)
	}
	if info.GetSize() == 0 || info.GetSize() > maxPartition {
		return p, malformed("partition %q has %d bytes", name, info.GetSize())
	}
	if len(info.Hash) != 32 {
		return p, malformed("partition %q has a hash of %d bytes, want 32", name, len(info.Hash))
	}
	p.Size, p.SHA256 = int64(info.GetSize()), [32]byte(info.Hash)
	if old != nil {
		if old.GetSize() == 0 || old.GetSize() > maxPartition || len(old.Hash) != 32 {
			return p, malformed("the old partition %q has %d bytes and a hash of %d", name, old.GetSize(), len(old.Hash))
		}
		p.OldSize, p.OldSHA256 = int64(old.GetSize()), [32]byte(old.Hash)
	}
	return p, nil
}

// ValidName reports whether a partition may have this name.
func ValidName(name string) bool {
	if name == "" || len(name) > 36 {
		return false
	}
	for _, c := range name {
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '_' || c == '-') {
			return false
		}
	}
	return true
}

// DecodeMetadataSignature reads Omaha's MetadataSignatureRsa.
func DecodeMetadataSignature(s string) ([]byte, error) { return base64.StdEncoding.DecodeString(s) }

// Counts returns how many operations of each kind make the image, by the name of the kind.
func (p Partition) Counts() map[string]int {
	n := map[string]int{}
	for _, op := range p.ops {
		n[op.kind.String()]++
	}
	return n
}

// Metadata returns the beginning of the payload as it was read: header, manifest, and the metadata's signature. With [Payload.Size] it is enough to [Open] the
// payload once more, by somebody who believes nothing of what another has found out. It must not be changed.
func (p *Payload) Metadata() []byte { return p.head }
