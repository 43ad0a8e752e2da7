package server

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// chart is the fleet by version over time, as stacked areas in an SVG.
type chart struct {
	Width, Height int
	Bands         []band // oldest version first, at the bottom
	From, To      string
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

// newChart draws samples, which are in order of time. With a single one it shows that moment as a level.
func newChart(samples []Sample) chart {
	c := chart{Width: chartWidth, Height: chartHeight}
	versions := map[string]bool{}
	for _, s := range samples {
		total := 0
		for v, n := range s.Versions {
			versions[v] = true
			total += n
		}
		c.Max = max(c.Max, total)
	}
	if c.Max == 0 {
		return c
	}
	names := make([]string, 0, len(versions))
	for v := range versions {
		names = append(names, v)
	}
	slices.SortFunc(names, compareVersions)
	begin, end := samples[0].At, samples[len(samples)-1].At
	span := end.Sub(begin)
	c.From, c.To = stamp(begin, span), stamp(end, span)
	x := func(t time.Time) float64 {
		if span <= 0 {
			return 0
		}
		return float64(t.Sub(begin)) / float64(span) * chartWidth
	}
	y := func(n int) float64 { return chartHeight - float64(n)/float64(c.Max)*chartHeight }

	base := make([]int, len(samples)) // the top of the bands below
	first := max(len(names)-maxBands, 0)
	for i, name := range names {
		last := i >= first || i == len(names)-1
		if !last { // the oldest versions share a band: few hosts run them
			for k, s := range samples {
				base[k] += s.Versions[name]
			}
			if i != first-1 {
				continue
			}
			c.Bands = append(c.Bands, area("older", "v0", make([]int, len(samples)), base, samples, x, y))
			continue
		}
		top := slices.Clone(base)
		for k, s := range samples {
			top[k] += s.Versions[name]
		}
		c.Bands = append(c.Bands, area(name, fmt.Sprintf("v%d", len(names)-i), base, top, samples, x, y))
		base = top
	}
	return c
}

// area is the polygon between two lines. Values hold until the next sample: a step, not a slope.
func area(version, class string, bottom, top []int, samples []Sample, x func(time.Time) float64, y func(int) float64) band {
	var line, back []string
	point := func(px float64, n int) string { return fmt.Sprintf("%.1f,%.1f", px, y(n)) }
	for i, s := range samples {
		px := x(s.At)
		if i > 0 {
			line, back = append(line, point(px, top[i-1])), append(back, point(px, bottom[i-1]))
		}
		line, back = append(line, point(px, top[i])), append(back, point(px, bottom[i]))
	}
	if len(samples) == 1 || !samples[len(samples)-1].At.After(samples[0].At) {
		n := len(samples) - 1
		line, back = []string{point(0, top[n]), point(chartWidth, top[n])}, []string{point(0, bottom[n]), point(chartWidth, bottom[n])}
	}
	slices.Reverse(back)
	n := len(samples) - 1
	return band{Version: version, Class: class, Points: strings.Join(append(line, back...), " "), Now: top[n] - bottom[n]}
}

// stamp writes a time as exactly as the span of the chart needs.
func stamp(t time.Time, span time.Duration) string {
	if span > 36*time.Hour {
		return t.UTC().Format("2 Jan 15:04")
	}
	return t.UTC().Format("15:04:05")
}
