package main

import (
	"fmt"
	"html"
	"strings"
	"time"
)

// phases are what a machine does, in the order of the picture's legend.
var phases = []struct{ name, color, text string }{
	{"boot", "#b9c3d6", "booting"},
	{"idle", "#4fae86", "running"},
	{"applying", "#4b86d8", "writing a release"},
	{"armed", "#d8a93b", "armed, waits to reboot"},
	{"rebooting", "#d87c3b", "rebooting"},
	{"trial", "#9a6fd0", "trial boot"},
	{"cut", "#cc1122", "power cut"},
	{"panic", "#111111", "kernel panic"},
}

func color(name string) string {
	for _, p := range phases {
		if p.name == name {
			return p.color
		}
	}
	return "#c94f4f" // failing
}

// picture draws a line for every machine, from when it was switched on first. The caller holds the lab's lock.
func (l *lab) picture() string {
	const left, width, step, top = 90.0, 900.0, 20.0, 64.0
	type line struct {
		name   string
		events []event
		last   time.Duration
	}
	var lines []*line
	of := map[string]*line{}
	for _, e := range l.events {
		n := of[e.machine]
		if n == nil {
			n = &line{name: e.machine}
			of[e.machine], lines = n, append(lines, n)
		}
		n.events, n.last = append(n.events, e), e.at
	}
	longest := time.Second
	for _, n := range lines {
		longest = max(longest, n.last-n.events[0].at)
	}
	var b strings.Builder
	height := top + step*float64(len(lines)) + 30
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" font-family="system-ui,sans-serif" font-size="12" role="img" aria-label="time lines of %d virtual machines">`+"\n", left+width+20, height, len(lines))
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="#fff"/><text x="8" y="22" font-size="15" font-weight="700" fill="#1d2330">%d power cuts, %d hosts lost</text>`+"\n", l.count.cuts, l.count.lost)
	if w := l.where(); w != "" {
		fmt.Fprintf(&b, `<text x="%.0f" y="22" text-anchor="end" fill="#445">cuts seen in: %s</text>`+"\n", left+width+10, w)
	}
	at := 8.0
	for _, p := range phases {
		fmt.Fprintf(&b, `<rect x="%.0f" y="36" width="11" height="11" fill="%s"/><text x="%.0f" y="46" fill="#445">%s</text>`+"\n", at, p.color, at+15, p.text)
		at += 34 + 6.3*float64(len(p.text))
	}
	x := func(n *line, at time.Duration) float64 {
		return left + width*float64(at-n.events[0].at)/float64(longest)
	}
	every := time.Minute
	for longest/every > 12 {
		every *= 2
	}
	for t := time.Duration(0); t <= longest; t += every {
		px := left + width*float64(t)/float64(longest)
		fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%.0f" y2="%.0f" stroke="#e4e7ee"/><text x="%.1f" y="%.0f" text-anchor="middle" fill="#778">%d min</text>`+"\n", px, px, top-6, height-24, px, height-8, int(t.Minutes()))
	}
	for i, n := range lines {
		y := top + step*float64(i)
		fmt.Fprintf(&b, `<text x="8" y="%.0f" fill="#1d2330">%s</text>`+"\n", y+12, html.EscapeString(n.name))
		var now event
		end := func(at time.Duration) {
			if now.what == "" {
				return
			}
			fmt.Fprintf(&b, `<rect x="%.1f" y="%.0f" width="%.1f" height="14" fill="%s"><title>%s</title></rect>`+"\n",
				x(n, now.at), y, x(n, at)-x(n, now.at), color(now.what), html.EscapeString(strings.TrimSpace(fmt.Sprintf("%.0f s: %s %s", (now.at-n.events[0].at).Seconds(), now.what, now.text))))
		}
		var marks []event
		for _, e := range n.events {
			switch e.what {
			case "moment", "floor", "refused", "replaced": // told, and not states
				continue
			case "cut", "panic":
				marks = append(marks, e)
			}
			end(e.at)
			now = e
			switch e.what {
			case "on", "panic":
				now.what = "boot"
			case "cut", "off":
				now.what = ""
			}
		}
		end(n.last)
		for _, e := range marks {
			fmt.Fprintf(&b, `<rect x="%.1f" y="%.0f" width="2.5" height="18" fill="%s"><title>%s</title></rect>`+"\n", x(n, e.at)-1, y-2, color(e.what), html.EscapeString(e.what+": "+e.text))
		}
	}
	b.WriteString("</svg>\n")
	return b.String()
}
