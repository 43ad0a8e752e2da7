package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/bus"
	"github.com/flipside-linux/flipside/updater/control"
)

// onBus is a daemon that only the bus lets somebody order about.
type onBus struct {
	mu      sync.Mutex
	did     []control.Command
	changed chan struct{}
}

func (d *onBus) Status(context.Context) (updater.Status, <-chan struct{}) {
	return updater.Status{Phase: updater.Idle, Version: "1.0.0", Why: "nothing to do"}, d.changed
}

func (d *onBus) Do(_ context.Context, _ string, c control.Command) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.did = append(d.did, c)
	return nil
}

func (d *onBus) Plan(context.Context, string) (updater.Plan, error) {
	return updater.Plan{Schema: "flipside.plan/v1", Channel: "beta", Reason: "the bus says so"}, nil
}

// Whom the control socket does not let gives the same order on the bus; without a daemon there, the socket's refusal stands.
func TestOrdersOnTheBus(t *testing.T) {
	if _, err := exec.LookPath("dbus-daemon"); err != nil {
		t.Skip("needs dbus-daemon (Debian's dbus)")
	}
	// The socket refuses orders, and answers a look.
	socket := filepath.Join(t.TempDir(), "control")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var refuse atomic.Bool // also a look
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			line, _ := bufio.NewReader(c).ReadBytes('\n')
			r := control.Reply{Error: "not permitted to user 1000", Kind: "denied"}
			if strings.Contains(string(line), `"status"`) && !refuse.Load() {
				r = control.Reply{Status: &updater.Status{Version: "1.0.0"}}
			}
			json.NewEncoder(c).Encode(r)
			c.Close()
		}
	}()
	cmd := exec.Command("dbus-daemon", "--session", "--nofork", "--nopidfile", "--print-address=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	address = strings.TrimSpace(address)
	run := func(want int, contains string, args ...string) {
		t.Helper()
		var out, errs bytes.Buffer
		a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs, bus: address}
		if code := a.run(t.Context(), append([]string{"--socket", socket}, args...)); code != want || !strings.Contains(out.String()+errs.String(), contains) {
			t.Errorf("flipside %s ended with %d, want %d and %q; it printed\n%s%s", strings.Join(args, " "), code, want, contains, &out, &errs)
		}
	}
	run(exitPermitted, "not permitted to user 1000", "pause")
	run(exitPermitted, "not permitted to user 1000", "plan")

	// A daemon that says no more on the bus when it has taken an order is looked at where anybody may look.
	conn, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	mute := map[string]any{
		"Pause":     func(string, int64) *dbus.Error { return nil },
		"GetStatus": func() (string, *dbus.Error) { return "", dbus.MakeFailedError(errors.New("no more")) },
	}
	if err := conn.ExportMethodTable(mute, bus.Path, bus.Interface); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.RequestName(bus.Name, dbus.NameFlagDoNotQueue); err != nil {
		t.Fatal(err)
	}
	run(exitOK, `"version": "1.0.0"`, "--json", "pause")
	refuse.Store(true)
	run(exitFailed, "has taken the order, and its status cannot be read", "--json", "pause")
	refuse.Store(false)
	conn.Close()

	d := &onBus{changed: make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan struct{})
	go func() { bus.Run(ctx, d, bus.Options{Address: address}); close(served) }()
	defer func() { cancel(); <-served }()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if _, err := (bus.Client{Address: address}).Plan(ctx, ""); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	run(exitOK, "paused until", "pause", "the rack is being moved")
	run(exitNothing, "the bus says so", "plan", "--channel", "beta")
	run(exitPermitted, "not permitted to user 1000", "rollback", "--yes", "--below-floor") // the bus has no such order
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.did) != 1 || d.did[0].Action != control.Pause || d.did[0].Reason != "the rack is being moved" {
		t.Errorf("done: %+v", d.did)
	}
	// A daemon that somebody has named is not the one on the system's bus.
	if a := (&app{socket: socket}); a.mayAskBus(control.ErrDenied) {
		t.Error("it asks the system's daemon for another one's order")
	}
}
