package health

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Watchdog is the machine's own dead-man timer: once it is running, the machine resets itself unless it is told in time that all is well.
// On a trial boot that makes a hang into a way back to the other slot.
//
// Where systemd holds the device (RuntimeWatchdogSec=) it cannot be opened, and systemd does this work.
type Watchdog struct {
	Device   string        // /dev/watchdog if empty
	Deadline time.Duration // after it nobody says any more that all is well; 0 means no deadline
	Every    time.Duration // between two signs of life; 0 means 5 s
}

// watchdogTimeout is asked of the device: the time without a sign of life after which it resets the machine.
const watchdogTimeout = 60 // seconds

// Guard keeps the watchdog quiet until ctx is done, and then puts it to rest. After the deadline it stops and leaves it running: the
// machine is reset. It returns at once if there is no such device, or somebody else has it, which an error says.
func (w Watchdog) Guard(ctx context.Context) error {
	device, every := w.Device, w.Every
	if device == "" {
		device = "/dev/watchdog"
	}
	if every <= 0 {
		every = 5 * time.Second
	}
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("opening the watchdog: %w", err)
	}
	// A device that cannot be told how long to wait has a time of its own.
	_ = unix.IoctlSetPointerInt(int(f.Fd()), unix.WDIOC_SETTIMEOUT, watchdogTimeout)
	var deadline <-chan time.Time
	if w.Deadline > 0 {
		t := time.NewTimer(w.Deadline)
		defer t.Stop()
		deadline = t.C
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		if _, err := f.Write([]byte{0}); err != nil {
			return errors.Join(fmt.Errorf("telling the watchdog that all is well: %w", err), f.Close())
		}
		select {
		case <-ctx.Done():
			// The letter V before closing says that this is on purpose (Linux, Documentation/watchdog/watchdog-api.rst).
			_, err := f.Write([]byte{'V'})
			return errors.Join(err, f.Close())
		case <-deadline:
			return errors.Join(errors.New("the trial took too long; the watchdog will reset this machine"), f.Close())
		case <-tick.C:
		}
	}
}
