package host

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/flipside-linux/flipside/reboot/health"
	"github.com/flipside-linux/flipside/updater/config"
)

// failedBoots is the directory in that for the state where what bad boots leave behind is kept.
const failedBoots = "failed-boots"

// healthChecks are those of a boot of a release.
func healthChecks(c config.Config, version string) health.Checks {
	return health.Checks{
		Dir: c.Health.Dir, Timeout: time.Duration(c.Health.Timeout), Soak: time.Duration(c.Health.Soak),
		Env: []string{"FLIPSIDE_VERSION=" + version},
		Units: health.Units{
			Active: c.Health.Units, NotFailed: c.Health.NotFailed, Patience: time.Duration(c.Health.Patience),
		},
	}
}

// judge decides whether a boot is good, by what run says. What a bad one leaves behind is kept in the state directory, which the release that the host
// goes back to can read.
func judge(c config.Config, version, bootID string, run func(context.Context) error, log *slog.Logger) func(context.Context) (bool, string) {
	return func(ctx context.Context) (bool, string) {
		defer underWatchdog(ctx, c.Health, log)()
		err := run(ctx)
		if err == nil || ctx.Err() != nil {
			return err == nil, "the daemon was told to end"
		}
		bad := health.Bad{Version: version, BootID: bootID, Reason: err.Error()}
		var f *health.Failure
		if errors.As(err, &f) {
			bad.Output = f.Output
		}
		kept, kerr := health.Keep(ctx, filepath.Join(c.Paths.State, failedBoots), bad, time.Now())
		if kerr != nil {
			log.Error("what this boot leaves behind is lost", "error", kerr)
		} else {
			log.Info("kept what this boot leaves behind", "directory", kept)
		}
		return false, err.Error()
	}
}

// deadlineOf bounds a trial: everything in it has a time of its own, and the programs are few.
func deadlineOf(h config.Health) time.Duration {
	return 2*time.Duration(h.Patience) + time.Duration(h.Soak) + 20*time.Duration(h.Timeout) + time.Minute
}

// underWatchdog lets the machine's watchdog end the trial if it hangs. The function that it returns ends the guard.
func underWatchdog(ctx context.Context, h config.Health, log *slog.Logger) func() {
	if h.Watchdog == "" {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		err := health.Watchdog{Device: h.Watchdog, Deadline: deadlineOf(h)}.Guard(ctx)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			log.Debug("this machine has no watchdog", "device", h.Watchdog)
		case err != nil:
			log.Info("the watchdog does not guard this trial", "device", h.Watchdog, "reason", err.Error())
		}
	}()
	return func() { cancel(); <-done }
}
