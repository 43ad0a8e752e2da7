package payload_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ulikunitz/xz"

	"github.com/flipside-linux/flipside/payload"
)

// samples finds a file that another program made. They are kept beside the checkout and not in it.
func samples(t testing.TB, elem ...string) string {
	t.Helper()
	path := filepath.Join(append([]string{"..", "..", "shared", "samples"}, elem...)...)
	if _, err := os.Stat(path); err != nil {
		path = filepath.Join("..", path)
	}
	if _, err := os.Stat(path); err != nil {
		t.Skipf("the samples of other programs are not beside this checkout: %v", err)
	}
	return path
}

func sampleKeys(t testing.TB, names ...string) *payload.Keyring {
	t.Helper()
	var paths []string
	for _, n := range names {
		paths = append(paths, samples(t, "keys", n))
	}
	k, err := payload.LoadKeys(paths...)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// images unpacks sample images, each once.
var images sync.Map

func sampleImage(t testing.TB, elem ...string) []byte {
	t.Helper()
	path := samples(t, elem...)
	if v, ok := images.Load(path); ok {
		return v.([]byte)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := xz.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	images.Store(path, data)
	return data
}

const (
	v1A       = "b40db452f01ab7c166fe53e74c494ac93e45ef860c9f5b5583e655a64394cb3e"
	v1B       = "7dc78e0c057003977a0127783814844955bde586f46c424b4584879f170901b1"
	newKernel = "03969d4c704d6bbbe7c50693c9fbd8f4a28d0b341008dc8dd52f45d9fb41de8a"
	newRoot   = "e1e871c9f75f696c5dcbde9b69d42ef8b047eb1bcc5d6d28581b7bdd63f33e88"
)

// sample is a payload of another program, and what it must give.
type sample struct {
	name string
	want map[string]string
}

func allSamples(t testing.TB) []sample {
	list := []sample{
		{"payload-v1/v1-full.dual.payload", map[string]string{"usr": v1A}},
		{"payload-v1/v1-delta.dual.payload", map[string]string{"usr": v1B}},
	}
	files, err := filepath.Glob(samples(t, "payload-v2") + "/small-*.bin")
	if err != nil || len(files) < 5 {
		t.Fatalf("%d samples, %v", len(files), err)
	}
	for _, f := range files {
		list = append(list, sample{"payload-v2/" + filepath.Base(f), map[string]string{"kernel": newKernel, "root": newRoot}})
	}
	return list
}

func openSample(t testing.TB, name string) (*payload.Payload, *memory) {
	t.Helper()
	data, err := os.ReadFile(samples(t, strings.Split(name, "/")...))
	if err != nil {
		t.Fatal(err)
	}
	src := &memory{data: data, limit: -1}
	p, err := payload.Open(t.Context(), src, payload.Options{Keys: sampleKeys(t, "rsa2048.pub.pem", "v1-key1.pub.pem")})
	if err != nil {
		t.Fatal(err)
	}
	return p, src
}

// oldImages are what the deltas among the samples change.
func oldImages(t testing.TB, p *payload.Payload) map[string]io.ReaderAt {
	t.Helper()
	names := map[string][]string{"usr": {"payload-v1", "a.img.xz"}, "kernel": {"payload-v2", "small-kernel-old.img.xz"}, "root": {"payload-v2", "small-root-old.ext4.xz"}}
	list := map[string]io.ReaderAt{}
	for _, q := range p.Partitions {
		if q.OldSize > 0 {
			list[q.Name] = bytes.NewReader(sampleImage(t, names[q.Name]...))
		}
	}
	return list
}

func disks(p *payload.Payload) (map[string]payload.Target, map[string]*disk) {
	targets, all := map[string]payload.Target{}, map[string]*disk{}
	for _, q := range p.Partitions {
		d := newDisk(int(q.Size))
		targets[q.Name], all[q.Name] = d, d
	}
	return targets, all
}

func checkImages(t *testing.T, p *payload.Payload, all map[string]*disk, want map[string]string) {
	t.Helper()
	for _, q := range p.Partitions {
		sum := sha256.Sum256(all[q.Name].durable[:q.Size])
		if got := hex.EncodeToString(sum[:]); got != want[q.Name] || sum != q.SHA256 {
			t.Errorf("%s has SHA-256 %s, want %s; the manifest says %x", q.Name, got, want[q.Name], q.SHA256)
		}
	}
}

func TestPayloadsOfOtherPrograms(t *testing.T) {
	for _, s := range allSamples(t) {
		t.Run(s.name, func(t *testing.T) {
			p, _ := openSample(t, s.name)
			targets, all := disks(p)
			if p.Delta() != strings.Contains(s.name, "delta") {
				t.Errorf("Delta() = %v", p.Delta())
			}
			if err := p.Apply(t.Context(), payload.ApplyOptions{Targets: targets, Sources: oldImages(t, p)}); err != nil {
				t.Fatal(err)
			}
			checkImages(t, p, all, s.want)
		})
	}
}

// TestSamplesResumeAnywhere kills each apply at random points, takes away what was not flushed, and goes on from the last checkpoint.
func TestSamplesResumeAnywhere(t *testing.T) {
	runs := 6
	switch {
	case os.Getenv("FLIPSIDE_LONG") != "":
		runs = 50
	case testing.Short():
		runs = 2
	}
	rng := mathrand.New(mathrand.NewPCG(9, 10))
	for _, s := range allSamples(t) {
		t.Run(s.name, func(t *testing.T) {
			for range runs {
				p, src := openSample(t, s.name)
				targets, all := disks(p)
				sources := oldImages(t, p)
				var last *payload.Checkpoint
				for attempt := 0; ; attempt++ {
					if attempt < 2 {
						src.limit = rng.Int64N(int64(len(src.data)))
					} else {
						src.limit = -1
					}
					err := p.Apply(t.Context(), payload.ApplyOptions{
						Targets: targets, Sources: sources, Resume: last, CheckpointEvery: time.Nanosecond,
						Checkpoint: func(c payload.Checkpoint) error { last = &c; return nil },
					})
					if err == nil {
						break
					}
					if !errors.Is(err, errKilled) || attempt > 2 {
						t.Fatal(err)
					}
					for _, d := range all {
						d.lose()
					}
				}
				checkImages(t, p, all, s.want)
			}
		})
	}
}

func TestPuffdiffIsRefusedByName(t *testing.T) {
	data, err := os.ReadFile(samples(t, "payload-v2", "puff-delta-m5-aosp.bin"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = payload.Open(t.Context(), &memory{data: data, limit: -1}, payload.Options{Keys: sampleKeys(t, "rsa2048.pub.pem")})
	if !errors.Is(err, payload.ErrUnsupported) || !strings.Contains(err.Error(), "PUFFDIFF") {
		t.Errorf("error = %v", err)
	}
}

// TestAnotherOldImage applies deltas to what they are not made for: nothing may be written.
func TestAnotherOldImage(t *testing.T) {
	for _, s := range allSamples(t) {
		if !strings.Contains(s.name, "delta") {
			continue
		}
		p, _ := openSample(t, s.name)
		for name := range oldImages(t, p) {
			sources := oldImages(t, p)
			q := sources[name].(*bytes.Reader)
			wrong := make([]byte, q.Size())
			if _, err := q.ReadAt(wrong, 0); err != nil {
				t.Fatal(err)
			}
			wrong[len(wrong)/2] ^= 1
			sources[name] = bytes.NewReader(wrong)
			targets, all := disks(p)
			err := p.Apply(t.Context(), payload.ApplyOptions{Targets: targets, Sources: sources})
			if !errors.Is(err, payload.ErrBase) {
				t.Errorf("%s, another %s: %v", s.name, name, err)
			}
			for part, d := range all {
				if d.writes > 0 {
					t.Errorf("%s, another %s: %d writes to %s", s.name, name, d.writes, part)
				}
			}
			delete(sources, name)
			if err := p.Apply(t.Context(), payload.ApplyOptions{Targets: targets, Sources: sources}); !errors.Is(err, payload.ErrBase) {
				t.Errorf("%s, no %s: %v", s.name, name, err)
			}
		}
	}
}

// onlyAtApply are the faults that cannot be seen before data is decoded. All others must be found before the first write.
var onlyAtApply = map[string]bool{
	"10-blob-bitflip": true, "14-payload-sig-garbage": true, "38-xz-bomb": true, "40-xz-short": true, "41-xz-truncated": true, "43-xz-dict-1536MiB": true, "46-replace-short": true,
	"59-d-src-hash-mismatch": true, "64-d-bsdiff-newsize-big": true, "65-d-bsdiff-newsize-neg": true, "66-d-bsdiff-ctrl-len": true, "67-d-bsdiff-diff-huge": true, "68-d-bsdiff-seek-neg": true, "69-d-bsdiff-seek-past": true,
}

func TestMalformed(t *testing.T) {
	index, err := os.ReadFile(samples(t, "payload-v2", "malformed", "cases.json"))
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct{ Name, Why, Base, File string }
	if err := json.Unmarshal(index, &cases); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"00-good-full", "00-good-delta"} {
		cases = append(cases, struct{ Name, Why, Base, File string }{name, "it is sound", strings.TrimPrefix(name, "00-good-"), name + ".bin.gz"})
	}
	keys := sampleKeys(t, "rsa2048.pub.pem")
	root := map[string][]byte{"root": sampleImage(t, "payload-v2", "small-root-old.ext4.xz"), "kernel": sampleImage(t, "payload-v2", "small-kernel-old.img.xz")}
	for _, c := range cases {
		name := strings.TrimSuffix(c.File, ".bin.gz")
		t.Run(name, func(t *testing.T) {
			z, err := os.Open(samples(t, "payload-v2", "malformed", c.File))
			if err != nil {
				t.Fatal(err)
			}
			defer z.Close()
			r, err := gzip.NewReader(z)
			if err != nil {
				t.Fatal(err)
			}
			data, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			p, err := payload.Open(t.Context(), &memory{data: data, limit: -1}, payload.Options{Keys: keys})
			writes := 0
			if err == nil {
				targets, all := disks(p)
				sources := map[string]io.ReaderAt{}
				for _, q := range p.Partitions {
					if q.OldSize > 0 {
						sources[q.Name] = bytes.NewReader(root[q.Name])
					}
				}
				err = p.Apply(t.Context(), payload.ApplyOptions{Targets: targets, Sources: sources})
				for _, d := range all {
					writes += d.writes
				}
				if err == nil {
					for _, q := range p.Partitions {
						if sha256.Sum256(all[q.Name].durable) != q.SHA256 {
							err = payload.ErrHash // what whoever reads the image back finds
						}
					}
				}
			}
			runtime.ReadMemStats(&after)
			// All that was ever allocated, the targets among it.
			if got := (after.TotalAlloc - before.TotalAlloc) >> 20; got > 100 {
				t.Errorf("%d MiB were allocated", got)
			}
			switch {
			case name == "00-good-delta":
				// The image that it changes is not among the samples.
				if !errors.Is(err, payload.ErrBase) || writes > 0 {
					t.Errorf("%d writes, and error = %v", writes, err)
				}
			case strings.HasPrefix(name, "00-good") || name == "63-d-bsdiff-ok" || name == "57-timestamp-old":
				if err != nil {
					t.Errorf("a sound payload was refused: %v", err)
				}
			case name == "44-xz-check-crc64":
			case err == nil:
				t.Errorf("accepted: %s", c.Why)
			case writes > 0 && !onlyAtApply[name]:
				t.Errorf("%d writes before it was refused: %v", writes, err)
			}
			t.Logf("%s: %v", c.Why, err)
		})
	}
}
