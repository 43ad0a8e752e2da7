package main

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
)

// screenful is what a command prints while it runs.
type screenful struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *screenful) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *screenful) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// background runs a command until the test ends and returns the address at which it says that FleetLock clients are answered.
func background(t *testing.T, args ...string) (address string, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	out := &screenful{}
	done := make(chan int, 1)
	go func() { done <- (&app{stdout: out, stderr: out}).run(ctx, args) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if code := <-done; code != 0 {
			t.Errorf("flipside %s ended with %d: %s", strings.Join(args, " "), code, out)
		}
	})
	t.Cleanup(stop)
	said := regexp.MustCompile(`answered at (\S+)`)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if m := said.FindStringSubmatch(out.String()); m != nil {
			return m[1], stop
		}
		if time.Now().After(deadline) {
			t.Fatalf("it says no address: %s", out)
		}
	}
}

// zincati asks as Zincati does.
func zincati(t *testing.T, address, call, id string) (status int, body string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, address+"/v1/"+call, strings.NewReader(`{"client_params":{"id":"`+id+`","group":"web"}}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("fleet-lock-protocol", "true")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

// A semaphore without etcd: FleetLock clients and the operator use it at the same time, and it is still there when the server is started again.
func TestFleetStore(t *testing.T) {
	dir, err := os.MkdirTemp("", "fleet") // the name of the socket in it must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	store := filepath.Join(dir, "s")
	run := func(want int, contains string, args ...string) string {
		t.Helper()
		var out bytes.Buffer
		a := &app{stdin: strings.NewReader("max = 1\nreboot_time = \"2m\"\n"), stdout: &out, stderr: &out}
		if code := a.run(t.Context(), append(args, "--store", store, "--group", "web")); code != want || !strings.Contains(out.String(), contains) {
			t.Fatalf("flipside %s ended with %d, want %d and %q; it printed\n%s", strings.Join(args, " "), code, want, contains, &out)
		}
		return out.String()
	}
	run(exitFailed, "makes one", "fleet", "status")
	address, stop := background(t, "fleet", "serve", "--store", store, "--listen", "127.0.0.1:0")
	run(exitBusy, "another process", "fleet", "serve", "--listen", "127.0.0.1:0")
	run(0, "is set", "fleet", "policy", "set", "-", "--reason", "first")
	if code, body := zincati(t, address, "pre-reboot", "n1"); code != 200 {
		t.Fatalf("%d %s", code, body)
	}
	if code, body := zincati(t, address, "pre-reboot", "n2"); code != 409 || !strings.Contains(body, "position 1 in the queue") {
		t.Fatalf("%d %s", code, body)
	}
	run(0, "n1      rebooting", "fleet", "status")
	if out := run(0, "the last of 1 hosts", "fleet", "plan"); !strings.Contains(out, "━") {
		t.Errorf("no picture: %s", out)
	}
	run(0, "first: ", "fleet", "history")
	stop()
	run(0, "1 of 1 down, 1 waiting", "fleet", "status") // from the file itself
	address, _ = background(t, "fleet", "serve", "--store", store, "--listen", "127.0.0.1:0")
	if code, body := zincati(t, address, "steady-state", "n1"); code != 200 {
		t.Fatalf("%d %s", code, body)
	}
	if code, body := zincati(t, address, "pre-reboot", "n2"); code != 200 {
		t.Errorf("%d %s", code, body)
	}
	run(exitUsage, "two semaphores", "fleet", "status", "--endpoints", "http://127.0.0.1:1")
}

// The release server keeps a semaphore beside the releases.
func TestServeFleetLock(t *testing.T) {
	dir, err := os.MkdirTemp("", "rel")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	address, _ := background(t, "serve", dir, "--listen", "127.0.0.1:0", "--fleetlock", "127.0.0.1:0")
	if code, body := zincati(t, address, "pre-reboot", "n1"); code != 200 {
		t.Errorf("%d %s", code, body)
	}
	var out bytes.Buffer
	if code := (&app{stdout: &out, stderr: &out}).run(t.Context(), []string{"fleet", "status", "--store", filepath.Join(dir, "fleet"), "--group", "web"}); code != 0 || !strings.Contains(out.String(), "n1") {
		t.Errorf("%d %s", code, &out)
	}
}

func TestPolicyEdit(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	k := lock.On(lock.NewMemory(), lock.Options{})
	if err := k.EditPolicy(t.Context(), "web", "", func(p *lock.Policy) error {
		p.Max = 2
		return p.UnmarshalJSON([]byte(`{"max":2,"failure_budget":1,"boot_deadline":"30m","grant_deadline":"10m","moon":"full","windows":[{"days":["Thu"],"start":"04:00","length":"1h","zone":"UTC"}]}`))
	}); err != nil {
		t.Fatal(err)
	}
	edit := func(editor string) (string, error) {
		t.Setenv("VISUAL", editor)
		var out bytes.Buffer
		err := (&app{stdin: strings.NewReader(""), stdout: &out, stderr: &out}).editPolicy(t.Context(), k, "web", "test")
		return out.String(), err
	}
	policy := func() lock.Policy {
		st, err := k.State(t.Context(), "web")
		if err != nil {
			t.Fatal(err)
		}
		return st.Policy
	}
	if out, err := edit(`sed -i "s/max = 2/max = 3/; s/04:00/05:00/"`); err != nil || !strings.Contains(out, "is set") {
		t.Fatalf("%s, %v", out, err)
	}
	if p := policy(); p.Max != 3 || len(p.Unknown()) != 1 || p.Windows[0].String() != "Thu 05:00 for 1h (UTC)" {
		t.Errorf("the policy is %+v", p)
	}
	if _, err := edit("true"); exitCode(t.Context(), err) != exitNothing {
		t.Errorf("nothing was changed: %v", err)
	}
	if _, err := edit(`sed -i "s/max = 3/maks = 3/"`); exitCode(t.Context(), err) != exitUsage || !strings.Contains(strings.Join(hintsOf(err), " "), "your text is kept") {
		t.Errorf("a typing mistake: %v, %q", err, hintsOf(err))
	}
	if _, err := edit("false"); err == nil {
		t.Error("an editor that fails: no error")
	}
	if p := policy(); p.Max != 3 {
		t.Errorf("the policy is %+v", p)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "flipside-*")); err != nil || len(left) != 1 {
		t.Errorf("left behind: %v, %v; only the text that could not be used is kept", left, err)
	}
}

// What hosts have written about themselves must not move the cursor of who looks.
func TestTableIsClean(t *testing.T) {
	s := &sheet{}
	s.table([]string{"A", "EMPTY", "B"}, [][]cell{cells(plain, "ä\x1b[31m", "", "x"), cells(plain, "longer", "", "y")})
	if want := "A       B\nä\ufffd[31m  x\nlonger  y\n"; s.b.String() != want {
		t.Errorf("%q, want %q", s.b.String(), want)
	}
}
