package bench_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/payload/build"
	"github.com/flipside-linux/flipside/payload/metadata"
)

// TestBenchPayload prints throughput, CPU time and memory of an apply beside those of the C reference. It fails only when something does not work.
func TestBenchPayload(t *testing.T) {
	if os.Getenv("FLIPSIDE_LONG") == "" {
		t.Skip("make bench-payload runs it (FLIPSIDE_LONG=1)")
	}
	size := 512 << 20
	if s := os.Getenv("FLIPSIDE_BENCH_MIB"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		size = n << 20
	}
	dir := t.TempDir()
	flipside, reference := filepath.Join(dir, "flipside"), filepath.Join(dir, "reference")
	run(t, exec.Command("go", "build", "-o", flipside, "github.com/flipside-linux/flipside/cmd/flipside"))
	run(t, exec.Command("cc", "-O2", "-o", reference, "testdata/reference.c", "-lbz2", "-llzma", "-lzstd", "-lcrypto"))
	image := usr(t, size)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	pubFile := filepath.Join(dir, "key.pem")
	write(t, pubFile, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pub}))
	t.Logf("%d processors, %s/%s, %s; an image of %d MiB made of /usr; load %s", runtime.NumCPU(), runtime.GOOS, runtime.GOARCH, runtime.Version(), size>>20, load())
	t.Logf("%-6s %9s | %8s %8s | %8s %8s | %20s %20s | %s", "", "payload", "C MB/s", "CPU s", "here", "CPU s", "throughput, here / C", "on idle processors", "peak memory, and with eight processors")
	var fastest float64
	for _, how := range []build.Compression{build.Bzip2, build.XZ, build.Zstd} {
		var b bytes.Buffer
		_, err := build.Full(context.Background(), &b, build.Spec{
			Images: []build.Image{{Name: "usr", Data: bytes.NewReader(image), Size: int64(size)}}, Compression: how, Keys: []crypto.Signer{key}, TempDir: dir,
		})
		if err != nil {
			t.Fatal(err)
		}
		file, plan, out := filepath.Join(dir, "payload"), filepath.Join(dir, "plan"), filepath.Join(dir, "image")
		write(t, file, b.Bytes())
		write(t, plan, operations(t, b.Bytes()))
		var c, here []sample
		sum := sha256.Sum256(image)
		for range 3 { // in turns, so that both see the same machine
			s := run(t, exec.Command(reference, file, plan, out))
			if got := strings.TrimSpace(s.output); got != hex.EncodeToString(sum[:]) {
				t.Fatalf("the reference made another image: %s", got)
			}
			c = append(c, s)
			os.Remove(out)
			here = append(here, run(t, exec.Command(flipside, "payload", "apply", file, "--key", pubFile, "--to", out)))
			got, err := os.ReadFile(out)
			if err != nil || !bytes.Equal(got, image) {
				t.Fatalf("another image, %v", err)
			}
			os.Remove(out)
		}
		mb := float64(size) / 1e6
		r, h := median(c), median(here)
		fastest = mb / h.wall.Seconds()
		peak := func(processors int) int64 {
			var res struct {
				Memory int64 `json:"peak_memory_bytes"`
			}
			cmd := exec.Command(flipside, "payload", "bench", "--json", file, "--key", pubFile)
			cmd.Env = append(os.Environ(), fmt.Sprintf("GOMAXPROCS=%d", processors))
			if err := json.Unmarshal([]byte(run(t, cmd).output), &res); err != nil {
				t.Fatal(err)
			}
			return res.Memory >> 20
		}
		// A machine with other work gives two threads less than two processors. What the CPU times say holds on an idle one, where decoding is all that counts.
		idle := r.cpu.Seconds() / h.cpu.Seconds() * float64(min(runtime.NumCPU(), 8))
		t.Logf("%-6s %6d MB | %8.0f %8.1f | %8.0f %8.1f | %20.2f %20.2f | %d MiB, %d with eight", how, b.Len()/1e6, mb/r.wall.Seconds(), r.cpu.Seconds(),
			mb/h.wall.Seconds(), h.cpu.Seconds(), r.wall.Seconds()/h.wall.Seconds(), idle, peak(runtime.NumCPU()), peak(8))
	}
	seq, hashed := limits(t, dir, image)
	t.Logf("sequential write with fsync %.0f MB/s, SHA-256 on one core %.0f MB/s; the slower is %.2f times the throughput of zstd", seq, hashed, min(seq, hashed)/fastest)
}

type sample struct {
	wall, cpu time.Duration
	output    string
}

func run(t *testing.T, cmd *exec.Cmd) sample {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	from := time.Now()
	out, err := cmd.Output()
	wall := time.Since(from)
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, stderr.String())
	}
	s := sample{wall: wall, cpu: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), output: string(out)}
	return s
}

// median is the run whose time is in the middle.
func median(list []sample) sample {
	slices.SortFunc(list, func(a, b sample) int { return int(a.wall - b.wall) })
	return list[len(list)/2]
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func load() string {
	data, _ := os.ReadFile("/proc/loadavg")
	return strings.TrimSpace(string(data))
}

// usr makes an image of the files in /usr, each from a block's beginning on, as a file system has them.
func usr(t *testing.T, size int) []byte {
	t.Helper()
	image := make([]byte, 0, size+1<<20)
	err := filepath.WalkDir("/usr", func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil
		}
		if len(image) >= size {
			return fs.SkipAll
		}
		f, err := os.Open(path)
		if err != nil {
			return nil
		}
		defer f.Close()
		data, err := io.ReadAll(io.LimitReader(f, int64(size-len(image))))
		if err != nil {
			return nil
		}
		image = append(image, data...)
		image = append(image, make([]byte, -len(image)&4095)...)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return append(image, make([]byte, max(0, size-len(image)))...)[:size]
}

// operations is a payload's manifest as the reference reads it.
func operations(t *testing.T, data []byte) []byte {
	t.Helper()
	n := binary.BigEndian.Uint64(data[12:])
	base := 24 + int64(n) + int64(binary.BigEndian.Uint32(data[20:]))
	var m metadata.Manifest
	if err := proto.Unmarshal(data[24:24+n], &m); err != nil {
		t.Fatal(err)
	}
	kinds := map[payload.Kind]int{payload.Replace: 0, payload.ReplaceBZ: 1, payload.ReplaceXZ: 2, payload.Zstd: 3, payload.Zero: 4}
	var b []byte
	for _, op := range m.Partitions[0].Operations {
		kind, ok := kinds[payload.Kind(op.GetType())]
		if !ok || len(op.DstExtents) != 1 {
			t.Fatalf("an operation that the reference does not have: %v", op)
		}
		e := op.DstExtents[0]
		b = fmt.Appendf(b, "%d %d %d %d %d\n", kind, base+int64(op.GetDataOffset()), op.GetDataLength(), e.GetStartBlock()*4096, e.GetNumBlocks()*4096)
	}
	return b
}

// limits measures what no apply can be faster than, in MB/s.
func limits(t *testing.T, dir string, image []byte) (write, hash float64) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "sequential"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	from := time.Now()
	for at := 0; at < len(image); at += 1 << 20 {
		if _, err := f.Write(image[at:min(len(image), at+1<<20)]); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	write = float64(len(image)) / 1e6 / time.Since(from).Seconds()
	from = time.Now()
	sha256.Sum256(image)
	return write, float64(len(image)) / 1e6 / time.Since(from).Seconds()
}
