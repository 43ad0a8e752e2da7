package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/lock/single"
)

// A group is signed, its hosts are accepted, and from then on a slot is taken and given back by a host's own key, or by an owner's.
func TestFleetSign(t *testing.T) {
	dir, err := os.MkdirTemp("", "sign")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := single.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	run := func(want int, args ...string) string {
		t.Helper()
		var out, errs bytes.Buffer
		a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}
		if code := a.run(t.Context(), args); code != want {
			t.Fatalf("flipside %s: status %d, want %d\n%s%s", strings.Join(args, " "), code, want, out.String(), errs.String())
		}
		return out.String() + errs.String()
	}
	key := func(name string) (private, public string) {
		t.Helper()
		run(exitOK, "payload", "keygen", filepath.Join(dir, name))
		files, err := filepath.Glob(filepath.Join(dir, name+"*"))
		if err != nil || len(files) != 2 {
			t.Fatal(files, err)
		}
		for _, f := range files {
			if strings.Contains(filepath.Base(f), "pub") {
				public = f
			} else {
				private = f
			}
		}
		return private, public
	}
	owner, ownerPublic := key("owner")
	keyA, _ := key("a")
	keyB, _ := key("b")
	fleet := func(want int, args ...string) string {
		t.Helper()
		return run(want, append([]string{args[0], args[1], "--store", dir, "--group", "web", "--owner", ownerPublic}, args[2:]...)...)
	}
	fleet(exitUsage, "fleet", "sign")
	fleet(exitOK, "fleet", "sign", "--owner-key", owner)
	fleet(exitNothing, "fleet", "accept", "--all", "--owner-key", owner)
	fleet(exitOK, "fleet", "enrol", "--host", "a", "--signer", keyA)
	fleet(exitOK, "fleet", "enrol", "--host", "b", "--signer", keyB)
	if out := fleet(exitBlocked, "fleet", "acquire", "--host", "a", "--signer", keyA); !strings.Contains(out, "not accepted") {
		t.Error(out)
	}
	out := fleet(exitOK, "fleet", "keys")
	print := regexp.MustCompile(`(?m)^a .*(sha256:[0-9a-f]{64}) +not accepted`).FindStringSubmatch(out)
	if print == nil {
		t.Fatal(out)
	}
	fleet(exitUsage, "fleet", "accept", "a")
	fleet(exitPermitted, "fleet", "accept", "b", "--key", print[1], "--owner-key", owner)
	fleet(exitPermitted, "fleet", "accept", "a", "--key", print[1])
	fleet(exitOK, "fleet", "accept", "a", "--key", print[1], "--owner-key", owner)
	fleet(exitOK, "fleet", "accept", "--all", "--owner-key", owner)
	if out := fleet(exitOK, "fleet", "keys", "--json"); strings.Count(out, `"fingerprint"`) != 2 || strings.Contains(out, `"problem"`) {
		t.Error(out)
	}
	fleet(exitOK, "fleet", "acquire", "--host", "a", "--signer", keyA)
	for _, args := range [][]string{
		{"fleet", "release", "--host", "a"}, {"fleet", "release", "--host", "a", "--signer", keyB},
		{"fleet", "force-release", "a", "--reason", "burnt"}, {"fleet", "set-max", "5"}, {"fleet", "pause"},
	} {
		if out := fleet(exitPermitted, args...); !strings.Contains(out, "not signed") || !strings.Contains(out, "hint: ") {
			t.Error(args, out)
		}
	}
	if out := fleet(exitOK, "fleet", "status"); !strings.Contains(out, "1 of 1 down") || strings.Contains(out, "NOT SIGNED") {
		t.Error(out)
	}
	if out := run(exitOK, "fleet", "status", "--store", dir, "--group", "web"); !strings.Contains(out, "NOT SIGNED") {
		t.Error("nobody says that nothing can be checked here: ", out)
	}
	fleet(exitOK, "fleet", "release", "--host", "a", "--signer", keyA, "--verdict", "healthy")
	fleet(exitOK, "fleet", "acquire", "--host", "b", "--signer", keyB)
	fleet(exitOK, "fleet", "force-release", "b", "--reason", "burnt", "--owner-key", owner)
	fleet(exitOK, "fleet", "set-max", "5", "--owner-key", owner)
	fleet(exitOK, "fleet", "forget", "b", "--reason", "sold", "--owner-key", owner)
	other, _ := key("other")
	if out := run(exitPermitted, "fleet", "sign", "--store", dir, "--group", "web", "--owner-key", other); !strings.Contains(out, "--force") {
		t.Error(out)
	}
	fleet(exitOK, "fleet", "sign", "--owner-key", other) // it knows both
	run(exitUsage, "fleet", "sign", "--store", dir, "--group", "web", "--owner-key", owner, "--off", "--force")
	run(exitOK, "fleet", "sign", "--store", dir, "--group", "web", "--owner-key", owner, "--force")
	fleet(exitOK, "fleet", "sign", "--off", "--owner-key", owner)
	run(exitOK, "fleet", "acquire", "--store", dir, "--group", "web", "--host", "c")
}
