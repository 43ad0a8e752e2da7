package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/godbus/dbus/v5"

	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/control"
)

// Client gives orders to the daemon on the bus, for those whom its control socket does not let: there polkit decides.
type Client struct {
	Address string // of the bus; "" is the system bus
	Ask     bool   // a person is there who can say who they are, if polkit wants to know
}

// ErrTaken says that the daemon has taken an order, and that nothing is known of where the host stands after it: one that reads its configuration again, or reboots,
// may be gone by then.
var ErrTaken = errors.New("flipsided has taken the order, and its status cannot be read")

// Do tells the daemon to do something and returns the status after it. The errors are those of [control.Do], and [ErrTaken].
func (c Client) Do(ctx context.Context, o control.Command) (st updater.Status, err error) {
	method, args := "", []any{}
	switch o.Action {
	case control.Check:
		method, args = "Check", []any{append([]string{}, o.Forgive...)}
	case control.Pause:
		method, args = "Pause", []any{o.Reason, unix(o.Until)}
	case control.Resume:
		method = "Resume"
	case control.SetChannel:
		method, args = "SetChannel", []any{o.Value}
	case control.SetPin:
		method, args = "SetPin", []any{o.Value}
	case control.Cancel:
		method = "Cancel"
	case control.Rollback:
		method = "Rollback"
	case control.Reboot, control.RebootNow:
		method, args = "Reboot", []any{o.Action == control.RebootNow}
	case control.Reload:
		method = "Reload"
	}
	if method == "" || o.BelowFloor {
		return st, fmt.Errorf("%w: the message bus has no such order", control.ErrDenied)
	}
	var unread error // whatever it is, it is no refusal of the order
	err = c.call(ctx, func(call func(method string, args ...any) *dbus.Call) error {
		if err := call(method, args...).Err; err != nil {
			return err
		}
		unread = decode(call("GetStatus"), &st)
		return nil
	})
	if unread != nil {
		return updater.Status{}, fmt.Errorf("%w: %w", ErrTaken, unread)
	}
	return st, err
}

// Plan asks the daemon what would happen with the offers of a channel.
func (c Client) Plan(ctx context.Context, channel string) (p updater.Plan, err error) {
	err = c.call(ctx, func(call func(method string, args ...any) *dbus.Call) error {
		return decode(call("GetPlan", channel), &p)
	})
	return p, err
}

// decode reads what [document] has written.
func decode(call *dbus.Call, v any) error {
	var text string
	if err := call.Store(&text); err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(text), v); err != nil {
		return fmt.Errorf("the answer of flipsided cannot be read: %w", err)
	}
	return nil
}

func (c Client) call(ctx context.Context, f func(call func(method string, args ...any) *dbus.Call) error) error {
	conn, err := connect(ctx, c.Address)
	if err != nil {
		return fmt.Errorf("%w: %w", control.ErrNotRunning, err)
	}
	defer conn.Close()
	flags := dbus.FlagNoAutoStart
	if c.Ask {
		flags |= dbus.FlagAllowInteractiveAuthorization
	}
	object := conn.Object(Name, Path)
	err = f(func(method string, args ...any) *dbus.Call {
		return object.CallWithContext(ctx, Interface+"."+method, flags, args...)
	})
	var e dbus.Error
	if !errors.As(err, &e) {
		return err
	}
	for name, kind := range map[string]error{
		errorNothing: updater.ErrNothing, errorUnderWay: updater.ErrUnderWay, errorBelowFloor: updater.ErrBelowFloor, errorBadCommand: control.ErrBadCommand,
		errorDenied: control.ErrDenied, errorAskPerson: control.ErrDenied,
		"org.freedesktop.DBus.Error.ServiceUnknown": control.ErrNotRunning, "org.freedesktop.DBus.Error.NameHasNoOwner": control.ErrNotRunning,
	} {
		if e.Name == name {
			return refusal{e.Error(), kind}
		}
	}
	return err
}

// refusal is an error of the daemon, in its own words.
type refusal struct {
	text string
	kind error
}

func (r refusal) Error() string { return r.text }
func (r refusal) Unwrap() error { return r.kind }
