package build_test

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	stdbzip2 "compress/bzip2"

	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/build"
	"github.com/flipside-linux/flipside/payload/metadata"
)

// obey carries out the operations of a manifest in the simplest way there is, so that a mistake that is made alike in making and
// in applying cannot hide. In major 1 it works in place.
func obey(data []byte, olds map[string][]byte) (map[string][]byte, error) {
	n := binary.BigEndian.Uint64(data[12:])
	var parts []*metadata.PartitionUpdate
	blobs := data[20+n:]
	inPlace := data[11] == 1
	if inPlace {
		var m metadata.ManifestV1
		if err := proto.Unmarshal(data[20:20+n], &m); err != nil {
			return nil, err
		}
		parts = append(parts, &metadata.PartitionUpdate{PartitionName: proto.String("usr"), Operations: m.PartitionOperations, OldPartitionInfo: m.OldPartitionInfo, NewPartitionInfo: m.NewPartitionInfo})
	} else {
		var m metadata.Manifest
		if err := proto.Unmarshal(data[24:24+n], &m); err != nil {
			return nil, err
		}
		parts = m.Partitions
		blobs = data[24+n+uint64(binary.BigEndian.Uint32(data[20:])):]
	}
	out := map[string][]byte{}
	for _, p := range parts {
		old := olds[p.GetPartitionName()]
		img := make([]byte, p.NewPartitionInfo.GetSize())
		if inPlace {
			img = make([]byte, max(len(img), len(old)))
		}
		if !inPlace {
			for i := range img {
				img[i] = 0xee
			}
		} else {
			copy(img, old)
			old = img
		}
		for i, op := range p.Operations {
			made, err := one(op, old, blobs)
			if err != nil {
				return nil, fmt.Errorf("%s, operation %d, type %d: %w", p.GetPartitionName(), i, op.GetType(), err)
			}
			for _, e := range op.DstExtents {
				k := int(e.GetNumBlocks()) * 4096
				if len(made) < k {
					return nil, fmt.Errorf("operation %d, type %d: too short", i, op.GetType())
				}
				copy(img[e.GetStartBlock()*4096:], made[:k])
				made = made[k:]
			}
			if len(made) > 0 {
				return nil, fmt.Errorf("operation %d, type %d: too long", i, op.GetType())
			}
		}
		img = img[:p.NewPartitionInfo.GetSize()]
		if sum := sha256.Sum256(img); !bytes.Equal(sum[:], p.NewPartitionInfo.Hash) {
			return nil, fmt.Errorf("%s is not what the manifest says", p.GetPartitionName())
		}
		out[p.GetPartitionName()] = img
	}
	return out, nil
}

func one(op *metadata.InstallOperation, old, blobs []byte) ([]byte, error) {
	blob := blobs[op.GetDataOffset() : op.GetDataOffset()+op.GetDataLength()]
	if sum := sha256.Sum256(blob); len(blob) > 0 && !bytes.Equal(sum[:], op.DataSha256Hash) {
		return nil, errors.New("the hash of the data is wrong")
	}
	var src []byte
	for _, e := range op.SrcExtents {
		src = append(src, old[e.GetStartBlock()*4096:(e.GetStartBlock()+e.GetNumBlocks())*4096]...)
	}
	if sum := sha256.Sum256(src); op.SrcSha256Hash != nil && !bytes.Equal(sum[:], op.SrcSha256Hash) {
		return nil, errors.New("the hash of the source is wrong")
	}
	switch op.GetType() {
	case 0:
		return blob, nil
	case 1:
		return io.ReadAll(stdbzip2.NewReader(bytes.NewReader(blob)))
	case 2, 4:
		return src, nil
	case 3, 5, 10:
		return patch(src, blob)
	case 6:
		n := 0
		for _, e := range op.DstExtents {
			n += int(e.GetNumBlocks()) * 4096
		}
		return make([]byte, n), nil
	case 8:
		cmd := exec.Command("xz", "-dc") // the library does not know the filter for machine code
		cmd.Stdin = bytes.NewReader(blob)
		return cmd.Output()
	case 12122:
		d, err := zstd.NewReader(nil)
		if err != nil {
			return nil, err
		}
		return d.DecodeAll(blob, nil)
	}
	return nil, errors.New("unknown")
}

func patch(old, p []byte) ([]byte, error) {
	num := func(b []byte) int {
		n := binary.LittleEndian.Uint64(b)
		if n>>63 != 0 {
			return -int(n &^ (1 << 63))
		}
		return int(n)
	}
	nctl, ndiff, size := num(p[8:]), num(p[16:]), num(p[24:])
	streams := [][]byte{p[32 : 32+nctl], p[32+nctl : 32+nctl+ndiff], p[32+nctl+ndiff:]}
	for i, s := range streams {
		var r io.Reader = stdbzip2.NewReader(bytes.NewReader(s))
		if string(p[:5]) == "BSDF2" && p[5+i] == 2 {
			r = brotli.NewReader(bytes.NewReader(s))
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return nil, err
		}
		streams[i] = data
	}
	ctl, diff, extra := streams[0], streams[1], streams[2]
	var out []byte
	at := 0
	for ; len(ctl) > 0; ctl = ctl[24:] {
		add, lit := num(ctl), num(ctl[8:])
		for i := range add {
			out = append(out, old[at+i]+diff[i])
		}
		out = append(out, extra[:lit]...)
		diff, extra = diff[add:], extra[lit:]
		at += add + num(ctl[16:])
	}
	if len(out) != size || len(diff)+len(extra) > 0 {
		return nil, fmt.Errorf("%d bytes, want %d", len(out), size)
	}
	return out, nil
}

// sample unpacks an image that the samples' generators were given.
func sample(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("..", "..", "..", "shared", "samples", filepath.FromSlash(name)+".xz"))
	if err != nil {
		t.Skipf("the samples of other programs are not beside this checkout: %v", err)
	}
	defer f.Close()
	tool := exec.Command("xz", "-dc")
	tool.Stdin = f
	data, err := tool.Output()
	if err != nil {
		t.Skipf("the samples cannot be unpacked: xz: %v", err)
	}
	return data
}

func pairOf(t testing.TB, name, old, new string) (build.Image, []byte, []byte) {
	a, b := sample(t, old), sample(t, new)
	return build.Image{Name: name, Data: bytes.NewReader(b), Size: int64(len(b)), Old: &build.Image{Data: bytes.NewReader(a), Size: int64(len(a))}}, a, b
}

// Deltas of the samples are no larger than those that the C++ generators made of the same images.
func TestDeltasOfTheSamples(t *testing.T) {
	if testing.Short() {
		t.Skip("too slow for the race detector, which other tests run under")
	}
	key := newKey(t)
	size := func(name string) int64 {
		info, err := os.Stat(filepath.Join("..", "..", "..", "shared", "samples", filepath.FromSlash(name)))
		if err != nil {
			t.Skipf("the samples of other programs are not beside this checkout: %v", err)
		}
		return info.Size()
	}
	for _, tt := range []struct {
		payload string
		images  [][3]string
		spec    build.Spec
	}{
		{"payload-v2/small-delta-m2-aosp.bin", [][3]string{{"kernel", "payload-v2/small-kernel-old.img", "payload-v2/small-kernel-new.img"}, {"root", "payload-v2/small-root-old.ext4", "payload-v2/small-root-new.ext4"}}, build.Spec{Compression: build.Smallest, Keys: []crypto.Signer{key}}},
		{"payload-v1/v1-delta.dual.payload", [][3]string{{"usr", "payload-v1/a.img", "payload-v1/b.img"}}, build.Spec{Compression: build.Smallest, Keys: []crypto.Signer{key, key}}},
		{"payload-v1/v1-delta.dual.payload", [][3]string{{"usr", "payload-v1/a.img", "payload-v1/b.img"}}, build.Spec{Major: 1, Keys: []crypto.Signer{key, key}}},
	} {
		for _, ignore := range []bool{false, true} {
			if ignore && os.Getenv("FLIPSIDE_LONG") == "" {
				continue
			}
			t.Run(fmt.Sprintf("%s, major %d, ignore files %t", filepath.Base(tt.payload), tt.spec.Major, ignore), func(t *testing.T) {
				spec := tt.spec
				spec.IgnoreFiles = ignore
				olds, news := map[string][]byte{}, map[string][]byte{}
				for _, n := range tt.images {
					img, a, b := pairOf(t, n[0], n[1], n[2])
					spec.Images = append(spec.Images, img)
					olds[n[0]], news[n[0]] = a, b
				}
				start := time.Now()
				data, res := create(t, spec)
				took := time.Since(start)
				got, err := obey(data, olds)
				if err != nil {
					t.Fatal(err)
				}
				for name, want := range news {
					if !bytes.Equal(got[name], want) {
						t.Errorf("%s is another image", name)
					}
				}
				reference := size(tt.payload)
				t.Logf("%d bytes (%d of metadata), the C++ generator's %d: %.2f; %s", len(data), res.MetadataSize, reference, float64(len(data))/float64(reference), took)
				if int64(len(data)) > reference {
					t.Errorf("%d bytes, the C++ generator needs %d", len(data), reference)
				}
			})
		}
	}
}

// A payload of major 1 differs from that of Flatcar's generator only in what its bzip2 makes of the same chunks.
func TestMajor1IsAsFlatcarMakesIt(t *testing.T) {
	if testing.Short() {
		t.Skip("too slow for the race detector, which other tests run under")
	}
	img := sample(t, "payload-v1/a.img")
	theirs, err := os.ReadFile(filepath.Join("..", "..", "..", "shared", "samples", "payload-v1", "v1-full.dual.payload"))
	if err != nil {
		t.Skipf("the samples of other programs are not beside this checkout: %v", err)
	}
	key := newKey(t)
	ours, _ := create(t, build.Spec{Major: 1, Images: []build.Image{{Name: "usr", Data: bytes.NewReader(img), Size: int64(len(img))}}, Keys: []crypto.Signer{key, key}})
	read := func(data []byte) *metadata.ManifestV1 {
		m := &metadata.ManifestV1{}
		if err := proto.Unmarshal(data[20:20+binary.BigEndian.Uint64(data[12:])], m); err != nil {
			t.Fatal(err)
		}
		for _, list := range [][]*metadata.InstallOperation{m.PartitionOperations, m.NoopOperations} {
			for _, op := range list {
				op.DataOffset, op.DataLength = nil, nil
				if op.DataSha256Hash != nil {
					op.DataSha256Hash = []byte{}
				}
			}
		}
		m.SignaturesOffset = nil
		return m
	}
	a, b := read(theirs), read(ours)
	if !proto.Equal(a, b) {
		t.Errorf("theirs: %v\nours: %v", a, b)
	}
	if got, err := obey(ours, nil); err != nil || !bytes.Equal(got["usr"], img) {
		t.Errorf("it does not make the image: %v", err)
	}
}

func create(t testing.TB, s build.Spec) ([]byte, build.Result) {
	t.Helper()
	s.TempDir = t.TempDir()
	var b bytes.Buffer
	res, err := build.Create(t.Context(), &b, s)
	if err != nil {
		t.Fatal(err)
	}
	if res.Size != int64(b.Len()) || res.SHA256 != sha256.Sum256(b.Bytes()) {
		t.Errorf("the result %+v is not that of the file", res)
	}
	return b.Bytes(), res
}

// In place, blocks that change places do so without being in the payload, and what two operations need of each other costs no more than that.
func TestInPlaceCircles(t *testing.T) {
	const blocks = 600
	old := noise(blocks*4096, 1)
	pairs := bytes.Clone(old)
	for i := 0; i < len(old); i += 2 * 4096 {
		copy(pairs[i:], old[i+4096:i+2*4096])
		copy(pairs[i+4096:], old[i:i+4096])
	}
	halves := slices.Concat(old[blocks/2*4096:], old[:blocks/2*4096])
	// Two pieces change places that are in different operations, since everything changes a little.
	overlap := bytes.Clone(old)
	copy(overlap[10*4096:20*4096], old[550*4096:])
	copy(overlap[550*4096:560*4096], old[10*4096:])
	for i := 0; i < len(overlap); i += 1000 {
		overlap[i] ^= 0x55
	}
	for _, tt := range []struct {
		name string
		new  []byte
		want int
	}{{"pairs", pairs, 20 * blocks}, {"halves", halves, 2000}, {"overlap", overlap, 120000}} {
		key := newKey(t)
		img := build.Image{Name: "usr", Data: bytes.NewReader(tt.new), Size: int64(len(tt.new)), Old: &build.Image{Data: bytes.NewReader(old), Size: int64(len(old))}}
		data, _ := create(t, build.Spec{Major: 1, Images: []build.Image{img}, Keys: []crypto.Signer{key}})
		if got, err := obey(data, map[string][]byte{"usr": old}); err != nil || !bytes.Equal(got["usr"], tt.new) {
			t.Errorf("%s: another image, %v", tt.name, err)
		}
		if got, err := applied(t.Context(), data, key, old, len(tt.new)); err != nil || !bytes.Equal(got, tt.new) {
			t.Errorf("%s: package payload makes another image, %v", tt.name, err)
		}
		if len(data) > tt.want {
			t.Errorf("%s: %d bytes, want %d at most", tt.name, len(data), tt.want)
		}
	}
}

// numbered is an image of which each block holds a number and is otherwise empty, so that it may be large.
type numbered struct {
	blocks int
	number func(block int) int
}

func (n numbered) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	for at := 0; at < len(p); at += 4096 {
		binary.LittleEndian.PutUint64(p[at:], uint64(n.number(int(off)/4096+at/4096)+1)*0x9e3779b97f4a7c15|1)
	}
	return len(p), nil
}

func (n numbered) image() build.Image {
	return build.Image{Name: "usr", Data: n, Size: int64(n.blocks) * 4096}
}

// A delta of very many pieces fits into what readers take, and where it does not, there is none.
func TestDeltaOfVeryManyPieces(t *testing.T) {
	key := newKey(t)
	reversed := func(blocks int) build.Spec {
		old := numbered{blocks, func(b int) int { return b }}.image()
		img := numbered{blocks, func(b int) int { return blocks - 1 - b }}.image()
		img.Old = &old
		return build.Spec{Images: []build.Image{img}, Keys: []crypto.Signer{key}, TempDir: t.TempDir()}
	}
	const blocks, most = 2000, 1000
	spec := reversed(blocks)
	old := make([]byte, blocks*4096)
	if _, err := spec.Images[0].Old.Data.ReadAt(old, 0); err != nil {
		t.Fatal(err)
	}
	for spec.Major = 1; spec.Major <= 2; spec.Major++ {
		data, _ := create(t, build.Within(spec, most))
		if _, err := obey(data, map[string][]byte{"usr": old}); err != nil {
			t.Errorf("major %d: %v", spec.Major, err)
		}
		n := binary.BigEndian.Uint64(data[12:])
		var ops []*metadata.InstallOperation
		if spec.Major == 1 {
			var m metadata.ManifestV1
			if err := proto.Unmarshal(data[20:20+n], &m); err != nil {
				t.Fatal(err)
			}
			ops = m.PartitionOperations
		} else {
			var m metadata.Manifest
			if err := proto.Unmarshal(data[24:24+n], &m); err != nil {
				t.Fatal(err)
			}
			ops = m.Partitions[0].Operations
		}
		pieces := 0
		for _, op := range ops {
			pieces += 1 + len(op.SrcExtents) + len(op.DstExtents)
		}
		if pieces > most {
			t.Errorf("major %d: %d operations and extents, want %d at most", spec.Major, pieces, most)
		}
	}
	if testing.Short() {
		t.Skip("too slow for the race detector, which other tests run under")
	}
	spec = reversed(110000)
	spec.Major = 1
	if _, err := build.Create(t.Context(), io.Discard, build.Within(spec, 1<<30)); !errors.Is(err, payload.ErrMalformed) || !strings.Contains(err.Error(), "make a full payload") {
		t.Errorf("with all its pieces: %v, want that it cannot be read", err)
	}
}
