package host

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/reboot/health"
	"github.com/flipside-linux/flipside/updater/config"
)

// gatePrograms are those of reboot.gate_dir.
func gatePrograms(c config.Config) health.Checks {
	return health.Checks{Dir: c.Reboot.GateDir, Timeout: time.Duration(c.Reboot.GateTimeout)}
}

// rebootGates are the host's own gates before a reboot, in the order in which they are asked. run runs the programs of reboot.gate_dir.
func rebootGates(c config.Config, run func(context.Context) error) (*reboot.Panel, error) {
	schedule, err := c.Reboot.Schedule()
	if err != nil {
		return nil, err
	}
	p := &reboot.Panel{Gates: []reboot.Gate{pauseGate{c.PauseFile()}, strategyGate{c.Reboot.Strategy}, reboot.Window{Schedule: schedule}}}
	people := c.Reboot.Method == "logind" // elsewhere there is no logind to ask
	if people && c.Reboot.Inhibitors {
		p.Gates = append(p.Gates, reboot.Inhibitors{})
	}
	p.Gates = append(p.Gates, reboot.Files{Dir: c.InhibitDir()})
	if c.Reboot.GateDir != "" {
		p.Gates = append(p.Gates, reboot.Commands{Dir: c.Reboot.GateDir, Run: run})
	}
	if c.Reboot.Alerts != "" {
		p.Gates = append(p.Gates, reboot.Alerts{URL: c.Reboot.Alerts, Query: c.Reboot.AlertsQuery})
	}
	if people && c.Reboot.UsersGrace > 0 {
		p.Last = append(p.Last, &reboot.Users{Grace: time.Duration(c.Reboot.UsersGrace)})
	}
	return p, nil
}

// strategyGate is the host's own word on reboots.
type strategyGate struct{ strategy string }

func (g strategyGate) Name() string { return "strategy" }

func (g strategyGate) Ask(context.Context, time.Time) reboot.Answer {
	if g.strategy == "off" {
		return reboot.Answer{Gate: g.Name(), Verdict: reboot.Wait, Why: "this host never reboots by itself (reboot.strategy is off)", Hint: "flipside reboot --now, or set reboot.strategy", Evidence: "reboot.strategy = \"off\""}
	}
	return reboot.Answer{Gate: g.Name(), Verdict: reboot.Go}
}

// pinGate keeps a host on the versions that it is pinned to.
func pinGate(pin string, o omaha.Offer) reboot.Answer {
	if pin == "" || o.Version == pin || strings.HasPrefix(o.Version, strings.TrimSuffix(pin, ".")+".") {
		return reboot.Answer{Gate: "pin", Verdict: reboot.Go}
	}
	return reboot.Answer{Gate: "pin", Verdict: reboot.Wait, Why: fmt.Sprintf("this host is pinned to %s and %s is offered", pin, o.Version), Hint: "flipside unpin", Evidence: fmt.Sprintf("update.pin = %q", pin)}
}
