package host

import (
	"os"
	"path/filepath"

	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/confine"
	"github.com/flipside-linux/flipside/updater/trust"
)

// AgentFiles are the agent's own in the state directory. All others there are root's: the floor of releases, keys, what a slot brought along.
func AgentFiles() []string {
	return []string{"state.json", "state.json.unreadable", "history.log", "history.old.log", "paused", "operator.toml", deadmanNote, deadmanSpent, failedBoots}
}

// Confinement is what the agent of the host that c configures may write to, and the health checks and gate programs, which run for it. There is no disk with slots in it,
// nothing of the boot partition, and not the keys and the configuration, which decide what a writer believes.
func Confinement(c config.Config) confine.Policy {
	p := confine.Policy{
		Dirs: append([]string{c.Paths.State, c.Paths.Run, os.TempDir(), "/tmp", "/var/tmp", "/dev/shm", "/dev/pts"}, c.Paths.Writable...),
		Devices: []string{
			"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/ptmx",
			"/dev/console", "/dev/tty*", // where people are logged in who are warned of a reboot
			trust.DefaultDevice,
		},
	}
	if c.Trust.TPM != "" {
		p.Devices = append(p.Devices, c.Trust.TPM)
	}
	if c.Health.Watchdog != "" {
		p.Devices = append(p.Devices, c.Health.Watchdog)
	}
	if c.Metrics.Textfile != "" {
		p.Dirs = append(p.Dirs, filepath.Dir(c.Metrics.Textfile))
	}
	return p
}
