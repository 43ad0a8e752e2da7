package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/config"
)

// deadman is a note on the state partition for a side on which flipsided never comes to run: packaging/systemd/deadman, which a timer starts, reads
// it there, and reboots such a trial once. The note has five lines: the boot in which the slot was armed, the release that ran then, how many
// seconds a trial may take, the release that is on trial, and the slot that ran when it was armed.
type deadman struct {
	dir             string
	bootID, version string
	limit           time.Duration
	slot            string // that runs
}

const (
	deadmanNote  = "on-trial"
	deadmanSpent = "on-trial.rebooted" // what the timer makes of the note before it reboots: it does so once
)

// bootTime is what a machine may take to start the daemon, beside the trial's own time.
const bootTime = 10 * time.Minute

func newDeadman(c config.Config, bootID, version string) deadman {
	return deadman{dir: c.Paths.State, bootID: bootID, version: version, limit: deadlineOf(c.Health) + bootTime}
}

// set leaves the note before a slot is armed.
func (d deadman) set(version string) error {
	text := fmt.Sprintf("%s\n%s\n%d\n%s\n%s\n", d.bootID, d.version, int(d.limit.Seconds()), version, d.slot)
	if err := atomicfile.Write(atomicfile.OS(d.dir), deadmanNote, []byte(text)); err != nil {
		return fmt.Errorf("leaving a note for the dead man's timer: %w", err)
	}
	return nil
}

// clear takes it away, when the trial has ended or will not be.
func (d deadman) clear() error {
	for _, name := range []string{deadmanNote, deadmanSpent} {
		if err := os.Remove(filepath.Join(d.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("taking the note for the dead man's timer away: %w", err)
		}
	}
	return nil
}

// start makes the note right at the start of the daemon: a slot that still waits for its boot is noted with this boot, so that this side, which
// may run for long, is not taken for a trial.
func (d deadman) start(st updater.State, f updater.Facts) error {
	u := st.Update
	switch waits := u != nil && (st.Phase == updater.Armed || st.Phase == updater.Rebooting); {
	case waits && u.ToSlot != f.Running && f.Slots[u.ToSlot].Bootable():
		return d.set(u.Offer.Version)
	case f.Slots[f.Running].Successful:
		return d.clear()
	}
	return nil
}
