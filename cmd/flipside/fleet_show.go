package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/omaha"
)

// gauge draws how many of the slots are held: used, late, free.
func (s *sheet) gauge(st lock.State) string {
	const most = 40
	if st.Policy.Max > most || len(st.Holders) > most {
		return ""
	}
	used, late := 0, 0
	for _, h := range st.Holders {
		if h.Late.IsZero() {
			used++
		} else {
			late++
		}
	}
	bar := s.paint(yellow, strings.Repeat("■", used)) + s.paint(red, strings.Repeat("■", late)) + s.paint(faint, strings.Repeat("□", max(0, st.Policy.Max-used-late)))
	if bar != "" {
		bar += "  "
	}
	return bar
}

// groupScreen shows who holds, who waits, since when, for which version, and what is halted.
func (a *app) groupScreen(group string, st lock.State, now time.Time) *sheet {
	s := a.sheet()
	head := fmt.Sprintf("%d of %d down, %d waiting", len(st.Holders), st.Policy.Max, len(st.Queue))
	if d := st.RebootTime(); d > 0 {
		head += fmt.Sprintf(", a reboot takes about %s", d.Round(time.Second))
	}
	s.line("group %s: %s%s", s.paint(bold, group), s.gauge(st), head)
	for _, t := range st.Tampered {
		s.line("%s: %s", s.paint(red, "NOT SIGNED"), omaha.Printable(t))
	}
	if st.Policy.Max == 0 {
		how := "flipside fleet resume --group " + group
		if st.Policy.PausedMax == 0 {
			how = "flipside fleet set-max --group " + group + " N"
		}
		s.line("%s: nobody is granted a slot\n  hint: %s", s.paint(yellow, "PAUSED"), how)
	}
	if over := st.Overlong(); over != "" {
		s.line("%s: %s", s.paint(yellow, "TIGHT"), over)
	}
	switch w := st.Window(now); {
	case !w.Open && w.Next.IsZero():
		s.line("%s: %s", s.paint(yellow, "CLOSED"), w.Why)
	case !w.Open:
		s.line("%s: %s; opens %s", s.paint(yellow, "CLOSED"), w.Why, when(w.Next, now))
	case !w.Until.IsZero():
		s.line("%s until %s", s.paint(green, "the window is open"), w.Until.Local().Format(time.DateTime))
	}
	for _, v := range slices.Sorted(maps.Keys(st.Halts)) {
		h := st.Halts[v]
		which := "--all" // of a version that nobody knows
		if v != "" {
			which = lock.Operand(omaha.Printable(v))
		}
		s.line("%s %s: %s\n  hint: flipside fleet resume --group %s %s", s.paint(red, "HALTED "+named(v)), when(h.Since, now), omaha.Printable(h.Reason), group, which)
	}
	for _, v := range slices.Sorted(maps.Keys(st.Failures)) {
		if _, halted := st.Halts[v]; halted {
			continue
		}
		f := st.Failures[v]
		var last lock.FailedHost
		if n := len(f.Hosts); n > 0 {
			last = f.Hosts[n-1]
		}
		budget := ""
		if b := st.Policy.FailureBudget; b > 0 {
			budget = fmt.Sprintf(" (%d halt it)", b)
		}
		s.line("%s on %d host(s)%s, last on %s %s: %s", s.paint(yellow, "release "+named(v)+" failed"), f.Count(), budget, omaha.Printable(last.Host), when(last.At, now), omaha.Printable(last.Reason))
	}
	if len(st.Holders) > 0 {
		var rows [][]cell
		for _, h := range st.Holders {
			phase, look := string(h.Phase), yellow
			switch {
			case !h.Late.IsZero():
				phase, look = phase+", late", red
			case h.Phase == lock.Booted:
				look = green
			case h.Phase == lock.Granted:
				look = cyan
			}
			reason := h.Reason
			if reason == fmt.Sprintf("update from %s to %s", h.From, h.To) { // as hosts say by themselves, and two columns do already
				reason = ""
			}
			row := cells(plain, h.Host, phase, when(h.Since(), now), h.From, cmp.Or(h.To, h.Version), h.Zone, h.Class, fmt.Sprint(h.Token), reason)
			row[0].look, row[1].look = bold, look
			rows = append(rows, row)
		}
		s.line("")
		s.table([]string{"HOLDER", "PHASE", "SINCE", "FROM", "TO", "ZONE", "CLASS", "TOKEN", "REASON"}, rows)
	}
	if len(st.Queue) > 0 {
		turns := map[string]time.Time{}
		forecast, _ := st.Forecast(now)
		for _, t := range forecast {
			turns[t.Host] = t.At
		}
		var rows [][]cell
		for i, q := range st.Queue {
			expected := "-"
			if t, ok := turns[q.Host]; ok {
				expected = when(t, now)
			}
			row := cells(plain, q.Host, fmt.Sprint(i+1), when(q.Since, now), q.From, q.To, q.Zone, q.Class, expected)
			row[0].look = bold
			rows = append(rows, row)
			if a.terminal() && len(rows) == shown && len(st.Queue) > shown {
				break
			}
		}
		s.line("")
		s.table([]string{"WAITER", "POSITION", "SINCE", "FROM", "TO", "ZONE", "CLASS", "EXPECTED"}, rows)
		if more := len(st.Queue) - len(rows); more > 0 {
			s.line("%s", s.paint(faint, fmt.Sprintf("and %d more", more)))
		}
	}
	return s
}

// named is a version for people. FleetLock clients name none.
func named(version string) string { return cmp.Or(omaha.Printable(version), "of unknown version") }

// shown is how many rows of a long list go to a terminal.
const shown = 30

// against says why a waiter gets no turn as things are.
func against(st lock.State, w lock.Waiter) string {
	if h, ok := st.Halts[w.To]; ok {
		return fmt.Sprintf("release %s is halted: %s", named(w.To), omaha.Printable(h.Reason))
	}
	if st.Policy.Max == 0 {
		return "the group is paused"
	}
	for _, h := range st.Holders {
		if !h.Late.IsZero() {
			return h.Host + " is late and keeps its slot"
		}
	}
	if st.RebootTime() == 0 {
		return "nobody knows yet how long a reboot takes here"
	}
	return "no slot comes free for it, or no window opens"
}

// planScreen draws the order in which the hosts that wait will reboot, and when.
func (a *app) planScreen(group string, st lock.State, all bool, now time.Time) *sheet {
	s := a.sheet()
	turns, never := st.Forecast(now)
	if len(st.Queue) == 0 {
		s.line("nobody waits in group %s", group)
		return s
	}
	if st.RebootTime() == 0 {
		s.line("nobody knows yet how long a reboot takes here; reboot_time in the policy says it until it is measured")
	}
	var end time.Time
	for _, t := range turns {
		if t.Done.After(end) {
			end = t.Done
		}
	}
	columns := 32
	if width := a.pen().width; width > 0 { // what stands beside the bars goes before them
		beside := len("99  ") + len("  ") + len(time.DateTime+"  "+time.TimeOnly+"  ")
		host, zone, to := 0, 0, 0
		for _, t := range turns {
			host, to = max(host, utf8.RuneCountInString(t.Host)), max(to, utf8.RuneCountInString(t.To))
			if t.Zone != "" {
				zone = max(zone, utf8.RuneCountInString(t.Zone)+len("  "))
			}
		}
		columns = min(columns, width-1-beside-host-zone-to-len("  "))
	}
	at := func(t time.Time) int {
		return int(float64(columns) * float64(t.Sub(now)) / float64(max(end.Sub(now), 1)))
	}
	var rows [][]cell
	for i, t := range turns {
		if a.terminal() && !all && i == shown && len(turns) > shown+1 {
			break
		}
		bar := ""
		if columns >= 8 {
			from := min(max(at(t.At), 0), columns-1)
			to := min(max(at(t.Done), from+1), columns)
			bar = strings.Repeat("·", from) + strings.Repeat("━", to-from) + strings.Repeat("·", columns-to)
		}
		row := cells(plain, fmt.Sprint(i+1), t.Host, t.Zone, t.To, t.At.Local().Format(time.DateTime), t.Done.Local().Format(time.TimeOnly), bar)
		row[1].look, row[6].look = bold, cyan
		rows = append(rows, row)
	}
	if len(rows) > 0 {
		s.table([]string{"", "HOST", "ZONE", "TO", "BEGINS", "DONE", ""}, rows)
		if more := len(turns) - len(rows); more > 0 {
			s.line("%s", s.paint(faint, fmt.Sprintf("and %d more (--all)", more)))
		}
		s.line("%s %s, in %s, if every reboot takes %s", s.paint(bold, fmt.Sprintf("the last of %d hosts is done about", len(turns))), end.Local().Format(time.DateTime),
			end.Sub(now).Round(time.Second), st.RebootTime().Round(time.Second))
	}
	for i, w := range never {
		if a.terminal() && !all && i == shown {
			s.line("%s", s.paint(faint, fmt.Sprintf("and %d more (--all)", len(never)-i)))
			break
		}
		s.line("%s gets no turn as things are: %s", s.paint(bold, omaha.Printable(w.Host)), against(st, w))
	}
	return s
}

func (a *app) entryTable(s *sheet, entries []lock.Entry) {
	var rows [][]cell
	for _, e := range entries {
		by := e.By
		if by == e.Host {
			by = ""
		}
		look := plain
		switch e.What {
		case "failed", "failed without a slot", "halt", "late":
			look = red
		case "healthy":
			look = green
		case "policy", "resume", "forced", "taken back", "left the queue":
			look = yellow
		}
		row := cells(plain, e.Time.Local().Format(time.DateTime), e.What, e.Host, e.From, e.Version, e.Why, by)
		row[0].look, row[1].look, row[2].look = faint, look, bold
		rows = append(rows, row)
	}
	titles := []string{"WHEN", "WHAT", "HOST", "FROM", "TO", "WHY", "BY"}
	const roomy = 140
	if s.width > 0 && s.width < roomy { // what is said in words goes below
		titles = titles[:5]
		for i, r := range rows {
			note := r[5].text
			if by := r[6].text; by != "" {
				note = strings.TrimSpace(note + " (by " + by + ")")
			}
			rows[i] = append(r[:5], cell{text: note})
		}
	}
	s.table(titles, rows)
}

// watchScreen redraws a group on a terminal, at every change and every two seconds, until ctx ends.
func (a *app) watchScreen(ctx context.Context, k *lock.Keeper, group string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	changed := make(chan struct{}, 1)
	followed := make(chan error, 1)
	go func() {
		followed <- k.Follow(ctx, group, func(lock.State) bool {
			select {
			case changed <- struct{}{}:
			default:
			}
			return true
		})
	}()
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return quiet(exitInterrupt)
		case err := <-followed:
			return err
		case <-changed:
		case <-tick.C:
		}
		st, err := k.State(ctx, group)
		if err != nil {
			return err
		}
		entries, err := k.History(ctx, group)
		if err != nil {
			return err
		}
		now := time.Now()
		s := a.groupScreen(group, st, now)
		if n := len(entries); n > 0 {
			s.line("")
			a.entryTable(s, entries[max(0, n-8):])
		}
		s.line("\n%s", s.paint(faint, now.Format(time.TimeOnly)+", Ctrl-C ends"))
		if _, err := io.WriteString(a.stdout, "\033[H\033[2J\033[3J"); err != nil {
			return err
		}
		if err := s.print(a.stdout); err != nil {
			return err
		}
	}
}
