// Package machinetest runs whole machines for tests: namespaces on this host that boot its own userland with the real systemd, D-Bus and
// logind, in about two seconds. A Reboot through logind really ends everything and boots again; what is the boot loader's work, choosing a slot of a
// real disk image, the test does with package bootsim.
//
// It needs root, overlayfs and cgroup2, and an installed systemd and dbus; [Need] skips with a clear message where one of them is missing.
// A machine has a network of its own with nothing in it but what [Machine.Forward] puts there, and everything that it writes is gone when the test ends.
package machinetest

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed machine.sh
var script []byte

// Need skips the test where machines cannot be run.
func Need(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("machines in namespaces need root")
	}
	for _, tool := range []string{"unshare", "nsenter", "setpriv", "dbus-daemon", "bash"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("machines in namespaces need %s", tool)
		}
	}
	if _, err := os.Stat("/lib/systemd/systemd-logind"); err != nil {
		t.Skip("machines in namespaces boot this host's systemd, and it has none")
	}
	// What machine.sh does, as far as it can be forbidden, with /bin/true in the place of systemd.
	probe := `set -e; d=$(mktemp -d); trap 'umount -l $d; rmdir $d' EXIT; mount -t tmpfs tmpfs $d; mkdir $d/u $d/w $d/m $d/c; mount -t cgroup2 cgroup2 $d/c; mkdir $d/c/flipside-probe; rmdir $d/c/flipside-probe
unshare -m -p -f -u -i -n -C --kill-child bash -ec "mount -t overlay -o lowerdir=/,upperdir=$d/u,workdir=$d/w overlay $d/m; cd $d/m
mount -t proc proc proc; mount -t sysfs -o ro sysfs sys; mount -t cgroup2 cgroup2 sys/fs/cgroup; mount -t tmpfs tmpfs dev; mknod -m 666 dev/null c 1 3; echo >dev/null; chroot . /bin/true"`
	if out, err := exec.Command("unshare", "-m", "--propagation", "private", "bash", "-c", probe).CombinedOutput(); err != nil {
		t.Skipf("this kernel, or what this test runs in, forbids machines in namespaces: %v: %s", err, bytes.TrimSpace(out))
	}
}

// Slot is what the boot loader found.
type Slot struct {
	Label   string
	Version string
	Config  string // further lines of the configuration that the slot's /usr carries
}

// Machine is one machine. Make it with [New].
type Machine struct {
	Name string
	// Share is the machine's state partition, /var/lib/flipside, which both slots see.
	Share string

	t        testing.TB
	dir      string
	load     func() (Slot, error)
	forwards map[int]string
	cmd      *exec.Cmd
	stdin    io.WriteCloser
	done     chan struct{}

	mu      sync.Mutex
	pid     int // of its init; 0 while it is down
	boots   []Slot
	exit    string // how it ended
	changed chan struct{}
}

// New makes a machine and lets it boot; load is its boot loader, asked before each boot. forwards are ports of the machine's loopback address,
// and the addresses out here that they lead to. The machine is gone when the test ends.
func New(t testing.TB, name string, forwards map[int]string, prepare func(share string), load func() (Slot, error)) *Machine {
	t.Helper()
	m := &Machine{Name: name, t: t, dir: t.TempDir(), load: load, forwards: forwards, done: make(chan struct{}), changed: make(chan struct{})}
	m.Share = filepath.Join(m.dir, "share")
	for _, d := range []string{m.Share, filepath.Join(m.dir, "boot")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	prepare(m.Share)
	path := filepath.Join(m.dir, "machine.sh")
	if err := os.WriteFile(path, script, 0o700); err != nil {
		t.Fatal(err)
	}
	m.cmd = exec.Command("bash", path, name, m.dir)
	m.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	var err error
	if m.stdin, err = m.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := m.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := os.Create(filepath.Join(m.dir, "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer stderr.Close()
	m.cmd.Stderr = stderr
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go m.follow(stdout)
	t.Cleanup(m.stop)
	return m
}

// follow reads what the machine's script says.
func (m *Machine) follow(out io.Reader) {
	defer close(m.done)
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		verb, arg, _ := strings.Cut(lines.Text(), " ")
		m.mu.Lock()
		switch verb {
		case "LOAD":
			slot, err := m.load()
			if err == nil {
				err = m.stage(slot)
			}
			if err != nil {
				m.exit = "the boot loader: " + err.Error()
				m.stdin.Close()
				break
			}
			m.boots = append(m.boots, slot)
			io.WriteString(m.stdin, "go\n")
		case "INIT":
			fmt.Sscan(arg, &m.pid)
			if err := m.connect(m.pid); err != nil {
				m.exit = "the network: " + err.Error()
			}
		case "EXIT":
			m.pid, m.exit = 0, arg
		}
		close(m.changed)
		m.changed = make(chan struct{})
		m.mu.Unlock()
	}
	m.cmd.Wait()
}

// stage leaves what the slot holds where the machine finds it.
func (m *Machine) stage(s Slot) error {
	text := fmt.Sprintf("[slots]\nrunning = %q\n%s", s.Label, s.Config)
	return errors.Join(
		os.WriteFile(filepath.Join(m.dir, "boot", "os-release"), []byte("ID=flipside-test\nVERSION_ID="+s.Version+"\n"), 0o644),
		os.WriteFile(filepath.Join(m.dir, "boot", "slot.toml"), []byte(text), 0o644))
}

// connect listens in the machine's network.
func (m *Machine) connect(pid int) error {
	for port, to := range m.forwards {
		l, err := listenIn(pid, port)
		if err != nil {
			return err
		}
		go func() { // ends with the machine's network, whose last socket this is not: at the next boot there is another one
			defer l.Close()
			go func() {
				for ; ; time.Sleep(100 * time.Millisecond) {
					if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err != nil {
						l.Close()
						return
					}
				}
			}()
			for {
				in, err := l.Accept()
				if err != nil {
					return
				}
				go pipe(in, to)
			}
		}()
	}
	return nil
}

func pipe(in net.Conn, to string) {
	defer in.Close()
	out, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer out.Close()
	go func() {
		io.Copy(out, in)
		out.(*net.TCPConn).CloseWrite()
	}()
	io.Copy(in, out)
}

// listenIn listens on the loopback address of a process's network. The socket stays there; the thread comes back. (It must not end: a thread that
// ends takes with it what was started from it with a death signal.)
func listenIn(pid, port int) (net.Listener, error) {
	type result struct {
		l   net.Listener
		err error
	}
	ch := make(chan result)
	go func() {
		runtime.LockOSThread()
		ch <- func() (res result) {
			home, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				return result{nil, err}
			}
			defer home.Close()
			ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
			if err != nil {
				return result{nil, err}
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return result{nil, err}
			}
			defer func() {
				if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err != nil {
					res.err = err // and the thread stays locked
					return
				}
				runtime.UnlockOSThread()
			}()
			if err := loopbackUp(); err != nil {
				return result{nil, err}
			}
			l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
			return result{l, err}
		}()
	}()
	r := <-ch
	return r.l, r.err
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req)
}

// stop takes the machine away.
func (m *Machine) stop() {
	m.stdin.Close()
	m.mu.Lock()
	pid := m.pid
	m.mu.Unlock()
	if m.t.Failed() && pid != 0 {
		out, _ := m.Run("journalctl -b --no-pager -n 80 -o short-precise")
		m.t.Logf("%s: the end of its journal:\n%s", m.Name, out)
	}
	if pid != 0 {
		unix.Kill(pid, unix.SIGKILL)
	}
	select {
	case <-m.done:
	case <-time.After(20 * time.Second):
		unix.Kill(-m.cmd.Process.Pid, unix.SIGKILL)
		<-m.done
	}
	if m.t.Failed() {
		text, _ := os.ReadFile(filepath.Join(m.dir, "stderr"))
		m.t.Logf("%s: boots %+v, ended %q\n%s", m.Name, m.Boots(), m.exit, text)
	}
}

// Boots returns the slots that it has booted, in order.
func (m *Machine) Boots() []Slot {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]Slot(nil), m.boots...)
}

// Run runs a shell command in the machine as root and returns what it printed.
func (m *Machine) Run(command string) (string, error) {
	m.mu.Lock()
	pid := m.pid
	m.mu.Unlock()
	if pid == 0 {
		return "", errors.New("the machine is down")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	// nsenter must not wait for the command: it would stop itself when systemd stops everything to shut down, and the machine could not end.
	cmd := exec.CommandContext(ctx, "nsenter", "-F", "-t", fmt.Sprint(pid), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "sh", "-c", `sh -c "$1"; exit $?`, "sh", command)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s: %s: %w: %s", m.Name, command, err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

// Must is Run for what must succeed.
func (m *Machine) Must(command string) string {
	m.t.Helper()
	out, err := m.Run(command)
	if err != nil {
		m.t.Fatal(err)
	}
	return out
}

// Until waits until ok says so, and fails the test if that takes longer than any loaded machine would.
func (m *Machine) Until(what string, ok func() bool) {
	m.t.Helper()
	for start := time.Now(); !ok(); time.Sleep(200 * time.Millisecond) {
		m.mu.Lock()
		exit, pid := m.exit, m.pid
		m.mu.Unlock()
		if pid == 0 && exit != "" && exit != "129" {
			m.t.Fatalf("%s ended (%s) and %s was waited for", m.Name, exit, what)
		}
		if time.Since(start) > 4*time.Minute {
			m.t.Fatalf("%s: %s: not within four minutes", m.Name, what)
		}
	}
}

// Up waits until systemd has done what it does at boot.
func (m *Machine) Up() {
	m.t.Helper()
	m.Until("the boot", func() bool {
		out, _ := m.Run("systemctl is-system-running")
		state := strings.TrimSpace(out)
		return state == "running" || state == "degraded"
	})
}
