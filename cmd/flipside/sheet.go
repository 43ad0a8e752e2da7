package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/term"
)

// A style is how a text looks on a terminal; elsewhere it makes no difference.
type style string

const (
	plain  style = ""
	bold   style = "1"
	faint  style = "2"
	red    style = "31"
	green  style = "32"
	yellow style = "33"
	cyan   style = "36"
)

// sheet is what a command shows: lines and tables, in colour on a terminal.
type sheet struct {
	b strings.Builder
	pen
}

func (a *app) sheet() *sheet { return &sheet{pen: a.pen()} }

func (a *app) terminal() bool {
	f, ok := a.stdout.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

func (s *sheet) print(w io.Writer) error {
	_, err := io.WriteString(w, s.b.String())
	return err
}

// line adds lines, each broken at spaces where it is longer than the terminal is wide.
func (s *sheet) line(format string, args ...any) {
	for line := range strings.SplitSeq(fmt.Sprintf(format, args...), "\n") {
		if s.width > 0 && columns(line) > s.width {
			lead := len(line) - len(strings.TrimLeft(line, " "))
			line = line[:lead] + s.wrap(line, lead+2)
		}
		s.b.WriteString(line + "\n")
	}
}

// cell is a text in a table. It comes from other hosts: nothing in it may move the cursor.
type cell struct {
	text string
	look style
}

func cells(look style, texts ...string) []cell {
	row := make([]cell, len(texts))
	for i, t := range texts {
		row[i] = cell{t, look}
	}
	return row
}

// narrow takes room from the widest column until a row fits beside the gaps between them, and says whether it does: each column is left enough to be read.
func (s *sheet) narrow(width []int) bool {
	const least = 12
	for s.width > 0 {
		total, widest := -2, 0
		for i, w := range width {
			if w > 0 {
				total += w + 2
			}
			if w > width[widest] {
				widest = i
			}
		}
		if total <= s.width {
			return true
		}
		if width[widest] <= least {
			return false
		}
		width[widest]--
	}
	return true
}

// widths is how wide the columns of a table are; 0 is one that is empty below its title, but in a table without rows.
func widths(titles []string, rows [][]cell) []int {
	width := make([]int, len(titles))
	for i := range titles {
		if len(rows) == 0 {
			width[i] = utf8.RuneCountInString(titles[i])
		}
		for _, r := range rows {
			if r[i].text != "" {
				width[i] = max(width[i], utf8.RuneCountInString(r[i].text), utf8.RuneCountInString(titles[i]))
			}
		}
	}
	return width
}

// below takes the last column that is not empty out of a table: what it says goes below each row, with its title.
func below(titles []string, rows [][]cell, width []int) {
	last := len(titles) - 1
	for width[last] == 0 {
		last--
	}
	for i, r := range rows {
		if len(r) == len(titles) {
			r = append(r, cell{})
		}
		note := &r[len(titles)]
		if r[last].text != "" {
			note.text = strings.TrimSpace(strings.TrimSuffix(strings.ToLower(titles[last])+" "+r[last].text+", "+note.text, ", "))
		}
		r[last].text = ""
		rows[i] = r
	}
}

// fold breaks a cell's text into lines of a width: at spaces, and words that are longer anywhere.
func fold(text string, width int) (lines []string) {
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && columns(line)+1+columns(word) <= width {
			line += " " + word
			continue
		}
		if line != "" {
			lines = append(lines, line)
		}
		for r := []rune(word); ; r = r[width:] {
			if line = string(r); len(r) <= width {
				break
			}
			lines = append(lines, string(r[:width]))
		}
	}
	return append(lines, line)
}

// printable is a text that comes from other hosts, in full: nothing in it moves the cursor.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return utf8.RuneError
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
}

// table aligns rows. A column that is empty below its title is left out; what does not fit the terminal goes on below, in its column, and where there are too many columns the last ones
// go below the row. A row may have a cell more than there are titles: it goes there too.
func (s *sheet) table(titles []string, rows [][]cell) {
	for _, r := range rows {
		for i := range r {
			r[i].text = printable(r[i].text)
		}
	}
	width := widths(titles, rows)
	for len(rows) > 0 && !s.narrow(width) && slices.Max(width) > 0 {
		width = widths(titles, rows)
		below(titles, rows, width)
		width = widths(titles, rows)
	}
	var all [][]cell
	for _, r := range append([][]cell{cells(faint, titles...)}, rows...) {
		for n := 0; ; n++ { // the lines of a row
			part, more := make([]cell, len(titles)), false
			for i, c := range r[:len(titles)] {
				folded := []string{c.text}
				if columns(c.text) > width[i] && width[i] > 0 {
					folded = fold(c.text, width[i])
				}
				if n < len(folded) {
					part[i] = cell{folded[n], c.look}
				}
				more = more || n+1 < len(folded)
			}
			if all = append(all, part); !more {
				break
			}
		}
		if len(r) > len(titles) && r[len(titles)].text != "" {
			all = append(all, r[len(titles):])
		}
	}
	for _, r := range all {
		if len(r) == 1 && len(titles) > 1 {
			for _, line := range fold(r[0].text, s.width-4) {
				s.b.WriteString("    " + line + "\n")
			}
			continue
		}
		var line strings.Builder
		gap := 0
		for i, c := range r {
			if width[i] == 0 || c.text == "" {
				gap += width[i]
				if width[i] > 0 {
					gap += 2
				}
				continue
			}
			line.WriteString(strings.Repeat(" ", gap) + s.paint(c.look, c.text))
			gap = width[i] - utf8.RuneCountInString(c.text) + 2
		}
		s.b.WriteString(line.String() + "\n")
	}
}
