package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Every command that --help knows has a page, and every flag of it is there.
func TestManualPages(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	a := &app{stdout: &out, stderr: &out}
	if code := a.run(t.Context(), []string{"man", dir}); code != exitOK {
		t.Fatalf("flipside man ended with %d: %s", code, &out)
	}
	pages := 0
	var check func(*cobra.Command)
	check = func(c *cobra.Command) {
		name := strings.ReplaceAll(c.CommandPath(), " ", "-") + ".1"
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Errorf("no page: %v", err)
			return
		}
		pages++
		text := strings.ReplaceAll(string(data), `\-`, "-")
		c.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if !f.Hidden && !strings.Contains(text, "--"+f.Name) {
				t.Errorf("%s does not name --%s", name, f.Name)
			}
		})
		for _, sub := range c.Commands() {
			if sub.IsAvailableCommand() && !sub.IsAdditionalHelpTopicCommand() {
				check(sub)
			}
		}
	}
	root := a.command()
	root.InitDefaultHelpFlag()
	check(root)
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != pages || pages < 30 {
		t.Errorf("%d files for %d commands, %v", len(files), pages, err)
	}
}
