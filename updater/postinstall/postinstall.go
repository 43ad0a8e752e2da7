// Package postinstall runs the program that a new release brings for the moment before it is made bootable, as the older update engines do.
//
// The program is a file of the release's own image, so a pinned key has signed it. The slot is mounted through a loop device that cannot be
// written: neither the mount nor the replay of a journal changes what was verified. The program gets bounded time, and what it prints
// is kept. It is called as
//
//	PROGRAM DEVICE [KERNEL=PATH] [PCR_POLICY=PATH]
//
// from the root of the mounted image, with PATH, the proxy variables of the daemon, FLIPSIDE_SLOT (the label), FLIPSIDE_DISK and FLIPSIDE_VERSION.
// Exit status 0 is success; 75 (EX_TEMPFAIL) means that it may succeed another time; anything else refuses the release.
package postinstall

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
)

// Errors that callers decide on.
var (
	ErrFailed    = errors.New("the release's post-install program refused")
	ErrTemporary = errors.New("the release's post-install program asks to be run another time")
	ErrTimeout   = errors.New("the release's post-install program took too long")
)

const (
	exitTemporary = 75        // EX_TEMPFAIL of sysexits.h
	maxOutput     = 256 << 10 // bytes that are kept of what it prints
	grace         = 5 * time.Second
)

// Program says what to run.
type Program struct {
	Disk    string // device or image that the slot is on
	Slot    partition.Slot
	Path    string        // of the program in the slot
	Args    []string      // after the device: KERNEL=/boot/vmlinuz-b
	Version string        // of the release
	Missing bool          // a slot without the program is no error
	Mount   string        // directory to mount the slot on; made if there is none
	Output  string        // file that keeps what the program printed
	Timeout time.Duration // 0: ten minutes
	Log     *slog.Logger
}

// proxies are the variables of the daemon that the program gets, too.
var proxies = []string{"ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "all_proxy", "http_proxy", "https_proxy", "no_proxy"}

// Run mounts the slot, runs the program, and unmounts. It needs the rights of root. Once ran is true the program may have changed whatever root can:
// the mount is read-only, the device that it is told of is not. What it wrote is on its way to the disk by then, past the caches of all devices.
func (p Program) Run(ctx context.Context) (ran bool, err error) {
	fail := func(err error) (bool, error) {
		return ran, fmt.Errorf("post-install program %q of slot %s: %w", p.Path, p.Slot.Label, err)
	}
	if !filepath.IsLocal(p.Path) {
		return fail(errors.New("not a path inside the slot"))
	}
	device, unmount, err := mountSlot(p.Disk, p.Slot, p.Mount)
	if err != nil {
		return fail(err)
	}
	defer func() {
		if e := unmount(); e != nil && err == nil {
			_, err = fail(e)
		}
	}()
	// Symbolic links that lead out of the image would run something that nobody signed.
	root, err := os.OpenRoot(p.Mount)
	if err != nil {
		return fail(err)
	}
	defer root.Close()
	info, err := root.Stat(p.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && p.Missing:
		return false, nil
	case err != nil:
		return fail(err)
	case !info.Mode().IsRegular() || info.Mode()&0o111 == 0:
		return fail(fmt.Errorf("not an executable file (%s)", info.Mode()))
	}
	if link := filepath.Join("/dev/disk/by-partuuid", p.Slot.UUID.String()); exists(link) {
		device = link
	}
	ran = true
	err = p.run(ctx, device)
	unix.Sync() // a partition has a cache of its own, beside that of its disk
	if err != nil {
		return fail(err)
	}
	return true, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func (p Program) run(parent context.Context, device string) error {
	timeout := p.Timeout
	if timeout <= 0 {
		timeout = 10 * time.Minute
	}
	ctx, cancel := context.WithTimeout(parent, timeout)
	defer cancel()
	// A link may lead anywhere: others than this process write to the directory.
	out, err := atomicfile.OS(filepath.Dir(p.Output)).Create(filepath.Base(p.Output))
	if err != nil {
		return fmt.Errorf("keeping its output: %w", err)
	}
	defer out.Close()
	if err := out.Truncate(0); err != nil {
		return fmt.Errorf("keeping its output: %w", err)
	}
	keep := &output{w: io.NewOffsetWriter(out, 0), log: p.Log, left: maxOutput}
	cmd := exec.CommandContext(ctx, filepath.Join(p.Mount, p.Path), append([]string{device}, p.Args...)...)
	cmd.Dir = p.Mount
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8",
		"FLIPSIDE_SLOT=" + p.Slot.Label, "FLIPSIDE_DISK=" + p.Disk, "FLIPSIDE_VERSION=" + p.Version}
	for _, name := range proxies {
		if v, ok := os.LookupEnv(name); ok {
			cmd.Env = append(cmd.Env, name+"="+v)
		}
	}
	cmd.Stdout, cmd.Stderr = keep, keep
	// Its own process group, so that what it started ends with it; and it does not outlive the daemon, whose next start would run it again.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = grace
	runtime.LockOSThread() // Pdeathsig is about the thread that started it
	defer runtime.UnlockOSThread()
	err = cmd.Run()
	if cmd.Process != nil {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // whatever it left behind holds the mount
	}
	keep.end()
	if keepErr := errors.Join(keep.failed(), out.Sync()); keepErr != nil && p.Log != nil {
		p.Log.Warn("the output of the post-install program is not kept", "file", p.Output, "error", keepErr)
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case parent.Err() != nil:
		return parent.Err() // which says nothing about the release
	case ctx.Err() != nil:
		return fmt.Errorf("%w: stopped after %s%s", ErrTimeout, timeout, keep.lastLine())
	case errors.Is(err, exec.ErrWaitDelay):
		return nil // it succeeded, and what it left behind kept its output open
	case errors.As(err, &exit) && exit.ExitCode() == exitTemporary:
		return fmt.Errorf("%w%s", ErrTemporary, keep.lastLine())
	case errors.As(err, &exit):
		return fmt.Errorf("%w: %s%s", ErrFailed, exit, keep.lastLine())
	}
	return err
}

// output keeps what a program prints, up to a limit, and logs its lines.
type output struct {
	mu   sync.Mutex
	w    io.Writer
	log  *slog.Logger
	left int
	line []byte
	last string
	err  error
}

const maxLine = 1000

// Write never fails: a full disk must not break the program.
func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := len(b)
	if keep := min(o.left, n); keep > 0 && o.err == nil {
		_, o.err = o.w.Write(b[:keep])
		if o.left -= keep; o.left == 0 && o.err == nil {
			_, o.err = io.WriteString(o.w, "\n[there was more]\n")
		}
	}
	for len(b) > 0 {
		i := bytes.IndexByte(b, '\n')
		part := b
		if i >= 0 {
			part, b = b[:i], b[i+1:]
		} else {
			b = nil
		}
		if room := maxLine - len(o.line); room > 0 {
			o.line = append(o.line, part[:min(room, len(part))]...)
		}
		if i >= 0 {
			o.flushLine()
		}
	}
	return n, nil
}

func (o *output) flushLine() {
	text := strings.TrimSpace(string(o.line))
	o.line = o.line[:0]
	if text == "" {
		return
	}
	o.last = text
	if o.log != nil {
		o.log.Info("post-install", "line", text)
	}
}

func (o *output) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.flushLine()
}

func (o *output) failed() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

func (o *output) lastLine() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.last == "" {
		return ""
	}
	return fmt.Sprintf(", its last line was %q", o.last)
}

// filesystems are those that a slot may hold: where their magic number is, and how they are mounted so that nothing is replayed.
var filesystems = []struct {
	name, magic string
	off         int64
	data        string
}{
	{"squashfs", "hsqs", 0, ""},
	{"erofs", "\xe2\xe1\xf5\xe0", 1024, ""},
	{"ext4", "\x53\xef", 0x438, "noload"},
	{"btrfs", "_BHRfS_M", 0x10040, "rescue=nologreplay"},
	{"xfs", "XFSB", 0, "norecovery,nouuid"},
}

// detect finds out which file system a slot holds.
func detect(r io.ReaderAt, off int64) (name, data string, err error) {
	for _, f := range filesystems {
		b := make([]byte, len(f.magic))
		if _, err := r.ReadAt(b, off+f.off); err != nil && !errors.Is(err, io.EOF) {
			return "", "", err
		}
		if string(b) == f.magic {
			return f.name, f.data, nil
		}
	}
	return "", "", errors.New("the slot holds no file system that can be mounted (ext4, squashfs, erofs, btrfs, xfs)")
}
