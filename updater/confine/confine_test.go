package confine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// probeEnv makes the test binary confine itself, with the named directory to write to, and try what it may not do.
const probeEnv = "FLIPSIDE_TEST_CONFINED"

func TestMain(m *testing.M) {
	dir := os.Getenv(probeEnv)
	if dir == "" {
		os.Exit(m.Run())
	}
	if err := json.NewEncoder(os.Stdout).Encode(probe(dir)); err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

// tried is what came of something: an error number, 0 for none.
type tried map[string]syscall.Errno

type report struct {
	Lacks []string
	Tried []tried // by thread
}

func probe(dir string) report {
	// Threads that are there before, and one that comes after.
	const old = 3
	begin, results := make(chan struct{}), make(chan tried)
	var ready sync.WaitGroup
	try := func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		results <- attempts(dir)
	}
	for range old {
		ready.Add(1)
		go func() {
			runtime.LockOSThread()
			ready.Done()
			<-begin
			try()
		}()
	}
	ready.Wait()
	var r report
	for _, l := range (Policy{Dirs: []string{filepath.Join(dir, "mine"), filepath.Join(dir, "not there"), ""}, Devices: []string{"/dev/null", "/dev/not-there*"}}).Self() {
		r.Lacks = append(r.Lacks, l.String())
	}
	close(begin)
	go try()
	for range old + 1 {
		r.Tried = append(r.Tried, <-results)
	}
	return r
}

func attempts(dir string) tried {
	t := tried{}
	note := func(what string, err error) {
		var e syscall.Errno
		switch {
		case errors.As(err, &e):
			t[what] = e
		case err != nil:
			t[what] = syscall.EIO
		default:
			t[what] = 0
		}
	}
	open := func(what, path string, flags int) {
		f, err := os.OpenFile(path, flags, 0o600)
		note(what, err)
		f.Close()
	}
	open("write mine", filepath.Join(dir, "mine", "file"), os.O_WRONLY|os.O_CREATE)
	open("write theirs", filepath.Join(dir, "theirs"), os.O_WRONLY)
	open("make theirs", filepath.Join(dir, "new"), os.O_WRONLY|os.O_CREATE)
	open("read theirs", filepath.Join(dir, "theirs"), os.O_RDONLY)
	note("remove theirs", os.Remove(filepath.Join(dir, "theirs")))
	note("move theirs", os.Rename(filepath.Join(dir, "theirs"), filepath.Join(dir, "mine", "theirs")))
	note("change theirs by another name", os.Truncate(filepath.Join(dir, "mine", "link"), 0))
	open("write to nothing", "/dev/null", os.O_WRONLY)
	if disk, ok := blockDevice(); ok {
		open("write the disk", disk, os.O_WRONLY)
		open("read the disk", disk, os.O_RDONLY)
		if f, err := os.Open(disk); err == nil {
			_, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET)
			note("ask the disk", err)
			f.Close()
		}
	}
	open("loop devices", "/dev/loop-control", os.O_RDWR)
	note("mount", unix.Mount("none", filepath.Join(dir, "mine"), "tmpfs", 0, ""))
	note("a device of one's own", unix.Mknod(filepath.Join(dir, "mine", "device"), unix.S_IFBLK|0o600, int(unix.Mkdev(7, 0))))
	open("the parent's memory", fmt.Sprintf("/proc/%d/mem", os.Getppid()), os.O_RDONLY)
	_, _, e := syscall.RawSyscall(unix.SYS_IO_URING_SETUP, 0, 0, 0)
	note("io_uring", e)
	_, _, e = syscall.RawSyscall(unix.SYS_BPF, 999, 0, 0)
	note("bpf", e)
	// What it starts is confined in the same way, and can do what programs do.
	out, err := exec.Command("/bin/sh", "-c", "echo x > "+filepath.Join(dir, "mine", "child")+" && echo y > /dev/null && ! (echo z > "+filepath.Join(dir, "theirs")+") 2>/dev/null && echo well").CombinedOutput()
	if err == nil && strings.TrimSpace(string(out)) != "well" {
		err = errors.New(string(out))
	}
	note("a child", err)
	return t
}

// blockDevice is some block device of this machine.
func blockDevice() (string, bool) {
	list, _ := filepath.Glob("/sys/block/*")
	for _, path := range list {
		dev := filepath.Join("/dev", filepath.Base(path))
		if info, err := os.Stat(dev); err == nil && info.Mode()&fs.ModeDevice != 0 && info.Mode()&fs.ModeCharDevice == 0 {
			return dev, true
		}
	}
	return "", false
}

func TestSelf(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "mine"), 0o700), os.WriteFile(filepath.Join(dir, "theirs"), []byte("old"), 0o600),
		os.Symlink(filepath.Join(dir, "theirs"), filepath.Join(dir, "mine", "link"))); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), probeEnv+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var r report
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, l := range r.Lacks {
		t.Logf("this kernel lacks: %s", l)
	}
	lacks := func(what string) bool {
		for _, l := range r.Lacks {
			if strings.HasPrefix(l, what) {
				return true
			}
		}
		return false
	}
	want := map[string][]syscall.Errno{"write mine": {0}, "read theirs": {0}, "write to nothing": {0}}
	if !lacks("Landlock") {
		for _, what := range []string{"write theirs", "make theirs", "remove theirs", "change theirs by another name", "loop devices"} {
			want[what] = []syscall.Errno{syscall.EACCES, syscall.ENOENT} // the latter: this machine has no loop devices
		}
		want["move theirs"] = []syscall.Errno{syscall.EACCES, syscall.EXDEV}
		want["the parent's memory"] = []syscall.Errno{syscall.EACCES, syscall.EPERM}
		want["a child"] = []syscall.Errno{0}
		want["write the disk"] = []syscall.Errno{syscall.EACCES, syscall.EPERM}
	}
	if os.Getuid() == 0 && !lacks("Landlock") {
		want["read the disk"], want["ask the disk"] = []syscall.Errno{0}, []syscall.Errno{0}
	}
	if !lacks("capabilities") || !lacks("Landlock") {
		want["mount"], want["a device of one's own"] = []syscall.Errno{syscall.EPERM, syscall.EACCES}, []syscall.Errno{syscall.EPERM, syscall.EACCES}
	}
	if !lacks("seccomp") {
		want["io_uring"], want["bpf"] = []syscall.Errno{syscall.EPERM}, []syscall.Errno{syscall.EPERM}
	}
	if len(r.Tried) != 4 {
		t.Fatalf("%d threads have tried", len(r.Tried))
	}
	for i, got := range r.Tried {
		for what, any := range want {
			e, did := got[what]
			ok := !did && strings.Contains(what, "the disk") // this machine has none
			for _, w := range any {
				ok = ok || did && e == w
			}
			if !ok {
				t.Errorf("thread %d: %s: %v, want one of %v", i, what, e, any)
			}
		}
	}
	if data, err := os.ReadFile(filepath.Join(dir, "theirs")); err != nil || string(data) != "old" {
		t.Errorf("what is not its own: %q, %v", data, err)
	}
}
