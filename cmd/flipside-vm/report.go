package main

import (
	"fmt"
	"html/template"
	"os"
	"slices"
	"strings"
	"time"
)

// report writes one page: what was done, and a time line of every machine; and the time line alone as a picture, beside it.
func (l *lab) report(path string, seed uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	end := time.Since(l.start)
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
	type row struct {
		Stage stage
		Cuts  int
	}
	var fell []row
	for _, x := range append(slices.Clone(stages), idling) {
		if l.fell[x] > 0 || l.count.cuts > 0 && x != idling {
			fell = append(fell, row{x, l.fell[x]})
		}
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	t, err := page()
	if err == nil {
		err = t.Execute(f, map[string]any{
			"Line": template.HTML(l.picture()), "Scenarios": list, "Seed": seed, "Cuts": l.count.cuts, "Boots": l.count.boots, "Lost": l.count.lost,
			"Took": end.Round(time.Second).String(), "Events": l.events, "Fell": fell,
		})
	}
	if err2 := f.Close(); err == nil {
		err = err2
	}
	if err == nil {
		err = os.WriteFile(strings.TrimSuffix(path, ".html")+".svg", []byte(l.picture()), 0o644)
	}
	if err != nil {
		return fmt.Errorf("writing the report: %w", err)
	}
	return nil
}

// where says how many power cuts fell into which stage.
func (l *lab) where() string {
	var list []string
	for _, x := range append(slices.Clone(stages), idling) {
		if n := l.fell[x]; n > 0 {
			list = append(list, fmt.Sprintf("%s %d", x, n))
		}
	}
	return strings.Join(list, ", ")
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
.ok{color:#16794b}.bad{color:#c22}svg{width:100%;height:auto}</style>
<h1>Flipside on virtual machines</h1>
<p class="big">{{.Cuts}} <span>power cuts</span>{{.Lost}} <span>hosts lost</span>{{.Boots}} <span>times switched on</span></p>
<p>Seed {{.Seed}}, {{.Took}}.</p>
<table><tr><th>Scenario<th>Time<th>Result</tr>
{{range .Scenarios}}<tr><td>{{.Story}}<td>{{.Took}}<td>{{if .Error}}<span class="bad">{{.Error}}</span>{{else}}<span class="ok">as it should be</span>{{end}}</tr>{{end}}</table>
{{with .Fell}}<h2>Where the cuts fell</h2>
<table><tr><th>While the machine was seen in<th>Cuts</tr>{{range .}}<tr><td>{{.Stage}}<td>{{.Cuts}}</tr>{{end}}</table>{{end}}
<h2>Time line</h2>
{{.Line}}
<details><summary>Everything that happened</summary><table><tr><th>Seconds<th>Machine<th>What<th></tr>
{{range .Events}}<tr><td>{{seconds .}}<td>{{machine .}}<td>{{what .}}<td>{{text .}}</tr>{{end}}</table></details>
</html>
`)
}
