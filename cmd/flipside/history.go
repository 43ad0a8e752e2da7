package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/history"
)

func (a *app) historyCommand() *cobra.Command {
	var count int
	var dir string
	cmd := &cobra.Command{
		Use:   "history",
		Short: "what happened on this host, what it decided, and why",
		Args:  cobra.NoArgs,
		Long: `History reads the host's black box from the state directory; flipsided need not run, so that a rescue system can read it too.

Exit status: 0, 3 nothing is recorded, 6 some of it is damaged (the rest is printed), 7 not permitted.`,
		RunE: func(*cobra.Command, []string) error {
			if dir == "" {
				c, err := config.Load(a.config)
				if err != nil && a.config != "" {
					return err
				}
				if err != nil {
					c = config.Default()
				}
				dir = c.Paths.State
			}
			records, damaged, err := history.Last(dir, count)
			if err != nil {
				return err
			}
			if a.json {
				err = a.printJSON(struct {
					Schema  string           `json:"schema"`
					Records []history.Record `json:"records"`
					Damaged int              `json:"damaged,omitempty"`
				}{"flipside.history/v1", append([]history.Record{}, records...), damaged})
			} else {
				a.printHistory(records)
			}
			switch {
			case err != nil:
				return err
			case damaged > 0:
				return withExit(exitVerify, fmt.Errorf("the history is damaged in %d place(s); what is printed is sound", damaged))
			case len(records) == 0:
				return withExit(exitNothing, fmt.Errorf("nothing is recorded in %s", dir))
			}
			return nil
		},
	}
	cmd.Flags().IntVarP(&count, "count", "n", 50, "print the last `N` records")
	cmd.Flags().StringVar(&dir, "state", "", "state `directory` of another root, from a rescue system")
	return cmd
}

func (a *app) printHistory(records []history.Record) {
	s := a.pen()
	boot := ""
	for _, r := range records {
		if r.Boot != boot && boot != "" {
			fmt.Fprintln(a.stdout, s.paint(faint, "-- reboot --"))
		}
		boot = r.Boot
		look := plain
		if r.Warn {
			look = yellow
		}
		fmt.Fprintf(a.stdout, "%s  %s  %s\n", s.paint(faint, r.Time.Local().Format(time.DateTime)), s.paint(look, pad(r.Kind, 14)), s.wrap(r.Text, 37))
	}
}
