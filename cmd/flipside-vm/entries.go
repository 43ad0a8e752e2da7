package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/partition/bls"
	"github.com/flipside-linux/flipside/partition/bootsim"
	"github.com/flipside-linux/flipside/partition/gptimage"
)

// What Debian's packages ovmf and systemd-boot-efi install.
const (
	ovmfCode    = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	ovmfVars    = "/usr/share/OVMF/OVMF_VARS_4M.fd"
	systemdBoot = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
)

// entries lets systemd-boot itself, under a UEFI firmware, boot from entries that package bls wrote, and compares what it starts and how it counts with
// what package bootsim says of the same files. What is started is a kernel that says on the console which entry it is of, and then finds no root.
func entries(ctx context.Context, l *lab) error {
	for _, f := range []string{ovmfCode, ovmfVars, systemdBoot} {
		if _, err := os.Stat(f); err != nil {
			return fmt.Errorf("systemd-boot and a firmware for it (Debian's systemd-boot-efi and ovmf): %w", err)
		}
	}
	dir := filepath.Join(l.out, "entries")
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
		return err
	}
	e := firmware{lab: l, dir: dir}
	if err := e.make(ctx); err != nil {
		return err
	}
	type bits struct {
		priority, tries uint8
		good            bool
	}
	for i, tt := range []struct {
		name  string
		a, b  bits
		boots int
		also  map[string]string // files beside them
	}{
		{"two tries, then the old slot", bits{1, 0, true}, bits{2, 2, false}, 4, nil},
		{"a slot that was marked successful", bits{2, 0, true}, bits{3, 0, true}, 1, nil},
		{"a slot with a lower priority", bits{10, 0, true}, bits{9, 0, true}, 1, nil},
		{"no slot has a try left: no dead end", bits{1, 0, false}, bits{2, 0, false}, 2, nil},
		{"an entry that is about to be written, and one that is about to go", bits{1, 0, true}, bits{}, 1, map[string]string{
			"flipside-b+1.conf": strings.Repeat("\x00", 512), "flipside-b.conf": strings.Repeat("\x00", 512) + "linux /vmlinuz\noptions " + options("b") + "\n",
		}},
		{"marked successful, cut off before the counted entry went", bits{1, 0, true}, bits{2, 0, true}, 2, map[string]string{
			"flipside-b+0-1.conf": "sort-key flipside\nversion 02\nlinux /vmlinuz\noptions " + options("b") + "\n",
		}},
		{"somebody else's entry without a sort key", bits{1, 0, true}, bits{2, 1, false}, 2, map[string]string{
			"z-9.conf": "title other\nlinux /vmlinuz\noptions " + options("z") + "\n",
		}},
	} {
		shadow := atomicfile.OS(filepath.Join(dir, fmt.Sprint("case-", i+1)))
		if err := os.Mkdir(string(shadow), 0o755); err != nil {
			return err
		}
		was := []partition.Slot{{Label: "USR-A"}, {Label: "USR-B"}}
		now := slices.Clone(was)
		for i, b := range []bits{tt.a, tt.b} {
			now[i].Priority, now[i].Tries, now[i].Successful = b.priority, b.tries, b.good
		}
		w := bls.Entries{Dir: shadow, Template: "linux /vmlinuz\noptions " + options("{letter}") + "\n"}
		if err := w.Write(was, now); err != nil {
			return err
		}
		for name, text := range tt.also {
			if err := os.WriteFile(filepath.Join(string(shadow), name), []byte(text), 0o600); err != nil {
				return err
			}
		}
		if err := e.put(ctx, shadow); err != nil {
			return err
		}
		for n := range tt.boots {
			want, err := bootsim.SystemdBoot(shadow, nil)
			if err != nil {
				return err
			}
			got, err := e.boot(ctx)
			if err != nil {
				return fmt.Errorf("%s, boot %d: %w", tt.name, n+1, err)
			}
			if !strings.Contains(want.Options, "flipside.entry="+got+" ") {
				return fmt.Errorf("%s, boot %d: systemd-boot starts entry %q, bootsim says %s", tt.name, n+1, got, want.Name)
			}
			names, err := e.names(ctx)
			if err != nil {
				return err
			}
			if list, err := shadow.List(); err != nil || !slices.Equal(names, list) {
				return fmt.Errorf("%s, boot %d: systemd-boot leaves the entries %v, bootsim %v (%v)", tt.name, n+1, names, list, err)
			}
			l.say("entries: %s: boot %d is of %s, as bootsim says", tt.name, n+1, want.Name)
		}
	}
	return os.Remove(filepath.Join(dir, "disk.img"))
}

func options(entry string) string {
	return "flipside.entry=" + entry + " console=ttyS0 panic=-1 no_timer_check"
}

// firmware is a virtual machine with UEFI and systemd-boot on its disk.
type firmware struct {
	lab *lab
	dir string
	esp int64 // where the EFI system partition begins, bytes
}

func (e *firmware) path(name string) string { return filepath.Join(e.dir, name) }

func (e *firmware) mtools(ctx context.Context, tool string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, tool, append([]string{"-i", fmt.Sprintf("%s@@%d", e.path("disk.img"), e.esp)}, args...)...)
	cmd.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", tool, strings.Join(args, " "), err, out)
	}
	return out, nil
}

// make makes the disk, with no entries yet.
func (e *firmware) make(ctx context.Context) error {
	parts := []gptimage.Partition{{Label: "EFI-SYSTEM", Type: gptimage.TypeEFI, UUID: "11111111-1111-4111-8111-111111111111", Size: 64 << 20}}
	if err := gptimage.Create(e.path("disk.img"), 512, "22222222-2222-4222-8222-222222222222", parts); err != nil {
		return err
	}
	e.esp = parts[0].Start
	fat := e.path("esp.img")
	f, err := os.Create(fat)
	if err != nil {
		return err
	}
	defer os.Remove(fat)
	if err := errors.Join(f.Truncate(parts[0].Size), f.Close()); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "mkfs.vfat", fat).CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.vfat: %w: %s", err, out)
	}
	if err := copyInto(e.path("disk.img"), e.esp, fat); err != nil {
		return err
	}
	conf := e.path("loader.conf")
	if err := os.WriteFile(conf, []byte("timeout 0\n"), 0o600); err != nil {
		return err
	}
	for _, step := range [][]string{
		{"mmd", "::EFI", "::EFI/BOOT", "::loader", "::loader/entries"},
		{"mcopy", systemdBoot, "::EFI/BOOT/BOOTX64.EFI"}, {"mcopy", e.lab.file("stage.kernel"), "::vmlinuz"}, {"mcopy", conf, "::loader/loader.conf"},
	} {
		if _, err := e.mtools(ctx, step[0], step[1:]...); err != nil {
			return err
		}
	}
	return copySparse(e.path("vars.fd"), ovmfVars)
}

// copyInto writes a file into another one at a place.
func copyInto(to string, at int64, from string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.NewOffsetWriter(dst, at), src)
	return errors.Join(err, dst.Close())
}

// put replaces all entries.
func (e *firmware) put(ctx context.Context, from atomicfile.OS) error {
	old, err := e.names(ctx)
	if err != nil {
		return err
	}
	for _, name := range old {
		if _, err := e.mtools(ctx, "mdel", "::loader/entries/"+name); err != nil {
			return err
		}
	}
	list, err := from.List()
	if err != nil {
		return err
	}
	for _, name := range list {
		if _, err := e.mtools(ctx, "mcopy", filepath.Join(string(from), name), "::loader/entries/"+name); err != nil {
			return err
		}
	}
	return nil
}

// names lists the entries on the disk, in order.
func (e *firmware) names(ctx context.Context) ([]string, error) {
	out, err := e.mtools(ctx, "mdir", "-b", "::loader/entries")
	if err != nil && strings.Contains(err.Error(), "File") {
		return nil, nil // none
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		if name := strings.TrimSpace(line); name != "" && !strings.HasSuffix(name, "/") {
			names = append(names, name[strings.LastIndexByte(name, '/')+1:])
		}
	}
	slices.Sort(names)
	return names, err
}

// boot switches the machine on and returns what the kernel that is started says of its entry.
func (e *firmware) boot(ctx context.Context) (string, error) {
	limit := time.Duration(float64(3*time.Minute) * e.lab.slow)
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	console := e.path("console")
	out, err := exec.CommandContext(ctx, "qemu-system-x86_64", "-M", "q35", "-accel", "tcg,tb-size=128", "-cpu", "max", "-m", "256", "-smp", strconv.Itoa(1),
		"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-no-reboot",
		"-drive", "if=pflash,format=raw,readonly=on,file="+ovmfCode, "-drive", "if=pflash,format=raw,file="+e.path("vars.fd"),
		"-drive", "if=none,id=d,format=raw,file="+e.path("disk.img"), "-device", "nvme,drive=d,serial=flipside", "-serial", "file:"+console).CombinedOutput()
	e.lab.booted()
	text, err2 := os.ReadFile(console)
	if err := errors.Join(err, err2); err != nil {
		return "", fmt.Errorf("QEMU: %w: %s; the console's last word: %s", err, out, tail(string(text), 400))
	}
	_, after, ok := strings.Cut(string(text), "Command line: ")
	_, entry, ok2 := strings.Cut(after, "flipside.entry=")
	if !ok || !ok2 {
		return "", fmt.Errorf("no kernel says which entry it is of; the console's last word: %s", tail(string(text), 400))
	}
	entry, _, _ = strings.Cut(entry, " ")
	return entry, nil
}
