package demo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/flipside-linux/flipside/partition/bootsim"
	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/control"
)

// A machine is a simulated host: a real disk image, a boot loader that obeys the image's GPT, and a real flipsided. What
// is simulated is the hardware, the firmware and the kernel; the "running system" is the set of files that a kernel would see in the
// booted slot, read from the slot's file system.
type machine struct {
	name      string
	dir       string
	disk      string
	flipsided string
	log       func(format string, args ...any)

	mu     sync.Mutex
	status updater.Status
	seen   bool
	boots  int
	ran    map[string]bool // versions that were booted
	proc   *os.Process
}

func (m *machine) path(elem ...string) string {
	return filepath.Join(append([]string{m.dir}, elem...)...)
}

// run keeps the machine on: it boots, runs flipsided until that asks for a reboot, and boots again.
func (m *machine) run(ctx context.Context) error {
	for {
		slot, err := m.boot(ctx)
		if err != nil {
			return fmt.Errorf("%s does not boot: %w", m.name, err)
		}
		again, err := m.daemon(ctx, slot)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		if !again {
			return fmt.Errorf("%s: flipsided ended by itself; see %s", m.name, m.path("flipsided.log"))
		}
	}
}

// boot does what firmware, boot loader and kernel do: choose a slot, spend its try, and make the slot's files the running system.
func (m *machine) boot(ctx context.Context) (string, error) {
	slot, err := bootsim.BootFile(m.disk)
	if err != nil {
		return "", err
	}
	m.mu.Lock()
	m.boots++
	boots := m.boots
	m.mu.Unlock()
	usr := m.path("usr")
	if err := errors.Join(os.RemoveAll(usr), os.MkdirAll(filepath.Join(usr, "health.d"), 0o755)); err != nil {
		return "", err
	}
	image := fmt.Sprintf("%s?offset=%d", m.disk, slot.Start)
	for from, to := range map[string]string{"/lib/os-release": "os-release", "/lib/flipside/health.d/10-os": "health.d/10-os"} {
		if _, err := tool(ctx, "debugfs", "-R", "dump -p "+from+" "+filepath.Join(usr, to), image); err != nil {
			return "", err
		}
	}
	release, err := os.ReadFile(filepath.Join(usr, "os-release"))
	if err != nil {
		return "", fmt.Errorf("slot %s holds no file system that can be read: %w", slot.Label, err)
	}
	if err := os.WriteFile(m.path("boot_id"), []byte(uuid.NewString()+"\n"), 0o644); err != nil {
		return "", err
	}
	m.mu.Lock()
	if m.ran == nil {
		m.ran = map[string]bool{}
	}
	m.ran[versionOf(string(release))] = true
	m.mu.Unlock()
	if boots > 1 {
		m.log("%s boots %s from %s", m.name, versionOf(string(release)), slot.Label)
	}
	return slot.Label, m.configure(slot.Label)
}

func versionOf(osRelease string) string {
	for line := range strings.Lines(osRelease) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_ID="); ok {
			return strings.Trim(v, `"`)
		}
	}
	return "unknown"
}

// configure writes the daemon's configuration; only the running slot differs from boot to boot, as the kernel's command line would.
func (m *machine) configure(running string) error {
	template, err := os.ReadFile(m.path("flipside.toml.in"))
	if err != nil {
		return err
	}
	return os.WriteFile(m.path("flipside.toml"), []byte(strings.ReplaceAll(string(template), "@RUNNING@", running)), 0o644)
}

// daemon runs flipsided and reports whether it asked for a reboot.
func (m *machine) daemon(ctx context.Context, slot string) (again bool, err error) {
	logFile, err := os.OpenFile(m.path("flipsided.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return false, err
	}
	defer logFile.Close()
	cmd := exec.CommandContext(ctx, m.flipsided, "--config", m.path("flipside.toml"))
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Second
	cmd.Env = append(os.Environ(), "FLIPSIDE_OS_RELEASE="+m.path("usr", "os-release"))
	if err := cmd.Start(); err != nil {
		return false, err
	}
	m.mu.Lock()
	m.proc = cmd.Process
	m.mu.Unlock()
	watch, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { m.watch(watch) })
	err = cmd.Wait()
	stop()
	wg.Wait()
	m.mu.Lock()
	m.proc = nil
	m.mu.Unlock()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return false, nil
	case errors.As(err, &exit) && exit.ExitCode() == reboot.ExitStatus:
		return true, nil
	case errors.As(err, &exit) && !exit.Exited():
		// Killed: the demo pulled the plug. The machine is switched on again.
		return true, nil
	}
	return false, fmt.Errorf("flipsided failed (%w); see %s", err, m.path("flipsided.log"))
}

// pullPlug ends the machine as a power cut does: nothing gets to say goodbye.
func (m *machine) pullPlug() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.proc != nil {
		m.proc.Kill()
	}
}

// watch follows the daemon's status until ctx ends.
func (m *machine) watch(ctx context.Context) {
	for ctx.Err() == nil {
		err := control.Call(ctx, m.path("run", "control.sock"), control.Request{Method: "watch"}, func(st updater.Status) bool {
			m.mu.Lock()
			resumes := st.Progress != nil && st.Progress.Resumed > 0 && (m.status.Progress == nil || m.status.Progress.Resumed != st.Progress.Resumed)
			m.status, m.seen = st, true
			m.mu.Unlock()
			if resumes {
				m.log("%s goes on with its download at %d %%", m.name, st.Progress.Resumed*100/st.Progress.Total)
			}
			return true
		})
		if err != nil && !errors.Is(err, control.ErrNotRunning) && !errors.Is(err, control.ErrNoAnswer) && !errors.Is(err, fs.ErrNotExist) && ctx.Err() == nil {
			m.log("%s: %v", m.name, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// booted reports whether the machine has ever booted a version.
func (m *machine) booted(version string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ran[version]
}

func (m *machine) view() (st updater.Status, seen bool, boots int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.status, m.seen, m.boots
}
