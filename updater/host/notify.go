package host

import (
	"context"
	"os"
	"strings"
	"time"
	"unicode"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/control"
)

// What the service manager is told (sd_notify(3)).
const (
	isReady  = daemon.SdNotifyReady
	stopping = daemon.SdNotifyStopping
)

// tellManager tells the service manager; where there is none it does nothing.
func tellManager(state string) { daemon.SdNotify(false, state) }

func reloading() string { return daemon.SdNotifyReloading + "\n" + daemon.SdNotifyMonotonicUsec() }

// notify tells the service manager that the daemon is ready once the engine works, and goes on to tell it the one-line why:
// "systemctl status" shows it. It closes ready when that is so.
func notify(ctx context.Context, d control.Daemon, ready chan<- struct{}, manager func(string)) {
	told := ""
	for {
		st, changed := d.Status(ctx)
		if st.Schema != "" { // the engine has looked at the disk and waits for its first check
			if ready != nil {
				close(ready)
				ready = nil
				manager(isReady)
			}
			if why := oneLine(st); why != told && os.Getenv("NOTIFY_SOCKET") != "" {
				told = why
				manager("STATUS=" + why)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
		if ready != nil {
			continue
		}
		select { // a download changes its progress often
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
	}
}

func oneLine(st updater.Status) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsGraphic(r) {
			return ' '
		}
		return r
	}, string(st.Phase)+": "+st.Why)
}

// stuck is how long the engine's loop may stand still. It turns at least once a minute. A step of it waits for the semaphore (lock.timeout, a minute at most), and for a
// writer that makes a slot unbootable: ten seconds for another one to let go of the disk, half a minute for trust.unlock, and twenty seconds until it has ended.
const stuck = 2 * time.Minute

// watchdog tells the service manager that the engine is alive, as long as it is. Without WatchdogSec= it does nothing.
func watchdog(ctx context.Context, e interface{ Beat() time.Time }, manager func(string)) {
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil || every <= 0 {
		return
	}
	tick := time.NewTicker(every / 3)
	defer tick.Stop()
	begun := time.Now()
	for {
		last := e.Beat()
		if last.IsZero() {
			last = begun
		}
		if time.Since(last) < stuck {
			manager(daemon.SdNotifyWatchdog)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
