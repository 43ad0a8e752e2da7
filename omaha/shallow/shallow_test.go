package shallow

import (
	"errors"
	"strings"
	"testing"
)

func TestWhatIsDeepIsNotDecoded(t *testing.T) {
	dots, braces := strings.Repeat("a.", 64)+"a=1", strings.Repeat("a={", 64)+"a=1"+strings.Repeat("}", 64)
	for name, text := range map[string]string{
		"a key":                        dots,
		"spaces between":               strings.Repeat("a . ", 65) + "a = 1",
		"quoted parts":                 strings.Repeat(`"=".'#'.`, 40) + "a=1",
		"escaped quotes":               strings.Repeat(`"\".".`, 65) + "a=1",
		"a table":                      "[" + strings.Repeat("a.", 64) + "a]",
		"in a table":                   "x={" + dots + "}",
		"tables in tables":             "x={" + braces + "}",
		"lists of tables":              strings.Repeat("a=[{", 40) + strings.Repeat("}]", 40),
		"lists in lists":               "a=" + strings.Repeat("[", 65) + strings.Repeat("]", 65),
		"after a comment":              "# it's \"\n" + dots,
		"after a string":               "x=\"a # \\\" b\"\n" + dots,
		"after a long string":          "x='''\n it's '''\n" + dots,
		"after a string with \" in it": "x=[\"\"\"he said \"yes\"\"\"\"\"\n," + "{" + dots + "}]",
		"after empty strings":          "x=[\"\", '', \"\"\"\"\"\"]\n" + dots,
	} {
		var v any
		if _, err := Decode([]byte(text), &v); !errors.Is(err, ErrDeep) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func TestWhatIsNotDeepIsDecoded(t *testing.T) {
	many := strings.Repeat("x", 3) + " = ['" + strings.Repeat("1.2.3.4', '", 40) + "']\n"
	for name, text := range map[string]string{
		"addresses in a list": many,
		"dots in a string":    "x = \"" + strings.Repeat(".", 100) + "\"\n",
		"dots in a comment":   "# " + strings.Repeat(".", 100) + "\nx = 1",
		"dots in lines":       "x = '''\n" + strings.Repeat("...[[{{\n", 100) + "'''\n",
		"many tables":         strings.Repeat("[[x]]\na.b = [1.5, {c = 2}]\n", 100),
		"a key of 64 parts":   strings.Repeat("a.", 63) + "a=1",
	} {
		var v any
		if _, err := Decode([]byte(text), &v); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte("x=[\"\"\"he said \"yes\"\"\"\"\"\n,{a.b.'c'=1}] # it's\n[[d.e]]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 4<<10 {
			return
		}
		var v map[string]any
		meta, err := Decode(data, &v)
		if err != nil {
			return
		}
		for _, k := range meta.Keys() {
			if len(k) > 2*most {
				t.Errorf("a key of %d parts", len(k))
			}
		}
	})
}
