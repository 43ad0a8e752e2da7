package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// Each document has a schema by a name of its own: one place in the programs makes it, of one Go type. What reads a document may name it as well.
func TestSchemasAreUnique(t *testing.T) {
	schema := regexp.MustCompile(`^flipside\.[a-z-]+/v[0-9]+$`)
	made := map[string]map[string]bool{} // by name: what makes it
	files := token.NewFileSet()
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		var above []ast.Node
		ast.Inspect(file, func(n ast.Node) bool {
			if n == nil {
				above = above[:len(above)-1]
				return true
			}
			above = append(above, n)
			lit, ok := n.(*ast.BasicLit)
			if !ok || lit.Kind != token.STRING {
				return true
			}
			name, err := strconv.Unquote(lit.Value)
			if err != nil || !schema.MatchString(name) {
				return true
			}
			by := files.Position(n.Pos()).String()
			switch p := above[len(above)-2].(type) {
			case *ast.BinaryExpr, *ast.CaseClause:
				return true // a reader
			case *ast.CallExpr: // a function that makes the document may be called from several places
				if f, ok := p.Fun.(*ast.Ident); ok {
					by = filepath.Dir(path) + "." + f.Name
				}
			}
			if made[name] == nil {
				made[name] = map[string]bool{}
			}
			made[name][by] = true
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(made) < 30 {
		t.Fatalf("only %d schemas were found", len(made))
	}
	for name, by := range made {
		if len(by) > 1 {
			t.Errorf("%s is the name of several documents, or of one that is made in several places: %v", name, by)
		}
	}
}
