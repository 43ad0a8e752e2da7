package bus

import (
	"context"
	"fmt"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/godbus/dbus/v5/introspect"

	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/control"
)

// The names of the older update engine.
const (
	OlderName      = "com.coreos.update1"
	OlderPath      = dbus.ObjectPath("/com/coreos/update1")
	OlderInterface = "com.coreos.update1.Manager"
)

// What the older engine calls what it does. UPDATE_STATUS_VERIFYING exists there too and is never used.
const (
	statusIdle        = "UPDATE_STATUS_IDLE"
	statusChecking    = "UPDATE_STATUS_CHECKING_FOR_UPDATE"
	statusAvailable   = "UPDATE_STATUS_UPDATE_AVAILABLE"
	statusDownloading = "UPDATE_STATUS_DOWNLOADING"
	statusFinalizing  = "UPDATE_STATUS_FINALIZING"
	statusNeedReboot  = "UPDATE_STATUS_UPDATED_NEED_REBOOT"
	statusReporting   = "UPDATE_STATUS_REPORTING_ERROR_EVENT"
)

// Older is a status as the older engine gives it: signature xdssx.
type Older struct {
	LastChecked int64   // Unix seconds
	Progress    float64 // 0 to 1, of the download
	Operation   string
	NewVersion  string // "0.0.0" when there is none
	NewSize     int64  // bytes of the payload
}

// OlderStatus says a status in the words of the older engine.
func OlderStatus(st updater.Status) Older {
	o := Older{Operation: statusIdle, NewVersion: "0.0.0"}
	if !st.LastCheck.IsZero() {
		o.LastChecked = st.LastCheck.Unix()
	}
	if u := st.Update; u != nil && st.Phase != updater.Trial { // on trial it runs already, which is nothing new
		o.NewVersion, o.NewSize = u.Version, u.Size
	}
	switch st.Phase {
	case updater.Idle:
		if st.Asking {
			o.Operation = statusChecking
		}
	case updater.Applying:
		p := st.Progress
		switch {
		case p == nil || p.Total <= 0:
			o.Operation = statusAvailable
		case p.Done < p.Total:
			o.Operation, o.Progress = statusDownloading, float64(p.Done)/float64(p.Total)
		default:
			o.Operation = statusFinalizing
		}
	case updater.Armed, updater.Rebooting:
		o.Operation = statusNeedReboot
	case updater.Failing:
		o.Operation = statusReporting
	}
	return o
}

// manager is the older engine's object.
type manager struct {
	conn   *dbus.Conn
	daemon control.Daemon
	told   Older
	at     time.Time
}

func (m *manager) export() error {
	return exportObject(m.conn, OlderPath, OlderInterface, map[string]any{
		"AttemptUpdate": m.attemptUpdate, "ResetStatus": m.resetStatus, "GetStatus": m.getStatus,
	}, introspect.Node{Name: string(OlderPath), Interfaces: []introspect.Interface{introspect.IntrospectData, {
		Name: OlderInterface,
		Methods: []introspect.Method{
			{Name: "AttemptUpdate"}, {Name: "ResetStatus"}, {Name: "GetStatus", Args: olderArgs("out")},
		},
		Signals: []introspect.Signal{{Name: "StatusUpdate", Args: olderArgs("")}},
	}}})
}

func olderArgs(direction string) []introspect.Arg {
	return []introspect.Arg{
		{Name: "last_checked_time", Type: "x", Direction: direction}, {Name: "progress", Type: "d", Direction: direction},
		{Name: "current_operation", Type: "s", Direction: direction}, {Name: "new_version", Type: "s", Direction: direction},
		{Name: "new_size", Type: "x", Direction: direction},
	}
}

// attemptUpdate returns at once, and does nothing unless the host is idle, as it was.
func (m *manager) attemptUpdate(sender dbus.Sender) *dbus.Error {
	ctx, cancel := context.WithTimeout(m.conn.Context(), patience)
	defer cancel()
	if st, _ := m.daemon.Status(ctx); OlderStatus(st).Operation != statusIdle {
		return nil
	}
	if err := m.daemon.Do(ctx, fmt.Sprintf("%s on %s", caller(ctx, m.conn, sender), OlderName), control.Command{Action: control.Check}); err != nil {
		return busError(err)
	}
	return nil
}

// resetStatus gives an update up that waits for its reboot. The older engine forgot it and let it boot all the same.
func (m *manager) resetStatus(sender dbus.Sender) *dbus.Error {
	ctx, cancel := context.WithTimeout(m.conn.Context(), patience)
	defer cancel()
	st, _ := m.daemon.Status(ctx)
	switch OlderStatus(st).Operation {
	case statusIdle:
		return nil
	case statusNeedReboot:
		if err := m.daemon.Do(ctx, fmt.Sprintf("%s on %s", caller(ctx, m.conn, sender), OlderName), control.Command{Action: control.Cancel}); err != nil {
			return busError(err)
		}
		return nil
	}
	return dbus.MakeFailedError(fmt.Errorf("the status cannot be reset now: the host is %s", st.Phase))
}

func (m *manager) getStatus() (int64, float64, string, string, int64, *dbus.Error) {
	ctx, cancel := context.WithTimeout(m.conn.Context(), patience)
	defer cancel()
	st, _ := m.daemon.Status(ctx)
	o := OlderStatus(st)
	return o.LastChecked, o.Progress, o.Operation, o.NewVersion, o.NewSize, nil
}

// tell sends StatusUpdate at the start, on each change of status, for each hundredth of a download, and at least every ten seconds of one.
func (m *manager) tell(st updater.Status, now time.Time) error {
	o := OlderStatus(st)
	quiet := o.Operation == m.told.Operation && o.NewVersion == m.told.NewVersion && o.LastChecked == m.told.LastChecked
	if quiet && o.Operation == statusDownloading {
		quiet = int(100*o.Progress) == int(100*m.told.Progress) && now.Sub(m.at) < 10*time.Second
	}
	if quiet {
		return nil
	}
	m.told, m.at = o, now
	return m.conn.Emit(OlderPath, OlderInterface+".StatusUpdate", o.LastChecked, o.Progress, o.Operation, o.NewVersion, o.NewSize)
}
