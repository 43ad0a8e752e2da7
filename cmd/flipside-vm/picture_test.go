package main

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The report and its picture can be read as what they are, whatever a machine said, and show each machine with its cuts.
func TestReport(t *testing.T) {
	l := &lab{start: time.Now()}
	l.count.cuts = 2
	for i, e := range []event{
		{0, "left", "on", ""}, {0, "left", "boot", "USR-A"}, {0, "left", "idle", "1.0.0: <nothing> & \"more\""}, {0, "right", "on", ""},
		{0, "left", "moment", "idle + 1 s"}, {0, "left", "cut", "1 lost"}, {0, "left", "on", ""}, {0, "right", "panic", ""}, {0, "left", "trial", ""}, {0, "left", "off", ""},
	} {
		e.at = time.Duration(i) * 30 * time.Second
		l.events = append(l.events, e)
	}
	l.parts = []part{{"cuts", 0, time.Minute, nil}, {"two", time.Minute, 2 * time.Minute, errors.New("a <bad> end")}}
	path := filepath.Join(t.TempDir(), "report.html")
	if err := l.report(path, 7); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if s := string(page); !strings.Contains(s, "a &lt;bad&gt; end") || !strings.Contains(s, "<svg") || !strings.Contains(s, "Seed 7") {
		t.Errorf("the page lacks something:\n%s", s)
	}
	svg, err := os.ReadFile(strings.TrimSuffix(path, "html") + "svg")
	if err != nil {
		t.Fatal(err)
	}
	d := xml.NewDecoder(strings.NewReader(string(svg)))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the picture is not XML: %v\n%s", err, svg)
		}
	}
	for _, want := range []string{">left<", ">right<", "2 power cuts, 0 hosts lost", "cut: 1 lost", "&lt;nothing&gt; &amp; "} {
		if !strings.Contains(string(svg), want) {
			t.Errorf("the picture lacks %q", want)
		}
	}
}
