package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/migrate"
)

func (a *app) migrateCommand() *cobra.Command {
	root := directory("/")
	var write, disable bool
	cmd := &cobra.Command{
		Use:   "migrate",
		Short: "move this host over from update_engine and locksmith",
		Args:  cobra.NoArgs,
		Long: `Migrate reads what update_engine and locksmith were told: update.conf of Flatcar and CoreOS, the drop-ins of both units, and whether
somebody masked them. It prints the configuration that does the same here, what has no equivalent, and the commands that are left to
do. It writes nothing without --write.

With --write it writes the files that are not there yet, and changes none that is. With --disable-old it also stops the two older
services and masks them, so that they do not come back at the next boot. Their own files and their memory stay as they are: unmasking
them is the way back. Run again it does what is still to be done.

Exit status: 0, 3 neither update_engine nor locksmith was ever here, 7 not permitted, 1 a file is in the way.`,
		RunE: func(*cobra.Command, []string) error {
			if disable && !write {
				return usagef("--disable-old belongs to --write: without the older services and without a configuration this host would not update at all")
			}
			p, err := migrate.Look(string(root))
			if errors.Is(err, migrate.ErrNothing) {
				return withExit(exitNothing, err)
			}
			if err != nil {
				return err
			}
			var written []string
			if write {
				written, err = p.Write()
				if errors.Is(err, migrate.ErrDiffers) {
					return withHint(err, `nothing was written; move that file away, or take over from "flipside migrate" what you want`)
				}
				if err != nil {
					return err
				}
			}
			if disable {
				if err := p.DisableOlder(); err != nil {
					return err
				}
			}
			if a.json {
				return a.printJSON(migrateDocument(p, written))
			}
			a.printMigration(p, string(root), write, written)
			return nil
		},
	}
	f := cmd.Flags()
	f.Var(&root, "root", "look at, and write, the files below this `directory`: an image's")
	f.BoolVar(&write, "write", false, "write the files")
	f.BoolVar(&disable, "disable-old", false, "with --write: stop update_engine and locksmith, and mask their services")
	return cmd
}

type migrateDoc struct {
	Schema string `json:"schema"`
	*migrate.Plan
	Written []string   `json:"written"`
	Left    [][]string `json:"left_to_do"` // commands
	Back    [][]string `json:"way_back"`   // commands
}

func migrateDocument(p *migrate.Plan, written []string) migrateDoc {
	return migrateDoc{"flipside.migrate/v1", p, append([]string{}, written...), leftToDo(p), p.Back()}
}

// leftToDo are the commands that are left when the files are written.
func leftToDo(p *migrate.Plan) [][]string {
	return append(append([][]string{}, p.Disabling()...), []string{"flipside", "config", "check"}, []string{"systemctl", "enable", "--now", "flipsided.service"})
}

func (a *app) printMigration(p *migrate.Plan, root string, wrote bool, written []string) {
	s := a.pen()
	say := func(format string, args ...any) { fmt.Fprintf(a.stdout, format+"\n", args...) }
	heading := func(text string) { say("%s", s.paint(bold, text)) }
	heading("what is here")
	for _, f := range p.Read {
		say("  %s", f.Path)
	}
	for _, u := range p.Services {
		state := "installed"
		switch {
		case !u.Found:
			state = "not installed"
		case u.Masked:
			state = "masked"
		}
		say("  %s, %s", u.Unit, state)
	}
	for _, f := range p.Files {
		what := "to be written"
		for _, path := range written {
			if path == f.Path {
				what = "written"
			}
		}
		switch {
		case what == "written":
		case f.State == migrate.Done:
			what = "was written before; it stays as it is"
		case f.State == migrate.Differs:
			what = "is there already; it stays as it is. What this command would have written:"
		}
		say("")
		heading(fmt.Sprintf("%s, %s", f.Path, what))
		switch {
		case f.State == migrate.Done && what != "written":
		case f.Secret:
			say("  not shown: there is a password in it; only root can read it (%s)", f.Mode)
		default:
			for line := range strings.Lines(f.Text) {
				line = strings.TrimRight(line, "\n")
				if strings.HasPrefix(line, "#") {
					line = s.paint(faint, line)
				}
				say("%s", strings.TrimRight("  "+line, " "))
			}
		}
	}
	if len(p.Unused) > 0 {
		say("")
		heading("without an equivalent")
		for _, u := range p.Unused {
			say("  %s (%s): %s", u.Key, place(u.Origin), s.wrap(u.Why, 4))
		}
	}
	if len(p.Notes) > 0 {
		say("")
		heading("to know first")
		for _, n := range p.Notes {
			say("  - %s", s.wrap(n, 4))
		}
	}
	say("")
	heading("left to do")
	if !wrote {
		command := "flipside migrate --write --disable-old"
		if root != "/" {
			command += " --root " + root
		}
		say("  %s", command)
	}
	for _, c := range leftToDo(p) {
		if !wrote && (c[1] == "mask" || c[1] == "disable") {
			continue // --disable-old does it
		}
		say("  %s", strings.Join(c, " "))
	}
	heading("the way back")
	for _, c := range p.Back() {
		say("  %s", strings.Join(c, " "))
	}
}

func place(o config.Origin) string {
	o.From = ""
	return o.String()
}
