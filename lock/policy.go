package lock

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/flipside-linux/flipside/lock/keep"
	"github.com/flipside-linux/flipside/lock/window"
)

// Policy is what the owner of the cluster decides for a group. Fields that this version does not know survive a rewrite.
type Policy struct {
	// Max is how many hosts may be down at once. 0 pauses the group.
	Max int `json:"max"`
	// ZoneMax is how many of them may be in one zone; 0 means no limit. Zones overrides it for single zones.
	ZoneMax int            `json:"zone_max,omitempty"`
	Zones   map[string]int `json:"zones,omitempty"`
	// FailureBudget is how many hosts may fail with a version before it is halted; the failure that reaches it halts. 0 means never.
	FailureBudget int `json:"failure_budget"`
	// FailuresInRow halts a version after so many failures without a success between them; 0 means never.
	FailuresInRow int `json:"failures_in_row,omitempty"`
	// BootDeadline is how long a holder may take to reboot, and then to become healthy, before it is late and counts as a failure;
	// 0 means for ever.
	BootDeadline Duration `json:"boot_deadline"`
	// GrantDeadline is how long a host may leave a slot unused before it is taken back. It has not gone down, and cannot any more:
	// a host that went away while it waited must not keep the others waiting. 0 means for ever.
	GrantDeadline Duration `json:"grant_deadline"`
	// Windows are when slots are given out; none means always. Blackouts are when they are not, whatever the windows say.
	Windows   []window.Window   `json:"windows,omitempty"`
	Blackouts []window.Blackout `json:"blackouts,omitempty"`
	// RebootTime is how long a reboot is taken to last, for windows and forecasts, until the group has measured it.
	RebootTime Duration `json:"reboot_time,omitempty"`
	// Classes names the priority classes, first served first. A claim of a class that is not named here is served last.
	Classes []string `json:"classes,omitempty"`
	// PausedMax is what Max was before the group was paused, for when it goes on.
	PausedMax int `json:"paused_max,omitempty"`

	extra keep.Fields
}

// DefaultPolicy is that of a group that nobody has set up: one at a time, and the first failure stops everything.
func DefaultPolicy() Policy {
	return Policy{Max: 1, FailureBudget: 1, BootDeadline: Duration(30 * time.Minute), GrantDeadline: Duration(15 * time.Minute)}
}

// maxClasses bounds the classes, because the class is part of a place in the queue.
const maxClasses = 9

// Check reports the first thing in the policy that makes no sense.
func (p Policy) Check() error {
	switch {
	case p.Max < 0:
		return fmt.Errorf("%w policy: max is %d; 0 pauses the group", ErrInvalid, p.Max)
	case p.ZoneMax < 0:
		return fmt.Errorf("%w policy: zone_max is %d", ErrInvalid, p.ZoneMax)
	case p.FailureBudget < 0 || p.FailuresInRow < 0:
		return fmt.Errorf("%w policy: failure budgets are %d and %d; 0 means that failures never halt a version", ErrInvalid, p.FailureBudget, p.FailuresInRow)
	case p.PausedMax < 0:
		return fmt.Errorf("%w policy: paused_max is %d", ErrInvalid, p.PausedMax)
	case p.BootDeadline < 0:
		return fmt.Errorf("%w policy: boot_deadline is %s", ErrInvalid, time.Duration(p.BootDeadline))
	case p.GrantDeadline < 0:
		return fmt.Errorf("%w policy: grant_deadline is %s", ErrInvalid, time.Duration(p.GrantDeadline))
	case p.RebootTime < 0:
		return fmt.Errorf("%w policy: reboot_time is %s", ErrInvalid, time.Duration(p.RebootTime))
	case len(p.Classes) > maxClasses:
		return fmt.Errorf("%w policy: %d classes, at most %d", ErrInvalid, len(p.Classes), maxClasses)
	}
	for zone, n := range p.Zones {
		if n < 0 {
			return fmt.Errorf("%w policy: zone %q has max %d; 0 pauses the zone", ErrInvalid, zone, n)
		}
	}
	for i, c := range p.Classes {
		if c == "" || slices.Contains(p.Classes[:i], c) {
			return fmt.Errorf("%w policy: class %q is empty or named twice", ErrInvalid, c)
		}
	}
	for _, w := range p.Windows {
		if p.RebootTime > 0 && time.Duration(p.RebootTime) > w.Length() {
			return fmt.Errorf("%w policy: a reboot takes %s and does not fit in the window %s", ErrInvalid, time.Duration(p.RebootTime), w)
		}
	}
	return nil
}

// changes says in words in which fields another policy differs, for the audit trail.
func (p Policy) changes(to Policy) string {
	var fields [2]map[string]json.RawMessage
	for i, q := range []Policy{p, to} {
		data, err := json.Marshal(q)
		if err == nil {
			err = json.Unmarshal(data, &fields[i])
		}
		if err != nil { // a policy that was checked can be written
			return err.Error()
		}
	}
	all := maps.Clone(fields[0])
	maps.Copy(all, fields[1])
	var list []string
	for _, name := range slices.Sorted(maps.Keys(all)) {
		was, is := string(fields[0][name]), string(fields[1][name])
		if was != is {
			list = append(list, fmt.Sprintf("%s %s to %s", name, cmp.Or(was, "unset"), cmp.Or(is, "unset")))
		}
	}
	return strings.Join(list, ", ")
}

// rank is the place of a class in the queue: 0 is served first.
func (p Policy) rank(class string) int {
	if i := slices.Index(p.Classes, class); i >= 0 {
		return i
	}
	return len(p.Classes)
}

// zoneMax is the limit of a zone, -1 for none.
func (p Policy) zoneMax(zone string) int {
	if n, ok := p.Zones[zone]; ok {
		return n
	}
	if p.ZoneMax > 0 && zone != "" {
		return p.ZoneMax
	}
	return -1
}

// longest is the length of the longest window, 0 if there is none.
func (p Policy) longest() (d time.Duration) {
	for _, w := range p.Windows {
		d = max(d, w.Length())
	}
	return d
}

func (p Policy) schedule() window.Schedule {
	return window.Schedule{Windows: p.Windows, Blackouts: p.Blackouts}
}

// Duration is a time.Duration that is written as "30m".
type Duration time.Duration

// MarshalText writes the duration as Go does.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText reads what MarshalText writes, and everything else that Go takes for a duration.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%w duration %q: want one as in 30m or 1h30m", ErrInvalid, text)
	}
	*d = Duration(v)
	return nil
}

func (d Duration) String() string { return time.Duration(d).String() }

// Window says whether the policy lets anybody reboot at t, and until or from when.
func (p Policy) Window(t time.Time) window.Status {
	return State{Policy: p}.Window(t)
}

// Unknown names the fields that this version does not know, with their places. In a policy that somebody has written by hand they
// are likely to be typing mistakes.
func (p Policy) Unknown() []string {
	names := p.extra.Names()
	for i, w := range p.Windows {
		for _, n := range w.Unknown() {
			names = append(names, fmt.Sprintf("windows[%d].%s", i, n))
		}
	}
	for i, b := range p.Blackouts {
		for _, n := range b.Unknown() {
			names = append(names, fmt.Sprintf("blackouts[%d].%s", i, n))
		}
	}
	return names
}
