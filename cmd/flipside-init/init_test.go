package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseHash(t *testing.T) {
	sum := strings.Repeat("0f", 32)
	if root, at, err := parseHash(sum + "@8192"); err != nil || root != sum || at != 8192 {
		t.Errorf("parseHash = %q, %d, %v", root, at, err)
	}
	for _, bad := range []string{"", sum, sum + "@", sum + "@0", sum + "@-4096", sum + "@100", "0f@4096", sum + "zz@4096", sum + "@4096@4096"} {
		if _, _, err := parseHash(bad); err == nil {
			t.Errorf("parseHash(%q) is accepted", bad)
		}
	}
}

// A hash tree that veritysetup made is described as the kernel wants it.
func TestSuperblockOfVeritysetup(t *testing.T) {
	tool, err := exec.LookPath("veritysetup")
	if err != nil {
		t.Skip("veritysetup (Debian's cryptsetup-bin) is not installed")
	}
	image := filepath.Join(t.TempDir(), "usr.img")
	const blocks = 256
	if err := os.WriteFile(image, make([]byte, blocks*4096+64<<10), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tool, "format", "--data-block-size=4096", "--hash-block-size=4096", "--data-blocks=256", "--hash-offset=1048576", "--salt=abcd", image, image).CombinedOutput()
	if err != nil {
		t.Fatalf("veritysetup: %v\n%s", err, out)
	}
	data, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	s, err := parseSuperblock(data[blocks*4096:])
	if err != nil {
		t.Fatal(err)
	}
	want := "1 /dev/x /dev/x 4096 4096 256 257 sha256 ROOT abcd 1 panic_on_corruption"
	if got := s.table("/dev/x", "ROOT", blocks*4096); got != want {
		t.Errorf("table\n%s, want\n%s", got, want)
	}
	_, root, _ := strings.Cut(string(out), "Root hash:")
	if got, err := rootOf(image, blocks*4096); err != nil || got != strings.TrimSpace(root) {
		t.Errorf("root hash %s, %v, want%s", got, err, root)
	}
}

func FuzzSuperblock(f *testing.F) {
	good := make([]byte, 512)
	copy(good, "verity\x00\x00")
	le := binary.LittleEndian
	le.PutUint32(good[8:], 1)
	le.PutUint32(good[12:], 1)
	copy(good[32:], "sha256")
	le.PutUint32(good[64:], 4096)
	le.PutUint32(good[68:], 4096)
	le.PutUint64(good[72:], 100)
	if _, err := parseSuperblock(good); err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	for _, at := range []int{0, 8, 12, 32, 64, 68, 79, 81} {
		bad := bytes.Clone(good)
		bad[at] ^= 0xff
		if s, err := parseSuperblock(bad); err == nil {
			f.Errorf("with byte %d flipped it is accepted: %+v", at, s)
		}
		f.Add(bad)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseSuperblock(b); err == nil && (s.Blocks == 0 || len(s.Salt) > 256 || s.Algorithm != "sha256") {
			t.Errorf("accepted: %+v", s)
		}
	})
}

// A unified kernel image that objcopy made is taken apart into what went into it.
func TestReadImage(t *testing.T) {
	const stub = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub"
	objcopy, err := exec.LookPath("objcopy")
	if _, err2 := os.Stat(stub); err != nil || err2 != nil {
		t.Skip("objcopy or the stub (Debian's binutils and systemd-boot-efi) is not installed")
	}
	dir := t.TempDir()
	parts := map[string]string{".cmdline": "quiet flipside.usrhash=00@4096\n", ".linux": "the kernel", ".initrd": "the initramfs, longer"}
	make := func(name string, sections ...string) *os.File {
		args, vma := []string{}, 0x2000000
		for _, s := range sections {
			path := filepath.Join(dir, "part"+s)
			if err := os.WriteFile(path, []byte(parts[s]), 0o644); err != nil {
				t.Fatal(err)
			}
			args = append(args, "--add-section", s+"="+path, "--change-section-vma", fmt.Sprintf("%s=%#x", s, vma))
			vma += 0x1000000
		}
		out := filepath.Join(dir, name)
		if msg, err := exec.Command(objcopy, append(args, stub, out)...).CombinedOutput(); err != nil {
			t.Fatalf("objcopy: %v\n%s", err, msg)
		}
		f, err := os.Open(out)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	im, err := readImage(make("whole", ".cmdline", ".linux", ".initrd"))
	if err != nil {
		t.Fatal(err)
	}
	if string(im.Kernel) != parts[".linux"] || string(im.Initrd) != parts[".initrd"] || im.CommandLine != strings.TrimSpace(parts[".cmdline"]) {
		t.Errorf("got kernel %q, initramfs %q, command line %q", im.Kernel, im.Initrd, im.CommandLine)
	}
	if _, err := readImage(make("empty", ".cmdline")); err == nil || !strings.Contains(err.Error(), "holds no kernel") {
		t.Errorf("an image without a kernel: %v", err)
	}
	broken := filepath.Join(dir, "broken")
	if err := os.WriteFile(broken, []byte("MZ and nothing else"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(broken)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := readImage(f); err == nil {
		t.Error("something else is taken for an image")
	}
}

func TestSuffix(t *testing.T) {
	for label, want := range map[string]string{"USR-A": "a", "USR-B": "b", "C": "c"} {
		if got := suffix(label); got != want {
			t.Errorf("suffix(%q) = %q, want %q", label, got, want)
		}
	}
}
