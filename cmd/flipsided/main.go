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
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
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

func run(ctx context.Context, path string, log *slog.Logger) error {
	c, err := config.Load(path)
	if err != nil {
		return err
	}
	debug.SetMemoryLimit(96 << 20) // collect early rather than grow: updates run beside the host's real work
	return host.Run(ctx, c, log)
}
