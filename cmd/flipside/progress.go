package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"
)

// progress shows how far a long job has come: one line that is redrawn on a terminal, a plain line now and then elsewhere.
type progress struct {
	w        io.Writer
	label    string
	total    int64
	terminal bool
	start    time.Time
	last     time.Time
	done     int64
}

// progress starts a progress display on standard error. total is in bytes; 0 means unknown.
func (a *app) progress(label string, total int64) *progress {
	f, ok := a.stderr.(*os.File)
	now := time.Now()
	return &progress{w: a.stderr, label: label, total: total, terminal: ok && term.IsTerminal(int(f.Fd())), start: now, last: now}
}

// Set says that done bytes of the total are done.
func (p *progress) Set(done int64) {
	p.done = done
	interval := 100 * time.Millisecond
	if !p.terminal {
		interval = 5 * time.Second
	}
	if now := time.Now(); now.Sub(p.last) >= interval {
		p.last = now
		p.draw(now)
	}
}

// Done draws the final state and ends the line.
func (p *progress) Done() {
	now := time.Now()
	if p.terminal {
		p.draw(now)
		fmt.Fprintln(p.w)
	} else if now.Sub(p.start) >= 5*time.Second {
		p.draw(now)
	}
}

func (p *progress) draw(now time.Time) {
	elapsed := now.Sub(p.start).Seconds()
	var b strings.Builder
	fmt.Fprintf(&b, "%s  %s", p.label, formatBytes(p.done))
	if p.total > 0 {
		fmt.Fprintf(&b, " of %s  %3d %%", formatBytes(p.total), p.done*100/p.total)
	}
	if elapsed > 0 && p.done > 0 {
		rate := float64(p.done) / elapsed
		fmt.Fprintf(&b, "  %s/s", formatBytes(int64(rate)))
		if left := p.total - p.done; left > 0 {
			fmt.Fprintf(&b, "  %s left", (time.Duration(float64(left) / rate * float64(time.Second))).Round(time.Second))
		}
	}
	if p.terminal {
		line := []rune(b.String())
		if s := penOf(p.w); s.width > 0 && len(line) >= s.width { // a line that wraps cannot be drawn over
			line = line[:s.width-1]
		}
		fmt.Fprintf(p.w, "\r\033[K%s", string(line))
	} else {
		fmt.Fprintln(p.w, b.String())
	}
}

// formatBytes prints a size in binary units, as people read disk sizes.
func formatBytes(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	div, exp := int64(unit), 0
	for m := n / unit; m >= unit && exp < 4; m /= unit {
		div *= unit
		exp++
	}
	return fmt.Sprintf("%.1f %ciB", float64(n)/float64(div), "KMGTP"[exp])
}
