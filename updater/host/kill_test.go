package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/supervisor"
	"github.com/flipside-linux/flipside/updater/writer"
)

// daemonEnv makes the test binary be the daemon, so that it can be killed as one, and partEnv one of its parts: it is split into processes as flipsided is.
const (
	daemonEnv = "FLIPSIDE_TEST_DAEMON_CONFIG"
	partEnv   = "FLIPSIDE_TEST_DAEMON_PART"
)

func TestMain(m *testing.M) {
	path := os.Getenv(daemonEnv)
	if path == "" {
		os.Exit(m.Run())
	}
	err := part(path, os.Getenv(partEnv), slog.New(slog.NewTextHandler(os.Stderr, nil)))
	var exit *reboot.ExitError
	if errors.As(err, &exit) {
		os.Exit(exit.Status)
	}
	var ended *supervisor.EndedError
	if errors.As(err, &ended) {
		os.Exit(ended.Status)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func part(path, which string, log *slog.Logger) error {
	self := func(part string) *exec.Cmd {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env, cmd.Stderr = append(os.Environ(), partEnv+"="+part), os.Stderr
		return cmd
	}
	load := func() (config.Config, error) { return config.Load(path) }
	if which == "" {
		return supervisor.Run(self("agent"), nil, func(p supervisor.Part) *exec.Cmd { return self(p.String()) }, func(string) {}, log)
	}
	if which == "agent" {
		s, err := supervisor.Connect(func(syscall.Signal) {})
		if err != nil {
			return err
		}
		start := writer.Over(func() (*net.UnixConn, error) { return s.Start(supervisor.Writer) })
		return Serve(context.Background(), Options{Load: load, Start: start}, nil, log)
	}
	conn, err := supervisor.Inherited()
	if err != nil {
		return err
	}
	return writer.Serve(context.Background(), conn, load, log)
}

// TestKilledAgainAndAgain kills the daemon with SIGKILL at random moments of an update until it is through. The state file must always be
// readable, the other slot must never be bootable before it is complete, and downloads must go on instead of beginning anew.
func TestKilledAgainAndAgain(t *testing.T) {
	if testing.Short() {
		t.Skip("takes several seconds")
	}
	r := newRig(t)
	r.publish("2.0.0", r.payload("2.0.0", r.image("2.0.0"), r.key))
	slot, _ := r.boot()
	rng := mathrand.New(mathrand.NewPCG(1, 2))
	path := filepath.Join(r.dir, "flipside.toml")
	r.config(slot) // checks it
	body := strings.Replace(r.lastConfig, "[update]\n", "[update]\nrate_limit = \"1536KiB\"\n", 1)
	r.write("flipside.toml", body)
	kills := 0
	var checkpoint string
	window := 1700 * time.Millisecond // for a daemon's life
	for range 60 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), daemonEnv+"="+path)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kill := time.AfterFunc(time.Duration(rng.Int64N(int64(window))), func() { cmd.Process.Kill() })
		err := cmd.Wait()
		kill.Stop()
		var ee *exec.ExitError
		switch {
		case errors.As(err, &ee) && ee.ExitCode() == reboot.ExitStatus:
			if kills == 0 {
				t.Error("it was through before it was killed once")
			}
			t.Logf("through after %d kills", kills)
			if slot, version := r.boot(); version != "2.0.0" || !bytes.Equal(r.read(slot), r.image("2.0.0")) {
				t.Errorf("booted %s from %s", version, slot)
			}
			if !bytes.Equal(r.read("USR-A"), r.image("1.0.0")) {
				t.Error("the old slot was changed")
			}
			return
		case errors.As(err, &ee) && !ee.Exited():
			kills++
		default:
			t.Fatalf("the daemon ended by itself: %v\n%s", err, stderr.String())
		}
		st, err := (updater.Store{Path: filepath.Join(r.dir, "state", "state.json")}).Load()
		if err != nil {
			t.Fatalf("after kill %d: %v", kills, err)
		}
		was := checkpoint
		if st.Update != nil {
			checkpoint = string(st.Update.Checkpoint)
		}
		if checkpoint == was { // this machine has other things to do: it takes longer to come as far as the next checkpoint
			window += window / 4
		}
		if s := r.slot("USR-B"); s.Bootable() && !bytes.Equal(r.read("USR-B"), r.image("2.0.0")) {
			t.Fatalf("after kill %d USR-B is bootable and not complete", kills)
		}
	}
	t.Fatalf("not through after %d kills", kills)
}
