package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/partition/gptimage"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/control"
)

// What the daemon may cost the host that it keeps up to date.
const (
	maxBinary = 25 << 20 // bytes, stripped
	maxOwn    = 10 << 20 // bytes of resident memory that are its own, between two checks, of both its processes
	maxIdle   = 21 << 20 // bytes of all of it, with what the kernel maps around what is used of the program, now more, now less
)

// program makes the daemon as "make build" does.
func program(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "flipsided")
	cmd := exec.Command("go", "build", "-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w", "-o", bin, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return bin
}

// configure writes the configuration of a host whose server is away, with a semaphore and metrics: everything that the daemon can be asked to hold.
// running are the boot bits of the slot that it runs from.
func configure(t *testing.T, running uint64) (conf, socket, dir string) {
	t.Helper()
	dir = t.TempDir()
	disk := filepath.Join(dir, "disk.img")
	if err := gptimage.Create(disk, 512, "22222222-2222-4222-8222-222222222222", []gptimage.Partition{
		{Label: "USR-A", Type: gptimage.TypeUSR, UUID: "7130c94a-213a-4e5a-8e26-6cce9662f132", Size: 1 << 20, Attributes: running},
		{Label: "USR-B", Type: gptimage.TypeUSR, UUID: "e03dd35c-7c2d-4a47-b3fe-27f15780a57c", Size: 1 << 20},
	}); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"machine-id": strings.Repeat("ab", 16) + "\n", "boot_id": "b1\n", "os-release": "VERSION_ID=1.0.0\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and says nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	text := fmt.Sprintf(`
[update]
server = "http://%[2]s/v1/update/"
first_check = "1ms"
[slots]
disk = "%[1]s/disk.img"
running = "USR-A"
[reboot]
method = "exit"
[lock]
endpoints = ["http://%[2]s"]
[metrics]
textfile = "%[1]s/flipside.prom"
listen = "127.0.0.1:0"
[health]
units = []
watchdog = ""
[host]
os_release = "%[1]s/os-release"
machine_id = "%[1]s/machine-id"
boot_id = "%[1]s/boot_id"
[paths]
state = "%[1]s/state"
run = "%[1]s/run"
`, dir, l.Addr())
	conf = filepath.Join(dir, "flipside.toml")
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return conf, filepath.Join(dir, "run", "control.sock"), dir
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for start := time.Now(); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Since(start) > 60*time.Second {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

func status(socket string, ok func(updater.Status) bool) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	good := false
	control.Call(ctx, socket, control.Request{Method: "status"}, func(st updater.Status) bool { good = ok(st); return false })
	return good
}

// resident returns the anonymous resident memory of a process and all that it has started, and all of it: what is mapped from the file of the program
// is shared, and the kernel takes it back when it likes.
func resident(t *testing.T, pid int) (own, all int64) {
	t.Helper()
	for _, p := range family(t, pid) {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", p))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(data)) {
			f := strings.Fields(line)
			if len(f) < 2 {
				continue
			}
			n, _ := strconv.ParseInt(f[1], 10, 64)
			switch f[0] {
			case "Anonymous:":
				own += n << 10
			case "Pss:": // what several have is counted once
				all += n << 10
			}
		}
	}
	return own, all
}

// family is a process and its children, and theirs.
func family(t *testing.T, pid int) []int {
	t.Helper()
	list := []int{pid}
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(list); i++ {
		for _, path := range stats {
			data, err := os.ReadFile(path)
			if err != nil {
				continue // it has ended
			}
			// 4711 (name) S parent ...: a name may hold anything.
			f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
			if len(f) > 1 && f[1] == strconv.Itoa(list[i]) {
				child, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
				list = append(list, child)
			}
		}
	}
	return list
}

// listen has what a program says on its standard error kept in a file, so that it can be read while it runs.
func listen(t *testing.T, cmd *exec.Cmd) (said func() string) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	cmd.Stderr = f
	return func() string {
		data, err := os.ReadFile(f.Name())
		if err != nil {
			t.Error(err)
		}
		return string(data)
	}
}

// checkRights looks at what the kernel says of the agent's rights, and of those that the process keeps that starts writers, which has the agent as its only child.
func checkRights(t *testing.T, first int, said string) {
	t.Helper()
	field := func(pid int, name string) string {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(data)) {
			if f := strings.Fields(line); len(f) == 2 && f[0] == name+":" {
				return f[1]
			}
		}
		t.Fatalf("/proc/%d/status does not know %s", pid, name)
		return ""
	}
	if _, lacks, ok := strings.Cut(said, "keeps rights that it does not need"); ok {
		t.Logf("this machine confines less: %s", lacks)
		return
	}
	const sysAdmin, mknod = 1 << 21, 1 << 27
	for _, pid := range family(t, first) {
		caps, err := strconv.ParseUint(field(pid, "CapEff"), 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		seccomp := field(pid, "Seccomp")
		if pid != first {
			if seccomp != "2" || field(pid, "NoNewPrivs") != "1" || caps&(sysAdmin|mknod) != 0 {
				t.Errorf("the agent has seccomp %s, capabilities %x", seccomp, caps)
			}
			if somebody(t) != "" && (caps != 1<<unix.CAP_DAC_READ_SEARCH || uid(t, pid) == 0 || uid(t, first) != 0) {
				t.Errorf("the agent is user %d and has capabilities %x; what started it is user %d", uid(t, pid), caps, uid(t, first))
			}
		} else if os.Getuid() == 0 && caps != own(t) {
			t.Errorf("what starts writers has capabilities %x, want %x", caps, own(t))
		}
	}
}

// somebody is a user for the agent that every host has; "" where it cannot be had.
func somebody(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		return ""
	}
	if _, err := user.Lookup("daemon"); err != nil {
		t.Log(err)
		return ""
	}
	return "daemon"
}

// uid is the user that a process runs as.
func uid(t *testing.T, pid int) uint32 {
	t.Helper()
	info, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Uid
}

// own are the capabilities of this process.
func own(t *testing.T) uint64 {
	t.Helper()
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), "CapEff:\t")
	caps, err := strconv.ParseUint(rest[:16], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return caps
}

// The daemon is small, idles in little memory, reads its configuration again when it is told to, and ends when it is told to.
func TestTheProgram(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the daemon")
	}
	bin := program(t)
	info, err := os.Stat(bin)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the stripped binary has %.1f MiB", float64(info.Size())/(1<<20))
	if info.Size() > maxBinary {
		t.Errorf("the stripped binary has %d bytes, more than %d", info.Size(), maxBinary)
	}
	conf, socket, dir := configure(t, gptimage.Attributes(1, 0, true))
	cmd := exec.Command(bin, "-config", conf, "-user", somebody(t))
	said := listen(t, cmd)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer cmd.Process.Kill()
	until(t, "the first check fails", func() bool {
		return status(socket, func(st updater.Status) bool { return st.Schema != "" })
	})
	checkRights(t, cmd.Process.Pid, said())
	var mine, all int64
	for begun := time.Now(); ; time.Sleep(100 * time.Millisecond) { // what its start took is given back after some seconds, and what it had done for it has ended
		n := len(family(t, cmd.Process.Pid))
		if mine, all = resident(t, cmd.Process.Pid); mine <= maxOwn && all <= maxIdle && n == 2 {
			break
		}
		if time.Since(begun) > time.Minute {
			t.Fatalf("idle, the daemon has %d bytes resident, %d of them its own, in %d processes; want %d and %d at most, in 2: the agent, and what starts writers", all, mine, n, maxIdle, maxOwn)
		}
	}
	t.Logf("idle, the daemon has %.1f MiB resident, %.1f MiB of them its own", float64(all)/(1<<20), float64(mine)/(1<<20))

	// A mistake in the configuration changes nothing; a good one counts.
	good, err := os.ReadFile(conf)
	if err != nil {
		t.Fatal(err)
	}
	history := func(text string) func() bool {
		return func() bool {
			data, _ := os.ReadFile(filepath.Join(dir, "state", "history.log"))
			return bytes.Contains(data, []byte(text))
		}
	}
	started := func() int {
		data, _ := os.ReadFile(filepath.Join(dir, "state", "history.log"))
		return bytes.Count(data, []byte(`"kind":"started"`))
	}
	until(t, "the start is in the history", history(`"kind":"started"`))
	if err := os.WriteFile(conf, append([]byte("[oops]\n"), good...), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd.Process.Signal(syscall.SIGHUP)
	if err := os.WriteFile(conf+".good", good, 0o644); err != nil {
		t.Fatal(err)
	}
	until(t, "it says what is wrong with the bad configuration", func() bool { return strings.Contains(said(), `unknown key \"oops\"`) })
	if !status(socket, func(st updater.Status) bool { return st.Version == "1.0.0" }) {
		t.Errorf("after a bad configuration it does not answer:\n%s", said())
	}
	if err := os.Rename(conf+".good", conf); err != nil {
		t.Fatal(err)
	}
	cmd.Process.Signal(syscall.SIGHUP)
	asks := 0
	until(t, "it started anew with the good configuration", func() bool {
		for range 10 { // whoever asks on the way waits, and nobody finds it gone
			err := control.Call(t.Context(), socket, control.Request{Method: "status"}, func(st updater.Status) bool {
				if st.Version != "1.0.0" {
					t.Errorf("the status during a reload is that of version %q", st.Version)
				}
				return true
			})
			if err != nil {
				t.Fatalf("asked during a reload, %d times before: %v", asks, err)
			}
			asks++
		}
		return started() == 2
	})

	cmd.Process.Signal(os.Interrupt)
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("it ended with %v:\n%s", err, said())
		}
	case <-time.After(time.Minute):
		t.Fatal("it does not end")
	}
	if _, err := os.Stat(filepath.Join(dir, "flipside.prom")); err == nil {
		t.Error("the metrics of a daemon that does not run are still there")
	}
}

// A health check runs as whoever started flipsided, and can write to the daemon's own directories and not to the disk's image or to the keys.
func TestTheAgentIsConfined(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the daemon")
	}
	bin := program(t)
	conf, _, dir := configure(t, gptimage.Attributes(1, 1, false)) // on trial
	// Outside of the directories for temporary files, which are open to all.
	theirs, err := os.MkdirTemp("/var/lib", "flipside-test-")
	if err != nil {
		t.Skipf("no place outside of the directories for temporary files can be written to: %v", err)
	}
	defer os.RemoveAll(theirs)
	check := filepath.Join(dir, "health.d", "10-writes")
	wrote := filepath.Join(dir, "state", "said")
	script := fmt.Sprintf("#!/bin/sh\nexec > %s 2>/dev/null\n[ $(id -u) = %d ] || echo not $(id -u)\n(touch %s/new) && echo theirs\n(echo x > %s/pinned.pem) && echo keys\nexec > %s.done\n", wrote, os.Getuid(), theirs, theirs, wrote)
	text, err := os.ReadFile(conf)
	if err == nil {
		err = errors.Join(os.Mkdir(filepath.Dir(check), 0o755), os.WriteFile(check, []byte(script), 0o755), os.Mkdir(filepath.Join(dir, "state"), 0o700),
			os.WriteFile(filepath.Join(theirs, "pinned.pem"), []byte("the key"), 0o600),
			os.WriteFile(conf, bytes.Replace(text, []byte("[health]\n"), fmt.Appendf(nil, "[health]\ndir = %q\nsoak = \"0s\"\n", filepath.Dir(check)), 1), 0o644))
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "-config", conf, "-user", somebody(t))
	said := listen(t, cmd)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	until(t, "the health check has run", func() bool { _, err := os.Stat(wrote + ".done"); return err == nil })
	if strings.Contains(said(), "keeps rights that it does not need") {
		t.Skipf("this machine confines less: %s", said())
	}
	if out, err := os.ReadFile(wrote); err != nil || len(out) > 0 {
		t.Errorf("it could write: %q, %v", out, err)
	}
	if key, err := os.ReadFile(filepath.Join(theirs, "pinned.pem")); err != nil || string(key) != "the key" {
		t.Errorf("the key: %q, %v", key, err)
	}
}
