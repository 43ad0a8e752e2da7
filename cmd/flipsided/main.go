// Flipsided is the daemon that keeps a host's /usr up to date. It reads its configuration, builds the engine of package
// updater from it, and runs until it is told to stop.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater/account"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/host"
	"github.com/flipside-linux/flipside/updater/journal"
	"github.com/flipside-linux/flipside/updater/supervisor"
	"github.com/flipside-linux/flipside/updater/writer"
)

func main() {
	path := flag.String("config", "", "read only this configuration `file` (default: "+config.DefaultPath+", its drop-ins, and update.conf)")
	verbose := flag.Bool("v", false, "log more")
	part := flag.String("part", "", "which `part` of the daemon this process is; only flipsided itself says that")
	user := flag.String("user", account.Default, "run the part that talks to the network as this system `user`, if there is one; \"\": as whoever started flipsided")
	lack := flag.String("lack", "", "why this part is not run as that user; only flipsided itself `says` that")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "flipsided: unexpected argument %q\n", flag.Arg(0))
		os.Exit(2)
	}
	level := slog.LevelInfo
	if *verbose {
		level = slog.LevelDebug
	}
	log := slog.New(handler(level))
	self := func(part string) *exec.Cmd {
		cmd := exec.Command("/proc/self/exe", "-part", part, "-config", *path, "-user", *user, fmt.Sprintf("-v=%t", *verbose))
		cmd.Args[0], cmd.Stderr = os.Args[0], os.Stderr
		return cmd
	}
	if *part != "" {
		_ = os.WriteFile("/proc/self/comm", []byte("flipsided"), 0) // people look for it by that name, and it was started as /proc/self/exe
	}
	var err error
	switch *part {
	case "":
		err = supervise(*path, *user, self, log)
	case "agent":
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		err = run(ctx, *path, *lack, log)
	case supervisor.Writer.String():
		err = write(log)
	case supervisor.Errand.String():
		err = doErrand(*user)
	default:
		fmt.Fprintf(os.Stderr, "flipsided: there is no part %q\n", *part)
		os.Exit(2)
	}
	var ended *supervisor.EndedError
	if errors.As(err, &ended) {
		if ended.Signal != 0 {
			log.Error(err.Error())
		}
		os.Exit(ended.Status) // it said itself why
	}
	var exit *reboot.ExitError
	switch {
	case errors.As(err, &exit):
		log.Info("ending with the status that asks for a reboot", "status", exit.Status)
		os.Exit(exit.Status)
	case err != nil:
		log.Error(err.Error())
		os.Exit(1)
	}
}

// handler writes to the journal with its fields where standard error goes there, and lines of text elsewhere.
func handler(level slog.Level) slog.Handler {
	if journal.Connected() {
		return journal.New(level)
	}
	return slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})
}

// supervise is the process that flipsided is started as. It keeps its rights, starts the agent, and starts for the agent what needs them. A file that cannot be used must not
// keep a good release from being confirmed: writers are given the last configuration that could.
func supervise(path, user string, self func(part string) *exec.Cmd, log *slog.Logger) error {
	signals, told := make(chan os.Signal, 4), make(chan os.Signal)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	var last []byte
	read := func() (config.Config, error) {
		l, err := config.Read(config.Source{File: path, Fixed: true})
		if err != nil {
			return config.Config{}, err
		}
		last, err = json.Marshal(l.Config)
		return l.Config, err
	}
	c, err := read()
	if err != nil {
		return err
	}
	agent, own := self("agent"), func() error { return nil }
	agent.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "WATCHDOG_PID=") }) // it is the agent that says that all is well
	if os.Geteuid() == 0 && user != "" {
		a, err := account.Find(user, c, host.AgentFiles())
		if err != nil {
			agent.Args = append(agent.Args, "-lack", err.Error())
		} else if agent.SysProcAttr, err = a.Prepare(c); err != nil {
			return err
		} else {
			own = func() error { return a.Own(c) }
		}
	}
	go func() {
		for sig := range signals {
			if sig == syscall.SIGHUP { // before it has that sent, systemd makes the directories of the service root's again, with all that is in them
				if err := own(); err != nil {
					log.Error(err.Error())
				}
			}
			told <- sig
		}
	}()
	lean()
	return supervisor.Run(agent, told, func(which supervisor.Part) *exec.Cmd {
		if _, err := read(); err != nil {
			log.Error("the configuration cannot be used; what writes to the disk keeps the last one that could", "error", err)
		}
		cmd := self(which.String())
		cmd.Stdin = bytes.NewReader(last)
		return cmd
	}, func(state string) { daemon.SdNotify(false, state) }, log)
}

// run is the agent: everything but what needs root. It gives up what rights it has before it says a word on the network.
func run(ctx context.Context, path, lack string, log *slog.Logger) (err error) {
	debug.SetMemoryLimit(96 << 20) // collect early rather than grow: updates run beside the host's real work
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	s, err := supervisor.Connect(func(sig syscall.Signal) {
		if sig != syscall.SIGHUP {
			cancel(nil)
			return
		}
		select {
		case hup <- sig:
		default: // it is about to read its configuration
		}
	})
	if err != nil {
		return err
	}
	go func() {
		<-s.Lost()
		cancel(errLost)
	}()
	load, lacks, err := confined(path)
	if err != nil {
		return err
	}
	if lack != "" {
		lacks = append([]string{"a user of its own: " + lack}, lacks...)
	}
	defer time.AfterFunc(started, lean).Stop()
	reload := make(chan struct{})
	go func() {
		for range hup {
			select {
			case reload <- struct{}{}:
				time.AfterFunc(started, lean)
			case <-ctx.Done():
				return
			}
		}
	}()
	start := func(which supervisor.Part) func() (*net.UnixConn, error) {
		return func() (*net.UnixConn, error) { return s.Start(which) }
	}
	err = host.Serve(ctx, host.Options{
		Load: load, Start: writer.Over(start(supervisor.Writer)), Errands: start(supervisor.Errand), Manager: s.Tell, Lacks: lacks,
	}, reload, log)
	if err == nil && context.Cause(ctx) == errLost {
		return errLost
	}
	return err
}

// confined confines this process as the configuration has it. What it returns loads the configuration again, which must be one for the same confinement: that cannot be
// changed any more.
func confined(path string) (load func() (config.Config, error), lacks []string, err error) {
	c, err := config.Load(path)
	if err != nil {
		return nil, nil, err
	}
	for dir, mode := range map[string]os.FileMode{c.Paths.State: 0o700, c.Paths.Run: 0o755} { // only what is there can be left writable
		if err := os.MkdirAll(dir, mode); err != nil {
			return nil, nil, fmt.Errorf("making a directory of the daemon: %w", err)
		}
	}
	policy := host.Confinement(c)
	for _, l := range policy.Self() {
		lacks = append(lacks, l.String())
	}
	return func() (config.Config, error) {
		c, err := config.Load(path)
		if err == nil && !reflect.DeepEqual(host.Confinement(c), policy) {
			err = errors.New("what flipsided may write to has changed (paths, metrics.textfile, health.watchdog, trust.tpm): systemctl restart flipsided")
		}
		return c, err
	}, lacks, nil
}

// started is when an agent has done for certain what only its start needs.
const started = 5 * time.Second

// errLost ends the agent: whoever supervises it starts both anew.
var errLost = errors.New("the process that started this one has ended, and nothing can be written to the disk without it")

// given is the configuration that whoever starts a part writes to its standard input.
func given() (c config.Config, err error) {
	err = json.NewDecoder(os.Stdin).Decode(&c)
	return c, err
}

// write is a writer.
func write(log *slog.Logger) error {
	debug.SetMemoryLimit(48 << 20)
	conn, err := supervisor.Inherited()
	if err != nil {
		return err
	}
	return writer.Serve(context.Background(), conn, sync.OnceValues(given), log)
}

// doErrand does one thing for the agent that needs the rights that it has given up.
func doErrand(user string) error {
	conn, err := supervisor.Inherited()
	if err != nil {
		return err
	}
	return host.Errand(context.Background(), conn, given, func(c config.Config) error {
		if os.Geteuid() != 0 || user == "" {
			return nil
		}
		a, err := account.Find(user, c, host.AgentFiles())
		if err != nil {
			return err
		}
		return a.Own(c)
	})
}
