// Flipsided is the daemon that keeps a host's /usr up to date. It reads its configuration, builds the engine of package
// updater from it, and runs until it is told to stop.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/host"
	"github.com/flipside-linux/flipside/updater/journal"
	"github.com/flipside-linux/flipside/updater/writer"
)

func main() {
	path := flag.String("config", "", "read only this configuration `file` (default: "+config.DefaultPath+", its drop-ins, and update.conf)")
	verbose := flag.Bool("v", false, "log more")
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
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, *path, log)
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

func run(ctx context.Context, path string, log *slog.Logger) error {
	debug.SetMemoryLimit(96 << 20) // collect early rather than grow: updates run beside the host's real work
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
	load := func() (config.Config, error) { return config.Load(path) }
	return host.Serve(ctx, load, writer.InProcess(load, log), reload, log)
}
