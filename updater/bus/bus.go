// Package bus is the daemon on the system's message bus, twice.
//
// com.coreos.update1 is what the older update engine had, method for method and word for word, so that locksmithctl, Flatcar's update
// operator and update_engine_client go on working. Who may call it is decided by the policy of the bus alone, as it was.
//
// org.flipside.Updater1 is Flipside's own interface. Everybody may read it: the properties, which change with
// PropertiesChanged, say what "flipside status" says. Whoever wants to change something needs the polkit action of that name; a refusal
// names it. docs/dbus.md is the reference.
//
// Each name has a connection of its own, because a bus policy that lets somebody talk to one name of a connection lets them
// talk to all of it.
//
// The bus is a convenience: a host without one updates itself all the same, and the control socket is always there. [Run] connects
// again when the bus went away.
package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/godbus/dbus/v5/introspect"

	"github.com/flipside-linux/flipside/updater/control"
	"github.com/flipside-linux/flipside/updater/history"
)

// Options are what a bus service needs beside the daemon.
type Options struct {
	// Address of the bus; "" is the system bus ($DBUS_SYSTEM_BUS_ADDRESS is obeyed).
	Address string
	// History returns the last n records of the host's history; nil if there is none.
	History func(n int) ([]history.Record, error)
	Log     *slog.Logger
}

// settle is how long changes are collected before they are told: a download changes its progress more often than anyone can read.
const settle = 200 * time.Millisecond

// Run serves d on the bus until ctx is done. Where there is no bus it waits for one.
func Run(ctx context.Context, d control.Daemon, opt Options) {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	wait, told := time.Second, ""
	for {
		begun := time.Now()
		err := serve(ctx, d, opt)
		if ctx.Err() != nil {
			return
		}
		if time.Since(begun) > time.Minute {
			wait = time.Second
		}
		if err != nil && err.Error() != told {
			told = err.Error()
			opt.Log.Warn("the message bus is not served; it is tried again", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		wait = min(2*wait, time.Minute)
	}
}

// serve holds both connections until one of them breaks.
func serve(ctx context.Context, d control.Daemon, opt Options) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	own, err := connect(ctx, opt.Address)
	if err != nil {
		return err
	}
	defer own.Close()
	older, err := connect(ctx, opt.Address)
	if err != nil {
		return err
	}
	defer older.Close()
	o := &host{conn: own, daemon: d, history: opt.History}
	m := &manager{conn: older, daemon: d}
	st, changed := d.Status(ctx)
	o.update(st)
	for _, err := range []error{o.export(), m.export()} {
		if err != nil {
			return err
		}
	}
	if err := take(own, Name, opt.Log); err != nil {
		return err
	}
	if err := take(older, OlderName, opt.Log); err != nil {
		return err
	}
	o.skipHistory()
	for {
		// What changes with the time alone, and the ten seconds that the older interface promises for a download.
		again := time.NewTimer(10 * time.Second)
		if err := errors.Join(o.tell(st), m.tell(st, time.Now())); err != nil {
			again.Stop()
			return fmt.Errorf("telling the message bus: %w", err)
		}
		select {
		case <-changed:
		case <-again.C:
		case <-own.Context().Done():
			return errors.New("the message bus went away")
		case <-older.Context().Done():
			return errors.New("the message bus went away")
		case <-ctx.Done():
			return nil
		}
		again.Stop()
		select {
		case <-time.After(settle):
		case <-ctx.Done():
			return nil
		}
		st, changed = d.Status(ctx)
	}
}

func connect(ctx context.Context, address string) (*dbus.Conn, error) {
	var conn *dbus.Conn
	var err error
	if address == "" {
		conn, err = dbus.ConnectSystemBus(dbus.WithContext(ctx))
	} else {
		conn, err = dbus.Connect(address, dbus.WithContext(ctx))
	}
	if err != nil {
		return nil, fmt.Errorf("connecting to the message bus: %w", err)
	}
	return conn, nil
}

// take asks for a name. Whoever has it keeps it, and this daemon gets it afterwards.
func take(conn *dbus.Conn, name string, log *slog.Logger) error {
	reply, err := conn.RequestName(name, 0)
	if err != nil {
		return fmt.Errorf("taking the name %s: %w", name, err)
	}
	if reply == dbus.RequestNameReplyInQueue {
		log.Warn("another program has this name on the message bus; flipsided takes it when that ends", "name", name)
	}
	return nil
}

// exportObject makes one interface with its introspection, and with properties if get is not nil, available at a path.
func exportObject(conn *dbus.Conn, path dbus.ObjectPath, iface string, methods map[string]any, node introspect.Node) error {
	if err := conn.ExportMethodTable(methods, path, iface); err != nil {
		return fmt.Errorf("exporting %s: %w", iface, err)
	}
	xml := introspect.NewIntrospectable(&node)
	if err := conn.Export(xml, path, "org.freedesktop.DBus.Introspectable"); err != nil {
		return fmt.Errorf("exporting the description of %s: %w", iface, err)
	}
	return nil
}
