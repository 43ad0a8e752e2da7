package flipside

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var testFunction = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)\w+)\(`)

// testsOf lists the tests of a package by its directory below the module.
func testsOf(t *testing.T, dir string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(filepath.FromSlash(dir), "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]bool{}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range testFunction.FindAllSubmatch(data, -1) {
			tests[string(m[1])] = true
		}
	}
	return tests
}

var namedTest = regexp.MustCompile("`((?:Test|Fuzz)\\w+)`((?:, `(?:Test|Fuzz)\\w+`)*)(?: \\(([a-z0-9./]+)\\))?")

// unproven lists what is wrong with the tests that a text names: each is followed by its package in brackets, or by others and then by the package of them all, and exists there; and
// each line of a table, but its head, names one.
func unproven(t *testing.T, text string) (wrong []string) {
	t.Helper()
	for _, m := range namedTest.FindAllStringSubmatch(text, -1) {
		names := strings.FieldsFunc(m[1]+m[2], func(r rune) bool { return strings.ContainsRune("`, ", r) })
		if m[3] == "" {
			wrong = append(wrong, fmt.Sprintf("%s: nobody says in which package", strings.Join(names, ", ")))
			continue
		}
		tests := testsOf(t, m[3])
		for _, name := range names {
			if !tests[name] {
				wrong = append(wrong, fmt.Sprintf("there is no %s in %s", name, m[3]))
			}
		}
	}
	table := false
	for line := range strings.Lines(text) {
		row := strings.HasPrefix(line, "|")
		switch {
		case row && !table, strings.HasPrefix(line, "|-"): // its head
		case row && !namedTest.MatchString(line):
			wrong = append(wrong, "no test: "+strings.TrimSpace(line))
		}
		table = row
	}
	return wrong
}

// Every line of the threat model names the tests that show it, and they exist.
func TestThreatModelNamesItsTests(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("docs", "threat-model.md"))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(namedTest.FindAll(text, -1)); n < 30 {
		t.Fatalf("only %d tests are found: the check looks at nothing", n)
	}
	for _, w := range unproven(t, string(text)) {
		t.Error(w)
	}
}

// The check itself finds what is wrong.
func TestUnproven(t *testing.T) {
	const head = "| who | shown by |\n|---|---|\n"
	for _, tt := range []struct{ text, want string }{
		{head + "| a | `TestUnproven`, `TestThreatModelNamesItsTests` (.) |\n", ""},
		{head + "| a | `TestHostRefuses` (updater/host), `TestEnrolmentIsLinear` (lock) |\n", ""},
		{head + "| a | `TestUnproven` |\n", "TestUnproven: nobody says in which package"},
		{head + "| a | `TestGone` (lock) |\n", "there is no TestGone in lock"},
		{head + "| a | `TestEnrolmentIsLinear`, `TestGone` (lock) |\n", "there is no TestGone in lock"},
		{head + "| a | of course |\n", "no test: | a | of course |"},
		{"Beside a table, `TestEnrolmentIsLinear` (omaha).\n", "there is no TestEnrolmentIsLinear in omaha"},
	} {
		if got := strings.Join(unproven(t, tt.text), "\n"); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.text, got, tt.want)
		}
	}
}

var runTests = regexp.MustCompile(`go test [^` + "`\n" + `|]*-run (?:'([^']+)'|(\S+))([^` + "`\n" + `]*)`)

// What the pages tell people to run runs something: each name after -run begins a test in one of the packages after it.
func TestCommandsOfTheDocsRunTests(t *testing.T) {
	pages, err := filepath.Glob(filepath.Join("docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, page := range append(pages, "README.md") {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range runTests.FindAllStringSubmatch(string(text), -1) {
			tests := map[string]bool{}
			for _, word := range strings.Fields(m[3]) {
				if dir, ok := strings.CutPrefix(word, "./"); ok && !strings.Contains(dir, "...") {
					for name := range testsOf(t, dir) {
						tests[name] = true
					}
				}
			}
			if len(tests) == 0 {
				continue // all packages, or a name in capitals for the reader's own
			}
			found++
			for _, part := range regexp.MustCompile(`\\?\|`).Split(m[1]+m[2], -1) {
				re, err := regexp.Compile(part)
				if err != nil {
					t.Errorf("%s: %s: %v", page, m[0], err)
					continue
				}
				some := false
				for name := range tests {
					some = some || re.MatchString(name)
				}
				if !some {
					t.Errorf("%s: %s: no test has %q in its name", page, m[0], part)
				}
			}
		}
	}
	if found < 4 {
		t.Errorf("%d commands are found: the check looks at nothing", found)
	}
}
