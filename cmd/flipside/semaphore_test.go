package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
	"github.com/flipside-linux/flipside/updater/config"
	daemon "github.com/flipside-linux/flipside/updater/host"
)

// TestFleet plays a small rollout from the command line, on a real etcd.
func TestFleet(t *testing.T) {
	endpoint, stop, err := etcdtest.StartEmbedded(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	run := func(want int, contains string, args ...string) string {
		t.Helper()
		var out, errs bytes.Buffer
		a := &app{stdin: strings.NewReader("max = 2\nfailure_budget = 1\nreboot_time = \"2m\"\n"), stdout: &out, stderr: &errs}
		args = append(args, "--endpoints", endpoint, "--group", "web")
		if code := a.run(t.Context(), args); code != want || !strings.Contains(out.String()+errs.String(), contains) {
			t.Fatalf("flipside %s ended with %d, want %d and %q; it printed\n%s%s", strings.Join(args, " "), code, want, contains, &out, &errs)
		}
		return out.String()
	}
	run(0, "0 of 1 down", "fleet", "status")
	run(0, "is set", "fleet", "policy", "set", "-", "--reason", "first")
	run(0, `"max": 2`, "fleet", "policy", "get")
	run(exitNothing, "holds no slot", "fleet", "release", "--host", "nobody")
	run(0, "a holds a slot", "fleet", "acquire", "--host", "a", "--from", "1", "--to", "2")
	run(0, "a holds a slot", "fleet", "acquire", "--host", "a", "--from", "1", "--to", "2")
	run(0, "b holds a slot", "fleet", "acquire", "--host", "b", "--to", "2")
	run(exitBlocked, "c waits at position 1", "fleet", "acquire", "--host", "c", "--to", "2")
	run(exitBlocked, "c waits at position 1", "fleet", "acquire", "--host", "c", "--to", "2", "--wait", "50ms")
	run(0, "c", "fleet", "plan")
	run(0, "1 waiting", "fleet", "status")
	run(0, "holds no slot", "fleet", "release", "--host", "b", "--verdict", "healthy")
	run(0, "c holds a slot", "fleet", "acquire", "--host", "c", "--to", "2", "--wait", "10s")
	run(0, "holds no slot", "fleet", "release", "--host", "c", "--verdict", "failed", "--version", "2", "--reason", "it smokes")
	run(exitBlocked, "it smokes", "fleet", "status")
	run(exitBlocked, "halted", "fleet", "acquire", "--host", "d", "--to", "2")
	run(exitNothing, "nothing is halted", "fleet", "resume", "3")
	run(0, "goes on with 2", "fleet", "resume", "2")
	run(0, "is paused", "fleet", "pause")
	run(exitNothing, "paused already", "fleet", "pause")
	run(0, "stays paused, and goes on with max 2", "fleet", "policy", "set", "-") // the file says max = 2
	run(exitBlocked, "paused", "fleet", "acquire", "--host", "p")
	run(0, "holds no slot", "fleet", "release", "--host", "p")
	run(0, "up to 2 host", "fleet", "resume", "--reason", "the switch is replaced")
	run(exitNothing, "not paused", "fleet", "resume")
	run(0, "up to 3", "fleet", "set-max", "3")
	run(exitUsage, "--reason", "fleet", "force-release", "a")
	run(0, "is free", "fleet", "force-release", "a", "--reason", "the machine burnt")
	run(exitNothing, "holds no slot", "fleet", "force-release", "a", "--reason", "again")
	run(0, "the machine burnt", "fleet", "history")
	run(exitUsage, "number", "fleet", "set-max", "many")
	run(exitUsage, "verdict", "fleet", "release", "--host", "a", "--verdict", "maybe")

	var fleet struct {
		Schema string `json:"schema"`
		Groups []struct {
			Schema  string `json:"schema"`
			Group   string `json:"group"`
			Holders []any  `json:"holders"`
		} `json:"groups"`
	}
	if out := run(0, "", "--json", "fleet", "status"); json.Unmarshal([]byte(out), &fleet) != nil || len(fleet.Groups) != 1 ||
		fleet.Groups[0].Schema != "flipside.fleet-group/v1" || fleet.Groups[0].Group != "web" || fleet.Groups[0].Holders == nil {
		t.Errorf("fleet status --json printed %s", out)
	}

	// What get prints is what set takes; its schema is of the document, and does not get into the store.
	policy := run(0, `"schema": "flipside.policy/v1"`, "--json", "fleet", "policy", "get")
	path := filepath.Join(t.TempDir(), "policy.json")
	for text, want := range map[string]int{policy: 0, strings.Replace(policy, "flipside.policy/v1", "flipside.plan/v1", 1): exitUsage} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		run(want, "", "fleet", "policy", "set", path)
	}
	if out := run(0, "max = 3", "fleet", "policy", "get", "--toml"); strings.Contains(out, "schema") {
		t.Errorf("the policy in the store is\n%s", out)
	}

	// The daemon's slot goes by another name than the machine's.
	dir := t.TempDir()
	for name, text := range map[string]string{
		"machine-id": "0123456789abcdef0123456789abcdef\n", "flipside.toml": "[update]\nserver = \"http://127.0.0.1:1/v1/update/\"\nchannel = \"stable\"\nkeys = [\"/etc/flipside/keys.d\"]\n[host]\nalias = \"web1\"\nmachine_id = \"" + dir + "/machine-id\"\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := config.Load(filepath.Join(dir, "flipside.toml"))
	if err != nil {
		t.Fatal(err)
	}
	name, err := daemon.LockName(c)
	if err != nil {
		t.Fatal(err)
	}
	run(0, "holds a slot", "fleet", "acquire", "--host", name, "--to", "2")
	run(exitNothing, "--host "+name, "fleet", "release", "--config", filepath.Join(dir, "flipside.toml"))
	run(0, "holds no slot", "fleet", "release", "--host", name)
}

// Who looks for it by another name is told where it is.
func TestFleetIsFound(t *testing.T) {
	for _, name := range []string{"lock", "semaphore", "flet"} {
		var errs strings.Builder
		a := &app{stdout: &errs, stderr: &errs}
		if code := a.run(t.Context(), []string{name, "status"}); code != exitUsage || !strings.Contains(errs.String(), "hint: flipside fleet\n") {
			t.Errorf("flipside %s status ended with %d: %s", name, code, &errs)
		}
	}
}

// An airlock semaphore is taken over without a moment at which both give out slots.
func TestFleetImport(t *testing.T) {
	endpoint, stop, err := etcdtest.StartEmbedded(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	const key = "com.coreos.airlock/groups/web/v1/semaphore"
	put := func(value string) {
		t.Helper()
		if _, err := c.Put(t.Context(), key, value); err != nil {
			t.Fatal(err)
		}
	}
	run := func(want int, contains string, args ...string) {
		t.Helper()
		var out bytes.Buffer
		a := &app{stdout: &out, stderr: &out}
		if code := a.run(t.Context(), append(args, "--endpoints", endpoint, "--group", "web")); code != want || !strings.Contains(out.String(), contains) {
			t.Fatalf("flipside %s ended with %d, want %d and %q; it printed\n%s", strings.Join(args, " "), code, want, contains, &out)
		}
	}
	run(exitNothing, "no semaphore", "fleet", "import", "--from", "airlock")
	put(`{"total_slots":2,"holders":["n1"],"later":true}`)
	run(0, "still held there by n1", "fleet", "import")
	resp, err := c.Get(t.Context(), key)
	if err != nil || string(resp.Kvs[0].Value) != `{"holders":["n1"],"later":true,"total_slots":0}` {
		t.Errorf("airlock is left with %s, %v", resp.Kvs[0].Value, err)
	}
	run(0, "1 of 2 down", "fleet", "status")
	run(0, "holds a slot", "fleet", "acquire", "--host", "n2")
	run(exitBlocked, "position 1", "fleet", "acquire", "--host", "n3")
	run(0, "still held there by n1", "fleet", "import") // again: changes nothing
	run(0, "2 of 2 down", "fleet", "status")
	put(`{"total_slots":0,"holders":[]}`) // n1 has given its slot back there
	run(0, "holds nobody there", "fleet", "import")
	run(0, "holds a slot", "fleet", "acquire", "--host", "n3")
	put(`{"total_slots":"many"}`)
	run(exitFailed, "total_slots", "fleet", "import")
}

func TestFleetPolicyCheck(t *testing.T) {
	for _, tt := range []struct {
		text, want string
		code       int
	}{
		{`{"max":3,"failure_budget":1,"boot_deadline":"20m"}`, "always open", 0},
		{"max = 1\n[[windows]]\ndays = [\"Thu\"]\nstart = \"04:00\"\nlength = \"1h\"\nzone = \"Europe/Berlin\"\n", "window", 0},
		{"reboot_time = \"18m\"\n[[windows]]\nstart = \"04:00\"\nlength = \"20m\"\nzone = \"UTC\"\n", "only given out in its first 5m0s", 0},
		{"max = 1\nmaks = 2\n", "unknown field \"maks\"", exitUsage},
		{"[[windows]]\ndyas = [\"Mon\"]\nstart = \"04:00\"\nlength = \"1h\"\nzone = \"UTC\"\n", "unknown field \"windows[0].dyas\"", exitUsage},
		{"max = -1\n", "max is -1", exitFailed},
		{"[[windows]]\nstart = \"2:30pm\"\nlength = \"1h\"\nzone = \"UTC\"\n", "2:30pm", exitFailed},
		{"boot_deadline = \"soon\"\n", "soon", exitFailed},
		{"max = \n", "policy.toml", exitFailed},
	} {
		path := filepath.Join(t.TempDir(), "policy.toml")
		if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		a := &app{stdout: &out, stderr: &out}
		if code := a.run(t.Context(), []string{"fleet", "policy", "check", path}); code != tt.code || !strings.Contains(out.String(), tt.want) {
			t.Errorf("%q: exit %d, want %d and %q; it printed %s", tt.text, code, tt.code, tt.want, &out)
		}
	}
}
