package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/updater"
)

func (a *app) watchCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "watch",
		Short: "follow what this host does, live",
		Args:  cobra.NoArgs,
		Long: `Watch shows what the host does until it is interrupted: on a terminal the last line is drawn again and again, elsewhere there is
a line for every change. With --json it prints one status document per line. It waits for a daemon that is not there, so that it can be
left running over a restart.

Exit status: 130 when it is interrupted, 1 otherwise.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.watch(cmd.Context()) },
	}
}

func (a *app) watch(ctx context.Context) error {
	s := a.pen()
	live := &liveLine{app: a, pen: s}
	seen := false
	for {
		err := a.ask(ctx, "watch", func(st updater.Status) bool {
			seen = true
			if a.json {
				return json.NewEncoder(a.stdout).Encode(st) == nil
			}
			live.show(st)
			return true
		})
		switch {
		case ctx.Err() != nil:
			live.end()
			return ctx.Err()
		case err != nil && !seen:
			return err
		}
		var permanent *usageError
		if errors.As(err, &permanent) {
			return err
		}
		if !a.json {
			live.say("flipsided does not answer; waiting for it")
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// liveLine is the last line of a watch.
type liveLine struct {
	app   *app
	pen   pen
	last  string // what the line said, without its time
	phase updater.Phase
	drawn bool
	since time.Time // of the last plain progress line
}

func (l *liveLine) show(st updater.Status) {
	p := st.Progress
	if st.Phase != updater.Applying || p == nil || p.Total <= 0 {
		l.phase = st.Phase
		l.say(string(st.Phase) + ": " + st.Why)
		return
	}
	text := fmt.Sprintf("%s %s", p.Step, st.Update.Version)
	if l.pen.width == 0 {
		if time.Since(l.since) >= 5*time.Second || l.phase != st.Phase {
			l.since, l.phase = time.Now(), st.Phase
			l.say(fmt.Sprintf("applying: %s: %s of %s, %s", text, formatBytes(p.Done), formatBytes(p.Total), rate(p)))
		}
		return
	}
	l.phase = st.Phase
	right := fmt.Sprintf(" %3d %%  %s of %s  %s", p.Done*100/p.Total, formatBytes(p.Done), formatBytes(p.Total), rate(p))
	cells := max(0, min(40, l.pen.width-len(text)-len(right)-12))
	full := int(float64(cells) * float64(p.Done) / float64(p.Total))
	bar := l.pen.paint(cyan, strings.Repeat("█", full)) + l.pen.paint(faint, strings.Repeat("░", cells-full))
	fmt.Fprintf(l.app.stdout, "\r\x1b[K%s  %s %s%s", time.Now().Format(time.TimeOnly), text, bar, right)
	l.drawn = true
}

func rate(p *updater.Progress) string {
	s := formatBytes(int64(p.Rate)) + "/s"
	if left := p.Total - p.Done; left > 0 && p.Rate > 0 {
		s += fmt.Sprintf(", %s left", time.Duration(float64(left)/p.Rate*float64(time.Second)).Round(time.Second))
	}
	return s
}

// say prints a line, once.
func (l *liveLine) say(text string) {
	// The relative times in a line change on their own; the line is told again when something else does.
	head, _, _ := strings.Cut(text, "; next check")
	if head == l.last {
		return
	}
	l.last = head
	l.end()
	fmt.Fprintf(l.app.stdout, "%s  %s\n", l.pen.paint(faint, time.Now().Format(time.TimeOnly)), l.pen.wrap(text, 10))
}

// end leaves the line that is drawn over.
func (l *liveLine) end() {
	if l.drawn {
		fmt.Fprintln(l.app.stdout)
		l.drawn = false
	}
}
