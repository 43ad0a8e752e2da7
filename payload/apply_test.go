package payload_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/build"
)

var errKilled = errors.New("killed")

// memory is a payload in memory whose reading can break off.
type memory struct {
	data  []byte
	limit int64 // bytes that may still be read; negative: no limit
	mu    sync.Mutex
	read  int64
}

func (m *memory) Size() int64 { return int64(len(m.data)) }

func (m *memory) Open(_ context.Context, off int64) (io.ReadCloser, error) {
	return io.NopCloser(&memoryReader{m, off}), nil
}

type memoryReader struct {
	m   *memory
	off int64
}

func (r *memoryReader) Read(p []byte) (int, error) {
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	if r.off >= int64(len(r.m.data)) {
		return 0, io.EOF
	}
	n := min(int64(len(p)), int64(len(r.m.data))-r.off)
	if r.m.limit >= 0 {
		if n = min(n, r.m.limit); n == 0 {
			return 0, errKilled
		}
		r.m.limit -= n
	}
	copy(p, r.m.data[r.off:r.off+n])
	r.off += n
	r.m.read += n
	return int(n), nil
}

// disk is a target that knows what is durable: what was written before the last flush.
type disk struct {
	mu      sync.Mutex
	data    []byte
	durable []byte
	writes  int
	fail    error
}

func newDisk(size int) *disk { return &disk{data: make([]byte, size), durable: make([]byte, size)} }

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fail != nil {
		return 0, d.fail
	}
	d.writes++
	if off < 0 || off+int64(len(p)) > int64(len(d.data)) {
		return 0, fmt.Errorf("bytes %d to %d are outside", off, off+int64(len(p)))
	}
	return copy(d.data[off:], p), nil
}

func (d *disk) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.durable, d.data)
	return nil
}

// lose is a power cut: only what was flushed is left.
func (d *disk) lose() { copy(d.data, d.durable) }

type fixture struct {
	image []byte
	data  []byte
	keys  *payload.Keyring
	key   crypto.Signer
}

func makeFixture(t testing.TB, how build.Compression, size int) fixture {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	f := fixture{image: make([]byte, size), keys: &payload.Keyring{}, key: key}
	mathrand.NewChaCha8([32]byte{1}).Read(f.image[:size*3/4])
	for i := 0; i < size/2; i += 2 {
		f.image[i] = byte(i >> 12)
	}
	var out bytes.Buffer
	_, err = build.Full(context.Background(), &out, build.Spec{
		Images: []build.Image{{Name: "usr", Data: bytes.NewReader(f.image), Size: int64(size)}}, Compression: how, Keys: []crypto.Signer{key}, TempDir: t.TempDir(),
	})
	if err != nil {
		t.Fatal(err)
	}
	f.data = out.Bytes()
	if err := f.keys.Add(key.Public()); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestResumeAnywhere kills an apply at random bytes of the payload, takes away what was not flushed, and goes on from the last checkpoint.
func TestResumeAnywhere(t *testing.T) {
	f := makeFixture(t, build.Zstd, 12<<20)
	rng := mathrand.New(mathrand.NewPCG(3, 4))
	rounds := 50
	if testing.Short() {
		rounds = 8 // under the race detector
	}
	for i := range rounds {
		d := newDisk(len(f.image))
		var last *payload.Checkpoint
		kept, reread := int64(0), int64(0)
		for attempt := range 100 {
			src := &memory{data: f.data, limit: -1}
			p, err := payload.Open(t.Context(), src, payload.Options{Keys: f.keys})
			if err != nil {
				t.Fatal(err)
			}
			if attempt < 3 {
				src.limit = rng.Int64N(int64(len(f.data)))
			}
			src.read = 0
			before := kept
			err = p.Apply(t.Context(), payload.ApplyOptions{
				Targets: map[string]payload.Target{"usr": d}, Resume: last, CheckpointEvery: time.Nanosecond,
				Checkpoint: func(c payload.Checkpoint) error {
					// What a checkpoint speaks of must be durable when it is made, and survive as JSON.
					data, err := json.Marshal(c)
					if err != nil {
						return err
					}
					last = new(payload.Checkpoint)
					kept = c.Offset
					return json.Unmarshal(data, last)
				},
			})
			if attempt > 0 && before > 0 && src.read > int64(len(f.data))-before {
				reread++
			}
			if err == nil {
				break
			}
			if !errors.Is(err, errKilled) || !errors.Is(err, payload.ErrSource) {
				t.Fatalf("run %d: %v", i, err)
			}
			d.lose()
		}
		if !bytes.Equal(d.durable, f.image) {
			t.Fatalf("run %d: the image is not what it should be", i)
		}
		if reread > 0 {
			t.Errorf("run %d: bytes before the checkpoint were read again", i)
		}
	}
}

func TestCheckpointOfAnotherPayloadIsOfNoUse(t *testing.T) {
	f := makeFixture(t, build.None, 2<<20)
	p, err := payload.Open(t.Context(), &memory{data: f.data, limit: -1}, payload.Options{Keys: f.keys})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]payload.Checkpoint{
		"of nothing":         {},
		"of another payload": {Manifest: make([]byte, 32), Operations: 1, Offset: 1 << 20},
		"that lies":          {Manifest: p.ManifestSHA256[:], Operations: 1, Offset: 1 << 20, SignedHash: []byte("x"), FileHash: []byte("y")},
		"beyond the end":     {Manifest: p.ManifestSHA256[:], Operations: 1 << 40, Offset: 1 << 60},
		"before the start":   {Manifest: p.ManifestSHA256[:], Operations: -1, Offset: -1},
	} {
		d := newDisk(len(f.image))
		if err := p.Apply(t.Context(), payload.ApplyOptions{Targets: map[string]payload.Target{"usr": d}, Resume: &c}); err != nil {
			t.Errorf("a checkpoint %s: %v", name, err)
		}
		if !bytes.Equal(d.durable, f.image) {
			t.Errorf("a checkpoint %s led to another image", name)
		}
	}
}

// TestAnyFlippedBitIsRefused flips one bit at many places. Whatever it hits, the apply must fail.
func TestAnyFlippedBitIsRefused(t *testing.T) {
	for _, how := range []build.Compression{build.Zstd, build.XZ, build.Bzip2, build.None} {
		t.Run(string(how), func(t *testing.T) {
			f := makeFixture(t, how, 256<<10)
			rng := mathrand.New(mathrand.NewPCG(5, 6))
			n := 300
			if testing.Short() {
				n = 50
			}
			for range n {
				at, bit := rng.IntN(len(f.data)), byte(1)<<rng.IntN(8)
				bad := bytes.Clone(f.data)
				bad[at] ^= bit
				p, err := payload.Open(t.Context(), &memory{data: bad, limit: -1}, payload.Options{Keys: f.keys})
				if err == nil {
					err = p.Apply(t.Context(), payload.ApplyOptions{Targets: map[string]payload.Target{"usr": newDisk(len(f.image))}})
				}
				if err == nil {
					t.Fatalf("bit %08b of byte %d of %d was flipped, and nobody noticed", bit, at, len(bad))
				}
			}
		})
	}
}

func TestTruncatedAnywhere(t *testing.T) {
	f := makeFixture(t, build.Zstd, 256<<10)
	for n := 0; n < len(f.data); n += 1 + n/50 {
		if _, err := payload.Open(t.Context(), &memory{data: f.data[:n], limit: -1}, payload.Options{Keys: f.keys}); err == nil {
			t.Fatalf("cut to %d of %d bytes, and accepted", n, len(f.data))
		}
	}
}

func TestNothingIsAcceptedWithoutAKey(t *testing.T) {
	f := makeFixture(t, build.None, 64<<10)
	src := &memory{data: f.data, limit: -1}
	for name, keys := range map[string]*payload.Keyring{"nil": nil, "empty": {}} {
		if _, err := payload.Open(t.Context(), src, payload.Options{Keys: keys}); !errors.Is(err, payload.ErrNoKey) {
			t.Errorf("a keyring that is %s: %v, want ErrNoKey", name, err)
		}
	}
	p, err := payload.Inspect(t.Context(), src)
	if err != nil {
		t.Fatal(err)
	}
	d := newDisk(len(f.image))
	if err := p.Apply(t.Context(), payload.ApplyOptions{Targets: map[string]payload.Target{"usr": d}}); !errors.Is(err, payload.ErrNoKey) || d.writes > 0 {
		t.Errorf("what was only inspected was applied: %v, %d writes", err, d.writes)
	}
}

func TestTheFloorIsRespected(t *testing.T) {
	f := makeFixture(t, build.None, 64<<10) // without a timestamp
	src := &memory{data: f.data, limit: -1}
	if _, err := payload.Open(t.Context(), src, payload.Options{Keys: f.keys, MinTimestamp: 1}); !errors.Is(err, payload.ErrRollback) {
		t.Errorf("error = %v, want ErrRollback", err)
	}
}

func TestFailuresOnTheWay(t *testing.T) {
	f := makeFixture(t, build.Zstd, 4<<20)
	broken := errors.New("input/output error")
	open := func() *payload.Payload {
		p, err := payload.Open(t.Context(), &memory{data: f.data, limit: -1}, payload.Options{Keys: f.keys})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	d := newDisk(len(f.image))
	d.fail = broken
	if err := open().Apply(t.Context(), payload.ApplyOptions{Targets: map[string]payload.Target{"usr": d}}); !errors.Is(err, broken) || !errors.Is(err, payload.ErrTarget) {
		t.Errorf("a disk that fails: %v", err)
	}
	err := open().Apply(t.Context(), payload.ApplyOptions{
		Targets: map[string]payload.Target{"usr": newDisk(len(f.image))}, CheckpointEvery: time.Nanosecond, Checkpoint: func(payload.Checkpoint) error { return broken },
	})
	if !errors.Is(err, broken) {
		t.Errorf("a checkpoint that fails: %v", err)
	}
	wrong := [32]byte{1}
	if err := open().Apply(t.Context(), payload.ApplyOptions{Targets: map[string]payload.Target{"usr": newDisk(len(f.image))}, ExpectedSHA256: &wrong}); !errors.Is(err, payload.ErrHash) {
		t.Errorf("another file than the server announced: %v", err)
	}
	if err := open().Apply(t.Context(), payload.ApplyOptions{}); !errors.Is(err, payload.ErrTarget) {
		t.Errorf("no target: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := open().Apply(ctx, payload.ApplyOptions{Targets: map[string]payload.Target{"usr": newDisk(len(f.image))}}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func FuzzInspect(f *testing.F) {
	fx := makeFixture(f, build.Zstd, 16<<10)
	f.Add(fx.data)
	f.Add(fx.data[:24])
	f.Add([]byte("CrAU\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x04"))
	f.Add([]byte("CrAU\x00\x00\x00\x00\x00\x00\x00\x02\xff\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := payload.Inspect(context.Background(), &memory{data: data, limit: -1})
		if err != nil {
			return
		}
		for _, q := range p.Partitions {
			if q.Size <= 0 || q.Operations() == 0 {
				t.Errorf("accepted partition %+v", q)
			}
		}
	})
}

func BenchmarkApply(b *testing.B) {
	for _, how := range []build.Compression{build.Zstd, build.XZ, build.Bzip2, build.None} {
		b.Run(string(how), func(b *testing.B) {
			f := makeFixture(b, how, 32<<20)
			d := newDisk(len(f.image))
			b.SetBytes(int64(len(f.image)))
			for b.Loop() {
				p, err := payload.Open(context.Background(), &memory{data: f.data, limit: -1}, payload.Options{Keys: f.keys})
				if err != nil {
					b.Fatal(err)
				}
				if err := p.Apply(context.Background(), payload.ApplyOptions{Targets: map[string]payload.Target{"usr": d}}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
