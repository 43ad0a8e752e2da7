package payload_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	mathrand "math/rand/v2"
	"strings"
	"testing"

	"github.com/andybalholm/brotli"
	"github.com/dsnet/compress/bzip2"
	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/metadata"
)

// forger makes payloads by hand, right and wrong, all of them well signed.
type forger struct {
	key  *ecdsa.PrivateKey
	keys *payload.Keyring
}

func newForger(t testing.TB) *forger {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	f := &forger{key: key, keys: &payload.Keyring{}}
	if err := f.keys.Add(key.Public()); err != nil {
		t.Fatal(err)
	}
	return f
}

// signatures is a message of one signature, always of the same length.
func (f *forger) signatures(t testing.TB, digest []byte) []byte {
	t.Helper()
	sig, err := ecdsa.SignASN1(rand.Reader, f.key, digest)
	if err != nil {
		t.Fatal(err)
	}
	n := uint32(len(sig))
	sig = append(sig, make([]byte, 72-len(sig))...)
	data, err := proto.Marshal(&metadata.Signatures{Signatures: []*metadata.Signatures_Signature{{Data: sig, UnpaddedSignatureSize: &n}}})
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func (f *forger) payload(t testing.TB, m proto.Message, blobs []byte) []byte {
	t.Helper()
	size := uint64(len(f.signatures(t, make([]byte, 32))))
	major := uint64(2)
	switch m := m.(type) {
	case *metadata.Manifest:
		m.SignaturesOffset, m.SignaturesSize = proto.Uint64(uint64(len(blobs))), &size
	case *metadata.ManifestV1:
		m.SignaturesOffset, m.SignaturesSize = proto.Uint64(uint64(len(blobs))), &size
		major = 1
	}
	manifest, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	out := binary.BigEndian.AppendUint64([]byte("CrAU"), major)
	out = binary.BigEndian.AppendUint64(out, uint64(len(manifest)))
	if major == 2 {
		out = binary.BigEndian.AppendUint32(out, uint32(size))
	}
	out = append(out, manifest...)
	signed := sha256.New()
	signed.Write(out)
	if major == 2 {
		out = append(out, f.signatures(t, signed.Sum(nil))...)
	}
	signed.Write(blobs)
	return append(append(out, blobs...), f.signatures(t, signed.Sum(nil))...)
}

const block = 4096

func extents(pairs ...uint64) (list []*metadata.Extent) {
	for i := 0; i < len(pairs); i += 2 {
		list = append(list, &metadata.Extent{StartBlock: proto.Uint64(pairs[i]), NumBlocks: proto.Uint64(pairs[i+1])})
	}
	return list
}

// blocks are the bytes of extents; what the image does not have is zeros.
func blocks(image []byte, list []*metadata.Extent) (out []byte) {
	for _, e := range list {
		at, n := e.GetStartBlock(), e.GetNumBlocks()
		if at > 1<<20 || int(at+n)*block > len(image) {
			out = append(out, make([]byte, n*block)...)
		} else {
			out = append(out, image[at*block:(at+n)*block]...)
		}
	}
	return out
}

func bz2(t testing.TB, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := bzip2.NewWriter(&buf, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// difference is a patch of one step, its streams compressed in the way that is asked for.
func difference(t testing.TB, was, is []byte, how [3]byte) []byte {
	t.Helper()
	n := min(len(was), len(is))
	diff := make([]byte, n)
	for i := range diff {
		diff[i] = is[i] - was[i]
	}
	var control []byte
	for _, v := range []int{n, len(is) - n, 0} {
		control = binary.LittleEndian.AppendUint64(control, uint64(v))
	}
	out := append([]byte("BSDF2"), how[:]...)
	if how == [3]byte{1, 1, 1} {
		out = []byte("BSDIFF40")
	}
	var streams [3][]byte
	for i, data := range [][]byte{control, diff, is[n:]} {
		streams[i] = data
		switch how[i] {
		case 1:
			streams[i] = bz2(t, data)
		case 2:
			var buf bytes.Buffer
			w := brotli.NewWriter(&buf)
			if _, err := w.Write(data); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			streams[i] = buf.Bytes()
		}
	}
	for _, v := range []int{len(streams[0]), len(streams[1]), len(is)} {
		out = binary.LittleEndian.AppendUint64(out, uint64(v))
	}
	return append(append(append(out, streams[0]...), streams[1]...), streams[2]...)
}

func sum(data []byte) []byte { s := sha256.Sum256(data); return s[:] }

// plan is a payload in the making.
type plan struct {
	old, new []byte
	blobs    []byte
	ops      []*metadata.InstallOperation
}

// add adds an operation that makes the blocks of dst as they are in the new image.
func (p *plan) add(t testing.TB, kind payload.Kind, src, dst []*metadata.Extent, how [3]byte) {
	t.Helper()
	op := &metadata.InstallOperation{Type: proto.Int32(int32(kind)), SrcExtents: src, DstExtents: dst}
	var data []byte
	was, is := blocks(p.old, src), blocks(p.new, dst)
	switch kind {
	case payload.Replace:
		data = is
	case payload.ReplaceBZ:
		data = bz2(t, is)
	case payload.SourceBSDiff, payload.BrotliBSDiff, payload.BSDiff:
		data = difference(t, was, is, how)
	}
	if len(src) > 0 && kind != payload.Move && kind != payload.BSDiff {
		op.SrcSha256Hash = sum(was)
	}
	if data != nil {
		op.DataOffset, op.DataLength, op.DataSha256Hash = proto.Uint64(uint64(len(p.blobs))), proto.Uint64(uint64(len(data))), sum(data)
		p.blobs = append(p.blobs, data...)
	}
	p.ops = append(p.ops, op)
}

func info(image []byte) *metadata.PartitionInfo {
	return &metadata.PartitionInfo{Size: proto.Uint64(uint64(len(image))), Hash: sum(image)}
}

func randomImage(seed byte, n int) []byte {
	b := make([]byte, n*block)
	mathrand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// delta is a sound delta of major 2 with every kind of operation that reads the old image.
func delta(t testing.TB) (*plan, *metadata.Manifest) {
	t.Helper()
	p := &plan{old: randomImage(1, 16), new: randomImage(2, 20)}
	copy(p.new[2*block:], p.old[5*block:8*block])            // copied
	copy(p.new[6*block:], p.old[10*block:12*block])          // patched
	copy(p.new[9*block:], p.old[0:2*block])                  // patched
	p.new[6*block+77], p.new[9*block+1] = p.old[0], p.old[9] // so that they differ
	clear(p.new[12*block : 15*block])
	p.add(t, payload.Replace, nil, extents(0, 2), [3]byte{})
	p.add(t, payload.SourceCopy, extents(5, 1, 6, 2), extents(2, 3), [3]byte{})
	p.add(t, payload.ReplaceBZ, nil, extents(5, 1), [3]byte{})
	p.add(t, payload.SourceBSDiff, extents(10, 2, 3, 1), extents(6, 2), [3]byte{1, 1, 1})
	p.add(t, payload.Replace, nil, extents(8, 1, 11, 1), [3]byte{})
	p.add(t, payload.BrotliBSDiff, extents(0, 2), extents(9, 2), [3]byte{2, 1, 2})
	p.add(t, payload.Zero, nil, extents(12, 2), [3]byte{})
	p.add(t, payload.Discard, nil, extents(14, 1), [3]byte{})
	p.add(t, payload.Replace, nil, extents(15, 5), [3]byte{})
	m := &metadata.Manifest{MinorVersion: proto.Uint32(4), Partitions: []*metadata.PartitionUpdate{{
		PartitionName: proto.String("usr"), OldPartitionInfo: info(p.old), NewPartitionInfo: info(p.new), Operations: p.ops,
	}}}
	return p, m
}

// apply opens and applies, and says how many writes there were.
func (f *forger) apply(t testing.TB, data, old, want []byte) (writes int, err error) {
	t.Helper()
	p, err := payload.Open(t.Context(), &memory{data: data, limit: -1}, payload.Options{Keys: f.keys})
	if err != nil {
		return 0, err
	}
	d := newDisk(int(p.Partitions[0].Size+block-1) &^ (block - 1))
	err = p.Apply(t.Context(), payload.ApplyOptions{Targets: map[string]payload.Target{"usr": d}, Sources: map[string]io.ReaderAt{"usr": bytes.NewReader(old)}, Workers: 3})
	if err == nil && !bytes.Equal(d.durable[:len(want)], want) {
		err = payload.ErrHash // as whoever reads it back finds
	}
	return d.writes, err
}

func TestDeltaOfEveryKind(t *testing.T) {
	f := newForger(t)
	p, m := delta(t)
	if _, err := f.apply(t, f.payload(t, m, p.blobs), p.old, p.new); err != nil {
		t.Error(err)
	}
}

func TestForgedDeltas(t *testing.T) {
	f := newForger(t)
	op := func(i int, change func(*metadata.InstallOperation)) func(*metadata.Manifest) {
		return func(m *metadata.Manifest) { change(m.Partitions[0].Operations[i]) }
	}
	kind := func(i int, k payload.Kind) func(*metadata.Manifest) {
		return op(i, func(o *metadata.InstallOperation) { o.Type = proto.Int32(int32(k)) })
	}
	for name, c := range map[string]struct {
		change func(*metadata.Manifest)
		want   error
		late   bool // it is seen only when the operation is carried out
	}{
		"a source beyond the old image": {op(1, func(o *metadata.InstallOperation) { o.SrcExtents = extents(14, 3) }), payload.ErrMalformed, false},
		"a source that overflows":       {op(1, func(o *metadata.InstallOperation) { o.SrcExtents = extents(1<<64-2, 3) }), payload.ErrMalformed, false},
		"a hole as source":              {op(1, func(o *metadata.InstallOperation) { o.SrcExtents = extents(1<<64-1, 3) }), payload.ErrMalformed, false},
		"an empty source extent":        {op(1, func(o *metadata.InstallOperation) { o.SrcExtents = extents(5, 3, 6, 0) }), payload.ErrMalformed, false},
		"no source":                     {op(1, func(o *metadata.InstallOperation) { o.SrcExtents = nil }), payload.ErrMalformed, false},
		"fewer blocks than it writes":   {op(1, func(o *metadata.InstallOperation) { o.SrcExtents = extents(5, 2) }), payload.ErrMalformed, false},
		"no source hash":                {op(1, func(o *metadata.InstallOperation) { o.SrcSha256Hash = nil }), payload.ErrMalformed, false},
		"a short source hash":           {op(3, func(o *metadata.InstallOperation) { o.SrcSha256Hash = make([]byte, 16) }), payload.ErrMalformed, false},
		"another source hash":           {op(1, func(o *metadata.InstallOperation) { o.SrcSha256Hash = make([]byte, 32) }), payload.ErrBase, true},
		"another hash of a patch's":     {op(3, func(o *metadata.InstallOperation) { o.SrcSha256Hash = make([]byte, 32) }), payload.ErrBase, true},
		"other blocks to patch":         {op(3, func(o *metadata.InstallOperation) { o.SrcExtents = extents(11, 2, 3, 1) }), payload.ErrBase, true},
		"REPLACE with a source":         {op(0, func(o *metadata.InstallOperation) { o.SrcExtents = extents(0, 1) }), payload.ErrMalformed, false},
		"ZERO with data":                {op(6, func(o *metadata.InstallOperation) { o.DataOffset = proto.Uint64(0) }), payload.ErrMalformed, false},
		"a hole as destination":         {op(1, func(o *metadata.InstallOperation) { o.DstExtents = extents(1<<64-1, 3) }), payload.ErrMalformed, false},
		"a block twice":                 {op(1, func(o *metadata.InstallOperation) { o.DstExtents = extents(2, 2, 2, 1) }), payload.ErrMalformed, false},
		"a block left out":              {op(7, func(o *metadata.InstallOperation) { o.DstExtents = extents(20, 1) }), payload.ErrMalformed, false},
		"a patch that makes less":       {op(3, func(o *metadata.InstallOperation) { o.DstExtents = extents(6, 2, 20, 1) }), payload.ErrMalformed, false},
		"bzip2 called a patch": {func(m *metadata.Manifest) {
			o := m.Partitions[0].Operations[2]
			s := m.Partitions[0].Operations[5]
			o.Type, o.SrcExtents, o.SrcSha256Hash = s.Type, s.SrcExtents, s.SrcSha256Hash
		}, payload.ErrMalformed, true},
		"a raw block called bzip2":       {kind(4, payload.ReplaceBZ), payload.ErrMalformed, true},
		"a raw block called xz":          {kind(4, payload.ReplaceXZ), payload.ErrMalformed, true},
		"a raw block called zstd":        {kind(4, payload.Zstd), payload.ErrMalformed, true},
		"MOVE":                           {kind(1, payload.Move), payload.ErrUnsupported, false},
		"BSDIFF":                         {kind(3, payload.BSDiff), payload.ErrUnsupported, false},
		"PUFFDIFF":                       {kind(3, 9), payload.ErrUnsupported, false},
		"ZUCCHINI":                       {kind(3, 11), payload.ErrUnsupported, false},
		"LZ4DIFF":                        {kind(3, 12), payload.ErrUnsupported, false},
		"an operation of no kind":        {op(0, func(o *metadata.InstallOperation) { o.Type = nil }), payload.ErrMalformed, false},
		"a negative kind":                {kind(0, -1), payload.ErrUnsupported, false},
		"brotli in minor version 3":      {func(m *metadata.Manifest) { m.MinorVersion = proto.Uint32(3) }, payload.ErrMalformed, false},
		"minor version 1":                {func(m *metadata.Manifest) { m.MinorVersion = proto.Uint32(1) }, payload.ErrUnsupported, false},
		"minor version 8":                {func(m *metadata.Manifest) { m.MinorVersion = proto.Uint32(8) }, payload.ErrUnsupported, false},
		"an old image of half a block":   {func(m *metadata.Manifest) { m.Partitions[0].OldPartitionInfo.Size = proto.Uint64(15*block + 1) }, payload.ErrMalformed, false},
		"another old image":              {func(m *metadata.Manifest) { m.Partitions[0].OldPartitionInfo.Hash = make([]byte, 32) }, payload.ErrBase, false},
		"no old image":                   {func(m *metadata.Manifest) { m.Partitions[0].OldPartitionInfo, m.MinorVersion = nil, nil }, payload.ErrMalformed, false},
		"an old image larger than there": {func(m *metadata.Manifest) { m.Partitions[0].OldPartitionInfo.Size = proto.Uint64(17 * block) }, payload.ErrBase, false},
		"another new image":              {func(m *metadata.Manifest) { m.Partitions[0].NewPartitionInfo.Hash = make([]byte, 32) }, nil, true},
		"a name that goes elsewhere":     {func(m *metadata.Manifest) { m.Partitions[0].PartitionName = proto.String("../usr") }, payload.ErrMalformed, false},
		"blocks of 512 bytes":            {func(m *metadata.Manifest) { m.BlockSize = proto.Uint32(512) }, payload.ErrMalformed, false},
	} {
		p, m := delta(t)
		c.change(m)
		writes, err := f.apply(t, f.payload(t, m, p.blobs), p.old, p.new)
		if c.want == nil {
			if err != nil { // whoever reads the image back compares it
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if writes > 0 && !c.late {
			t.Errorf("%s: %d writes before it was refused", name, writes)
		}
	}
}

// inPlace is a delta of major 1 in which two blocks change places by way of a third, beyond both images.
func inPlace(t testing.TB) (*plan, *metadata.ManifestV1) {
	t.Helper()
	p := &plan{old: randomImage(1, 8)}
	p.new = bytes.Clone(p.old)
	copy(p.new[0:], p.old[3*block:4*block])
	copy(p.new[3*block:], p.old[0:block])
	copy(p.new[4*block:], randomImage(3, 1))
	p.new[6*block+5]++
	p.add(t, payload.Move, extents(0, 1), extents(9, 1), [3]byte{})
	p.add(t, payload.Move, extents(3, 1), extents(0, 1), [3]byte{})
	p.add(t, payload.Move, extents(9, 1), extents(3, 1), [3]byte{})
	p.add(t, payload.ReplaceBZ, nil, extents(4, 1), [3]byte{})
	p.add(t, payload.BSDiff, extents(6, 1), extents(6, 1), [3]byte{1, 1, 1})
	// Blocks 1, 2, 5 and 7 stay as they are, and no operation speaks of them.
	return p, &metadata.ManifestV1{OldPartitionInfo: info(p.old), NewPartitionInfo: info(p.new), PartitionOperations: p.ops}
}

func TestInPlaceDelta(t *testing.T) {
	f := newForger(t)
	p, m := inPlace(t)
	if _, err := f.apply(t, f.payload(t, m, p.blobs), p.old, p.new); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		change func(*metadata.ManifestV1)
		want   error
	}{
		"it reads what it made":       {func(m *metadata.ManifestV1) { m.PartitionOperations[4].SrcExtents = extents(4, 1) }, payload.ErrUnsupported},
		"it reads what is not there":  {func(m *metadata.ManifestV1) { m.PartitionOperations[0].SrcExtents = extents(10, 1) }, payload.ErrUnsupported},
		"it reads beyond everything":  {func(m *metadata.ManifestV1) { m.PartitionOperations[0].SrcExtents = extents(1<<40, 1) }, payload.ErrMalformed},
		"it reads too much":           {func(m *metadata.ManifestV1) { m.PartitionOperations[0].SrcExtents = extents(0, 1<<62) }, payload.ErrMalformed},
		"it copies one block to two":  {func(m *metadata.ManifestV1) { m.PartitionOperations[0].DstExtents = extents(8, 2) }, payload.ErrMalformed},
		"SOURCE_COPY":                 {func(m *metadata.ManifestV1) { m.PartitionOperations[0].Type = proto.Int32(4) }, payload.ErrUnsupported},
		"a length of more than there": {func(m *metadata.ManifestV1) { m.PartitionOperations[4].DstLength = proto.Uint64(block + 1) }, payload.ErrMalformed},
		"a huge image":                {func(m *metadata.ManifestV1) { m.NewPartitionInfo.Size = proto.Uint64(1 << 39) }, payload.ErrUnsupported},
		"another old image":           {func(m *metadata.ManifestV1) { m.OldPartitionInfo.Hash = make([]byte, 32) }, payload.ErrBase},
		"an unknown procedure":        {func(m *metadata.ManifestV1) { m.Procedures = []*metadata.InstallProcedure{{Type: proto.Int32(9)}} }, payload.ErrUnsupported},
	} {
		p, m := inPlace(t)
		c.change(m)
		if writes, err := f.apply(t, f.payload(t, m, p.blobs), p.old, p.new); !errors.Is(err, c.want) || writes > 0 {
			t.Errorf("%s: %d writes, %v, want %v", name, writes, err, c.want)
		}
	}
}

// There is one kernel in a payload, and two would be written to one place.
func TestTwoKernels(t *testing.T) {
	f := newForger(t)
	for n, want := range map[int]string{1: "", 2: `two images of "kernel"`} {
		p, m := inPlace(t)
		p.add(t, payload.Replace, nil, extents(0, 1), [3]byte{})
		kernel := &metadata.InstallProcedure{Type: proto.Int32(0), Operations: p.ops[len(p.ops)-1:], NewInfo: info(p.new[:block])}
		for range n {
			m.Procedures = append(m.Procedures, kernel)
		}
		_, err := payload.Open(t.Context(), &memory{data: f.payload(t, m, p.blobs), limit: -1}, payload.Options{Keys: f.keys})
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%d kernels: %v, want %q", n, err, want)
		}
	}
}

// A manifest of major 1 is obeyed before anybody has vouched for it: what one operation may take of memory is little then.
func TestMemoryOfAnUnsignedManifest(t *testing.T) {
	f := newForger(t)
	p := &plan{new: make([]byte, 200<<20)}
	p.add(t, payload.ReplaceBZ, nil, extents(0, uint64(len(p.new)/block)), [3]byte{})
	m := &metadata.ManifestV1{NewPartitionInfo: info(p.new), PartitionOperations: p.ops}
	data := f.payload(t, m, p.blobs)
	digest := sha256.Sum256(data[:20+binary.BigEndian.Uint64(data[12:])])
	sig, err := ecdsa.SignASN1(rand.Reader, f.key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		sig  []byte
		want string
	}{{nil, "nobody has signed the manifest"}, {sig, ""}} {
		_, err := payload.Open(t.Context(), &memory{data: data, limit: -1}, payload.Options{Keys: f.keys, MetadataSignature: tt.sig})
		if (err == nil) != (tt.want == "") || err != nil && (!errors.Is(err, payload.ErrMalformed) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("signed: %v: %v, want %q", tt.sig != nil, err, tt.want)
		}
	}
}

// A manifest of major 1 that nobody has signed by itself is refused where that is asked for, before anything is believed of it.
func TestSignedMetadata(t *testing.T) {
	f := newForger(t)
	p, m := inPlace(t)
	data := f.payload(t, m, p.blobs)
	manifest := 20 + binary.BigEndian.Uint64(data[12:])
	digest := sha256.Sum256(data[:manifest])
	sig, err := ecdsa.SignASN1(rand.Reader, f.key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		opt  payload.Options
		want error
	}{
		"not asked for":   {payload.Options{Keys: f.keys}, nil},
		"none":            {payload.Options{Keys: f.keys, SignedMetadata: true}, payload.ErrUnsigned},
		"one beside it":   {payload.Options{Keys: f.keys, SignedMetadata: true, MetadataSignature: sig}, nil},
		"one that is not": {payload.Options{Keys: f.keys, SignedMetadata: true, MetadataSignature: sig[:len(sig)-1]}, payload.ErrSignature},
	} {
		if _, err := payload.Open(t.Context(), &memory{data: data, limit: -1}, tt.opt); !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
}

// TestAnyFlippedBitOfADelta flips bits of deltas of both majors. Whatever is hit, the apply must fail.
func TestAnyFlippedBitOfADelta(t *testing.T) {
	f := newForger(t)
	p2, m2 := delta(t)
	p1, m1 := inPlace(t)
	rng := mathrand.New(mathrand.NewPCG(11, 12))
	for _, c := range []struct {
		p *plan
		m proto.Message
	}{{p2, m2}, {p1, m1}} {
		good := f.payload(t, c.m, c.p.blobs)
		for range 150 {
			bad := bytes.Clone(good)
			at := rng.IntN(len(bad))
			bad[at] ^= 1 << rng.IntN(8)
			if _, err := f.apply(t, bad, c.p.old, c.p.new); err == nil {
				t.Fatalf("a bit of byte %d of %d was flipped, and nobody noticed", at, len(bad))
			}
		}
	}
}

// TestAnyFlippedBitOfSignatures flips every bit of what no signature covers, the signatures: with padding and, when the signature is long, without.
func TestAnyFlippedBitOfSignatures(t *testing.T) {
	f := newForger(t)
	p, m := inPlace(t)
	good := f.payload(t, m, p.blobs)
	for i := range 8 * int(m.GetSignaturesSize()) {
		bad := bytes.Clone(good)
		bad[len(bad)-1-i/8] ^= 1 << (i % 8)
		if _, err := f.apply(t, bad, p.old, p.new); !errors.Is(err, payload.ErrSignature) && !errors.Is(err, payload.ErrMalformed) && !errors.Is(err, payload.ErrUnsigned) {
			t.Fatalf("bit %d of the byte %d before the end was flipped: %v", i%8, i/8, err)
		}
	}
}

// FuzzManifest reads manifests of both majors that are well signed and otherwise anything at all: what is accepted must be safe to apply.
func FuzzManifest(f *testing.F) {
	fg := newForger(f)
	_, m := delta(f)
	_, m1 := inPlace(f)
	for _, seed := range []proto.Message{m, m1} {
		data, err := proto.Marshal(seed)
		if err != nil {
			f.Fatal(err)
		}
		_, major1 := seed.(*metadata.ManifestV1)
		f.Add(data, major1)
	}
	blobs := make([]byte, 64<<10)
	f.Fuzz(func(t *testing.T, manifest []byte, major1 bool) {
		var m proto.Message = &metadata.Manifest{}
		if major1 {
			m = &metadata.ManifestV1{}
		}
		if proto.Unmarshal(manifest, m) != nil {
			return
		}
		end := min(uint64(len(blobs)), m.(interface{ GetSignaturesOffset() uint64 }).GetSignaturesOffset())
		data := fg.payload(t, m, blobs[:end])
		p, err := payload.Open(context.Background(), &memory{data: data, limit: -1}, payload.Options{Keys: fg.keys})
		if err != nil {
			return
		}
		targets, sources, total := map[string]payload.Target{}, map[string]io.ReaderAt{}, int64(0)
		for _, q := range p.Partitions {
			if total += q.Size + q.OldSize; q.Size <= 0 || q.Operations() == 0 {
				t.Errorf("accepted partition %+v", q)
			}
		}
		if total > 4<<20 {
			return
		}
		for _, q := range p.Partitions {
			// A write outside the image is an error of the disk here.
			targets[q.Name], sources[q.Name] = newDisk(int(q.Size+block-1)&^(block-1)), bytes.NewReader(make([]byte, q.OldSize))
		}
		err = p.Apply(context.Background(), payload.ApplyOptions{Targets: targets, Sources: sources, SourcesChecked: true, Workers: 2})
		if errors.Is(err, payload.ErrTarget) {
			t.Error(err)
		}
	})
}

// FuzzSignatures reads anything as signatures: only the right ones may be believed.
func FuzzSignatures(f *testing.F) {
	fg := newForger(f)
	p, m := delta(f)
	good := fg.payload(f, m, p.blobs)
	size := int(binary.BigEndian.Uint32(good[20:]))
	start := 24 + int(binary.BigEndian.Uint64(good[12:]))
	f.Add(good[start : start+size])
	f.Add(good[len(good)-size:])
	f.Add([]byte{0x0a, 0x00})
	f.Fuzz(func(t *testing.T, sigs []byte) {
		data := append(bytes.Clone(good[:start]), sigs...)
		binary.BigEndian.PutUint32(data[20:], uint32(len(sigs)))
		data = append(data, good[start+size:]...)
		if _, err := payload.Open(context.Background(), &memory{data: data, limit: -1}, payload.Options{Keys: fg.keys}); err == nil && !bytes.Equal(data[:start], good[:start]) {
			t.Error("the header was changed, and the signature believed")
		}
	})
}
