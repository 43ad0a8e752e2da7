// Flipside-init is a boot stage for disks with A/B slots, as the init program of an initramfs. It is in two initramfs images:
//
// The boot stage's, which the firmware starts. It finds the disk whose partition table has slots, chooses one by the rules of package
// bootsim (the highest priority that has tries left or is successful), spends its try on the disk, reads the slot's kernel image from the EFI
// system partition, and starts that kernel with kexec. On a host whose boot loader is systemd-boot there is no boot stage.
//
// The slot's own, inside that kernel image (a unified kernel image: kernel, initramfs and command line in one file). The command line holds
// the root hash of the slot's /usr, so that kernel and /usr belong together: it sets up dm-verity with it, mounts the root file system and
// /usr in it, and becomes the system's init.
//
// Whatever fails restarts the machine: the try is spent, so that in the end the other slot is taken. Before anything else a watchdog is
// armed, where the kernel has one, so that a machine that hangs is restarted as well.
//
// Command line:
//
//	flipside.disk=/dev/sda      the disk; otherwise the first one that has slots
//	flipside.kernel=PATTERN     of the kernel image on the EFI system partition, %s is the last part of the slot's label in lower case
//	flipside.watchdog=SECONDS   until a machine that hangs is restarted; 0: no watchdog
//	flipside.usr=UUID           the slot; added by the boot stage. Without it, as under systemd-boot, the slot is found by its root hash
//	flipside.usrhash=HASH@BYTE  root hash of /usr in hexadecimal, and where in the partition its hash tree begins
//	flipside.root=LABEL         label of the partition with the root file system
package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "flipside-init: this program is the init of an initramfs, and not for a running system")
		os.Exit(2)
	}
	runtime.LockOSThread()
	console := early()
	say := func(format string, args ...any) { fmt.Fprintf(console, "flipside-init: "+format+"\n", args...) }
	err := boot(say)
	say("%v", err)
	say("the machine restarts in %v", restartDelay)
	time.Sleep(restartDelay)
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	select {} // the watchdog's turn
}

// restartDelay is how long an error stays readable on a console.
const restartDelay = 3 * time.Second

// early mounts what everything else needs, and returns the console.
func early() io.Writer {
	for _, m := range []struct{ fs, at, data string }{{"devtmpfs", "/dev", "mode=755"}, {"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"tmpfs", "/run", "mode=755"}} {
		os.MkdirAll(m.at, 0o755)
		unix.Mount(m.fs, m.at, m.fs, unix.MS_NOSUID, m.data) // one that fails is missed below, and named there
	}
	var out []io.Writer
	if f, err := os.OpenFile("/dev/console", os.O_WRONLY, 0); err == nil {
		out = append(out, f)
	}
	if f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); err == nil {
		out = append(out, debug{f})
	}
	return io.MultiWriter(out...)
}

// debug writes lines to the kernel log, where the running system finds them, at a level that is not printed on the console again.
type debug struct{ w io.Writer }

func (d debug) Write(p []byte) (int, error) {
	d.w.Write(append([]byte("<7>"), p...))
	return len(p), nil
}

func boot(say func(string, ...any)) error {
	options, err := commandLine()
	if err != nil {
		return err
	}
	if err := modules("/modules"); err != nil {
		return err
	}
	if err := watchdog(options["flipside.watchdog"]); err != nil {
		say("no watchdog: %v", err)
	}
	if options["flipside.usr"] == "" && options["flipside.usrhash"] == "" {
		return choose(options, say)
	}
	return start(options, say)
}

// commandLine reads the kernel's command line. Of an option that is there twice the last one counts.
func commandLine() (map[string]string, error) {
	data, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, fmt.Errorf("reading the command line: %w", err)
	}
	options := map[string]string{}
	for _, word := range strings.Fields(string(data)) {
		k, v, _ := strings.Cut(word, "=")
		options[k] = v
	}
	return options, nil
}

// modules loads the kernel modules of a directory, in the order of their names.
func modules(dir string) error {
	names, err := filepath.Glob(filepath.Join(dir, "*.ko"))
	if err != nil {
		return err
	}
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && err != unix.EEXIST {
			return fmt.Errorf("loading the kernel module %s: %w", filepath.Base(name), err)
		}
	}
	return nil
}

const defaultWatchdog = 120 // seconds

// watchdog arms the first watchdog device. It goes on after the device is closed: whoever comes next takes it over, or the machine restarts.
func watchdog(option string) error {
	seconds, err := watchdogSeconds(option)
	if seconds == 0 || err != nil {
		return err
	}
	f, err := os.OpenFile(watchdogDevice, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.IoctlSetPointerInt(int(f.Fd()), unix.WDIOC_SETTIMEOUT, seconds)
}

const watchdogDevice = "/dev/watchdog0"

func watchdogSeconds(option string) (int, error) {
	if option == "" {
		return defaultWatchdog, nil
	}
	n, err := strconv.Atoi(option)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("flipside.watchdog=%q is not a number of seconds", option)
	}
	return n, nil
}

// fed does something that may take longer than the watchdog waits, and keeps it quiet meanwhile, but not for ever.
func fed(option string, limit time.Duration, work func() error) error {
	seconds, err := watchdogSeconds(option)
	if seconds == 0 || err != nil {
		return work()
	}
	done := make(chan struct{})
	defer close(done)
	go func() {
		ticker, end := time.NewTicker(time.Duration(seconds)*time.Second/4), time.After(limit)
		defer ticker.Stop()
		for {
			if f, err := os.OpenFile(watchdogDevice, os.O_WRONLY, 0); err == nil {
				unix.IoctlWatchdogKeepalive(int(f.Fd()))
				f.Close()
			}
			select {
			case <-done:
				return
			case <-end:
				return
			case <-ticker.C:
			}
		}
	}()
	return work()
}
