package reboot

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"github.com/godbus/dbus/v5"
	"github.com/godbus/dbus/v5/prop"
	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/lock"
)

const testClock = "FLIPSIDE_TEST_CLOCK"

// TestMain makes the test binary be a program, too, that may not ask the kernel for the time's state.
func TestMain(m *testing.M) {
	if os.Getenv(testClock) == "" {
		os.Exit(m.Run())
	}
	if err := protectClock(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	if _, err := lock.Synchronised(); !errors.Is(err, unix.EPERM) {
		fmt.Println("the kernel may be asked:", err)
		os.Exit(1)
	}
	fmt.Println(new(Clock).Synchronised())
}

// protectClock is what ProtectClock= does to a service, as far as asking goes: adjtimex fails, for all threads, and for good.
func protectClock() error {
	const load, equal, give = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	filter := []unix.SockFilter{
		{Code: load, K: 0}, // the number of the call
		{Code: equal, K: unix.SYS_ADJTIMEX, Jt: 1},
		{Code: equal, K: unix.SYS_CLOCK_ADJTIME, Jf: 1},
		{Code: give, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: give, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	if _, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog))); e != 0 {
		return e
	}
	return nil
}

// In a unit with ProtectClock= the clock is what systemd-timedated says, and without it what systemd-timesyncd has left.
func TestProtectedClock(t *testing.T) {
	stop := startBus(t)
	conn, err := dbus.ConnectSystemBus()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	props, err := prop.Export(conn, "/org/freedesktop/timedate1", prop.Map{"org.freedesktop.timedate1": {"NTPSynchronized": {Value: false}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.RequestName("org.freedesktop.timedate1", dbus.NameFlagDoNotQueue); err != nil {
		t.Fatal(err)
	}
	wants := func(want bool) {
		t.Helper()
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), testClock+"=1")
		if out, err := cmd.CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != fmt.Sprint(want) {
			t.Errorf("%v: the clock is synchronised: %s; want %v", err, out, want)
		}
	}
	for _, is := range []bool{false, true} {
		props.SetMust("org.freedesktop.timedate1", "NTPSynchronized", is)
		wants(is)
	}
	stop()
	_, err = os.Stat("/run/systemd/timesync/synchronized")
	wants(err == nil)
}

// TestTimedated asks what stands for systemd-timedated on a real bus.
func TestTimedated(t *testing.T) {
	stop := startBus(t)
	conn, err := dbus.ConnectSystemBus()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := timedated(); err == nil {
		t.Error("an answer, and nobody is there")
	}
	props, err := prop.Export(conn, "/org/freedesktop/timedate1", prop.Map{"org.freedesktop.timedate1": {"NTPSynchronized": {Value: false}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.RequestName("org.freedesktop.timedate1", dbus.NameFlagDoNotQueue); err != nil {
		t.Fatal(err)
	}
	for _, want := range []bool{false, true} {
		props.SetMust("org.freedesktop.timedate1", "NTPSynchronized", want)
		if is, err := timedated(); err != nil || is != want {
			t.Errorf("timedated says %v, %v; want %v", is, err, want)
		}
	}
	stop()
	if _, err := timedated(); err == nil {
		t.Error("an answer without a bus")
	}
}
