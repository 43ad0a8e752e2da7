package reboot

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
)

// startBus runs a real dbus-daemon that is the system bus of this test.
func startBus(t *testing.T) (stop func()) {
	t.Helper()
	path, err := exec.LookPath("dbus-daemon")
	if err != nil {
		t.Skip("dbus-daemon is not installed (package dbus): the calls to logind are not tested")
	}
	dir, err := os.MkdirTemp("", "bus") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	conf := filepath.Join(dir, "bus.conf")
	err = os.WriteFile(conf, []byte(fmt.Sprintf(`<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=%s/bus</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow receive_sender="*"/></policy></busconfig>`, dir)), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "--config-file="+conf, "--nofork", "--print-address")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	stop = func() { once.Do(func() { cmd.Process.Kill(); cmd.Wait() }) }
	t.Cleanup(stop)
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("dbus-daemon says no address: %v", err)
	}
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", strings.TrimSpace(address))
	return stop
}

// fakeLogin1 is logind as far as this package calls it.
type fakeLogin1 struct {
	mu         sync.Mutex
	reboots    int
	wall       string
	answer     *dbus.Error
	onReboot   func()
	inhibitors []Inhibitor
	sessions   []fakeSession
	conn       *dbus.Conn
}

func (f *fakeLogin1) Reboot(bool) *dbus.Error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reboots++
	if f.onReboot != nil {
		f.onReboot()
	}
	return f.answer
}

func (f *fakeLogin1) SetWallMessage(text string, _ bool) *dbus.Error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wall = text
	return nil
}

func (f *fakeLogin1) ListInhibitors() ([]Inhibitor, *dbus.Error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.inhibitors, nil
}

type fakeSession struct {
	ID         string
	UID        uint32
	User, Seat string
	Path       dbus.ObjectPath
}

func (f *fakeLogin1) ListSessions() ([]fakeSession, *dbus.Error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sessions, nil
}

func (f *fakeLogin1) export(t *testing.T) {
	t.Helper()
	conn, err := dbus.ConnectSystemBus()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	f.conn = conn
	if err := conn.Export(f, login1Path, login1Iface); err != nil {
		t.Fatal(err)
	}
	if r, err := conn.RequestName(login1, dbus.NameFlagDoNotQueue); err != nil || r != dbus.RequestNameReplyPrimaryOwner {
		t.Fatalf("taking the name: %v, %v", r, err)
	}
}

func TestLogindReboots(t *testing.T) {
	startBus(t)
	f := &fakeLogin1{}
	f.export(t)
	if err := (Logind{}).Reboot(t.Context(), "update from 1 to 2"); err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.reboots != 1 || f.wall != "flipside: update from 1 to 2" {
		t.Errorf("%d reboots, wall message %q", f.reboots, f.wall)
	}
}

// systemd 257 refuses root too while somebody holds a block inhibitor. A caller that does not look would wait for ever.
func TestLogindRefuses(t *testing.T) {
	startBus(t)
	f := &fakeLogin1{
		answer: dbus.NewError("org.freedesktop.DBus.Error.AccessDenied", []any{"Access denied"}),
		inhibitors: []Inhibitor{
			{"sleep", "lid", "closed", "block", 0, 1},
			{"shutdown:idle", "backup", "a long job", "block", 1000, 42},
			{"shutdown", "net", "says goodbye", "delay", 0, 2},
		},
	}
	f.export(t)
	err := (Logind{}).Reboot(t.Context(), "test")
	var blocked *BlockedError
	if !errors.As(err, &blocked) || len(blocked.By) != 1 || blocked.By[0].Who != "backup" || blocked.By[0].PID != 42 {
		t.Fatalf("Reboot = %v, want a BlockedError that names the backup", err)
	}
	if !strings.Contains(err.Error(), `"backup" ("a long job", pid 42, uid 1000)`) {
		t.Errorf("the error %q does not say who", err)
	}
}

func TestLogindOtherError(t *testing.T) {
	startBus(t)
	f := &fakeLogin1{answer: dbus.NewError("org.freedesktop.login1.OperationInProgress", []any{"There's already a shutdown or sleep operation in progress"})}
	f.export(t)
	var blocked *BlockedError
	if err := (Logind{}).Reboot(t.Context(), "test"); err == nil || errors.As(err, &blocked) || !strings.Contains(err.Error(), "already a shutdown") {
		t.Errorf("Reboot = %v", err)
	}
}

// A machine that goes down takes the bus with it before the answer arrives.
func TestLogindLostReplyIsSuccess(t *testing.T) {
	stop := startBus(t)
	f := &fakeLogin1{}
	f.onReboot = stop
	f.export(t)
	if err := (Logind{}).Reboot(t.Context(), "test"); err != nil {
		t.Errorf("Reboot = %v, want success", err)
	}
}

// A logind that crashes leaves no answer either; the next one knows whether the machine goes down.
func TestLogindCrashIsNoReboot(t *testing.T) {
	startBus(t)
	f := &fakeLogin1{answer: dbus.NewError("org.freedesktop.DBus.Error.NoReply", []any{"Message recipient disconnected from message bus without replying"})}
	f.export(t)
	if err := (Logind{}).Reboot(t.Context(), "test"); err != nil {
		t.Errorf("Reboot = %v where nobody can say whether it goes down, want success", err)
	}
	for _, down := range []bool{false, true} {
		if err := f.conn.Export(properties{"PreparingForShutdown": down}, login1Path, "org.freedesktop.DBus.Properties"); err != nil {
			t.Fatal(err)
		}
		if err := (Logind{}).Reboot(t.Context(), "test"); (err == nil) != down {
			t.Errorf("Reboot = %v where the machine goes down: %t", err, down)
		}
	}
}

type properties map[string]bool

func (p properties) Get(_, name string) (dbus.Variant, *dbus.Error) {
	return dbus.MakeVariant(p[name]), nil
}

func TestLogindAway(t *testing.T) {
	stop := startBus(t)
	if err := (Logind{Timeout: 5 * time.Second}).Reboot(t.Context(), "test"); err == nil {
		t.Error("a bus without logind: the reboot succeeded")
	}
	if _, err := (Logind{}).Inhibitors(t.Context()); err == nil {
		t.Error("a bus without logind: no error")
	}
	stop()
	if err := (Logind{}).Reboot(t.Context(), "test"); err == nil {
		t.Error("no bus: the reboot succeeded")
	}
}

func TestLogindHangs(t *testing.T) {
	startBus(t)
	f := &fakeLogin1{onReboot: func() { time.Sleep(500 * time.Millisecond) }}
	f.export(t)
	if err := (Logind{Timeout: 50 * time.Millisecond}).Reboot(t.Context(), "test"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Reboot = %v, want a deadline", err)
	}
}
