package payload_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/payload"
)

// TestKeptPayloads applies payloads that earlier versions of Flipside made: every later one must give the same images.
func TestKeptPayloads(t *testing.T) {
	dir := filepath.Join("..", "testdata", "payloads")
	keys, err := payload.LoadKeys(filepath.Join(dir, "key.pem.pub"))
	if err != nil {
		t.Fatal(err)
	}
	sums, err := os.ReadFile(filepath.Join(dir, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{} // SHA-256 by image
	for line := range strings.Lines(string(sums)) {
		if sum, name, ok := strings.Cut(strings.TrimSpace(line), "  "); ok {
			want[strings.TrimSuffix(name, ".img")] = sum
		}
	}
	apply := func(t *testing.T, path string, old []byte) []byte {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		p, err := payload.Open(t.Context(), &memory{data: data, limit: -1}, payload.Options{Keys: keys})
		if err != nil {
			t.Fatal(err)
		}
		targets, all := disks(p)
		if err := p.Apply(t.Context(), payload.ApplyOptions{Targets: targets, Sources: map[string]io.ReaderAt{"usr": bytes.NewReader(old)}}); err != nil {
			t.Fatal(err)
		}
		return all["usr"].durable
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.payload"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no payloads in %s: %v", dir, err)
	}
	old := apply(t, filepath.Join(dir, "zstd-full.payload"), nil)
	for _, path := range files {
		t.Run(filepath.Base(path), func(t *testing.T) {
			image := "old"
			if strings.Contains(path, "delta") {
				image = "new"
			}
			if got := fmt.Sprintf("%x", sha256.Sum256(apply(t, path, old))); got != want[image] {
				t.Errorf("the image has SHA-256 %s, want %s", got, want[image])
			}
		})
	}
}
