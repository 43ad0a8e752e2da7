package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
	releases "github.com/flipside-linux/flipside/omaha/server"
	"github.com/flipside-linux/flipside/partition/bootsim"
	"github.com/flipside-linux/flipside/partition/gptimage"
	"github.com/flipside-linux/flipside/payload/build"
	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/control"
	"github.com/flipside-linux/flipside/updater/host"
	"github.com/flipside-linux/flipside/updater/writer"
)

const (
	scriptSlot  = 1 << 20
	scriptImage = 512 << 10
	// patience is longer than anything takes on a machine that is ten times slower.
	patience = 2 * time.Minute
)

// scriptHost is a host of a script: a disk image, a release server, and the daemon's own code behind its control socket. Nothing but what the script says makes it
// move: it looks for its first release after a day.
type scriptHost struct {
	dir     string
	key     crypto.Signer
	starts  map[string]int64 // where each slot begins
	server  *releases.Server
	web     *httptest.Server
	cluster *lock.Keeper

	stop context.CancelFunc // of the daemon that runs
	done chan error

	watches map[string]*exec.Cmd // by the file that each writes
}

type hostKey struct{}

// hostCommand is what scripts do with their host:
//
//	host boot [TABLE.KEY=VALUE ...]  the boot loader chooses a slot, the daemon starts; flipside.toml is its configuration
//	host until PHASE [WORDS]         waits until it is in this phase, asks nobody anything, and says these words
//	host rebooted                    waits until the daemon has ended to reboot
//	host off                         ends the daemon
//	host publish VERSION             puts a release on the server's channel stable
//	host deaf                        ends the server
//	host semaphore HOLDER            from the next boot on there is a semaphore of 1, which another host holds
//	host free HOLDER                 which that gives back
//	host watch FILE [FLAG ...]       starts flipside watch, which writes to the file
//	host shows FILE WORDS            waits until the file has these words
//	host interrupt FILE              interrupts the watch, which must end with status 130
func hostCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: host boot|until|rebooted|off|publish|deaf|semaphore|free|watch|shows|interrupt")
	}
	h, _ := ts.Value(hostKey{}).(*scriptHost)
	ts.Check(h.prepare(ts))
	arg := func(i int) string {
		if i < len(args) {
			return args[i]
		}
		return ""
	}
	switch args[0] {
	case "boot":
		ts.Check(h.boot(args[1:]))
	case "until":
		ts.Check(h.until(arg(1), arg(2)))
	case "rebooted":
		select {
		case err := <-h.done:
			var exit *reboot.ExitError
			if h.stop(); !errors.As(err, &exit) {
				ts.Fatalf("the daemon ended: %v", err)
			}
			h.stop = nil
		case <-time.After(patience):
			ts.Fatalf("it does not reboot")
		}
	case "off":
		ts.Check(h.off())
	case "publish":
		ts.Check(h.publish(arg(1)))
	case "deaf":
		h.web.Close()
	case "semaphore":
		ts.Check(h.semaphore(ts, arg(1)))
	case "free":
		ts.Check(h.cluster.Release(context.Background(), "default", arg(1), lock.Verdict{Outcome: lock.Healthy, Version: "9"}))
	case "watch":
		ts.Check(h.watch(ts, args[1], args[2:]))
	case "interrupt":
		cmd := h.watches[arg(1)]
		ts.Check(cmd.Process.Signal(os.Interrupt))
		if cmd.Wait(); cmd.ProcessState.ExitCode() != exitInterrupt {
			ts.Fatalf("it ended with %s", cmd.ProcessState)
		}
	case "shows":
		ts.Check(wait(func() (bool, error) {
			b, err := os.ReadFile(ts.MkAbs(arg(1)))
			return bytes.Contains(b, []byte(arg(2))), err
		}, "%s does not show %q", arg(1), arg(2)))
	default:
		ts.Fatalf("host has no %q", args[0])
	}
}

// wait asks until ok says yes. The last error is part of the answer.
func wait(ok func() (bool, error), format string, args ...any) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		yes, err := ok()
		if yes {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.Join(fmt.Errorf(format, args...), err)
		}
	}
}

func (h *scriptHost) path(name string) string { return filepath.Join(h.dir, name) }

// prepare makes the host when a script first asks for it.
func (h *scriptHost) prepare(ts *testscript.TestScript) (err error) {
	if h.server != nil {
		return nil
	}
	parts := []gptimage.Partition{
		{Label: "USR-A", Type: gptimage.TypeUSR, UUID: "7130c94a-213a-4e5a-8e26-6cce9662f132", Size: scriptSlot, Attributes: gptimage.Attributes(1, 0, true)},
		{Label: "USR-B", Type: gptimage.TypeUSR, UUID: "e03dd35c-7c2d-4a47-b3fe-27f15780a57c", Size: scriptSlot},
	}
	if err := gptimage.Create(h.path("disk.img"), 512, "22222222-2222-4222-8222-222222222222", parts); err != nil {
		return err
	}
	f, err := os.OpenFile(h.path("disk.img"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	h.starts = map[string]int64{}
	for _, p := range parts {
		h.starts[p.Label] = p.Start
	}
	if _, err := f.WriteAt(release("1.0.0"), h.starts["USR-A"]); err != nil {
		return err
	}
	if h.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(h.key.Public())
	if err != nil {
		return err
	}
	err = errors.Join(
		os.WriteFile(h.path("release.pem"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o644),
		os.WriteFile(h.path("machine-id"), []byte(strings.Repeat("ab", 16)+"\n"), 0o644),
		os.Mkdir(h.path("inhibit"), 0o755))
	if err != nil {
		return err
	}
	if h.server, err = releases.New(h.path("releases"), releases.Options{}); err != nil {
		return err
	}
	h.web = httptest.NewServer(h.server)
	ts.Defer(func() {
		h.off()
		h.web.Close()
		h.server.Close()
	})
	return nil
}

// release is the /usr of a version: its name, and noise that does not get smaller.
func release(version string) []byte {
	image := make([]byte, scriptImage)
	mathrand.NewChaCha8(sha256.Sum256([]byte(version))).Read(image)
	copy(image, version+"\x00")
	return image
}

func (h *scriptHost) publish(version string) error {
	var pay bytes.Buffer
	image := release(version)
	_, err := build.Full(context.Background(), &pay, build.Spec{
		Images: []build.Image{{Name: "usr", Data: bytes.NewReader(image), Size: int64(len(image))}}, Keys: []crypto.Signer{h.key}, TempDir: h.dir,
	})
	if err != nil {
		return err
	}
	path := h.path(version + ".payload")
	if err := os.WriteFile(path, pay.Bytes(), 0o644); err != nil {
		return err
	}
	_, err = h.server.Publish(context.Background(), "stable", version, path)
	return err
}

// boot does the boot loader's work and starts the daemon.
func (h *scriptHost) boot(settings []string) error {
	slot, err := bootsim.BootFile(h.path("disk.img"))
	if err != nil {
		return err
	}
	f, err := os.Open(h.path("disk.img"))
	if err != nil {
		return err
	}
	defer f.Close()
	head := make([]byte, 32)
	if _, err := f.ReadAt(head, h.starts[slot.Label]); err != nil {
		return err
	}
	version, _, _ := strings.Cut(string(head), "\x00")
	keys := map[string]string{
		"update.server": h.web.URL + "/v1/update/", "update.app": "test", "update.keys": h.path("release.pem"), "update.first_check": "24h", "update.interval": "24h", "update.retry": "1s",
		"slots.disk": h.path("disk.img"), "slots.running": slot.Label,
		"reboot.method": "exit", "reboot.inhibit_dir": h.path("inhibit"),
		"health.dir": "", "health.soak": "0s", "health.watchdog": "", "health.units": "",
		"host.os_release": h.path("os-release"), "host.machine_id": h.path("machine-id"), "host.boot_id": h.path("boot_id"),
		"paths.state": h.path("state"), "paths.run": h.path("run"),
	}
	if h.cluster != nil {
		b, err := os.ReadFile(h.path("etcd.endpoint"))
		if err != nil {
			return err
		}
		keys["lock.endpoints"] = string(b)
	}
	for _, s := range settings {
		key, value, ok := strings.Cut(s, "=")
		if !ok {
			return fmt.Errorf("host boot %s: it is no setting", s)
		}
		keys[key] = value
	}
	var text strings.Builder
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		value := fmt.Sprintf("%q", keys[key])
		if key == "update.keys" || key == "health.units" || key == "lock.endpoints" { // lists
			if value = "[" + value + "]"; keys[key] == "" {
				value = "[]"
			}
		}
		fmt.Fprintf(&text, "%s = %s\n", key, value)
	}
	err = errors.Join(
		os.WriteFile(h.path("flipside.toml"), []byte(text.String()), 0o644),
		os.WriteFile(h.path("os-release"), []byte("VERSION_ID="+version+"\n"), 0o644),
		os.WriteFile(h.path("boot_id"), fmt.Appendf(nil, "%x\n", mathrand.Uint64()), 0o644))
	if err != nil {
		return err
	}
	load := func() (config.Config, error) { return config.Load(h.path("flipside.toml")) }
	log := slog.New(slog.DiscardHandler)
	var ctx context.Context
	ctx, h.stop = context.WithCancel(context.Background())
	h.done = make(chan error, 1)
	go func() {
		h.done <- host.Serve(ctx, host.Options{Load: load, Start: writer.InProcess(load, log)}, nil, log)
	}()
	return wait(func() (bool, error) {
		select {
		case err := <-h.done:
			h.done <- err
			return true, nil // a host may reboot as soon as it is up
		default:
		}
		st, err := h.status()
		return err == nil && st.Schema != "", err
	}, "the daemon does not answer")
}

func (h *scriptHost) status() (st updater.Status, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err = control.Call(ctx, h.path("run/control.sock"), control.Request{Method: "status"}, func(s updater.Status) bool { st = s; return true })
	return st, err
}

func (h *scriptHost) until(phase, words string) error {
	var st updater.Status
	err := wait(func() (bool, error) {
		var err error
		st, err = h.status()
		return err == nil && string(st.Phase) == phase && !st.Asking && strings.Contains(st.Why, words), err
	}, "it is never %s with %q", phase, words)
	if err != nil {
		return fmt.Errorf("%w; at last it was %s: %s", err, st.Phase, st.Why)
	}
	return nil
}

func (h *scriptHost) off() error {
	if h.stop == nil {
		return nil
	}
	h.stop()
	h.stop = nil
	return <-h.done
}

// watch starts a process of its own, as a signal is to end it.
func (h *scriptHost) watch(ts *testscript.TestScript, name string, flags []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	out, err := os.Create(h.path(name))
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := &exec.Cmd{Path: self, Args: append([]string{"flipside", "watch", "--config", h.path("flipside.toml")}, flags...), Stdout: out, Env: append(os.Environ(), "TZ=UTC")}
	if err := cmd.Start(); err != nil {
		return err
	}
	ts.Defer(func() { cmd.Process.Kill(); cmd.Wait() })
	h.watches[name] = cmd
	return nil
}

// semaphore starts an etcd, in which another host holds the only slot.
func (h *scriptHost) semaphore(ts *testscript.TestScript, holder string) error {
	endpoint, stop, err := etcdtest.StartEmbedded(h.path("etcd"))
	if err != nil {
		return err
	}
	ts.Defer(stop)
	if h.cluster, err = etcd.New(etcd.Config{Endpoints: []string{endpoint}}); err != nil {
		return err
	}
	ts.Defer(func() { h.cluster.Close() })
	if err := os.WriteFile(h.path("etcd.endpoint"), []byte(endpoint), 0o644); err != nil {
		return err
	}
	st, err := h.cluster.Request(context.Background(), lock.Claim{Group: "default", Host: holder, BootID: "b", From: "8", To: "9"})
	if err == nil && !st.Granted {
		err = fmt.Errorf("%s does not get a slot: %+v", holder, st)
	}
	return err
}
