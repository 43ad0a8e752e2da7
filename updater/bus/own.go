package bus

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/godbus/dbus/v5/introspect"

	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/control"
	"github.com/flipside-linux/flipside/updater/history"
)

// The names of Flipside's own interface.
const (
	Name      = "org.flipside.Updater1"
	Path      = dbus.ObjectPath("/org/flipside/Updater1")
	Interface = "org.flipside.Updater1"

	propsInterface = "org.freedesktop.DBus.Properties"
)

// Gate is what a gate says: signature (sssxxss). Times are Unix seconds, 0 if there is none.
type Gate struct {
	Name, Verdict, Why string
	Since, Until       int64
	Hint, Evidence     string
}

// Slot is a slot: signature (ssxyybbb).
type Slot struct {
	Label, UUID               string
	Size                      int64
	Priority, Tries           byte
	Successful, Running, Next bool
}

// Update is the update under way: signature (ssxx); the version is empty if there is none.
type Update struct {
	Version, Slot string
	Size, Started int64
}

// Progress is how far it has come: signature (xxds).
type Progress struct {
	Done, Total int64
	Rate        float64
	Step        string
}

// Done is the outcome of the last update: signature (ssxbs).
type Done struct {
	From, To string
	At       int64
	Good     bool
	Reason   string
}

func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

// properties says a status as the properties of the interface, in the order of the reference.
func properties(st updater.Status) (names []string, values map[string]any) {
	values = map[string]any{}
	set := func(name string, value any) {
		names = append(names, name)
		values[name] = value
	}
	update, progress, done := Update{}, Progress{}, Done{}
	if u := st.Update; u != nil {
		update = Update{u.Version, u.Slot, u.Size, unix(u.Started)}
	}
	if p := st.Progress; p != nil {
		progress = Progress{p.Done, p.Total, p.Rate, p.Step}
	}
	if u := st.LastUpdate; u != nil {
		done = Done{u.From, u.To, unix(u.At), u.Good, u.Reason}
	}
	gates, slots := []Gate{}, []Slot{}
	for _, g := range st.Gates {
		gates = append(gates, Gate{g.Gate, string(g.Verdict), g.Why, unix(g.Since), unix(g.Ask), g.Hint, g.Evidence})
	}
	for _, s := range st.Slots {
		slots = append(slots, Slot{s.Label, s.UUID, s.Size, s.Priority, s.Tries, s.Successful, s.Running, s.Next})
	}
	set("Version", st.Version)
	set("Slot", st.Slot)
	set("Channel", st.Channel)
	set("Pin", st.Pin)
	set("Phase", string(st.Phase))
	set("Since", unix(st.Since))
	set("Why", st.Why)
	set("Blocked", st.Blocked)
	set("Update", update)
	set("Progress", progress)
	set("GateStage", string(st.Stage))
	set("Gates", gates)
	set("Slots", slots)
	set("LastCheck", unix(st.LastCheck))
	set("NextCheck", unix(st.NextCheck))
	set("LastAnswer", st.LastAnswer)
	set("LastError", st.LastError)
	set("ErrorAt", unix(st.ErrorAt))
	set("LastUpdate", done)
	return names, values
}

// host is Flipside's own object.
type host struct {
	conn    *dbus.Conn
	daemon  control.Daemon
	history func(n int) ([]history.Record, error)

	mu     sync.Mutex
	values map[string]any
	seq    uint64 // of the last record of the history that was told
}

// methods is every method of the interface with its arguments, as docs/dbus.md has them.
func (h *host) methods() map[string]any {
	order := func(c control.Command, msg dbus.Message, sender dbus.Sender) *dbus.Error {
		return h.order(msg, sender, c)
	}
	return map[string]any{
		"Check": func(msg dbus.Message, s dbus.Sender, forgive []string) *dbus.Error {
			return order(control.Command{Action: control.Check, Forgive: forgive}, msg, s)
		},
		"Pause": func(msg dbus.Message, s dbus.Sender, reason string, until int64) *dbus.Error {
			c := control.Command{Action: control.Pause, Reason: reason}
			if until != 0 {
				c.Until = time.Unix(until, 0)
			}
			return order(c, msg, s)
		},
		"Resume": func(msg dbus.Message, s dbus.Sender) *dbus.Error {
			return order(control.Command{Action: control.Resume}, msg, s)
		},
		"SetChannel": func(msg dbus.Message, s dbus.Sender, channel string) *dbus.Error {
			return order(control.Command{Action: control.SetChannel, Value: channel}, msg, s)
		},
		"SetPin": func(msg dbus.Message, s dbus.Sender, version string) *dbus.Error {
			return order(control.Command{Action: control.SetPin, Value: version}, msg, s)
		},
		"Cancel": func(msg dbus.Message, s dbus.Sender) *dbus.Error {
			return order(control.Command{Action: control.Cancel}, msg, s)
		},
		"Rollback": func(msg dbus.Message, s dbus.Sender) *dbus.Error {
			return order(control.Command{Action: control.Rollback}, msg, s)
		},
		"Reboot": func(msg dbus.Message, s dbus.Sender, now bool) *dbus.Error {
			a := control.Reboot
			if now {
				a = control.RebootNow
			}
			return order(control.Command{Action: a}, msg, s)
		},
		"Reload": func(msg dbus.Message, s dbus.Sender) *dbus.Error {
			return order(control.Command{Action: control.Reload}, msg, s)
		},
		"GetStatus":  h.getStatus,
		"GetPlan":    h.getPlan,
		"GetHistory": h.getHistory,
	}
}

// arguments names them, because Go's functions do not.
var arguments = map[string][]introspect.Arg{
	"Check":      {{Name: "forgive", Type: "as", Direction: "in"}},
	"Pause":      {{Name: "reason", Type: "s", Direction: "in"}, {Name: "until", Type: "x", Direction: "in"}},
	"SetChannel": {{Name: "channel", Type: "s", Direction: "in"}},
	"SetPin":     {{Name: "version", Type: "s", Direction: "in"}},
	"Reboot":     {{Name: "now", Type: "b", Direction: "in"}},
	"GetStatus":  {{Name: "status", Type: "s", Direction: "out"}},
	"GetPlan":    {{Name: "channel", Type: "s", Direction: "in"}, {Name: "plan", Type: "s", Direction: "out"}},
	"GetHistory": {{Name: "count", Type: "u", Direction: "in"}, {Name: "records", Type: "as", Direction: "out"}},
}

// methodOrder is that of the reference.
var methodOrder = []string{"GetStatus", "GetHistory", "GetPlan", "Check", "Pause", "Resume", "SetChannel", "SetPin", "Cancel", "Rollback", "Reboot", "Reload"}

// Node describes the object, as Introspect does.
func Node() introspect.Node {
	iface := introspect.Interface{Name: Interface}
	for _, name := range methodOrder {
		iface.Methods = append(iface.Methods, introspect.Method{Name: name, Args: arguments[name]})
	}
	names, values := properties(updater.Status{})
	for _, name := range names {
		iface.Properties = append(iface.Properties, introspect.Property{
			Name: name, Type: dbus.SignatureOf(values[name]).String(), Access: "read",
			Annotations: []introspect.Annotation{{Name: "org.freedesktop.DBus.Property.EmitsChangedSignal", Value: "true"}},
		})
	}
	iface.Signals = []introspect.Signal{{Name: "Recorded", Args: []introspect.Arg{{Name: "seq", Type: "t"}, {Name: "kind", Type: "s"}, {Name: "text", Type: "s"}}}}
	return introspect.Node{Name: string(Path), Interfaces: []introspect.Interface{introspect.IntrospectData, propsData, iface}}
}

var propsData = introspect.Interface{
	Name: propsInterface,
	Methods: []introspect.Method{
		{Name: "Get", Args: []introspect.Arg{{Name: "interface", Type: "s", Direction: "in"}, {Name: "property", Type: "s", Direction: "in"}, {Name: "value", Type: "v", Direction: "out"}}},
		{Name: "GetAll", Args: []introspect.Arg{{Name: "interface", Type: "s", Direction: "in"}, {Name: "props", Type: "a{sv}", Direction: "out"}}},
		{Name: "Set", Args: []introspect.Arg{{Name: "interface", Type: "s", Direction: "in"}, {Name: "property", Type: "s", Direction: "in"}, {Name: "value", Type: "v", Direction: "in"}}},
	},
	Signals: []introspect.Signal{{Name: "PropertiesChanged", Args: []introspect.Arg{{Name: "interface", Type: "s"}, {Name: "changed", Type: "a{sv}"}, {Name: "invalidated", Type: "as"}}}},
}

func (h *host) export() error {
	if err := h.conn.ExportMethodTable(map[string]any{"Get": h.get, "GetAll": h.getAll, "Set": h.set}, Path, propsInterface); err != nil {
		return fmt.Errorf("exporting the properties: %w", err)
	}
	return exportObject(h.conn, Path, Interface, h.methods(), Node())
}

// order carries a command out for whoever may give it.
func (h *host) order(msg dbus.Message, sender dbus.Sender, c control.Command) *dbus.Error {
	asking, stop := context.WithTimeout(h.conn.Context(), typing)
	defer stop()
	by, refused := permit(asking, h.conn, msg, sender, c.Action)
	if refused != nil {
		return refused
	}
	ctx, cancel := context.WithTimeout(h.conn.Context(), patience)
	defer cancel()
	if err := h.daemon.Do(ctx, by, c); err != nil {
		return busError(err)
	}
	return nil
}

func (h *host) getStatus() (string, *dbus.Error) {
	ctx, cancel := context.WithTimeout(h.conn.Context(), patience)
	defer cancel()
	st, _ := h.daemon.Status(ctx)
	return document(st)
}

// getPlan asks the server, and needs the permission of a check for it.
func (h *host) getPlan(msg dbus.Message, sender dbus.Sender, channel string) (string, *dbus.Error) {
	asking, stop := context.WithTimeout(h.conn.Context(), typing)
	defer stop()
	if _, refused := permit(asking, h.conn, msg, sender, control.Check); refused != nil {
		return "", refused
	}
	ctx, cancel := context.WithTimeout(h.conn.Context(), 2*patience)
	defer cancel()
	p, err := h.daemon.Plan(ctx, channel)
	if err != nil {
		return "", busError(err)
	}
	return document(p)
}

// maxRecords bounds what one call gives of the history.
const maxRecords = 1000

func (h *host) getHistory(count uint32) ([]string, *dbus.Error) {
	list := []string{}
	if h.history == nil {
		return list, nil
	}
	records, err := h.history(int(min(count, maxRecords)))
	if err != nil {
		return nil, busError(err)
	}
	for _, r := range records {
		text, refused := document(r)
		if refused != nil {
			return nil, refused
		}
		list = append(list, text)
	}
	return list, nil
}

func document(v any) (string, *dbus.Error) {
	data, err := json.Marshal(v)
	if err != nil {
		return "", dbus.MakeFailedError(err)
	}
	return string(data), nil
}

func (h *host) get(iface, name string) (dbus.Variant, *dbus.Error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	value, ok := h.values[name]
	if iface != Interface || !ok {
		return dbus.Variant{}, dbus.NewError("org.freedesktop.DBus.Error.UnknownProperty", []any{fmt.Sprintf("%s has no property %q", iface, name)})
	}
	return dbus.MakeVariant(value), nil
}

func (h *host) getAll(iface string) (map[string]dbus.Variant, *dbus.Error) {
	all := map[string]dbus.Variant{}
	if iface != Interface && iface != "" {
		return all, nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for name, value := range h.values {
		all[name] = dbus.MakeVariant(value)
	}
	return all, nil
}

func (h *host) set(iface, name string, _ dbus.Variant) *dbus.Error {
	return dbus.NewError("org.freedesktop.DBus.Error.PropertyReadOnly", []any{fmt.Sprintf("property %s of %s is read-only; the methods change what can be changed", name, iface)})
}

// update takes a status over and returns the properties that it changes.
func (h *host) update(st updater.Status) map[string]dbus.Variant {
	names, values := properties(st)
	h.mu.Lock()
	defer h.mu.Unlock()
	changed := map[string]dbus.Variant{}
	for _, name := range names {
		if !reflect.DeepEqual(h.values[name], values[name]) {
			changed[name] = dbus.MakeVariant(values[name])
		}
	}
	h.values = values
	return changed
}

// tell sends what changed since the last time, and what was added to the history.
func (h *host) tell(st updater.Status) error {
	if changed := h.update(st); len(changed) > 0 {
		if err := h.conn.Emit(Path, propsInterface+".PropertiesChanged", Interface, changed, []string{}); err != nil {
			return err
		}
	}
	if h.history == nil {
		return nil
	}
	records, err := h.history(16)
	if err != nil {
		return nil // the history stops nothing, and its reader is told by GetHistory
	}
	for _, r := range records {
		if r.Seq <= h.seq {
			continue
		}
		h.seq = r.Seq
		if err := h.conn.Emit(Path, Interface+".Recorded", r.Seq, r.Kind, r.Text); err != nil {
			return err
		}
	}
	return nil
}

// skipHistory makes Recorded tell only of what comes from now on.
func (h *host) skipHistory() {
	if h.history == nil {
		return
	}
	if records, err := h.history(1); err == nil && len(records) > 0 {
		h.seq = records[len(records)-1].Seq
	}
}
