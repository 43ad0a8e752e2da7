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
	"os"
	"os/exec"
	"os/signal"
	"reflect"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/host"
	"github.com/flipside-linux/flipside/updater/journal"
	"github.com/flipside-linux/flipside/updater/writer"
)

func main() {
	path := flag.String("config", "", "read only this configuration `file` (default: "+config.DefaultPath+", its drop-ins, and update.conf)")
	verbose := flag.Bool("v", false, "log more")
	part := flag.String("part", "", "which `part` of the daemon this process is; only flipsided itself says that")
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
		cmd := exec.Command("/proc/self/exe", "-part", part, "-config", *path, fmt.Sprintf("-v=%t", *verbose))
		cmd.Args[0], cmd.Stderr = os.Args[0], os.Stderr
		return cmd
	}
	var err error
	switch *part {
	case "":
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		err = run(ctx, *path, self("spawner"), log)
	case "spawner":
		err = spawn(*path, func() *exec.Cmd { return self("writer") }, log)
	case "writer":
		err = write(log)
	default:
		fmt.Fprintf(os.Stderr, "flipsided: there is no part %q\n", *part)
		os.Exit(2)
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

// run is the agent: everything but what writes to the disk. It gives the rights to that up as soon as somebody is there who can start writers.
func run(ctx context.Context, path string, spawner *exec.Cmd, log *slog.Logger) (err error) {
	debug.SetMemoryLimit(96 << 20) // collect early rather than grow: updates run beside the host's real work
	s, err := writer.StartSpawner(spawner)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		<-s.Lost()
		cancel(errLost)
	}()
	load, lacks, err := confined(path)
	if err != nil {
		s.Close()
		return err
	}
	defer time.AfterFunc(started, lean).Stop()
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	reload := make(chan struct{})
	go func() {
		for range hup {
			select {
			case reload <- struct{}{}:
			case <-ctx.Done():
				return
			}
		}
	}()
	err = host.Serve(ctx, host.Options{Load: load, Start: s.Start, Lacks: lacks}, reload, log)
	if err == nil && context.Cause(ctx) == errLost {
		return errLost
	}
	s.Close()
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
var errLost = errors.New("the process that starts the writers has ended, and nothing can be written to the disk without it")

// spawn is the process that is there to start writers. A file that cannot be used must not keep a good release from being confirmed: writers are given the last
// configuration that could.
func spawn(path string, command func() *exec.Cmd, log *slog.Logger) error {
	conn, err := writer.Inherited()
	if err != nil {
		return err
	}
	var last []byte
	read := func() {
		c, err := config.Load(path)
		if err == nil {
			last, err = json.Marshal(c)
		}
		if err != nil {
			log.Error("the configuration cannot be used; what writes to the disk keeps the last one that could", "error", err)
		}
	}
	read()
	lean()
	return writer.Spawn(conn, func() *exec.Cmd {
		read()
		cmd := command()
		cmd.Stdin = bytes.NewReader(last)
		return cmd
	}, log)
}

// write is a writer. The spawner writes its configuration to its standard input.
func write(log *slog.Logger) error {
	debug.SetMemoryLimit(48 << 20)
	conn, err := writer.Inherited()
	if err != nil {
		return err
	}
	return writer.Serve(context.Background(), conn, sync.OnceValues(func() (c config.Config, err error) {
		err = json.NewDecoder(os.Stdin).Decode(&c)
		return c, err
	}), log)
}
