package journal

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"log/slog"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/coreos/go-systemd/v22/journal"
	"github.com/google/go-cmp/cmp"

	"github.com/flipside-linux/flipside/updater"
)

type sent struct {
	Message  string
	Priority journal.Priority
	Fields   map[string]string
}

func logger(out *[]sent) *slog.Logger {
	h := New(slog.LevelInfo)
	h.send = func(m string, p journal.Priority, f map[string]string) error {
		*out = append(*out, sent{m, p, f})
		return nil
	}
	return slog.New(h)
}

func TestHandler(t *testing.T) {
	var got []sent
	log := logger(&got)
	log.Debug("not this")
	log.Warn("release 2.0.0 is not healthy", "kind", string(updater.Unhealthy), "version", "2.0.0", "slot", "USR-B")
	log.With("disk", "/dev/sda").WithGroup("http").Error("it failed", "error", errors.New("no route"), slog.Group("try", "n", 3))
	want := []sent{
		{"release 2.0.0 is not healthy", journal.PriWarning, map[string]string{
			"SYSLOG_IDENTIFIER": "flipsided", "MESSAGE_ID": ID(updater.Unhealthy),
			"FLIPSIDE_KIND": "unhealthy", "FLIPSIDE_VERSION": "2.0.0", "FLIPSIDE_SLOT": "USR-B",
		}},
		{"it failed error=no route", journal.PriErr, map[string]string{
			"SYSLOG_IDENTIFIER": "flipsided", "FLIPSIDE_DISK": "/dev/sda", "FLIPSIDE_HTTP_ERROR": "no route", "FLIPSIDE_HTTP_TRY_N": "3",
		}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// kinds reads the kinds from the source of package updater, so that one that is added cannot be forgotten here.
func kinds(t *testing.T) map[string]bool {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "../note.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	ast.Inspect(f, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if typ, ok := v.Type.(*ast.Ident); ok && typ.Name == "Kind" {
			k, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			found[k] = true
		}
		return true
	})
	if len(found) < 20 {
		t.Fatalf("only %d kinds found", len(found))
	}
	return found
}

// Every kind has an id of its own, and the catalog and the reference explain it.
func TestIDsAreCompleteAndExplained(t *testing.T) {
	catalog, err := os.ReadFile("../../packaging/systemd/flipside.catalog")
	if err != nil {
		t.Fatal(err)
	}
	reference, err := os.ReadFile("../../docs/journal.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]updater.Kind{}
	known := kinds(t)
	for k := range known {
		id := ID(updater.Kind(k))
		if !regexp.MustCompile(`^[0-9a-f]{32}$`).MatchString(id) {
			t.Errorf("%s has id %q", k, id)
			continue
		}
		if other, ok := seen[id]; ok {
			t.Errorf("%s and %s have the same id", k, other)
		}
		seen[id] = updater.Kind(k)
		if !strings.Contains(string(catalog), "-- "+id+"\n") {
			t.Errorf("the catalog does not explain %s (%s)", k, id)
		}
		if !strings.Contains(string(reference), "| `"+k+"` | `"+id+"` |") {
			t.Errorf("docs/journal.md does not list %s (%s)", k, id)
		}
	}
	for k := range ids {
		if !known[string(k)] {
			t.Errorf("%s has an id and is not a kind", k)
		}
	}
}
