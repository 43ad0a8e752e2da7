package host

import (
	"context"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/flipside-linux/flipside/updater/control"
)

// notify tells the service manager that the daemon is ready, and goes on to tell it the one-line why: "systemctl status" shows it. Where there is no
// service manager it does nothing.
func notify(ctx context.Context, d control.Daemon) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return
	}
	state := daemon.SdNotifyReady
	for {
		st, changed := d.Status(ctx)
		if st.Why != "" {
			state += "\nSTATUS=" + st.Why
		}
		if state != "" {
			daemon.SdNotify(false, state)
		}
		state = ""
		select {
		case <-ctx.Done():
			daemon.SdNotify(false, daemon.SdNotifyStopping)
			return
		case <-changed:
		}
		select { // a download changes its progress often
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}
