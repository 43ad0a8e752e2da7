package host

import (
	"bytes"
	"crypto"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	releases "github.com/flipside-linux/flipside/omaha/server"
	"github.com/flipside-linux/flipside/payload/build"
	"github.com/flipside-linux/flipside/updater"
)

// next makes the image of a version that is like another: most of it is the same or elsewhere, some of it is changed a little, and some is new.
func (r *rig) next(version, from string) []byte {
	old := r.image(from)
	img := slices.Concat(old[64<<10:1<<20], old[:64<<10], old[1<<20:])
	for i := 2 << 20; i < 2<<20+256<<10; i += 997 {
		img[i] ^= 0x55
	}
	copy(img[5<<19:], r.image("the new files of " + version)[:100_000])
	delete(r.images, "the new files of "+version)
	copy(img, version)
	r.images[version] = img
	return img
}

// delta is a payload that makes an image, and a kernel, out of those of another release.
func (r *rig) delta(old, new, oldKernel, newKernel []byte) []byte {
	r.t.Helper()
	image := func(name string, old, new []byte) build.Image {
		return build.Image{Name: name, Data: bytes.NewReader(new), Size: int64(len(new)), Old: &build.Image{Name: name, Data: bytes.NewReader(old), Size: int64(len(old))}}
	}
	var b bytes.Buffer
	res, err := build.Create(r.t.Context(), &b, build.Spec{
		Images: []build.Image{image("usr", old, new), image("kernel", oldKernel, newKernel)}, Keys: []crypto.Signer{r.key}, TempDir: r.dir,
	})
	if err != nil || !res.Delta {
		r.t.Fatalf("no delta: %+v, %v", res, err)
	}
	if b.Len() > imageSize/4 {
		r.t.Fatalf("a delta of %d bytes for an image of %d", b.Len(), imageSize)
	}
	return b.Bytes()
}

// TestHostTakesADelta makes the other slot and its kernel out of the running ones, and after the reboot the first slot out of the second.
func TestHostTakesADelta(t *testing.T) {
	r := newRig(t)
	dir := r.bootDir()
	kernels := [][]byte{bytes.Repeat([]byte("kernel of 1.0.0\n"), 1024), bytes.Repeat([]byte("kernel of 2.0.0\n"), 1024), bytes.Repeat([]byte("kernel of 3.0.0\n"), 1024)}
	r.write("boot/vmlinuz-a", string(kernels[0]))
	slot, _ := r.boot()
	for i, want := range []struct{ version, from, slot, other, kernel string }{{"2.0.0", "1.0.0", "USR-B", "USR-A", "vmlinuz-b"}, {"3.0.0", "2.0.0", "USR-A", "USR-B", "vmlinuz-a"}} {
		img := r.next(want.version, want.from)
		r.publish(want.version, r.delta(r.image(want.from), img, kernels[i], kernels[i+1]))
		if _, rebooted := r.run(slot, func(updater.Status) bool { return false }); !rebooted {
			t.Fatal("no reboot")
		}
		if !bytes.Equal(r.read(want.slot), img) || !bytes.Equal(r.read(want.other), r.image(want.from)) {
			t.Fatalf("%s: the slots do not hold their releases", want.version)
		}
		if got, err := os.ReadFile(filepath.Join(dir, want.kernel)); err != nil || !bytes.Equal(got, kernels[i+1]) {
			t.Errorf("%s: the new slot's kernel: %d bytes, %v", want.version, len(got), err)
		}
		var version string
		if slot, version = r.boot(); slot != want.slot || version != want.version {
			t.Fatalf("booted %s from %s", version, slot)
		}
		st, _ := r.run(slot, settled)
		if s := r.slot(want.slot); !s.Successful || st.LastUpdate == nil || !st.LastUpdate.Good {
			t.Errorf("after the trial: %+v, %+v", s, st.LastUpdate)
		}
	}
}

// A delta for another release than the one that runs is refused before the other slot is given up: it may still be gone back to.
func TestHostRefusesADeltaOfAnotherRelease(t *testing.T) {
	r := newRig(t)
	r.bootDir()
	kernel := bytes.Repeat([]byte("kernel of 1.5.0\n"), 1024)
	r.write("boot/vmlinuz-a", string(kernel))
	r.publish("2.0.0", r.delta(r.image("1.5.0"), r.next("2.0.0", "1.5.0"), kernel, kernel))
	other, bits := r.read("USR-B"), r.slot("USR-B")
	slot, _ := r.boot()
	st, _ := r.run(slot, func(st updater.Status) bool { return st.LastError != "" })
	if !strings.Contains(st.LastError, "old partition \"usr\"") {
		t.Errorf("it says: %s", st.LastError)
	}
	if got := r.slot("USR-B"); !bytes.Equal(r.read("USR-B"), other) || got != bits {
		t.Errorf("the other slot was touched: %+v, was %+v", got, bits)
	}
	if slot, version := r.boot(); slot != "USR-A" || version != "1.0.0" {
		t.Errorf("booted %s from %s", version, slot)
	}
}

// TestHostIsOfferedADelta: a host takes the delta of a release when the server has one from what it runs. One that does not fit costs a check, and no more.
func TestHostIsOfferedADelta(t *testing.T) {
	r := newRig(t)
	publisher := releases.Publisher{Dir: filepath.Join(r.dir, "releases")}
	release := func(version, like, from string) {
		t.Helper()
		img := r.next(version, like)
		r.publish(version, r.payload(version, img, r.key))
		var b bytes.Buffer
		old := r.image(like)
		if _, err := build.Create(t.Context(), &b, build.Spec{
			Images: []build.Image{{Name: "usr", Data: bytes.NewReader(img), Size: int64(len(img)), Old: &build.Image{Name: "usr", Data: bytes.NewReader(old), Size: int64(len(old))}}},
			Keys:   []crypto.Signer{r.key}, TempDir: r.dir,
		}); err != nil {
			t.Fatal(err)
		}
		r.write(version+".delta", b.String())
		if _, err := publisher.AddDelta(t.Context(), version, from, filepath.Join(r.dir, version+".delta")); err != nil {
			t.Fatal(err)
		}
		if err := r.server.Reload(); err != nil {
			t.Fatal(err)
		}
	}
	var mu sync.Mutex
	var fetched []string
	r.wrap = func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if name := path.Base(req.URL.Path); strings.HasSuffix(name, ".payload") {
				mu.Lock()
				if !slices.Contains(fetched, name) {
					fetched = append(fetched, name)
				}
				mu.Unlock()
			}
			h.ServeHTTP(w, req)
		})
	}
	update := func(version string, want ...string) {
		t.Helper()
		slot, _ := r.boot()
		if _, rebooted := r.run(slot, func(updater.Status) bool { return false }); !rebooted {
			t.Fatal("no reboot")
		}
		slot, booted := r.boot()
		if booted != version {
			t.Fatalf("booted %s", booted)
		}
		r.run(slot, settled)
		mu.Lock()
		defer mu.Unlock()
		if !slices.Equal(fetched, want) {
			t.Errorf("%s: fetched %q, want %q", version, fetched, want)
		}
		fetched = nil
	}
	release("2.0.0", "1.0.0", "1.0.0")
	update("2.0.0", "2.0.0_from_1.0.0.payload")
	release("3.0.0", "1.5.0", "2.0.0")
	update("3.0.0", "3.0.0_from_2.0.0.payload", "3.0.0.payload")
	release("4.0.0", "3.0.0", "3.0.0")
	update("4.0.0", "4.0.0_from_3.0.0.payload")
}
