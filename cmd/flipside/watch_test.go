package main

import (
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/flipside-linux/flipside/updater"
)

// The line that is drawn over fits the terminal, however narrow, and its bar only grows: the numbers beside it do not push it about.
func TestLiveLineFits(t *testing.T) {
	for _, width := range []int{40, 60, 80, 120, 200} {
		l := &liveLine{pen: pen{width: width}}
		cells, full := 0, 0
		for _, round := range []string{"first", "second"} { // in the first one it learns how wide the numbers get
			full = 0
			for i, done := range []int64{0, 27 << 10, 1 << 20, 9 << 20, 90 << 20, 512 << 20, 1022 << 20, 1 << 30} {
				p := &updater.Progress{Done: done, Total: 1 << 30, Rate: []float64{0, 700 << 10, 5 << 20}[i%3], Step: "reading back"}
				line := l.draw("03:12:12  reading back 4230.2.1", p)
				if n := utf8.RuneCountInString(line); n >= width {
					t.Errorf("%d columns: a line of %d: %s", width, n, line)
				}
				if want := fmt.Sprintf("%d %%", done*100>>30); width >= 60 && !strings.Contains(line, want) {
					t.Errorf("%d columns: no %s in %s", width, want, line)
				}
				bar, now := strings.Count(line, "█")+strings.Count(line, "░"), strings.Count(line, "█")
				if round == "second" && (bar != cells || now < full) {
					t.Errorf("%d columns: the bar of %d with %d full is one of %d with %d now: %s", width, cells, full, bar, now, line)
				}
				cells, full = bar, now
			}
		}
		if width >= 80 && cells < leastBar {
			t.Errorf("%d columns: there is no bar", width)
		}
	}
}
