package flipside

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/flipside-linux/flipside/"

// rooms are the top-level packages, and which of the other rooms each may import. A reader of one room need not know the others,
// and the disk code cannot come to depend on the network code.
var rooms = map[string][]string{
	"cmd":       {"updater", "omaha", "payload", "partition", "reboot", "lock"},
	"updater":   {"omaha", "payload", "partition", "reboot", "lock"},
	"omaha":     {},
	"payload":   {},
	"partition": {},
	"reboot":    {"lock"}, // the semaphore is one of the gates
	"lock":      {},
}

// buildTags are those of the Makefile: without gRPC's request tracing, and the web pages that come with it.
const buildTags = "grpcnotrace"

// never are imports that a program, or a package, must not link, with the reason.
var never = []struct{ program, prefix, reason string }{
	{"cmd/flipsided", "go.etcd.io/etcd/server", "a host is a client of etcd, never a server"},
	{"cmd/flipsided", "html/template", "a host serves no pages"},
	{"cmd/flipsided", "testing", "tests stay out of the daemon"},
	{"cmd/flipsided", module + "omaha/server", "a host is not a release server"},
	{"updater/supervisor", "net/http", "what keeps root's rights says nothing on the network"},
	{"updater/supervisor", module + "updater/writer", "it starts writers, and what they are told does not pass through it"},
	{"updater/writer", module + "updater/supervisor", "it is given a socket, and does not ask by whom"},
	{"updater/writer", module + "reboot", "what writes to the disk knows nothing of the engine that decides, and of its gates"},
}

type listed struct {
	ImportPath                         string
	Imports, TestImports, XTestImports []string
	Deps                               []string
}

func list(t *testing.T, pattern ...string) []listed {
	t.Helper()
	out, err := exec.Command("go", append([]string{"list", "-tags", buildTags, "-json=ImportPath,Imports,TestImports,XTestImports,Deps"}, pattern...)...).Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []listed
	dec := json.NewDecoder(bytes.NewReader(out))
	for {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

func room(path string) string {
	rest, ok := strings.CutPrefix(path, module)
	if !ok {
		return ""
	}
	r, _, _ := strings.Cut(rest, "/")
	return r
}

func violation(from, to string) bool {
	a, b := room(from), room(to)
	if a == "" || b == "" || a == b {
		return false
	}
	for _, ok := range rooms[a] {
		if ok == b {
			return false
		}
	}
	return true
}

func TestImportsPointOneWay(t *testing.T) {
	pkgs := list(t, "./...")
	if len(pkgs) < 10 {
		t.Fatalf("go list found only %d packages", len(pkgs))
	}
	for _, p := range pkgs {
		if r := room(p.ImportPath); r != "" {
			if _, known := rooms[r]; !known {
				t.Errorf("%s is in a room that the design does not know", p.ImportPath)
			}
		}
		for _, imports := range [][]string{p.Imports, p.TestImports, p.XTestImports} {
			for _, to := range imports {
				if violation(p.ImportPath, to) {
					t.Errorf("%s imports %s: room %q may import only %v", p.ImportPath, to, room(p.ImportPath), rooms[room(p.ImportPath)])
				}
			}
		}
	}
}

// The check itself must be able to fail.
func TestViolation(t *testing.T) {
	for _, tt := range []struct {
		from, to string
		want     bool
	}{
		{"payload", "omaha", true},
		{"lock/etcd", "reboot", true},
		{"omaha", "updater", true},
		{"updater", "cmd/flipside", true},
		{"reboot", "lock", false},
		{"cmd/flipside", "payload/build", false},
		{"payload/build", "payload", false},
	} {
		if got := violation(module+tt.from, module+tt.to); got != tt.want {
			t.Errorf("%s imports %s: violation = %v, want %v", tt.from, tt.to, got, tt.want)
		}
	}
}

func TestProgramsDoNotLink(t *testing.T) {
	for _, n := range never {
		for _, p := range list(t, "./"+n.program) {
			for _, dep := range p.Deps {
				if dep == n.prefix || strings.HasPrefix(dep, n.prefix+"/") {
					t.Errorf("%s links %s: %s", n.program, dep, n.reason)
				}
			}
		}
	}
}
