package config

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"strconv"
	"strings"
	"testing"
)

var rewrite = flag.Bool("rewrite", false, "write docs/config.md anew from the comments in the code")

const referenceHead = `# The configuration

Settings come from these places; a later one wins, key by key:

1. the defaults below;
2. ` + "`/usr/share/flatcar/release`, `/usr/share/flatcar/update.conf` and `/etc/flatcar/update.conf`" + ` of older hosts, see the last table;
3. ` + "`flipside/flipside.toml`" + ` from the first of ` + "`/etc`, `/run`, `/usr/local/lib`, `/usr/lib`" + ` that has one;
4. ` + "`flipside/flipside.toml.d/*.toml`" + ` from all four, sorted by name. Of files with the same name only the one from the first of these
   directories counts, and a link to ` + "`/dev/null`" + ` masks the others;
5. what "flipside channel set" and "flipside pin" chose, in ` + "`operator.toml`" + ` in the state directory.

A key that is not known is an error with its file and line. ` + "`flipside config show --origin`" + ` prints every setting with its place,
` + "`flipside config check`" + ` what is wrong. With ` + "`--config FILE`" + ` only that file, and 5, are read.

This page is made from the code: ` + "`go test ./updater/config -run Reference -rewrite`" + `.
`

// TestReference keeps docs/config.md the same as the code: every key, what it means, and its default.
func TestReference(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "config.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	structs := map[string]*ast.StructType{}
	docs := map[string]string{}
	for _, d := range file.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok {
			continue
		}
		for _, s := range g.Specs {
			if ts, ok := s.(*ast.TypeSpec); ok {
				if st, ok := ts.Type.(*ast.StructType); ok {
					structs[ts.Name.Name], docs[ts.Name.Name] = st, line(g.Doc)
				}
			}
		}
	}
	var b strings.Builder
	b.WriteString(referenceHead)
	def := Default()
	value := map[string]string{}
	for _, s := range def.Settings() {
		value[s.Key] = s.Value
	}
	typ := reflect.TypeOf(def)
	for i := range typ.NumField() {
		f := typ.Field(i)
		table := f.Tag.Get("toml")
		_, about, _ := strings.Cut(docs[f.Type.Name()], " ")
		fmt.Fprintf(&b, "\n## [%s]\n\n%s\n\n| key | default | meaning |\n|---|---|---|\n", table, strings.ToUpper(about[:1])+about[1:])
		for _, field := range structs[f.Type.Name()].Fields.List {
			tag, err := strconv.Unquote(field.Tag.Value)
			if err != nil {
				t.Fatal(err)
			}
			key := reflect.StructTag(tag).Get("toml")
			meaning := strings.TrimSpace(line(field.Doc) + " " + line(field.Comment))
			v, ok := value[table+"."+key]
			if !ok {
				t.Errorf("%s.%s is not among the settings", table, key)
			}
			fmt.Fprintf(&b, "| `%s` | `%s` | %s |\n", key, v, strings.ReplaceAll(meaning, "|", "\\|"))
		}
	}
	b.WriteString("\n## What becomes of update.conf\n\n| older setting | here | |\n|---|---|---|\n")
	for _, o := range olderSettings {
		to := "not used"
		if o.To != "" {
			to = "`" + o.To + "`"
			if _, ok := value[o.To]; !ok {
				t.Errorf("%s becomes %s, which is no setting", o.Key, o.To)
			}
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", o.Key, to, o.How)
	}
	const path = "../../docs/config.md"
	if *rewrite {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != b.String() {
		t.Errorf("docs/config.md is not what the code says; go test ./updater/config -run Reference -rewrite")
	}
}

func line(g *ast.CommentGroup) string { return strings.Join(strings.Fields(g.Text()), " ") }
