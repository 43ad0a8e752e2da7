package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Both tables of exit codes are those of the code.
func TestExitCodesAreDocumented(t *testing.T) {
	codes := []int{exitOK, exitFailed, exitUsage, exitNothing, exitReboot, exitBlocked, exitVerify, exitPermitted, exitBusy, exitInterrupt}
	row := regexp.MustCompile(`(?m)^\| (\d+) \| .+ \|$`)
	var tables []string
	for _, path := range []string{"../../README.md", "../../docs/exit-codes.md"} {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		rows := row.FindAllString(string(text), -1)
		if len(rows) != len(codes) {
			t.Fatalf("%s has %d exit codes, the code has %d", path, len(rows), len(codes))
		}
		for i, code := range codes {
			if !strings.HasPrefix(rows[i], fmt.Sprintf("| %d |", code)) {
				t.Errorf("%s: %q, want code %d", path, rows[i], code)
			}
		}
		tables = append(tables, strings.Join(rows, "\n"))
	}
	if tables[0] != tables[1] {
		t.Errorf("the tables differ:\n%s\n\n%s", tables[0], tables[1])
	}
}

// namedCommand finds the commands that a text names: flipside, and up to three words.
var namedCommand = regexp.MustCompile(`(?:^|[^\w/.@%$-])flipside((?: [a-z][a-z-]*){1,3})`)

// unknown lists the commands that a text names and that there are not.
func unknown(root *cobra.Command, text string) (found int, wrong []string) {
	// What may follow the program's name in a sentence, in a list of names, and where it begins the name of a key.
	prose := []string{"command", "does", "is", "flipsided", "flipside-writer", "device", "attestation"}
	for _, m := range namedCommand.FindAllStringSubmatch(text, -1) {
		words := strings.Fields(m[1])
		if slices.Contains(prose, words[0]) {
			continue
		}
		found++
		cmd := root
		for _, word := range words {
			i := slices.IndexFunc(cmd.Commands(), func(c *cobra.Command) bool { return c.Name() == word })
			if i < 0 {
				if cmd.HasSubCommands() && !strings.Contains(cmd.Use, " ") { // else it is an argument, or the sentence goes on
					wrong = append(wrong, "flipside"+m[1])
				}
				break
			}
			cmd = cmd.Commands()[i]
		}
	}
	return found, wrong
}

// What any text of the project tells people to run exists: pages, hints, comments, units, alerts.
func TestNamedCommandsExist(t *testing.T) {
	root := (&app{}).command()
	root.InitDefaultCompletionCmd()
	all := 0
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel("../..", path)
		if name := d.Name(); d.IsDir() && (name == ".git" || name == "dist" || name == "bin" || rel == "testdata") {
			return filepath.SkipDir
		}
		if !d.Type().IsRegular() || strings.HasSuffix(path, ".png") || rel == filepath.Join("cmd", "flipside", "docs_test.go") {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		found, wrong := unknown(root, string(text))
		all += found
		for _, w := range wrong {
			t.Errorf("%s: there is no %q", rel, w)
		}
		if found == 0 && slices.Contains([]string{"docs/why.md", "docs/reboot-policy.md", "reboot/semaphore.go", "packaging/systemd/flipside.catalog"}, filepath.ToSlash(rel)) {
			t.Errorf("%s names no command: the check looks at nothing", rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if all < 300 {
		t.Errorf("only %d commands are found", all)
	}
}

// The check itself finds what is wrong.
func TestUnknownCommand(t *testing.T) {
	root := (&app{}).command()
	for text, want := range map[string]string{
		"`flipside fleet policy edit` opens it": "",
		"flipside status shows why":             "",
		"flipside fleet --group web":            "",
		"see flipside lock status":              "flipside lock status",
		"see \"flipside fleet stats\"":          "flipside fleet stats",
		"run flipside fleet policy list":        "flipside fleet policy list",
	} {
		if _, wrong := unknown(root, text); strings.Join(wrong, ",") != want {
			t.Errorf("%q: %q, want %q", text, wrong, want)
		}
	}
}

// Every command says what it is for, and completions are made for all of them.
func TestEveryCommandIsDescribed(t *testing.T) {
	root := (&app{}).command()
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Short == "" {
			t.Errorf("%s has no description", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
	for _, shell := range []string{"bash", "zsh", "fish"} {
		var out, errs strings.Builder
		a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}
		if code := a.run(t.Context(), []string{"completion", shell}); code != exitOK || len(out.String()) < 1000 {
			t.Errorf("completion %s: exit status %d, %d bytes: %s", shell, code, len(out.String()), errs.String())
		}
	}
}
