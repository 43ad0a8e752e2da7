package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	releases "github.com/flipside-linux/flipside/omaha/server"
	"github.com/flipside-linux/flipside/partition/bootsim"
	"github.com/flipside-linux/flipside/partition/gptimage"
	"github.com/flipside-linux/flipside/payload/build"
	"github.com/flipside-linux/flipside/payload/keytest"
	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
)

// calls are the system calls that change files and disks. strace counts them for each thread by itself.
const calls = "pwrite64,fsync,fdatasync,ftruncate,renameat,renameat2,unlinkat"

const killImage = 512 << 10

// shipped is a host on a disk image, run by the programs that are shipped.
type shipped struct {
	t        *testing.T
	dir      string
	bin      string
	disk     string
	fresh    []byte // the image at the beginning
	starts   map[string]int64
	releases map[string][]byte
	kernels  map[string][]byte
}

func long() bool { return os.Getenv("FLIPSIDE_LONG") != "" }

// newShipped builds the programs and makes the image. It skips the test where the tools of other projects are missing.
func newShipped(t *testing.T) *shipped {
	t.Helper()
	if testing.Short() {
		t.Skip("builds the programs and runs them many times")
	}
	for tool, pkg := range map[string]string{"strace": "strace", "sgdisk": "gdisk", "sfdisk": "fdisk", "cgpt": "cgpt"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed (package %s)", tool, pkg)
		}
	}
	if out, err := exec.Command("strace", "-o", "/dev/null", "true").CombinedOutput(); err != nil {
		t.Skipf("strace cannot trace here: %v: %s", err, out)
	}
	s := &shipped{t: t, dir: t.TempDir(), starts: map[string]int64{}, releases: map[string][]byte{}, kernels: map[string][]byte{}}
	s.bin, s.disk = filepath.Join(s.dir, "bin"), filepath.Join(s.dir, "disk.img")
	if out, err := exec.Command("go", "build", "-tags", "grpcnotrace", "-o", s.bin+"/", "github.com/flipside-linux/flipside/cmd/flipsided", "github.com/flipside-linux/flipside/cmd/flipside").CombinedOutput(); err != nil {
		t.Fatalf("building the programs: %v\n%s", err, out)
	}
	parts := []gptimage.Partition{
		{Label: "EFI-SYSTEM", Type: gptimage.TypeEFI, UUID: "11111111-1111-4111-8111-111111111111", Size: 1 << 20},
		{Label: "USR-A", Type: gptimage.TypeUSR, UUID: "7130c94a-213a-4e5a-8e26-6cce9662f132", Size: 1 << 20, Attributes: gptimage.Attributes(1, 0, true)},
		{Label: "USR-B", Type: gptimage.TypeUSR, UUID: "e03dd35c-7c2d-4a47-b3fe-27f15780a57c", Size: 1 << 20},
	}
	if err := gptimage.Create(s.disk, 512, "22222222-2222-4222-8222-222222222222", parts); err != nil {
		t.Fatal(err)
	}
	for _, v := range []string{"1.0.0", "2.0.0"} {
		seed := sha256.Sum256([]byte(v))
		noise := mathrand.NewChaCha8(seed)
		s.releases[v], s.kernels[v] = make([]byte, killImage), make([]byte, 16<<10)
		noise.Read(s.releases[v])
		noise.Read(s.kernels[v])
	}
	var err error
	if s.fresh, err = os.ReadFile(s.disk); err != nil {
		t.Fatal(err)
	}
	for _, p := range parts {
		s.starts[p.Label] = p.Start
	}
	copy(s.fresh[s.starts["USR-A"]:], s.releases["1.0.0"])
	return s
}

func (s *shipped) write(name string, data []byte) {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o600)); err != nil {
		s.t.Fatal(err)
	}
}

// reset puts everything back to the beginning.
func (s *shipped) reset() {
	s.t.Helper()
	for _, dir := range []string{"state", "run", "boot"} {
		if err := os.RemoveAll(filepath.Join(s.dir, dir)); err != nil {
			s.t.Fatal(err)
		}
	}
	s.write("disk.img", s.fresh)
	s.write("boot/vmlinuz-a", s.kernels["1.0.0"])
}

// run runs a program, killed at the nth of its calls in some thread if n is not 0, and returns its exit status, -1 if it was killed.
func (s *shipped) run(n int, args ...string) (status int, output string) {
	s.t.Helper()
	return s.traced(calls, n, args...)
}

// traced is run with the calls that count.
func (s *shipped) traced(calls string, n int, args ...string) (status int, output string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*time.Minute)
	defer cancel()
	args[0] = filepath.Join(s.bin, args[0])
	log := filepath.Join(s.dir, "strace.log")
	os.Remove(log)
	if n > 0 {
		args = append([]string{"strace", "-f", "-o", log, "-e", "trace=" + calls, "-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", calls, n)}, args...)
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	// On one processor most calls are made by one thread, and strace counts for each.
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Start()
	if err == nil {
		ended := make(chan struct{})
		if n > 0 {
			go killTheRest(cmd.Process.Pid, log, ended)
		}
		err = cmd.Wait()
		close(ended)
	}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		s.t.Fatalf("%q does not end\n%s", args, out.String())
	case errors.As(err, &exit):
		return exit.ExitCode(), out.String()
	case err != nil:
		s.t.Fatal(err)
	}
	return 0, out.String()
}

// killTheRest kills what runs under a strace once one of its processes was killed: power is cut for the whole daemon, not for one part of it.
func killTheRest(strace int, log string, ended <-chan struct{}) {
	for {
		select {
		case <-ended:
			return
		case <-time.After(2 * time.Millisecond):
		}
		if data, err := os.ReadFile(log); err != nil || !bytes.Contains(data, []byte("+++ killed by SIGKILL +++")) {
			continue
		}
		// strace goes on until all that it traces has ended: the other parts do by themselves when the agent is gone.
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", strace, strace))
		for _, f := range strings.Fields(string(children)) {
			if pid, err := strconv.Atoi(f); err == nil {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
}

func (s *shipped) slot(label string) []byte {
	s.t.Helper()
	f, err := os.Open(s.disk)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, killImage)
	if _, err := f.ReadAt(b, s.starts[label]); err != nil {
		s.t.Fatal(err)
	}
	return b
}

// check looks at what is left with the programs of other projects, and with the boot loader's rule: before the repair there is a table that each of them reads, and a
// slot that boots and is complete with its kernel; after it nothing is wrong.
func (s *shipped) check(where string) {
	s.t.Helper()
	tool := func(name string, args ...string) string {
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			s.t.Errorf("%s: %s: %v\n%s", where, name, err, out)
		}
		return string(out)
	}
	for range 2 {
		if out := tool("sfdisk", "--json", s.disk); !strings.Contains(out, `"USR-B"`) {
			s.t.Errorf("%s: sfdisk reads no table: %s", where, out)
		}
		if out := tool("cgpt", "show", s.disk); !strings.Contains(out, "USR-B") {
			s.t.Errorf("%s: cgpt reads no table: %s", where, out)
		}
		// On a copy: the boot spends a try.
		image, err := os.ReadFile(s.disk)
		if err != nil {
			s.t.Fatal(err)
		}
		s.write("copy.img", image)
		slot, err := bootsim.BootFile(filepath.Join(s.dir, "copy.img"))
		if err != nil {
			s.t.Fatalf("%s: %v", where, err)
		}
		version := map[string]string{"USR-A": "1.0.0", "USR-B": "2.0.0"}[slot.Label]
		kernel, err := os.ReadFile(filepath.Join(s.dir, "boot", map[string]string{"USR-A": "vmlinuz-a", "USR-B": "vmlinuz-b"}[slot.Label]))
		if err != nil || !bytes.Equal(kernel, s.kernels[version]) || !bytes.Equal(s.slot(slot.Label), s.releases[version]) {
			s.t.Errorf("%s: %s boots and is not complete (kernel: %v)", where, slot.Label, err)
		}
		if !bytes.Equal(s.slot("USR-A"), s.releases["1.0.0"]) {
			s.t.Errorf("%s: the running slot was changed", where)
		}
		if status, out := s.run(0, "flipside", "slots", "repair", "--disk", s.disk, "--yes"); status != 0 && status != 3 {
			s.t.Errorf("%s: the repair: exit status %d\n%s", where, status, out)
		}
	}
	if out := tool("sgdisk", "-v", s.disk); !strings.Contains(out, "No problems found") {
		s.t.Errorf("%s: sgdisk: %s", where, out)
	}
	if out := tool("sfdisk", "--verify", s.disk); !strings.Contains(out, "No errors detected") {
		s.t.Errorf("%s: sfdisk: %s", where, out)
	}
	if out := tool("cgpt", "show", s.disk); strings.Contains(out, "INVALID") {
		s.t.Errorf("%s: cgpt: %s", where, out)
	}
}

// everyNth returns 1, 2, 3 and so on, or some of them where there is no time for all.
func everyNth(yield func(int) bool) {
	for n := 1; yield(n); n++ {
		if !long() {
			n += n - 1
		}
	}
}

// TestKilledAtEveryWrite kills the daemon at its nth write, flush or rename, for every n, looks at what is left, and starts it again: the update must go
// through.
func TestKilledAtEveryWrite(t *testing.T) {
	s := newShipped(t)
	key := keytest.Pinned(t, filepath.Join(s.dir, "key.pem"))
	s.write("machine-id", []byte(strings.Repeat("ab", 16)+"\n"))
	s.write("boot_id", []byte("boot-1\n"))
	s.write("os-release", []byte("VERSION_ID=1.0.0\n"))
	var b bytes.Buffer
	image := func(name string, data []byte) build.Image {
		return build.Image{Name: name, Data: bytes.NewReader(data), Size: int64(len(data))}
	}
	if _, err := build.Full(t.Context(), &b, build.Spec{
		Images: []build.Image{image("usr", s.releases["2.0.0"]), image("kernel", s.kernels["2.0.0"])}, Keys: []crypto.Signer{key}, TempDir: s.dir,
	}); err != nil {
		t.Fatal(err)
	}
	s.write("2.0.0.payload", b.Bytes())
	server, err := releases.New(filepath.Join(s.dir, "releases"), releases.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if _, err := server.Publish(t.Context(), "stable", "2.0.0", filepath.Join(s.dir, "2.0.0.payload")); err != nil {
		t.Fatal(err)
	}
	web := httptest.NewServer(server)
	defer web.Close()
	s.write("flipside.toml", fmt.Appendf(nil, `
[update]
server = %q
app = "test"
keys = [%q]
first_check = "1ms"
interval = "1h"
retry = "20ms"
[slots]
disk = %q
running = "USR-A"
kernels = %q
[reboot]
method = "exit"
[health]
dir = ""
soak = "0s"
[host]
os_release = %q
machine_id = %q
boot_id = %q
[paths]
state = %q
run = %q
`, web.URL+"/v1/update/", s.dir+"/key.pem", s.disk, s.dir+"/boot", s.dir+"/os-release", s.dir+"/machine-id", s.dir+"/boot_id", s.dir+"/state", s.dir+"/run"))

	kills := 0
	sets := []string{calls}
	if long() {
		sets = append(sets, strings.Split(calls, ",")...)
	}
	for _, set := range sets {
		for n := range everyNth {
			if !s.killDaemon(set, n) {
				break
			}
			kills++
			if t.Failed() {
				t.FailNow()
			}
		}
	}
	if kills < 4 {
		t.Errorf("killed only %d times", kills)
	}
	t.Logf("killed at %d calls", kills)
}

// killDaemon runs an update from the beginning, kills the daemon at the nth of some calls, looks at what is left, and lets another daemon go on. It reports
// whether there was an nth call.
func (s *shipped) killDaemon(calls string, n int) bool {
	t := s.t
	t.Helper()
	s.reset()
	where := fmt.Sprintf("killed at call %d of %s", n, calls)
	status, out := s.traced(calls, n, "flipsided", "-config", s.dir+"/flipside.toml")
	if status == reboot.ExitStatus {
		return false
	}
	if status != -1 && status != 137 {
		t.Fatalf("%s: exit status %d\n%s", where, status, out)
	}
	s.check(where)
	if st, err := (updater.Store{Path: filepath.Join(s.dir, "state", "state.json")}).Load(); err != nil || st.Phase == "" {
		t.Errorf("%s: the state: %v", where, err)
	}
	if status, out = s.run(0, "flipsided", "-config", s.dir+"/flipside.toml"); status != reboot.ExitStatus {
		t.Fatalf("%s: started again, it ends with status %d\n%s", where, status, out)
	}
	if slot, err := bootsim.BootFile(s.disk); err != nil || slot.Label != "USR-B" {
		t.Errorf("%s: after the update %s boots, %v", where, slot.Label, err)
	}
	s.check(where + ", and updated")
	return true
}

// TestCommandKilledAtEveryWrite does the same with the commands that change boot bits.
func TestCommandKilledAtEveryWrite(t *testing.T) {
	s := newShipped(t)
	s.write("disk.img", s.fresh)
	sum := sha256.Sum256(s.releases["2.0.0"])
	f, err := os.OpenFile(s.disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(s.releases["2.0.0"], s.starts["USR-B"]); err != nil {
		t.Fatal(err)
	}
	f.Close()
	ready, err := os.ReadFile(s.disk)
	if err != nil {
		t.Fatal(err)
	}
	armed := s.after(ready, "activate", "USR-B", "--size", fmt.Sprint(killImage), "--sha256", fmt.Sprintf("%x", sum))
	broken := bytes.Clone(armed)
	broken[512+60] ^= 0xff
	kills := 0
	for _, tt := range []struct {
		name  string
		image []byte
		args  []string
	}{
		{"activate", ready, []string{"activate", "USR-B", "--size", fmt.Sprint(killImage), "--sha256", fmt.Sprintf("%x", sum)}},
		{"deactivate", armed, []string{"deactivate", "USR-B"}},
		{"mark-successful", armed, []string{"mark-successful", "USR-B", "--running", "USR-B"}},
		{"repair", broken, []string{"repair"}},
	} {
		if !long() && tt.name != "activate" && tt.name != "repair" {
			continue
		}
		want := s.after(tt.image, tt.args...)
		for n := range everyNth {
			s.load(tt.image)
			where := fmt.Sprintf("%s, killed at call %d", tt.name, n)
			status, out := s.run(n, s.command(tt.args...)...)
			if status == 0 {
				break
			}
			if status != -1 && status != 137 {
				t.Fatalf("%s: exit status %d\n%s", where, status, out)
			}
			kills++
			s.check(where)
			// Done again, it does what it does when nobody interrupts it.
			if status, out := s.run(0, s.command(tt.args...)...); status != 0 && status != 3 {
				t.Errorf("%s: again: exit status %d\n%s", where, status, out)
			}
			if got, err := os.ReadFile(s.disk); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: done again, the disk is not what it should be (%v)", where, err)
			}
			if t.Failed() {
				t.FailNow()
			}
		}
	}
	if kills < 4 {
		t.Errorf("killed only %d times", kills)
	}
	t.Logf("killed at %d calls", kills)
}

func (s *shipped) command(args ...string) []string {
	base := []string{"flipside", "slots", "--disk", s.disk, "--yes"}
	if args[0] != "mark-successful" {
		base = append(base, "--running", "USR-A")
	}
	return append(append(base[:2:2], args...), base[2:]...)
}

func (s *shipped) load(image []byte) {
	s.t.Helper()
	s.write("disk.img", image)
	s.write("boot/vmlinuz-a", s.kernels["1.0.0"])
	s.write("boot/vmlinuz-b", s.kernels["2.0.0"])
}

// after is the image after a command that nobody interrupted.
func (s *shipped) after(image []byte, args ...string) []byte {
	s.t.Helper()
	s.load(image)
	if status, out := s.run(0, s.command(args...)...); status != 0 {
		s.t.Fatalf("%q: exit status %d\n%s", args, status, out)
	}
	got, err := os.ReadFile(s.disk)
	if err != nil {
		s.t.Fatal(err)
	}
	return got
}
