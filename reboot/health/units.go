package health

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
)

// Units is what systemd must say of a good boot. The zero value asks for nothing, and does not ask systemd at all.
type Units struct {
	Active    []string      // must become active, such as boot-complete.target
	NotFailed []string      // must not be failed; shell patterns, "*" is every unit
	Patience  time.Duration // how long the first may take to become active; 0 means 5 minutes
	Poll      time.Duration // between two questions; 0 means a second

	// Connect connects to systemd; nil is that of this machine.
	Connect func(context.Context) (Manager, error)
}

// Manager is systemd as [Units] asks it.
type Manager interface {
	// ListUnitsByPatternsContext lists the loaded units in one of states ("" is any) whose names match one of patterns.
	ListUnitsByPatternsContext(ctx context.Context, states, patterns []string) ([]dbus.UnitStatus, error)
	GetUnitPropertyContext(ctx context.Context, unit, name string) (*dbus.Property, error)
	Close()
}

// systemd connects to the system's manager: to its own socket where that is allowed, so that a boot whose message bus is broken can be
// judged too.
func systemd(ctx context.Context) (Manager, error) {
	if c, err := dbus.NewSystemdConnectionContext(ctx); err == nil {
		return c, nil
	}
	c, err := dbus.NewSystemConnectionContext(ctx)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// check returns nil if all is as it must be. What cannot be asked within Patience is not good.
func (u Units) check(ctx context.Context) error {
	if len(u.Active) == 0 && len(u.NotFailed) == 0 {
		return nil
	}
	patience, poll := u.Patience, u.Poll
	if patience <= 0 {
		patience = 5 * time.Minute
	}
	if poll <= 0 {
		poll = time.Second
	}
	deadline, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		waits, err := u.ask(deadline)
		if err == nil {
			return nil
		}
		if f, ok := err.(*Failure); ok && !waits {
			return f
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-deadline.Done():
			if f, ok := err.(*Failure); ok {
				f.Reason += fmt.Sprintf(" after %s", patience)
				return f
			}
			return &Failure{Program: "units", Reason: fmt.Sprintf("systemd could not be asked for %s: %v", patience, err)}
		case <-time.After(poll):
		}
	}
}

// ask looks once, and reports whether the answer may still become a better one.
func (u Units) ask(ctx context.Context) (waits bool, err error) {
	connect := u.Connect
	if connect == nil {
		connect = systemd
	}
	m, err := connect(ctx)
	if err != nil {
		return true, fmt.Errorf("connecting to systemd: %w", err)
	}
	defer m.Close()
	for _, name := range u.Active {
		p, err := m.GetUnitPropertyContext(ctx, name, "ActiveState")
		if err != nil {
			return true, fmt.Errorf("asking systemd about %s: %w", name, err)
		}
		switch state, _ := p.Value.Value().(string); state {
		case "active":
		case "failed":
			return false, &Failure{Program: name, Reason: "the unit failed"}
		default:
			return true, &Failure{Program: name, Reason: fmt.Sprintf("the unit is %s", state)}
		}
	}
	if len(u.NotFailed) == 0 {
		return false, nil
	}
	failed, err := m.ListUnitsByPatternsContext(ctx, []string{"failed"}, u.NotFailed)
	if err != nil {
		return true, fmt.Errorf("asking systemd which units failed: %w", err)
	}
	if len(failed) > 0 {
		var names []string
		for _, f := range failed {
			names = append(names, f.Name)
		}
		return false, &Failure{Program: "units", Reason: "failed: " + strings.Join(names, ", ")}
	}
	return false, nil
}
