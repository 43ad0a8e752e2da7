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
	"strings"
	"sync"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
	"github.com/flipside-linux/flipside/omaha/server"
)

// lab is the world around the machines: the release server, an etcd, and the releases.
type lab struct {
	images, out string
	jobs        int // machines that lose power side by side
	cuts        int
	slow        float64
	kvm         bool
	seed        uint64
	releases    []*release

	server    *server.Server
	semaphore *lock.Keeper
	etcd      string
	closers   []func()

	mu       sync.Mutex
	machines []*machine
	count    struct{ cuts, boots, lost int }
	fell     map[stage]int // power cuts, by what the machine was seen to be doing
	lasted   map[stage]time.Duration
	start    time.Time
	events   []event
	parts    []part
}

// event is something that happened to a machine, for the report's time line.
type event struct {
	at                  time.Duration
	machine, what, text string
}

// part is a scenario as it went.
type part struct {
	name     string
	from, to time.Duration
	err      error
}

// newLab starts the servers and looks at the releases.
func newLab(ctx context.Context, images, out string) (*lab, error) {
	l := &lab{images: images, out: out, jobs: 1, fell: map[stage]int{}, lasted: map[stage]time.Duration{}, start: time.Now()}
	if err := l.readReleases(); err != nil {
		return nil, err
	}
	l.kvm = hasKVM()
	ok := false
	defer func() {
		if !ok {
			l.close()
		}
	}()
	work, err := os.MkdirTemp(out, "servers-")
	if err != nil {
		return nil, err
	}
	l.closers = append(l.closers, func() { os.RemoveAll(work) })
	endpoint, stop, err := etcdtest.StartEmbedded(filepath.Join(work, "etcd"))
	if err != nil {
		return nil, err
	}
	l.closers = append(l.closers, stop)
	client, err := etcd.New(etcd.Config{Endpoints: []string{endpoint}})
	if err != nil {
		return nil, err
	}
	l.closers = append(l.closers, func() { client.Close() })
	l.semaphore = client
	// QEMU's user network has this machine's loopback interface at 10.0.2.2.
	l.etcd = strings.Replace(endpoint, "127.0.0.1", "10.0.2.2", 1)
	if l.server, err = server.New(filepath.Join(work, "releases"), server.Options{}); err != nil {
		return nil, err
	}
	l.closers = append(l.closers, func() { l.server.Close() })
	ok = true
	return l, nil
}

// hasKVM reports whether the processor runs machines. There are hosts with /dev/kvm whose processor does not: what is there then starts no firmware.
func hasKVM() bool {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	f.Close()
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return false
	}
	return slices.ContainsFunc(strings.Fields(string(cpu)), func(flag string) bool { return flag == "vmx" || flag == "svm" })
}

func (l *lab) close() {
	l.reset()
	for i := len(l.closers) - 1; i >= 0; i-- {
		l.closers[i]()
	}
}

// reset switches every machine off and forgets it.
func (l *lab) reset() {
	l.mu.Lock()
	machines := l.machines
	l.machines = nil
	l.mu.Unlock()
	for _, m := range machines {
		m.close()
	}
}

func (l *lab) file(name string) string { return filepath.Join(l.images, "base", name) }

// publish makes a release the newest on the channel of a scenario: machines of another scenario see nothing of it.
func (l *lab) publish(ctx context.Context, channel string, r *release) error {
	_, err := l.server.Publish(ctx, channel, r.version, r.payload)
	return err
}

// machine makes a machine whose disk is that of the first release, as an installer would leave it.
func (l *lab) machine(ctx context.Context, name, channel string, bls bool) (*machine, error) {
	m := &machine{bls: bls, lab: l, name: name, dir: filepath.Join(l.out, name), watchdog: 600}
	if err := errors.Join(os.RemoveAll(m.dir), os.MkdirAll(m.dir, 0o755)); err != nil {
		return nil, err
	}
	if err := m.openDoor(); err != nil {
		return nil, err
	}
	if err := m.install(ctx, channel); err != nil {
		m.close()
		return nil, fmt.Errorf("installing %s: %w", name, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.machines = append(l.machines, m)
	return m, nil
}

// install makes the disk and writes the host's own configuration to its root file system.
func (m *machine) install(ctx context.Context, channel string) error {
	from := m.lab.file("disk.img")
	if m.bls {
		from = filepath.Join(m.lab.images, "bls", "disk.img")
		if err := copySparse(m.path("vars.fd"), ovmfVars); err != nil {
			return fmt.Errorf("the firmware (Debian's ovmf): %w", err)
		}
	}
	if err := copySparse(m.disk(), from); err != nil {
		return err
	}
	root, err := rootOffset(m.disk())
	if err != nil {
		return err
	}
	conf := fmt.Sprintf(hostConfig, m.url, channel, m.lab.etcd, "vm-"+channel, m.name)
	if !m.bls { // otherwise the image brings it
		conf += "\n[slots]\nkernels = \"/boot/flipside\"\n"
	}
	for name, text := range map[string]string{"/etc/flipside/flipside.toml": conf, "/etc/hostname": m.name + "\n", "/etc/machine-id": machineID(m.name) + "\n"} {
		tmp := m.path("install")
		if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
			return err
		}
		script := fmt.Sprintf("rm %[1]s\nwrite %[2]s %[1]s\n", name, tmp)
		cmd := exec.CommandContext(ctx, "debugfs", "-w", "-f", "-", fmt.Sprintf("%s?offset=%d", m.disk(), root))
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("writing %s with debugfs: %w: %s", name, err, out)
		}
		// debugfs ends with success whatever happens.
		back, err := exec.CommandContext(ctx, "debugfs", "-R", "cat "+name, fmt.Sprintf("%s?offset=%d", m.disk(), root)).Output()
		if err != nil || string(back) != text {
			return fmt.Errorf("writing %s with debugfs: it holds %q afterwards (%v)", name, back, err)
		}
		os.Remove(tmp)
	}
	return nil
}

// hostConfig is an ordinary configuration with short times.
const hostConfig = `[update]
server      = %q
app         = "io.flipside.vm"
channel     = %q
partition   = "usr"
first_check = "1s"
interval    = "5s"
retry       = "2s"

[reboot]
gate_retry = "2s"

[lock]
endpoints = [%q]
group     = %q

[health]
dir     = "/usr/lib/flipside/health.d"
timeout = "60s"
soak    = "2s"

[host]
alias = %q
`

func (l *lab) say(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fmt.Fprintf(os.Stdout, "%7.1fs  %s\n", time.Since(l.start).Seconds(), fmt.Sprintf(format, args...))
}

// mark puts something on a machine's time line, and tells it.
func (l *lab) mark(m *machine, what, text string) {
	l.mu.Lock()
	l.events = append(l.events, event{time.Since(l.start), m.name, what, text})
	l.mu.Unlock()
	l.say("%-8s %-9s %s", m.name, what, text)
}

func (l *lab) chapter(name string) {
	l.mu.Lock()
	l.parts = append(l.parts, part{name: name, from: time.Since(l.start)})
	l.mu.Unlock()
	io.WriteString(os.Stdout, "\n"+stories[name]+"\n")
}

func (l *lab) endChapter(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &l.parts[len(l.parts)-1]
	p.to, p.err = time.Since(l.start), err
}

// booted counts a machine that is switched on.
func (l *lab) booted() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count.boots++
}

// lose counts a host that does not come back.
func (l *lab) lose() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count.lost++
}
