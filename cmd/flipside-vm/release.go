package main

import (
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/uuid"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/partition/bootsim"
	"github.com/flipside-linux/flipside/partition/gptimage"
)

// release is what packaging/image/build made in one folder.
type release struct {
	name, version string
	payload       string // path
	usr, kernel   string // SHA-256, hexadecimal
	size          int64  // of usr, bytes
}

// laterReleases are the good ones after base, each newer than the one before. Those that were not built are left out.
var laterReleases = []string{"good", "next", "third", "fourth", "fifth"}

// readReleases reads the folder of images: base, the good ones after it, and the bad ones.
func (l *lab) readReleases() error {
	for _, name := range append([]string{"base", "panic", "hang", "sick"}, laterReleases...) {
		dir := filepath.Join(l.images, name)
		version, err := os.ReadFile(filepath.Join(dir, "version"))
		if errors.Is(err, os.ErrNotExist) && name != "base" {
			continue
		}
		if err != nil {
			return fmt.Errorf("reading release %s: %w", name, err)
		}
		r := &release{name: name, version: strings.TrimSpace(string(version)), payload: filepath.Join(dir, "release.payload")}
		info, err := os.Stat(filepath.Join(dir, "usr.img"))
		if err != nil {
			return err
		}
		r.size = info.Size()
		var err1, err2 error
		r.usr, err1 = hashFile(filepath.Join(dir, "usr.img"), 0, r.size)
		r.kernel, err2 = hashWhole(filepath.Join(dir, "vmlinuz"))
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		l.releases = append(l.releases, r)
	}
	return nil
}

func (l *lab) release(name string) (*release, error) {
	for _, r := range l.releases {
		if r.name == name {
			return r, nil
		}
	}
	return nil, fmt.Errorf("the release %q was not built", name)
}

// later returns the good releases after base that were built, the newest last.
func (l *lab) later() []*release {
	var list []*release
	for _, name := range laterReleases {
		if r, err := l.release(name); err == nil {
			list = append(list, r)
		}
	}
	return list
}

// whole looks at a disk that is off: what the boot loader would choose must be a whole release, with the kernel that belongs to it. It
// returns the version.
func (m *machine) whole(ctx context.Context) (string, error) {
	next, err := m.next(ctx)
	if err != nil {
		return "", err
	}
	sum, err := hashFile(m.disk(), next.Start, m.lab.releases[0].size)
	if err != nil {
		return "", err
	}
	for _, r := range m.lab.releases {
		if r.usr != sum {
			continue
		}
		kernel, err := m.kernelOf(ctx, next.Label)
		if err != nil {
			return "", err
		}
		if kernel != r.kernel {
			return "", fmt.Errorf("slot %s holds release %s, and its kernel is not that release's", next.Label, r.version)
		}
		return r.version, nil
	}
	return "", fmt.Errorf("slot %s is next to boot (priority %d, tries %d, successful %v), and holds no release", next.Label, next.Priority, next.Tries, next.Successful)
}

// next says which slot the boot loader of a disk that is off would choose.
func (m *machine) next(ctx context.Context) (partition.Slot, error) {
	d, err := partition.OpenDisk(m.disk(), partition.Options{ReadOnly: true})
	if err != nil {
		return partition.Slot{}, err
	}
	slots, err := d.Slots()
	d.Close()
	if err != nil {
		return partition.Slot{}, err
	}
	if !m.bls {
		s, ok := bootsim.Next(slots)
		if !ok {
			return s, errors.New("no slot can be booted")
		}
		return s, nil
	}
	program, err := m.nextEntry(ctx)
	if err != nil {
		return partition.Slot{}, err
	}
	for _, s := range slots {
		if _, letter, _ := strings.Cut(program, "vmlinuz-"); strings.HasSuffix(strings.ToLower(s.Label), "-"+letter) {
			return s, nil
		}
	}
	return partition.Slot{}, fmt.Errorf("systemd-boot would start %s, which is no slot's", program)
}

// nextEntry says what systemd-boot would start.
func (m *machine) nextEntry(ctx context.Context) (string, error) {
	esp, err := offsetOf(m.disk(), gptimage.TypeEFI, string(bootArea))
	if err != nil {
		return "", err
	}
	e := firmware{lab: m.lab, dir: m.dir, esp: esp}
	names, err := e.names(ctx)
	if err != nil {
		return "", err
	}
	shadow, err := os.MkdirTemp(m.dir, "entries-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(shadow)
	for _, name := range names {
		if _, err := e.mtools(ctx, "mcopy", "::loader/entries/"+name, filepath.Join(shadow, name)); err != nil {
			return "", err
		}
	}
	entry, err := bootsim.SystemdBoot(atomicfile.OS(shadow), nil)
	return entry.Program, err
}

// kernelOf reads a slot's kernel from the EFI system partition with mtools, and returns its SHA-256.
func (m *machine) kernelOf(ctx context.Context, label string) (string, error) {
	esp, err := offsetOf(m.disk(), gptimage.TypeEFI, "EFI-SYSTEM")
	if err != nil {
		return "", err
	}
	name := "::flipside/vmlinuz-" + strings.ToLower(label[strings.LastIndexByte(label, '-')+1:])
	cmd := exec.CommandContext(ctx, "mtype", "-i", fmt.Sprintf("%s@@%d", m.disk(), esp), name)
	cmd.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	h := sha256.New()
	_, err = io.Copy(h, pipe)
	if err := errors.Join(err, cmd.Wait()); err != nil {
		return "", fmt.Errorf("the kernel of slot %s: %w: %s", label, err, strings.TrimSpace(stderr.String()))
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func rootOffset(disk string) (int64, error) { return offsetOf(disk, gptimage.TypeLinux, "ROOT") }

// offsetOf returns where a partition begins, in bytes.
func offsetOf(disk, typ, label string) (int64, error) {
	p, err := partitionOf(disk, typ, label)
	return p.Start, err
}

func partitionOf(disk, typ, label string) (partition.Slot, error) {
	d, err := partition.OpenDisk(disk, partition.Options{ReadOnly: true, TypeGUID: uuid.MustParse(typ)})
	if err != nil {
		return partition.Slot{}, err
	}
	defer d.Close()
	return d.Slot(label)
}

func machineID(name string) string {
	sum := md5.Sum([]byte(name))
	return hex.EncodeToString(sum[:])
}

func hashWhole(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	return hashFile(path, 0, info.Size())
}

func hashFile(path string, off, n int64) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, off, n)); err != nil {
		return "", fmt.Errorf("hashing %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
