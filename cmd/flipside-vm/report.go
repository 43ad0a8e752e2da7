package main

import (
	"fmt"
	"html/template"
	"os"
	"time"
)

// report writes one page: what was done, and a time line of every machine.
func (l *lab) report(path string, seed uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	end := time.Since(l.start)
	const width = 1100.0
	x := func(at time.Duration) float64 { return width * at.Seconds() / max(end.Seconds(), 1) }
	type bar struct {
		X, W       float64
		Class, Tip string
	}
	type row struct {
		Name string
		Bars []bar
		Cuts []bar
	}
	var rows []*row
	byName := map[string]*row{}
	on := map[string]*bar{}
	for _, e := range l.events {
		r := byName[e.machine]
		if r == nil {
			r = &row{Name: e.machine}
			byName[e.machine] = r
			rows = append(rows, r)
		}
		tip := fmt.Sprintf("%.1f s: %s %s", e.at.Seconds(), e.what, e.text)
		switch e.what {
		case "moment":
			continue
		case "cut", "panic":
			r.Cuts = append(r.Cuts, bar{X: x(e.at), Class: e.what, Tip: tip})
		}
		if b := on[e.machine]; b != nil {
			b.W = x(e.at) - b.X
			r.Bars = append(r.Bars, *b)
		}
		on[e.machine] = &bar{X: x(e.at), Class: e.what, Tip: tip}
		if e.what == "cut" {
			on[e.machine] = nil
		}
	}
	type scenario struct {
		Name, Story, Took, Error string
	}
	var list []scenario
	for _, p := range l.parts {
		s := scenario{p.name, stories[p.name], fmt.Sprintf("%.0f s", (p.to - p.from).Seconds()), ""}
		if p.err != nil {
			s.Error = p.err.Error()
		}
		list = append(list, s)
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	t, err := page()
	if err == nil {
		err = t.Execute(f, map[string]any{
			"Rows": rows, "Scenarios": list, "Seed": seed, "Cuts": l.count.cuts, "Boots": l.count.boots, "Lost": l.count.lost,
			"Took": end.Round(time.Second).String(), "Width": width, "Events": l.events,
		})
	}
	if err2 := f.Close(); err == nil {
		err = err2
	}
	if err != nil {
		return fmt.Errorf("writing the report: %w", err)
	}
	return nil
}

// page is the report's template.
func page() (*template.Template, error) {
	return template.New("report").Funcs(template.FuncMap{
		"seconds": func(e event) string { return fmt.Sprintf("%.1f", e.at.Seconds()) },
		"machine": func(e event) string { return e.machine },
		"what":    func(e event) string { return e.what },
		"text":    func(e event) string { return e.text },
	}).Parse(`<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Flipside on virtual machines</title>
<style>
:root{color-scheme:light dark;--ink:#1d2330;--dim:#667;--bg:#fff;--line:#dde}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaf0;--dim:#99a;--bg:#14171f;--line:#333a48}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--bg);max-width:1280px;margin:2rem auto;padding:0 1rem}
.big{font-size:2.2rem;font-weight:700}.big span{font-size:1rem;font-weight:400;color:var(--dim);margin-right:2rem}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
.ok{color:#16794b}.bad{color:#c22}svg{width:100%;height:auto}text{fill:var(--ink);font:12px system-ui}
.on,.boot{fill:#b9c3d6}.idle{fill:#4fae86}.applying{fill:#4b86d8}.armed{fill:#d8a93b}.rebooting{fill:#d87c3b}.trial{fill:#9a6fd0}.failing{fill:#c94f4f}
.cut{stroke:#d11;stroke-width:2}.panic{stroke:#808;stroke-width:2}</style>
<h1>Flipside on virtual machines</h1>
<p class="big">{{.Cuts}} <span>power cuts</span>{{.Lost}} <span>hosts lost</span>{{.Boots}} <span>times switched on</span></p>
<p>Seed {{.Seed}}, {{.Took}}.</p>
<table><tr><th>Scenario<th>Time<th>Result</tr>
{{range .Scenarios}}<tr><td>{{.Story}}<td>{{.Took}}<td>{{if .Error}}<span class="bad">{{.Error}}</span>{{else}}<span class="ok">as it should be</span>{{end}}</tr>{{end}}</table>
<h2>Time line</h2>
<p><svg viewBox="0 0 12 12" style="width:12px"><rect class="boot" width="12" height="12"/></svg> booting
<svg viewBox="0 0 12 12" style="width:12px"><rect class="idle" width="12" height="12"/></svg> idle
<svg viewBox="0 0 12 12" style="width:12px"><rect class="applying" width="12" height="12"/></svg> writing a release
<svg viewBox="0 0 12 12" style="width:12px"><rect class="armed" width="12" height="12"/></svg> waiting to reboot
<svg viewBox="0 0 12 12" style="width:12px"><rect class="rebooting" width="12" height="12"/></svg> rebooting
<svg viewBox="0 0 12 12" style="width:12px"><rect class="trial" width="12" height="12"/></svg> trial boot
<svg viewBox="0 0 12 12" style="width:12px"><line class="cut" x1="6" x2="6" y1="0" y2="12"/></svg> power cut</p>
{{range .Rows}}<svg viewBox="0 0 1230 26" role="img" aria-label="time line of {{.Name}}"><text x="0" y="17">{{.Name}}</text><g transform="translate(120,4)">
{{range .Bars}}<rect class="{{.Class}}" x="{{.X}}" y="0" width="{{.W}}" height="18"><title>{{.Tip}}</title></rect>{{end}}
{{range .Cuts}}<line class="{{.Class}}" x1="{{.X}}" x2="{{.X}}" y1="-4" y2="22"><title>{{.Tip}}</title></line>{{end}}</g></svg>
{{end}}
<details><summary>Everything that happened</summary><table><tr><th>Seconds<th>Machine<th>What<th></tr>
{{range .Events}}<tr><td>{{seconds .}}<td>{{machine .}}<td>{{what .}}<td>{{text .}}</tr>{{end}}</table></details>
</html>
`)
}
