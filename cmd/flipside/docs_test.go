package main

import (
	"fmt"
	"os"
	"regexp"
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

// What a page for people tells them to run exists.
func TestCommandsInTheDocsExist(t *testing.T) {
	root := (&app{}).command()
	command := regexp.MustCompile("flipside ((?:[a-z][a-z-]*)(?: [a-z][a-z-]*)?)")
	for _, path := range []string{"../../docs/why.md", "../../docs/config.md", "../../docs/migrate.md"} {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		for _, quoted := range regexp.MustCompile("`[^`\n]+`|\"[^\"\n]+\"|(?m)^    .+$").FindAllString(string(text), -1) {
			for _, m := range command.FindAllStringSubmatch(quoted, -1) {
				words := strings.Fields(m[1])
				sub, _, err := root.Find(words[:1])
				if err != nil || sub == root {
					t.Errorf("%s: there is no command %q", path, m[0])
				}
				found++
			}
		}
		if found == 0 {
			t.Errorf("%s names no command: the check looks at nothing", path)
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
