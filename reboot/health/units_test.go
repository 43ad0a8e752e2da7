package health

import (
	"context"
	"errors"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
)

// manager stands for systemd: the states of its units change with every question. The real one is asked on the machines of
// updater/host/machinetest.
type manager struct {
	states map[string][]string // by unit; the last one stays
	asked  int
}

func (m *manager) state(unit string) string {
	s := m.states[unit]
	if len(s) == 0 {
		return "inactive"
	}
	return s[min(m.asked, len(s)-1)]
}

func (m *manager) GetUnitPropertyContext(_ context.Context, unit, _ string) (*dbus.Property, error) {
	return &dbus.Property{Name: "ActiveState", Value: godbus.MakeVariant(m.state(unit))}, nil
}

func (m *manager) ListUnitsByPatternsContext(_ context.Context, states, patterns []string) (out []dbus.UnitStatus, err error) {
	for name := range m.states {
		for _, p := range patterns {
			if ok, _ := path.Match(p, name); ok && m.state(name) == states[0] {
				out = append(out, dbus.UnitStatus{Name: name})
				break
			}
		}
	}
	return out, nil
}

func (m *manager) Close() { m.asked++ }

func TestUnits(t *testing.T) {
	for _, tt := range []struct {
		name   string
		units  Units
		states map[string][]string
		want   string
	}{
		{"nothing is asked for", Units{}, nil, ""},
		{"active", Units{Active: []string{"boot-complete.target"}}, map[string][]string{"boot-complete.target": {"active"}}, ""},
		{"becomes active", Units{Active: []string{"web.service"}}, map[string][]string{"web.service": {"inactive", "activating", "active"}}, ""},
		{"never becomes active", Units{Active: []string{"web.service"}}, map[string][]string{"web.service": {"activating"}}, "web.service: the unit is activating after 50ms"},
		{"is not there", Units{Active: []string{"web.service"}}, nil, "web.service: the unit is inactive"},
		{"fails", Units{Active: []string{"web.service"}}, map[string][]string{"web.service": {"activating", "failed"}}, "web.service: the unit failed"},
		{"another failed", Units{NotFailed: []string{"*"}}, map[string][]string{"db.service": {"failed"}}, "units: failed: db.service"},
		{"another failed that nobody minds", Units{NotFailed: []string{"web*"}}, map[string][]string{"db.service": {"failed"}}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := &manager{states: tt.states}
			tt.units.Patience, tt.units.Poll = 50*time.Millisecond, time.Millisecond
			for _, states := range tt.states {
				if len(states) > 1 { // it is waited for until the last one comes
					tt.units.Patience = time.Minute
				}
			}
			tt.units.Connect = func(context.Context) (Manager, error) { return m, nil }
			err := Checks{Units: tt.units}.Run(t.Context())
			if tt.want == "" {
				if err != nil {
					t.Errorf("error = %v", err)
				}
				return
			}
			var f *Failure
			if !errors.As(err, &f) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error = %v, want a Failure with %q", err, tt.want)
			}
		})
	}
}

func TestASystemdThatCannotBeAskedIsNotGood(t *testing.T) {
	u := Units{Active: []string{"x"}, Patience: 10 * time.Millisecond, Poll: time.Millisecond}
	u.Connect = func(context.Context) (Manager, error) { return nil, errors.New("no socket") }
	var f *Failure
	if err := (Checks{Units: u}).Run(t.Context()); !errors.As(err, &f) || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("error = %v", err)
	}
}
