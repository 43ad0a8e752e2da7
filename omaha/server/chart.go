package server

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// chart is the hosts by version over time, as stacked areas in an SVG.
type chart struct {
	Width, Height int
	Bands         []band // oldest version first, at the bottom
	Times         []string
	Counts        []int // labels of the vertical axis, top first
	Max           int
}

// band is one version's area.
type band struct {
	Version string
	Class   string // its colour
	Points  string
	Now     int
}

const (
	chartWidth, chartHeight = 720, 200
	maxBands                = 8
)

// palette gives each version its colour, the same in every chart of a page: the newest ones each their own, all older
// ones together the quiet one.
func palette(samples []Sample) map[string]string {
	versions := map[string]bool{}
	for _, s := range samples {
		for _, m := range s.Channels {
			for v := range m {
				versions[v] = true
			}
		}
	}
	names := make([]string, 0, len(versions))
	for v := range versions {
		names = append(names, v)
	}
	slices.SortFunc(names, compareVersions)
	classes := make(map[string]string, len(names))
	for i, v := range names {
		if rank := len(names) - i; rank <= maxBands {
			classes[v] = fmt.Sprintf("v%d", rank)
		} else {
			classes[v] = "v0"
		}
	}
	return classes
}

// level is one moment of a chart: hosts by version.
type level struct {
	at       time.Time
	versions map[string]int
}

// levels picks a channel out of samples, or adds all channels up for "".
func levels(samples []Sample, channel string) []level {
	out := make([]level, len(samples))
	for i, s := range samples {
		out[i] = level{s.At, map[string]int{}}
		for name, m := range s.Channels {
			if channel == "" || channel == name {
				for v, n := range m {
					out[i].versions[v] += n
				}
			}
		}
	}
	return out
}

// newChart draws levels, which are in order of time. With a single one it shows that moment.
func newChart(samples []level, colours map[string]string) chart {
	c := chart{Width: chartWidth, Height: chartHeight}
	versions := map[string]bool{}
	for _, s := range samples {
		total := 0
		for v, n := range s.versions {
			versions[v] = true
			total += n
		}
		c.Max = max(c.Max, total)
	}
	if c.Max == 0 {
		return c
	}
	c.Counts = []int{c.Max, 0}
	if c.Max%2 == 0 {
		c.Counts = []int{c.Max, c.Max / 2, 0}
	}
	names := make([]string, 0, len(versions))
	for v := range versions {
		names = append(names, v)
	}
	slices.SortFunc(names, compareVersions)
	begin, end := samples[0].at, samples[len(samples)-1].at
	span := end.Sub(begin)
	if span > 0 {
		c.Times = []string{stamp(begin, span), stamp(begin.Add(span/2), span), stamp(end, span) + " UTC"}
	} else {
		c.Times = []string{stamp(end, span) + " UTC"}
	}
	x := func(t time.Time) float64 {
		if span <= 0 {
			return 0
		}
		return float64(t.Sub(begin)) / float64(span) * chartWidth
	}
	y := func(n int) float64 { return chartHeight - float64(n)/float64(c.Max)*chartHeight }

	base := make([]int, len(samples)) // the top of the bands below
	older := 0
	for older < len(names)-1 && colours[names[older]] == "v0" {
		older++
	}
	if older > 0 { // few hosts run them: one band for all
		top := make([]int, len(samples))
		for k, s := range samples {
			for _, name := range names[:older] {
				top[k] += s.versions[name]
			}
		}
		c.Bands = append(c.Bands, area("older", "v0", base, top, samples, x, y))
		base = top
	}
	for _, name := range names[older:] {
		top := slices.Clone(base)
		for k, s := range samples {
			top[k] += s.versions[name]
		}
		c.Bands = append(c.Bands, area(name, colours[name], base, top, samples, x, y))
		base = top
	}
	return c
}

// area is the polygon between two lines. Values hold until the next sample: a step, not a slope.
func area(version, class string, bottom, top []int, samples []level, x func(time.Time) float64, y func(int) float64) band {
	var line, back []string
	point := func(px float64, n int) string { return fmt.Sprintf("%.1f,%.1f", px, y(n)) }
	for i, s := range samples {
		px := x(s.at)
		if i > 0 {
			line, back = append(line, point(px, top[i-1])), append(back, point(px, bottom[i-1]))
		}
		line, back = append(line, point(px, top[i])), append(back, point(px, bottom[i]))
	}
	n := len(samples) - 1
	if !samples[n].at.After(samples[0].at) {
		line, back = []string{point(0, top[n]), point(chartWidth, top[n])}, []string{point(0, bottom[n]), point(chartWidth, bottom[n])}
	}
	slices.Reverse(back)
	return band{Version: version, Class: class, Points: strings.Join(append(line, back...), " "), Now: top[n] - bottom[n]}
}

// stamp writes a time as exactly as the span of the chart needs.
func stamp(t time.Time, span time.Duration) string {
	switch {
	case span > 36*time.Hour:
		return t.UTC().Format("2 Jan 15:04")
	case span > 10*time.Minute:
		return t.UTC().Format("15:04")
	}
	return t.UTC().Format("15:04:05")
}
