package bus

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/updater/control"
)

// docs/dbus.md has every property and every method with its types, and no others.
func TestReference(t *testing.T) {
	data, err := os.ReadFile("../../docs/dbus.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	iface := Node().Interfaces[2]
	rows := 0
	for _, p := range iface.Properties {
		if rows++; !strings.Contains(text, fmt.Sprintf("| `%s` | `%s` |", p.Name, p.Type)) {
			t.Errorf("property %s of type %s is not there", p.Name, p.Type)
		}
	}
	for _, m := range iface.Methods {
		in, out := "", ""
		for _, a := range m.Args {
			if a.Direction == "in" {
				in += a.Type
			} else {
				out += a.Type
			}
		}
		cell := func(types string) string {
			if types == "" {
				return " \\|"
			}
			return " `" + regexp.QuoteMeta(types) + "`.*\\|"
		}
		rows++
		if !regexp.MustCompile("(?m)^\\| `" + m.Name + "` \\|" + cell(in) + cell(out)).MatchString(text) {
			t.Errorf("method %s(%s) -> %s is not there", m.Name, in, out)
		}
		if (&host{}).methods()[m.Name] == nil {
			t.Errorf("method %s is described and not there", m.Name)
		}
	}
	if len((&host{}).methods()) != len(iface.Methods) {
		t.Errorf("%d methods are described, %d are there", len(iface.Methods), len((&host{}).methods()))
	}
	if have := len(regexp.MustCompile("(?m)^\\| `").FindAllString(text, -1)); have != rows {
		t.Errorf("the page has %d rows, the code has %d properties and methods", have, rows)
	}
	for _, a := range control.Actions() {
		if !strings.Contains(text, "`"+a.Polkit()+"`") {
			t.Errorf("action %s is not there", a.Polkit())
		}
	}
}
