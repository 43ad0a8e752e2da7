package reboot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	login1      = "org.freedesktop.login1"
	login1Path  = dbus.ObjectPath("/org/freedesktop/login1")
	login1Iface = "org.freedesktop.login1.Manager"
)

// Logind reboots through systemd-logind, over the system bus (DBUS_SYSTEM_BUS_ADDRESS is honoured).
type Logind struct {
	Timeout time.Duration // of one call; 0: 30 s, because logind may wait for delay inhibitors
}

// Inhibitor is what stands in the way of a reboot, as logind lists it.
type Inhibitor struct {
	What string `json:"what"` // colon-separated: shutdown, sleep, ...
	Who  string `json:"who"`
	Why  string `json:"why"`
	Mode string `json:"mode"` // block, block-weak, delay
	UID  uint32 `json:"uid"`
	PID  uint32 `json:"pid"`
}

// Blocks reports whether the inhibitor is against a reboot, and not only for its delay.
func (i Inhibitor) Blocks() bool {
	if i.Mode != "block" && i.Mode != "block-weak" {
		return false
	}
	for what := range strings.SplitSeq(i.What, ":") {
		if what == "shutdown" {
			return true
		}
	}
	return false
}

func (i Inhibitor) String() string {
	return fmt.Sprintf("%q (%q, pid %d, uid %d)", i.Who, i.Why, i.PID, i.UID)
}

// BlockedError says that logind refuses the reboot, and because of whom.
type BlockedError struct {
	By  []Inhibitor
	Err error
}

func (e *BlockedError) Error() string {
	if len(e.By) == 0 {
		return fmt.Sprintf("logind refuses the reboot: %v", e.Err)
	}
	return fmt.Sprintf("logind refuses the reboot: blocked by %s: %v", list(e.By), e.Err)
}

func (e *BlockedError) Unwrap() error { return e.Err }

func list(by []Inhibitor) string {
	var names []string
	for _, i := range by {
		names = append(names, i.String())
	}
	return strings.Join(names, ", ")
}

func (l Logind) dial(ctx context.Context) (*dbus.Conn, context.Context, context.CancelFunc, error) {
	timeout := l.Timeout
	if timeout <= 0 {
		timeout = 30 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	conn, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	if err != nil {
		cancel()
		return nil, nil, nil, fmt.Errorf("connecting to the system bus: %w", err)
	}
	return conn, ctx, cancel, nil
}

// Reboot implements [Rebooter].
func (l Logind) Reboot(ctx context.Context, reason string) error {
	conn, call, cancel, err := l.dial(ctx)
	if err != nil {
		return err
	}
	defer cancel()
	defer conn.Close()
	manager := conn.Object(login1, login1Path)
	// Said to everybody who is logged in; an old logind, or one that lets nobody set it, is no reason to stay up.
	manager.CallWithContext(call, login1Iface+".SetWallMessage", 0, "flipside: "+reason, true)
	err = manager.CallWithContext(call, login1Iface+".Reboot", 0, false).Err
	switch {
	case err == nil:
		return nil
	case call.Err() != nil: // also closes the connection, which must not be taken for a machine that goes down
		return fmt.Errorf("asking logind to reboot: it has not answered: %w", call.Err())
	case lost(conn, err) && !staysUp(call, conn):
		return nil
	}
	if refused(err) {
		by, listErr := inhibitors(call, conn)
		var blocking []Inhibitor
		for _, i := range by {
			if i.Blocks() {
				blocking = append(blocking, i)
			}
		}
		return &BlockedError{By: blocking, Err: errors.Join(err, listErr)}
	}
	return fmt.Errorf("asking logind to reboot: %w", err)
}

// lost reports whether the bus went away after the call was sent, which is what a machine that goes down does.
func lost(conn *dbus.Conn, err error) bool {
	return errors.Is(err, dbus.ErrClosed) || errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		!conn.Connected() || named(err, "org.freedesktop.DBus.Error.NoReply", "org.freedesktop.DBus.Error.Disconnected")
}

// staysUp reports whether logind says that the machine does not go down. One that crashed leaves its caller without an answer, too, and is soon back; one that cannot
// be asked goes down with the machine.
func staysUp(ctx context.Context, conn *dbus.Conn) bool {
	var v dbus.Variant
	err := conn.Object(login1, login1Path).CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, login1Iface, "PreparingForShutdown").Store(&v)
	down, ok := v.Value().(bool)
	return err == nil && ok && !down
}

func refused(err error) bool {
	return named(err, "org.freedesktop.DBus.Error.AccessDenied", "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired", "org.freedesktop.login1.OperationInhibited")
}

func named(err error, names ...string) bool {
	var e dbus.Error
	if !errors.As(err, &e) {
		return false
	}
	for _, n := range names {
		if e.Name == n {
			return true
		}
	}
	return false
}

// Inhibitors lists what logind knows to be against a shutdown or sleep.
func (l Logind) Inhibitors(ctx context.Context) ([]Inhibitor, error) {
	conn, call, cancel, err := l.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer cancel()
	defer conn.Close()
	return inhibitors(call, conn)
}

func inhibitors(ctx context.Context, conn *dbus.Conn) ([]Inhibitor, error) {
	var found []Inhibitor
	if err := conn.Object(login1, login1Path).CallWithContext(ctx, login1Iface+".ListInhibitors", 0).Store(&found); err != nil {
		return nil, fmt.Errorf("listing inhibitors: %w", err)
	}
	return found, nil
}
