package payload

import (
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// samples finds a file that another program made. They are kept beside the checkout and not in it.
func samples(t testing.TB, elem ...string) string {
	t.Helper()
	path := filepath.Join(append([]string{"..", "..", "shared", "samples"}, elem...)...)
	if _, err := os.Stat(path); err != nil {
		t.Skipf("the samples of other programs are not beside this checkout: %v", err)
	}
	return path
}

type fileTarget struct{ *os.File }

func (f fileTarget) Flush() error { return f.Sync() }

func sampleKeys(t testing.TB, names ...string) *Keyring {
	t.Helper()
	var paths []string
	for _, n := range names {
		paths = append(paths, samples(t, "keys", n))
	}
	k, err := LoadKeys(paths...)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func applyTo(t *testing.T, p *Payload, opt ApplyOptions) (map[string]string, error) {
	t.Helper()
	dir := t.TempDir()
	opt.Targets = map[string]Target{}
	files := map[string]*os.File{}
	for _, q := range p.Partitions {
		f, err := os.Create(filepath.Join(dir, q.Name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		opt.Targets[q.Name], files[q.Name] = fileTarget{f}, f
	}
	if err := p.Apply(t.Context(), opt); err != nil {
		return nil, err
	}
	sums := map[string]string{}
	for _, q := range p.Partitions {
		h := sha256.New()
		if _, err := io.Copy(h, io.NewSectionReader(files[q.Name], 0, q.Size)); err != nil {
			t.Fatal(err)
		}
		if [32]byte(h.Sum(nil)) != q.SHA256 {
			t.Errorf("partition %q is not what the manifest says", q.Name)
		}
		sums[q.Name] = hex.EncodeToString(h.Sum(nil))
	}
	return sums, nil
}

func TestFullPayloadsOfOtherPrograms(t *testing.T) {
	kernel, root := "03969d4c704d6bbbe7c50693c9fbd8f4a28d0b341008dc8dd52f45d9fb41de8a", "e1e871c9f75f696c5dcbde9b69d42ef8b047eb1bcc5d6d28581b7bdd63f33e88"
	want := map[string]map[string]string{
		"payload-v1/v1-full.dual.payload": {"usr": "b40db452f01ab7c166fe53e74c494ac93e45ef860c9f5b5583e655a64394cb3e"},
	}
	dir := samples(t, "payload-v2")
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.Contains(e.Name(), "full") && strings.HasSuffix(e.Name(), ".bin") {
			want["payload-v2/"+e.Name()] = map[string]string{"kernel": kernel, "root": root}
		}
	}
	for name, sums := range want {
		t.Run(name, func(t *testing.T) {
			src, err := NewFileSource(samples(t, strings.Split(name, "/")...))
			if err != nil {
				t.Fatal(err)
			}
			p, err := Open(t.Context(), src, Options{Keys: sampleKeys(t, "rsa2048.pub.pem", "v1-key1.pub.pem")})
			if err != nil {
				t.Fatal(err)
			}
			got, err := applyTo(t, p, ApplyOptions{})
			if err != nil {
				t.Fatal(err)
			}
			for part, sum := range sums {
				if got[part] != sum {
					t.Errorf("%s has SHA-256 %s, want %s", part, got[part], sum)
				}
			}
		})
	}
}

func TestMalformed(t *testing.T) {
	data, err := os.ReadFile(samples(t, "payload-v2", "malformed", "cases.json"))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%.300s", data)
	var any json.RawMessage
	_ = json.Unmarshal(data, &any)
	files, _ := filepath.Glob(samples(t, "payload-v2", "malformed") + "/*.gz")
	keys := sampleKeys(t, "rsa2048.pub.pem")
	for _, f := range files {
		name := strings.TrimSuffix(filepath.Base(f), ".bin.gz")
		t.Run(name, func(t *testing.T) {
			z, err := os.Open(f)
			if err != nil {
				t.Fatal(err)
			}
			defer z.Close()
			r, err := gzip.NewReader(z)
			if err != nil {
				t.Fatal(err)
			}
			raw := filepath.Join(t.TempDir(), name)
			w, _ := os.Create(raw)
			if _, err := io.Copy(w, r); err != nil {
				t.Fatal(err)
			}
			w.Close()
			src, err := NewFileSource(raw)
			if err != nil {
				t.Fatal(err)
			}
			p, err := Open(t.Context(), src, Options{Keys: keys})
			if err == nil {
				_, err = applyTo(t, p, ApplyOptions{})
			}
			switch {
			case strings.HasPrefix(name, "00-good-full") || name == "57-timestamp-old":
				if err != nil {
					t.Errorf("a sound payload was refused: %v", err)
				}
			case name == "44-xz-check-crc64":
			case err == nil:
				t.Errorf("accepted")
			case strings.Contains(name, "delta") || strings.Contains(name, "-d-"):
				if !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrMalformed) {
					t.Errorf("error = %v", err)
				}
			}
			if err != nil {
				t.Log(err)
			}
		})
	}
}
