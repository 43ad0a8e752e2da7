package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/trust"
)

// A machine is a virtual machine with a disk. disk is what is surely on the disk; while the machine is on, QEMU writes to a copy and
// records what it writes, and the power cut decides how much of that is on the disk afterwards.
type machine struct {
	lab  *lab
	name string
	dir  string
	tpm  bool // it has one, which keeps its state over power cuts, and when the disk is replaced

	mu      sync.Mutex
	proc    *exec.Cmd
	done    chan struct{} // closed when QEMU has ended
	tpmDone chan struct{} // and when its TPM has
	status  updater.Status
	floor   trust.Level // of releases; only with a TPM
	reports int         // of status, since power-on
	console string      // the end of what the console said
	slots   int         // slots that the boot stage chose, since power-on
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }
func (m *machine) disk() string            { return m.path("disk.img") }

// on switches the machine on.
func (m *machine) on(ctx context.Context) (err error) {
	if err := copySparse(m.path("run.img"), m.disk()); err != nil {
		return fmt.Errorf("%s: preparing the disk: %w", m.name, err)
	}
	for _, f := range []string{"writes.log", "console", "status"} {
		if err := os.WriteFile(m.path(f), nil, 0o644); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.status, m.floor, m.reports, m.console, m.slots = updater.Status{}, trust.Level{}, 0, "", 0
	// The boot stage's kernel and initramfs are what a firmware would have found.
	accel := "tcg,tb-size=256" // MiB of translated code; the default grows over reboots
	if _, err := os.Stat("/dev/kvm"); err == nil {
		accel = "kvm"
	}
	var tpm []string
	if m.tpm {
		if tpm, err = m.startTPM(ctx); err != nil {
			return err
		}
	}
	m.proc = exec.CommandContext(ctx, "qemu-system-x86_64", append(tpm,
		"-name", m.name, "-M", "q35", "-accel", accel, "-cpu", "max", "-m", "512", "-smp", strconv.Itoa(m.lab.cores),
		"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none",
		"-kernel", m.lab.stage("stage.kernel"), "-initrd", m.lab.stage("stage.initrd"),
		"-append", "console=ttyS0 panic=-1 quiet flipside.watchdog=90",
		"-blockdev", "driver=blklogwrites,node-name=d,log-super-update-interval=1,file.driver=file,file.filename="+m.path("run.img")+",log.driver=file,log.filename="+m.path("writes.log"),
		"-device", "nvme,drive=d,serial=flipside",
		"-netdev", "user,id=n,restrict=off", "-device", "virtio-net-pci,netdev=n",
		"-serial", "file:"+m.path("console"), "-serial", "file:"+m.path("status"))...)
	m.proc.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var errs bytes.Buffer
	m.proc.Stderr = &errs
	if err := m.proc.Start(); err != nil {
		return fmt.Errorf("%s: %w", m.name, err)
	}
	m.done = make(chan struct{})
	m.lab.count.boots++
	m.lab.mark(m, "on", "")
	proc, done := m.proc, m.done
	watching, stop := context.WithCancel(ctx)
	var watchers sync.WaitGroup
	watchers.Go(func() { m.follow(watching, "console", m.hear) })
	watchers.Go(func() { m.follow(watching, "status", m.read) })
	go func() {
		defer close(done)
		err := proc.Wait()
		stop()
		watchers.Wait()
		if err != nil && errs.Len() > 0 {
			m.lab.say("%s: QEMU says: %s", m.name, strings.TrimSpace(errs.String()))
		}
	}()
	return nil
}

// startTPM starts the machine's TPM, an emulator that ends when QEMU does, and returns QEMU's arguments for it.
func (m *machine) startTPM(ctx context.Context) ([]string, error) {
	state := m.path("tpm")
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, err
	}
	// A socket's path may have no more than 107 bytes, and that of the machine may be longer.
	dir, err := os.MkdirTemp("", "flipside-tpm-")
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "socket")
	cmd := exec.CommandContext(ctx, "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+state, "--ctrl", "type=unixio,path="+socket, "--terminate")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: the TPM: %w", m.name, err), os.RemoveAll(dir))
	}
	m.tpmDone = make(chan struct{})
	go func() {
		defer close(m.tpmDone)
		cmd.Wait()
		os.RemoveAll(dir)
	}()
	for range 100 {
		if _, err := os.Stat(socket); err == nil {
			return []string{"-chardev", "socket,id=tpm,path=" + socket, "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-tis,tpmdev=tpm0"}, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	cmd.Process.Kill()
	<-m.tpmDone
	return nil, fmt.Errorf("%s: the TPM does not come up", m.name)
}

// follow hands on the lines of a file that grows.
func (m *machine) follow(ctx context.Context, name string, line func(string)) {
	f, err := os.Open(m.path(name))
	if err != nil {
		return
	}
	defer f.Close()
	all, err := os.OpenFile(m.path(name+".all"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return
	}
	defer all.Close()
	var rest []byte
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		if n > 0 {
			all.Write(buf[:n])
			rest = append(rest, buf[:n]...)
			for {
				i := bytes.IndexByte(rest, '\n')
				if i < 0 {
					break
				}
				line(strings.TrimRight(string(rest[:i]), "\r"))
				rest = rest[i+1:]
			}
			continue
		}
		if err != nil && !errors.Is(err, io.EOF) || ctx.Err() != nil {
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// hear takes a line of the console.
func (m *machine) hear(line string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.console = tail(m.console+line+"\n", 4000)
	if _, slot, ok := strings.Cut(line, "flipside-init: slot "); ok {
		m.slots++
		m.status, m.reports = updater.Status{}, 0 // what the system said before it rebooted
		label, _, _ := strings.Cut(slot, ",")
		m.lab.mark(m, "boot", label)
	}
	if strings.Contains(line, "Kernel panic") {
		m.lab.mark(m, "panic", "")
	}
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// read takes a line of the daemon's status.
func (m *machine) read(line string) {
	var level struct {
		Schema string       `json:"schema"`
		Floor  *trust.Level `json:"floor"`
	}
	if json.Unmarshal([]byte(line), &level) == nil && level.Schema == "flipside.trust-status/v1" {
		m.mu.Lock()
		defer m.mu.Unlock()
		if level.Floor != nil && *level.Floor != m.floor {
			m.floor = *level.Floor
			m.lab.mark(m, "floor", fmt.Sprintf("%d: TPM %d, file %d, running release %d", m.floor.Number, m.floor.TPM, m.floor.File, m.floor.Release))
		}
		return
	}
	var st updater.Status
	if json.Unmarshal([]byte(line), &st) != nil || st.Phase == "" {
		return // cut off by a reboot, or said before the engine had begun
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.reports == 0 || st.Phase != m.status.Phase || why(st) != why(m.status) {
		m.lab.mark(m, string(st.Phase), st.Version+": "+st.Why)
	}
	m.status = st
	m.reports++
}

// why is what a status says, less what changes all the time.
func why(st updater.Status) string {
	if st.Progress != nil {
		return st.Progress.Step
	}
	w, _, _ := strings.Cut(st.Why, "; next check")
	w, _, _ = strings.Cut(w, " (asked")
	return w
}

// view is what is known of a machine now.
type view struct {
	status updater.Status
	floor  trust.Level
	up     bool // the daemon has spoken since the last boot
	slots  int
}

func (m *machine) view() view {
	m.mu.Lock()
	defer m.mu.Unlock()
	return view{m.status, m.floor, m.reports > 0, m.slots}
}

// until waits for something to be so.
func (m *machine) until(ctx context.Context, limit time.Duration, what string, ok func(view) bool) error {
	deadline := time.Now().Add(time.Duration(float64(limit) * m.lab.slow))
	for {
		v := m.view()
		if ok(v) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-m.done:
			return fmt.Errorf("%s: QEMU ended while waiting until %s", m.name, what)
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			m.mu.Lock()
			console := tail(m.console, 800)
			m.mu.Unlock()
			return fmt.Errorf("%s: it did not happen within %.0f s that %s; the daemon's last word: %s %s: %s; the console's: %s",
				m.name, limit.Seconds()*m.lab.slow, what, v.status.Version, v.status.Phase, v.status.Why, console)
		}
	}
}

// cut cuts the power. What was not flushed may be lost.
func (m *machine) cut() error {
	m.lab.count.cuts++
	lost, err := m.off(true)
	if err != nil {
		return err
	}
	m.lab.mark(m, "cut", lost.String())
	return nil
}

// off ends QEMU and brings the disk to where it is then.
func (m *machine) off(lossy bool) (loss, error) {
	m.mu.Lock()
	proc, done := m.proc, m.done
	m.proc = nil
	m.mu.Unlock()
	if proc == nil {
		return loss{}, nil
	}
	proc.Process.Kill()
	<-done
	if m.tpm {
		<-m.tpmDone
	}
	random := m.lab.random
	if !lossy {
		random = nil
	}
	lost, err := replay(m.disk(), m.path("writes.log"), random)
	return lost, errors.Join(err, os.Remove(m.path("run.img")), os.Remove(m.path("writes.log")))
}
