package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/control"
	"github.com/flipside-linux/flipside/updater/trust"
)

// A machine is a virtual machine with a disk. disk is what is surely on the disk; while the machine is on, QEMU writes to a copy and
// records what it writes, and the power cut decides how much of that is on the disk afterwards.
type machine struct {
	lab  *lab
	name string
	dir  string
	tpm  bool   // it has one, which keeps its state over power cuts, and when the disk is replaced
	bls  bool   // its boot loader is systemd-boot under a UEFI firmware, and not the boot stage
	url  string // of the release server, as this machine sees it

	random *rand.Rand // decides when its power is cut, and what that loses
	door   *door

	watchdog int // seconds until it restarts when it hangs; software emulation on a busy machine is slow

	mu      sync.Mutex
	proc    *exec.Cmd
	done    chan struct{} // closed when QEMU has ended
	tpmDone chan struct{} // and when its TPM has
	status  updater.Status
	floor   trust.Level // of releases; only with a TPM
	reports int         // of status, since power-on
	console string      // the end of what the console said
	at      progress
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
	parts, err := spans(m.disk())
	if err != nil {
		return fmt.Errorf("%s: %w", m.name, err)
	}
	record, err := os.Open(m.path("writes.log"))
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			record.Close()
		}
	}()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.status, m.floor, m.reports, m.console, m.at = updater.Status{}, trust.Level{}, 0, "", progress{bls: m.bls, tape: &tape{spans: parts, log: record}}
	// The boot stage's kernel and initramfs are what a firmware would have found.
	// MiB of translated code; the default grows over reboots. While it is busy the machine's clock goes by the instructions that it has executed, two
	// nanoseconds each: on a busy host it is slow, and does not know it, so that none of its own time limits ends.
	accel := []string{"-accel", "tcg,tb-size=256", "-icount", "shift=1"}
	if m.lab.kvm {
		accel = []string{"-accel", "kvm"}
	}
	var tpm []string
	if m.tpm {
		if tpm, err = m.startTPM(ctx); err != nil {
			return err
		}
	}
	boot := []string{
		"-kernel", m.lab.file("stage.kernel"), "-initrd", m.lab.file("stage.initrd"),
		"-append", "console=ttyS0 panic=-1 quiet no_timer_check cryptomgr.notests nvme.io_queue_depth=2 flipside.watchdog=" + strconv.Itoa(m.watchdog),
	}
	disk := "nvme,drive=d,serial=flipside"
	if m.bls {
		disk += ",bootindex=0"
		boot = []string{"-drive", "if=pflash,format=raw,readonly=on,file=" + ovmfCode, "-drive", "if=pflash,format=raw,file=" + m.path("vars.fd")}
	}
	m.proc = exec.CommandContext(ctx, "qemu-system-x86_64", slices.Concat(tpm, accel, boot, []string{
		"-name", m.name, "-M", "q35", "-cpu", "max", "-m", "512", "-smp", "1",
		"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none",
		// A flush is recorded, and this machine's own disk need not be waited for.
		"-blockdev", "driver=blklogwrites,node-name=d,log-super-update-interval=1,file.driver=file,file.cache.no-flush=on,file.filename=" + m.path("run.img") +
			",log.driver=file,log.cache.no-flush=on,log.filename=" + m.path("writes.log"),
		"-device", disk,
		"-netdev", "user,id=n,restrict=off", "-device", "virtio-net-pci,netdev=n",
		"-serial", "file:" + m.path("console"), "-serial", "file:" + m.path("status")})...)
	m.proc.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var errs bytes.Buffer
	m.proc.Stderr = &errs
	if err := m.proc.Start(); err != nil {
		return fmt.Errorf("%s: %w", m.name, err)
	}
	m.done = make(chan struct{})
	m.lab.booted()
	m.lab.mark(m, "on", "")
	proc, done := m.proc, m.done
	watching, stop := context.WithCancel(ctx)
	var watchers sync.WaitGroup
	watchers.Go(func() { m.follow(watching, "console", m.hear) })
	watchers.Go(func() { m.follow(watching, "status", m.read) })
	watchers.Go(func() { m.followTape(watching) })
	go func() {
		defer close(done)
		err := proc.Wait()
		stop()
		watchers.Wait()
		record.Close()
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
	_, slot, chosen := strings.Cut(line, "flipside-init: slot ")
	switch {
	case chosen:
		label, _, _ := strings.Cut(slot, ",")
		m.lab.mark(m, "boot", label)
	case strings.Contains(line, "reboot: Restarting system"), strings.Contains(line, "Kernel panic"):
		if strings.Contains(line, "Kernel panic") {
			m.lab.mark(m, "panic", "")
		}
		m.status, m.reports = updater.Status{}, 0 // what the system said before it rebooted
		m.at = progress{tape: m.at.tape, bls: m.bls, restarts: m.at.restarts + 1, reset: m.at.tape.length()}
	case strings.Contains(line, "flipside-init: /usr is"):
		m.at.system, m.at.systemAt = true, m.at.tape.length()
		if m.bls {
			_, device, _ := strings.Cut(line, "/usr is ")
			m.lab.mark(m, "boot", device)
		}
	}
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// read takes a line of the daemon's status.
func (m *machine) read(line string) {
	if i := strings.IndexByte(line, '{'); i > 0 {
		line = line[i:] // a firmware writes to every port
	}
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
	var said control.Reply
	if json.Unmarshal([]byte(line), &said) != nil || said.Status == nil || said.Status.Phase == "" {
		return // cut off by a reboot, or said before the engine had begun
	}
	st := *said.Status
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.reports == 0 || st.Phase != m.status.Phase || why(st) != why(m.status) {
		m.lab.mark(m, string(st.Phase), st.Version+": "+st.Why)
	}
	m.at.see(st)
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
	stage  stage
	resets int  // since power-on
	trial  bool // it boots a release that is new to it
	// the stage has begun to change what boots next
	changes bool
}

func (m *machine) view() view {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.stageNow()
	return view{m.status, m.floor, m.reports > 0, s, m.at.restarts, m.at.restarts > 0 || m.at.trial, m.at.firstOf(s) >= 0}
}

// until waits for something to be so. The limit is for a machine that has its cores to itself: as long as QEMU did not get that much of the processor, it
// waits on, up to ten times the limit.
func (m *machine) until(ctx context.Context, limit time.Duration, what string, ok func(view) bool) error {
	limit = time.Duration(float64(limit) * m.lab.slow)
	began, used := time.Now(), m.used()
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
		if took := time.Since(began); took > limit && (m.used()-used > limit || took > 10*limit) {
			m.mu.Lock()
			console := tail(m.console, 800)
			m.mu.Unlock()
			return fmt.Errorf("%s: it did not happen within %.0f s that %s; the daemon's last word: %s %s: %s; the console's: %s",
				m.name, took.Seconds(), what, v.status.Version, v.status.Phase, v.status.Why, console)
		}
	}
}

// used is how long QEMU has had a processor.
func (m *machine) used() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.proc == nil {
		return 0
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", m.proc.Process.Pid))
	if err != nil {
		return 0
	}
	const user, system, tick = 11, 12, 10 * time.Millisecond // proc(5), counted after the name
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) <= system {
		return 0
	}
	u, _ := strconv.ParseInt(fields[user], 10, 64)
	s, _ := strconv.ParseInt(fields[system], 10, 64)
	return time.Duration(u+s) * tick
}

// off ends QEMU and brings the disk to where it is then: where every write is on it.
func (m *machine) off() error {
	if !m.end() {
		return nil
	}
	_, err := replay(m.disk(), m.path("writes.log"), -1, nil)
	return errors.Join(err, os.Remove(m.path("run.img")), os.Remove(m.path("writes.log")))
}

// end ends QEMU, and reports whether it ran.
func (m *machine) end() bool {
	m.mu.Lock()
	proc, done := m.proc, m.done
	m.proc = nil
	m.mu.Unlock()
	if proc == nil {
		return false
	}
	proc.Process.Kill()
	<-done
	if m.tpm {
		<-m.tpmDone
	}
	return true
}

// close switches the machine off for good.
func (m *machine) close() {
	m.off()
	m.door.close()
}
