package host

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/control"
	"github.com/flipside-linux/flipside/updater/history"
	"github.com/flipside-linux/flipside/updater/writer"
)

// Going back to a release below the floor is refused with both numbers, and done when somebody says that it is meant. The floor stays, and the
// program for the next boot's secrets is asked as before every other boot into another slot.
func TestRollbackBelowTheFloor(t *testing.T) {
	r := newRig(t)
	asked := filepath.Join(r.dir, "asked")
	unlock := filepath.Join(r.dir, "unlock")
	if err := os.WriteFile(unlock, []byte("#!/bin/sh\necho \"$@ $VERSION\" >> "+asked+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	r.conf = "[trust]\nunlock = \"" + unlock + "\"\n"
	r.update("1.5.0", r.numbered("1.5.0", 15*day, "", r.key))
	r.update("2.0.0", r.numbered("2.0.0", 20*day, "", r.key))
	before, err := os.ReadFile(r.disk)
	if err != nil {
		t.Fatal(err)
	}
	order := func(slot string, c control.Command) (refusal error, rebooted bool) {
		t.Helper()
		ordered := false
		_, rebooted = r.run(slot, func(st updater.Status) bool {
			if settled(st) && !ordered {
				ordered = true
				_, refusal = control.Do(t.Context(), filepath.Join(r.dir, "run", "control.sock"), c)
			}
			return refusal != nil
		})
		return refusal, rebooted
	}
	slot, _ := r.boot()
	err, rebooted := order(slot, control.Command{Action: control.Rollback})
	if rebooted || !errors.Is(err, updater.ErrBelowFloor) || !strings.Contains(err.Error(), "release 1.5.0 in slot USR-B has number 1296000, and the floor is 1728000") {
		t.Fatalf("rebooted %v, %v", rebooted, err)
	}
	after, err := os.ReadFile(r.disk)
	if err != nil {
		t.Fatal(err)
	}
	if string(before) != string(after) {
		t.Error("it was refused, and the disk was written")
	}
	if err, rebooted = order(slot, control.Command{Action: control.Rollback, BelowFloor: true}); err != nil || !rebooted {
		t.Fatalf("rebooted %v, %v", rebooted, err)
	}
	slot, version := r.boot()
	if version != "1.5.0" || slot != "USR-B" {
		t.Fatalf("booted %s from %s", version, slot)
	}
	st, _ := r.run(slot, settled)
	if st.LastUpdate == nil || !st.LastUpdate.Good || st.LastUpdate.From != "2.0.0" || st.LastUpdate.To != "1.5.0" {
		t.Errorf("%+v", st.LastUpdate)
	}
	records, _, err := history.Last(filepath.Join(r.dir, "state"), 100)
	if err != nil {
		t.Fatal(err)
	}
	said := fmt.Sprintf("going back from release 2.0.0 to release 1.5.0 on USR-B: asked for by user %d, even if it is older than this host accepts", os.Getuid())
	if !slices.ContainsFunc(records, func(rec history.Record) bool { return rec.Text == said }) {
		t.Errorf("the history does not say %q: %+v", said, records)
	}
	f, err := writer.Floor(r.config(slot))
	if err != nil {
		t.Fatal(err)
	}
	if l, err := f.Level(); err != nil || l.Number != 20*day {
		t.Errorf("the floor is %+v, %v", l, err)
	}
	heard, err := os.ReadFile(asked)
	if err != nil {
		t.Fatal(err)
	}
	if want := "arm USR-B 1.5.0\nconfirm USR-B 1.5.0\n"; !strings.HasSuffix(string(heard), want) {
		t.Errorf("the program heard %q, want %q at its end", heard, want)
	}
	if err, rebooted = order(slot, control.Command{Action: control.Rollback}); err != nil || !rebooted { // forth again is not below it
		t.Errorf("rebooted %v, %v", rebooted, err)
	}
}

// What is said to the server beside the protocol goes through update.proxy.
func TestPCRPolicyThroughTheProxy(t *testing.T) {
	r := newRig(t)
	var got []string
	proxy := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) { got = append(got, req.Method+" "+req.URL.String()) }))
	defer proxy.Close()
	r.conf = "[trust]\npcr_policy = \"http://policies.invalid/pcrs\"\n"
	r.boot()
	c := r.config("USR-A")
	c.Update.Proxy = proxy.URL
	e, _, closer, err := assemble(c, Options{Start: writer.InProcess(func() (config.Config, error) { return c, nil }, slog.New(slog.DiscardHandler))}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer closer()
	r.write("pcrs.zip", "a policy")
	if err := e.Installer.(*installer).guard.handOn(t.Context(), "2.0.0", filepath.Join(r.dir, "pcrs.zip")); err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || got[0] != "POST http://policies.invalid/pcrs" {
		t.Errorf("the proxy got %q", got)
	}
}

// A rollback that is given up before its reboot leaves both slots as good as they were, whatever it was that waited.
func TestRollbackGivenUp(t *testing.T) {
	r := newRig(t)
	r.update("1.5.0", r.payload("1.5.0", r.image("1.5.0"), r.key))
	running, version := r.boot()
	before := r.slot("USR-A")
	r.rebootConf = "strategy = \"off\"\n"
	var failed error
	step := 0
	st, rebooted := r.run(running, func(st updater.Status) bool {
		do := func(a control.Action) {
			step++
			if _, err := control.Do(t.Context(), filepath.Join(r.dir, "run", "control.sock"), control.Command{Action: a}); err != nil {
				failed = errors.Join(failed, err)
			}
		}
		switch {
		case step == 0 && settled(st):
			do(control.Rollback)
		case step == 1 && st.Phase == updater.Armed && len(st.Gates) > 0:
			if next := r.slot("USR-A"); next.Successful || next.Tries == 0 {
				failed = errors.Join(failed, errors.New("USR-A is not on trial"))
			}
			do(control.Cancel)
		case step == 2 && st.Phase == updater.Idle:
			return true
		}
		return failed != nil
	})
	if failed != nil || rebooted || st.Version != version {
		t.Fatalf("%v, rebooted %v, %+v", failed, rebooted, st)
	}
	run, other := r.slot(running), r.slot("USR-A")
	if !other.Successful || other.Tries != before.Tries || !run.Successful || run.Priority <= other.Priority {
		t.Errorf("running %+v, other %+v, which was %+v", run, other, before)
	}
}
