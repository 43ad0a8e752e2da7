package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// manCommand writes the manual pages. Their one source is what --help prints, so that the two cannot say different things.
func (a *app) manCommand() *cobra.Command {
	return &cobra.Command{
		Use: "man DIR", Short: "Write the manual pages of all commands to a directory", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return writeManuals(a.command(), args[0])
		},
	}
}

// manDate stands in every page: the same sources give the same bytes.
func manDate() *time.Time {
	t := time.Unix(0, 0).UTC()
	if n := os.Getenv("SOURCE_DATE_EPOCH"); n != "" {
		var s int64
		if _, err := fmt.Sscan(n, &s); err == nil {
			t = time.Unix(s, 0).UTC()
		}
	}
	return &t
}

func writeManuals(root *cobra.Command, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("writing the manual pages: %w", err)
	}
	var page func(*cobra.Command) error
	page = func(c *cobra.Command) error {
		c.DisableAutoGenTag = true
		f, err := os.Create(filepath.Join(dir, strings.ReplaceAll(c.CommandPath(), " ", "-")+".1"))
		if err != nil {
			return err
		}
		head := doc.GenManHeader{Title: strings.ToUpper(strings.ReplaceAll(c.CommandPath(), " ", "-")), Section: "1", Source: "Flipside", Manual: "Flipside", Date: manDate()}
		err = doc.GenMan(c, &head, f)
		if err2 := f.Close(); err == nil {
			err = err2
		}
		if err != nil {
			return fmt.Errorf("the page of %q: %w", c.CommandPath(), err)
		}
		for _, sub := range c.Commands() {
			if !sub.IsAvailableCommand() || sub.IsAdditionalHelpTopicCommand() {
				continue
			}
			if err := page(sub); err != nil {
				return err
			}
		}
		return nil
	}
	if err := page(root); err != nil {
		return fmt.Errorf("writing the manual pages: %w", err)
	}
	return nil
}
