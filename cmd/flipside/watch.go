package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

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
			return quiet(exitInterrupt) // which is how a watch ends
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
			return quiet(exitInterrupt)
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

	room   int  // columns beside the bar
	narrow bool // there is none for the rate
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
	fmt.Fprint(l.app.stdout, "\r\x1b[K"+l.draw(time.Now().Format(time.TimeOnly)+"  "+text, p))
	l.drawn = true
}

const (
	leastBar = 6 // cells: what is shorter says nothing
	mostBar  = 40
)

// draw makes a line that fits the terminal. What there is no room for is left out: first the rate, then the bar, then the end. The bar does not change its length with
// every number beside it.
func (l *liveLine) draw(left string, p *updater.Progress) string {
	last := l.pen.width - 1 // in the last column a cursor is already on the next line, for some terminals
	right := fmt.Sprintf(" %3d %%  %s", p.Done*100/p.Total, share(p.Done, p.Total))
	whole := right + "  " + rate(p)
	if !l.narrow {
		l.room = max(l.room, utf8.RuneCountInString(whole))
		l.narrow = last-len(left)-1-l.room < leastBar
		if l.narrow {
			l.room = 0
		}
	}
	if !l.narrow {
		right = whole
	} else if t := timeLeft(p); t != "" {
		right += "  " + t
	}
	l.room = max(l.room, utf8.RuneCountInString(right))
	cells := min(mostBar, last-len(left)-1-l.room)
	if cells < leastBar {
		line := left + right
		return line[:min(len(line), last)]
	}
	full := int(float64(cells) * float64(p.Done) / float64(p.Total))
	return left + " " + l.pen.paint(cyan, strings.Repeat("█", full)) + l.pen.paint(faint, strings.Repeat("░", cells-full)) + right
}

// share says how much of a whole is done, with one unit if that serves both.
func share(done, total int64) string {
	d, t := formatBytes(done), formatBytes(total)
	if n, unit, ok := strings.Cut(d, " "); ok && strings.HasSuffix(t, " "+unit) {
		d = n
	}
	return d + " of " + t
}

func rate(p *updater.Progress) string {
	s := formatBytes(int64(p.Rate)) + "/s"
	if left := timeLeft(p); left != "" {
		s += ", " + left
	}
	return s
}

func timeLeft(p *updater.Progress) string {
	if p.Rate <= 0 {
		return ""
	}
	left := time.Duration(float64(p.Total-p.Done) / p.Rate * float64(time.Second)).Round(time.Second)
	if left <= 0 {
		return ""
	}
	return fmt.Sprintf("%s left", left)
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
