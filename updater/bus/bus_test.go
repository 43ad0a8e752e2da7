package bus

import (
	"bufio"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/control"
	"github.com/flipside-linux/flipside/updater/history"
)

const nobody = 65534

// TestMain makes the test binary be an ordinary user's program too: it makes one call and prints the error's name and text.
func TestMain(m *testing.M) {
	call := os.Getenv("FLIPSIDE_TEST_BUS_CALL")
	if call == "" {
		os.Exit(m.Run())
	}
	if action, ok := strings.CutPrefix(call, "do "); ok {
		_, err := Client{Address: os.Getenv("FLIPSIDE_TEST_BUS")}.Do(context.Background(), control.Command{Action: control.Action(action)})
		fmt.Printf("denied: %v, not running: %v: %v\n", errors.Is(err, control.ErrDenied), errors.Is(err, control.ErrNotRunning), err)
		return
	}
	dest, member, _ := strings.Cut(call, " ")
	path := dbus.ObjectPath("/" + strings.ReplaceAll(dest, ".", "/"))
	conn, err := dbus.Connect(os.Getenv("FLIPSIDE_TEST_BUS"))
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	var args []any
	if strings.HasSuffix(member, ".Check") {
		args = append(args, []string{})
	}
	err = conn.Object(dest, path).Call(member, 0, args...).Err
	var e dbus.Error
	switch {
	case errors.As(err, &e):
		fmt.Printf("%s: %v\n", e.Name, err)
	case err != nil:
		fmt.Println(err)
	default:
		fmt.Println("ok")
	}
}

// fake is a daemon whose status is set by the test.
type fake struct {
	mu      sync.Mutex
	st      updater.Status
	changed chan struct{}
	did     []string
	refuse  error
}

func (f *fake) Status(context.Context) (updater.Status, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.st, f.changed
}

func (f *fake) Do(_ context.Context, by string, c control.Command) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	did := string(c.Action) + " by " + by
	if c.BelowFloor {
		did += " below the floor"
	}
	f.did = append(f.did, did)
	return f.refuse
}

func (f *fake) Plan(_ context.Context, channel string) (updater.Plan, error) {
	return updater.Plan{Schema: "flipside.plan/v1", Channel: channel}, nil
}

func (f *fake) set(st updater.Status) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.st = st
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fake) done() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.did...)
}

// startBus runs a real dbus-daemon with the policy files of packaging/dbus, as the system bus has them.
func startBus(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("dbus-daemon"); err != nil {
		t.Skip("needs dbus-daemon (Debian's dbus)")
	}
	if os.Getuid() != 0 {
		t.Skip("the policy lets only root own the names")
	}
	policies, err := filepath.Abs("../../packaging/dbus")
	if err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(t.TempDir(), "bus.conf")
	text := fmt.Sprintf(`<busconfig><type>system</type><listen>unix:abstract=flipside-test-%d-%d</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><deny own="*"/><deny send_type="method_call"/><allow send_type="signal"/><allow send_requested_reply="true" send_type="method_return"/>
<allow send_requested_reply="true" send_type="error"/><allow receive_type="method_call"/><allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/>
<allow send_destination="org.freedesktop.DBus"/></policy><includedir>%s</includedir>
<policy context="default"><allow own="org.freedesktop.PolicyKit1"/><allow send_destination="org.freedesktop.PolicyKit1"/></policy></busconfig>`,
		os.Getpid(), time.Now().UnixNano(), policies)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dbus-daemon", "--config-file="+conf, "--nofork", "--nopidfile", "--print-address=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("dbus-daemon printed no address: %v", err)
	}
	return strings.TrimSpace(address)
}

// start serves d and returns a client's connection.
func start(t *testing.T, address string, d *fake, hist func(int) ([]history.Record, error)) *dbus.Conn {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); Run(ctx, d, Options{Address: address, History: hist}) }()
	t.Cleanup(func() { cancel(); <-ended })
	conn, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		var both int
		for _, name := range []string{Name, OlderName} {
			var has bool
			if conn.BusObject().Call("org.freedesktop.DBus.NameHasOwner", 0, name).Store(&has) == nil && has {
				both++
			}
		}
		if both == 2 {
			return conn
		}
		if time.Now().After(deadline) {
			t.Fatal("the names do not appear on the bus")
		}
	}
}

func newFake(st updater.Status) *fake { return &fake{st: st, changed: make(chan struct{})} }

var checked = time.Unix(1700000000, 0)

// asUser makes one call as an ordinary user.
func asUser(t *testing.T, address, dest, member string) string {
	t.Helper()
	self := filepath.Join(os.TempDir(), fmt.Sprintf("flipside-bus-test-%d", os.Getpid())) // the test binary's own directory is root's
	if _, err := os.Stat(self); err != nil {
		data, err := os.ReadFile("/proc/self/exe")
		if err == nil {
			err = os.WriteFile(self, data, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(self) })
	}
	cmd := exec.Command(self)
	cmd.Dir = "/"
	cmd.Env = []string{"FLIPSIDE_TEST_BUS=" + address, "FLIPSIDE_TEST_BUS_CALL=" + dest + " " + member}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestTheOlderInterface(t *testing.T) {
	address := startBus(t)
	d := newFake(updater.Status{Phase: updater.Idle, LastCheck: checked})
	conn := start(t, address, d, nil)
	signals := make(chan *dbus.Signal, 64)
	conn.Signal(signals)
	// The match that locksmithd makes.
	if err := conn.AddMatchSignal(dbus.WithMatchInterface(OlderInterface), dbus.WithMatchMember("StatusUpdate")); err != nil {
		t.Fatal(err)
	}
	object := conn.Object(OlderName, OlderPath)
	var got Older
	if err := object.Call(OlderInterface+".GetStatus", 0).Store(&got.LastChecked, &got.Progress, &got.Operation, &got.NewVersion, &got.NewSize); err != nil {
		t.Fatal(err)
	}
	if want := (Older{1700000000, 0, "UPDATE_STATUS_IDLE", "0.0.0", 0}); got != want {
		t.Errorf("status %+v, want %+v", got, want)
	}
	if err := object.Call(OlderInterface+".AttemptUpdate", 0).Err; err != nil {
		t.Error(err)
	}
	up := &updater.UpdateStatus{Version: "2.0.0", Size: 1000}
	d.set(updater.Status{Phase: updater.Applying, LastCheck: checked, Update: up, Progress: &updater.Progress{Done: 500, Total: 1000}})
	if err := object.Call(OlderInterface+".AttemptUpdate", 0).Err; err != nil { // not idle: nothing happens, and that is no error
		t.Error(err)
	}
	// The signal of the start may come at any time before the first change: what is waited for is an operation.
	next := func(operation string) Older {
		t.Helper()
		for {
			select {
			case s := <-signals:
				if s == nil || s.Name != OlderInterface+".StatusUpdate" {
					continue
				}
				var o Older
				if err := dbus.Store(s.Body, &o.LastChecked, &o.Progress, &o.Operation, &o.NewVersion, &o.NewSize); err != nil {
					t.Fatal(err)
				}
				if o.Operation == operation {
					return o
				}
			case <-time.After(time.Minute):
				t.Fatal("no signal of ", operation)
			}
		}
	}
	if o, want := next("UPDATE_STATUS_DOWNLOADING"), (Older{1700000000, 0.5, "UPDATE_STATUS_DOWNLOADING", "2.0.0", 1000}); o != want {
		t.Errorf("signal %+v, want %+v", o, want)
	}
	d.set(updater.Status{Phase: updater.Armed, LastCheck: checked, Update: up})
	if o := next("UPDATE_STATUS_UPDATED_NEED_REBOOT"); o.NewVersion != "2.0.0" {
		t.Errorf("signal %+v", o)
	}
	if err := object.Call(OlderInterface+".ResetStatus", 0).Err; err != nil {
		t.Error(err)
	}
	if did := strings.Join(d.done(), "; "); did != "check by user 0 on com.coreos.update1; cancel by user 0 on com.coreos.update1" {
		t.Errorf("done: %s", did)
	}
	if out := asUser(t, address, OlderName, OlderInterface+".GetStatus"); out != "ok" {
		t.Errorf("GetStatus by an ordinary user: %s", out)
	}
	if out := asUser(t, address, OlderName, OlderInterface+".AttemptUpdate"); !strings.HasPrefix(out, "org.freedesktop.DBus.Error.AccessDenied") {
		t.Errorf("AttemptUpdate by an ordinary user: %s", out)
	}
}

func TestOlderStatus(t *testing.T) {
	up := &updater.UpdateStatus{Version: "2.0.0", Size: 10}
	for _, tt := range []struct {
		st   updater.Status
		want Older
	}{
		{updater.Status{Phase: updater.Idle}, Older{0, 0, statusIdle, "0.0.0", 0}},
		{updater.Status{Phase: updater.Idle, Asking: true}, Older{0, 0, statusChecking, "0.0.0", 0}},
		{updater.Status{Phase: updater.Applying, Update: up}, Older{0, 0, statusAvailable, "2.0.0", 10}},
		{updater.Status{Phase: updater.Applying, Update: up, Progress: &updater.Progress{Done: 1, Total: 10}}, Older{0, 0.1, statusDownloading, "2.0.0", 10}},
		{updater.Status{Phase: updater.Applying, Update: up, Progress: &updater.Progress{Done: 10, Total: 10}}, Older{0, 0, statusFinalizing, "2.0.0", 10}},
		{updater.Status{Phase: updater.Armed, Update: up}, Older{0, 0, statusNeedReboot, "2.0.0", 10}},
		{updater.Status{Phase: updater.Rebooting, Update: up}, Older{0, 0, statusNeedReboot, "2.0.0", 10}},
		{updater.Status{Phase: updater.Trial, Update: up}, Older{0, 0, statusIdle, "0.0.0", 0}},
		{updater.Status{Phase: updater.Failing, Update: up}, Older{0, 0, statusReporting, "2.0.0", 10}},
	} {
		if got := OlderStatus(tt.st); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.st.Phase, got, tt.want)
		}
	}
}

func TestOwnInterface(t *testing.T) {
	address := startBus(t)
	d := newFake(updater.Status{Schema: "flipside.status/v1", Version: "1.0.0", Phase: updater.Idle, Why: "up to date", Channel: "stable"})
	records := []history.Record{{Seq: 1, Kind: "started", Text: "before"}}
	var mu sync.Mutex
	conn := start(t, address, d, func(n int) ([]history.Record, error) {
		mu.Lock()
		defer mu.Unlock()
		return records[max(0, len(records)-n):], nil
	})
	object := conn.Object(Name, Path)
	signals := make(chan *dbus.Signal, 64)
	conn.Signal(signals)
	if err := conn.AddMatchSignal(dbus.WithMatchObjectPath(Path)); err != nil {
		t.Fatal(err)
	}
	var all map[string]dbus.Variant
	if err := object.Call(propsInterface+".GetAll", 0, Interface).Store(&all); err != nil {
		t.Fatal(err)
	}
	if all["Why"].Value() != "up to date" || all["Channel"].Value() != "stable" {
		t.Errorf("properties %v", all)
	}
	var description string
	if err := object.Call("org.freedesktop.DBus.Introspectable.Introspect", 0).Store(&description); err != nil {
		t.Fatal(err)
	}
	_, values := properties(updater.Status{})
	for name := range all {
		if want := fmt.Sprintf(`<property name=%q type=%q access="read">`, name, dbus.SignatureOf(values[name])); !strings.Contains(description, want) {
			t.Errorf("the description lacks %s", want)
		}
	}
	var status string
	if err := object.Call(Interface+".GetStatus", 0).Store(&status); err != nil || !json.Valid([]byte(status)) || !strings.Contains(status, "flipside.status/v1") {
		t.Errorf("GetStatus: %v, %s", err, status)
	}
	mu.Lock()
	records = append(records, history.Record{Seq: 2, Kind: "update-armed", Text: "release 2.0.0 is in place"})
	mu.Unlock()
	d.set(updater.Status{
		Version: "1.0.0", Phase: updater.Armed, Why: "outside the window", Channel: "stable", Blocked: true, Stage: updater.BeforeReboot,
		Gates: []reboot.Answer{{Gate: "window", Verdict: reboot.Wait, Why: "outside the window", Since: checked, Hint: "wait"}},
	})
	var changed map[string]dbus.Variant
	recorded := ""
	for changed == nil || recorded == "" {
		select {
		case s := <-signals:
			switch {
			case s == nil:
			case s.Name == propsInterface+".PropertiesChanged":
				if c := s.Body[1].(map[string]dbus.Variant); c["Phase"].Value() == "armed" {
					changed = c
				}
			case s.Name == Interface+".Recorded":
				recorded = s.Body[2].(string)
			}
		case <-time.After(time.Minute):
			t.Fatalf("changed %v, recorded %q", changed, recorded)
		}
	}
	if _, ok := changed["Channel"]; ok || changed["Gates"].Signature().String() != "a(sssxxss)" {
		t.Errorf("changed: %v", changed)
	}
	if recorded != "release 2.0.0 is in place" {
		t.Errorf("recorded %q", recorded)
	}
	if err := object.Call(Interface+".Pause", 0, "because", int64(0)).Err; err != nil {
		t.Errorf("root may not pause: %v", err)
	}
	for reason, name := range map[error]string{updater.ErrNothing: "NothingToDo", updater.ErrUnderWay: "UnderWay", updater.ErrBelowFloor: "BelowFloor", errors.New("else"): "Failed"} {
		d.mu.Lock()
		d.refuse = fmt.Errorf("%w: as the test wants it", reason)
		d.mu.Unlock()
		var e dbus.Error
		if err := object.Call(Interface+".Rollback", 0).Err; !errors.As(err, &e) || e.Name != Interface+".Error."+name {
			t.Errorf("refused with %q, Rollback says %v", reason, err)
		}
	}
	for _, arg := range []any{true, "below-floor", map[string]dbus.Variant{"below_floor": dbus.MakeVariant(true)}} { // nobody on the bus says that it is meant
		if err := object.Call(Interface+".Rollback", 0, arg).Err; err == nil {
			t.Errorf("Rollback takes %v", arg)
		}
	}
	d.mu.Lock()
	d.refuse = fmt.Errorf("%w: no release waits", updater.ErrNothing)
	d.mu.Unlock()
	var e dbus.Error
	if err := object.Call(Interface+".Reboot", 0, true).Err; !errors.As(err, &e) || e.Name != Interface+".Error.NothingToDo" {
		t.Errorf("Reboot: %v", err)
	}
	if err := object.Call(propsInterface+".Set", 0, Interface, "Pin", dbus.MakeVariant("9")).Err; err == nil {
		t.Error("a property was set")
	}
	if did := strings.Join(d.done(), "; "); did != "pause by user 0; "+strings.Repeat("rollback by user 0; ", 4)+"reboot-now by user 0" {
		t.Errorf("done: %s", did)
	}
	// Nobody answers for polkit here: an ordinary user may read, and is told which action it takes to do more.
	if out := asUser(t, address, Name, Interface+".GetStatus"); out != "ok" {
		t.Errorf("GetStatus by an ordinary user: %s", out)
	}
	if out := asUser(t, address, Name, Interface+".Check"); !strings.HasPrefix(out, errorDenied) || !strings.Contains(out, "org.flipside.updater1.check") {
		t.Errorf("Check by an ordinary user: %s", out)
	}
}

// TestPolkit asks the real polkitd, with the action file of packaging/polkit and one rule, in a mount namespace of its own.
func TestPolkit(t *testing.T) {
	const polkitd = "/usr/lib/polkit-1/polkitd"
	if _, err := os.Stat(polkitd); err != nil {
		t.Skip("needs polkitd")
	}
	address := startBus(t)
	dir, err := os.MkdirTemp("", "flipside-polkit")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	rule := `polkit.addRule(function(a, s) { if (a.id == "org.flipside.updater1.check" && s.user == "nobody") return polkit.Result.YES; });`
	if err := os.WriteFile(filepath.Join(dir, "10-test.rules"), []byte(rule), 0o644); err != nil {
		t.Fatal(err)
	}
	actions, err := filepath.Abs("../../packaging/polkit")
	if err != nil {
		t.Fatal(err)
	}
	// polkitd drops root; what it reads must be readable without.
	if err := os.CopyFS(filepath.Join(dir, "actions"), os.DirFS(actions)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "-m", "sh", "-c", `mount --bind "$0/actions" /usr/share/polkit-1/actions && mount --bind "$0" /usr/share/polkit-1/rules.d && exec `+polkitd+` --no-debug`, dir)
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+address)
	if err := cmd.Start(); err != nil {
		t.Skipf("polkitd cannot be started here: %v", err)
	}
	gone := make(chan struct{})
	go func() { cmd.Wait(); close(gone) }()
	t.Cleanup(func() { cmd.Process.Kill(); <-gone })
	d := newFake(updater.Status{Phase: updater.Idle})
	conn := start(t, address, d, nil)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		var has bool
		if conn.BusObject().Call("org.freedesktop.DBus.NameHasOwner", 0, "org.freedesktop.PolicyKit1").Store(&has) == nil && has {
			break
		}
		select {
		case <-gone:
			t.Skip("polkitd does not run here (it needs a mount namespace)")
		default:
		}
		if time.Now().After(deadline) {
			t.Skip("polkitd does not take its name here")
		}
	}
	if out := asUser(t, address, Name, Interface+".Check"); out != "ok" {
		t.Errorf("Check, which a rule allows: %s", out)
	}
	out := asUser(t, address, Name, Interface+".Rollback")
	if !strings.Contains(out, "org.flipside.updater1.rollback") || strings.Contains(out, "cannot be asked") {
		t.Errorf("Rollback, which no rule allows: %s", out)
	}
	// As the flipside command asks.
	if out := asUser(t, address, "do", "check"); out != "denied: false, not running: false: <nil>" {
		t.Errorf("a check by the client, which a rule allows: %s", out)
	}
	if out := asUser(t, address, "do", "reboot-now"); !strings.HasPrefix(out, "denied: true, not running: false: not permitted: it needs the polkit action org.flipside.updater1.reboot-now") {
		t.Errorf("a reboot by the client, which no rule allows: %s", out)
	}
	if did := strings.Join(d.done(), "; "); did != fmt.Sprintf("check by user %d; check by user %[1]d", nobody) {
		t.Errorf("done: %s", did)
	}
}

// Every action that the code asks for is one that the policy file declares, and the other way round.
func TestThePolicyFileHasEveryAction(t *testing.T) {
	data, err := os.ReadFile("../../packaging/polkit/org.flipside.updater1.policy")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Actions []struct {
			ID string `xml:"id,attr"`
		} `xml:"action"`
	}
	if err := xml.Unmarshal(data, &file); err != nil {
		t.Fatal(err)
	}
	var have, want []string
	for _, a := range file.Actions {
		have = append(have, a.ID)
	}
	for _, a := range control.Actions() {
		want = append(want, a.Polkit())
	}
	if strings.Join(have, " ") != strings.Join(want, " ") {
		t.Errorf("the file has\n%s\nthe code wants\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"))
	}
}

// The client gives every order that the socket takes, but those that the bus has none for, and tells the daemon's refusals apart.
func TestClient(t *testing.T) {
	address := startBus(t)
	c := Client{Address: address}
	if _, err := c.Do(t.Context(), control.Command{Action: control.Check}); !errors.Is(err, control.ErrNotRunning) {
		t.Errorf("no daemon on the bus: %v", err)
	}
	d := newFake(updater.Status{Phase: updater.Idle, Version: "1.0.0"})
	start(t, address, d, nil)
	var want []string
	for _, action := range control.Actions() {
		st, err := c.Do(t.Context(), control.Command{Action: action})
		if err != nil || st.Version != "1.0.0" {
			t.Errorf("%s: %+v, %v", action, st, err)
		}
		want = append(want, string(action)+" by user 0")
	}
	if did := d.done(); !slices.Equal(did, want) {
		t.Errorf("done: %q, want %q", did, want)
	}
	if p, err := c.Plan(t.Context(), "beta"); err != nil || p.Channel != "beta" {
		t.Errorf("%+v, %v", p, err)
	}
	for _, kind := range []error{updater.ErrNothing, updater.ErrUnderWay, updater.ErrBelowFloor, control.ErrBadCommand} {
		d.mu.Lock()
		d.refuse = fmt.Errorf("%w: so it is", kind)
		d.mu.Unlock()
		if _, err := c.Do(t.Context(), control.Command{Action: control.Rollback}); !errors.Is(err, kind) || err.Error() != kind.Error()+": so it is" {
			t.Errorf("%v came as %v", kind, err)
		}
	}
	before := len(d.done())
	if _, err := c.Do(t.Context(), control.Command{Action: control.Rollback, BelowFloor: true}); !errors.Is(err, control.ErrDenied) || len(d.done()) != before {
		t.Errorf("below the floor: %v, %q", err, d.done()[before:])
	}
	// A daemon that ends when it has taken the order, and says nothing more, or not what a status is.
	for _, said := range []string{"", "{"} {
		gone := Client{Address: startBus(t)}
		conn, err := dbus.Connect(gone.Address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		status := func() (string, *dbus.Error) {
			if said == "" {
				return "", dbus.NewError("org.freedesktop.DBus.Error.ServiceUnknown", []any{"gone"})
			}
			return said, nil
		}
		methods := map[string]any{"Resume": func() *dbus.Error { return nil }, "GetStatus": status}
		if err := conn.ExportMethodTable(methods, Path, Interface); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.RequestName(Name, dbus.NameFlagDoNotQueue); err != nil {
			t.Fatal(err)
		}
		if _, err := gone.Do(t.Context(), control.Command{Action: control.Resume}); !errors.Is(err, ErrTaken) || errors.Is(err, control.ErrNotRunning) {
			t.Errorf("a status that is %q: %v", said, err)
		}
	}
	if _, err := (Client{Address: "unix:path=/nowhere"}).Do(t.Context(), control.Command{Action: control.Check}); !errors.Is(err, control.ErrNotRunning) {
		t.Errorf("no bus: %v", err)
	}
}
