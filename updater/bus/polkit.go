package bus

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/control"
)

const (
	// patience is how long the daemon may take for an order.
	patience = 30 * time.Second
	// typing is how long a person may take to say who they are.
	typing = 3 * time.Minute
)

// The errors of org.flipside.Updater1. A refusal for lack of permission has the name that D-Bus has for it.
const (
	errorNothing    = Interface + ".Error.NothingToDo"
	errorUnderWay   = Interface + ".Error.UnderWay"
	errorBadCommand = Interface + ".Error.BadCommand"
	errorBelowFloor = Interface + ".Error.BelowFloor"
	errorFailed     = Interface + ".Error.Failed"
	errorDenied     = "org.freedesktop.DBus.Error.AccessDenied"
	errorAskPerson  = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
)

func busError(err error) *dbus.Error {
	name := errorFailed
	switch {
	case errors.Is(err, updater.ErrNothing):
		name = errorNothing
	case errors.Is(err, updater.ErrUnderWay):
		name = errorUnderWay
	case errors.Is(err, updater.ErrBelowFloor):
		name = errorBelowFloor
	case errors.Is(err, control.ErrBadCommand):
		name = errorBadCommand
	}
	return dbus.NewError(name, []any{err.Error()})
}

// caller says who sends a message, for the journal.
func caller(ctx context.Context, conn *dbus.Conn, sender dbus.Sender) string {
	uid, err := uidOf(ctx, conn, sender)
	if err != nil {
		return "somebody"
	}
	return fmt.Sprintf("user %d", uid)
}

func uidOf(ctx context.Context, conn *dbus.Conn, sender dbus.Sender) (uid uint32, err error) {
	err = conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.GetConnectionUnixUser", 0, string(sender)).Store(&uid)
	return uid, err
}

// permit asks whether the sender of a message may do something, and returns who it is. Root may; for everybody else polkit decides. Without polkit
// nobody else may.
func permit(ctx context.Context, conn *dbus.Conn, msg dbus.Message, sender dbus.Sender, a control.Action) (by string, refused *dbus.Error) {
	denied := func(name, format string, args ...any) (string, *dbus.Error) {
		return "", dbus.NewError(name, []any{fmt.Sprintf("not permitted: it needs the polkit action %s", a.Polkit()) + fmt.Sprintf(format, args...)})
	}
	uid, err := uidOf(ctx, conn, sender)
	if err != nil {
		return denied(errorDenied, ", and the bus does not say who asks: %v", err)
	}
	by = fmt.Sprintf("user %d", uid)
	if uid == 0 {
		return by, nil
	}
	subject := struct {
		Kind    string
		Details map[string]dbus.Variant
	}{"system-bus-name", map[string]dbus.Variant{"name": dbus.MakeVariant(string(sender))}}
	flags := uint32(0)
	if msg.Flags&dbus.FlagAllowInteractiveAuthorization != 0 {
		flags = 1
	}
	var answer struct {
		Authorized, Challenge bool
		Details               map[string]string
	}
	err = conn.Object("org.freedesktop.PolicyKit1", "/org/freedesktop/PolicyKit1/Authority").CallWithContext(ctx,
		"org.freedesktop.PolicyKit1.Authority.CheckAuthorization", 0, subject, a.Polkit(), map[string]string{}, flags, "").Store(&answer)
	switch {
	case err != nil:
		return denied(errorDenied, ", and polkit cannot be asked: %v", err)
	case answer.Authorized:
		return by, nil
	case answer.Challenge:
		return denied(errorAskPerson, ", and a person who can say who they are")
	}
	return denied(errorDenied, "")
}
