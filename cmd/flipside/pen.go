package main

import (
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"golang.org/x/term"
)

// pen writes on standard output: with colours and wrapped to the width on a terminal, plain elsewhere. NO_COLOR and TERM=dumb
// are obeyed.
type pen struct {
	colour bool
	width  int // 0: nothing is wrapped
}

func (a *app) pen() pen { return penOf(a.stdout) }

func penOf(w io.Writer) pen {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return pen{}
	}
	s := pen{colour: os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
	if width, _, err := term.GetSize(int(f.Fd())); err == nil && width >= 40 {
		s.width = width
	}
	return s
}

// paint gives text a colour, or a weight.
func (s pen) paint(look style, text string) string {
	if !s.colour || look == plain || text == "" {
		return text
	}
	return "\x1b[" + string(look) + "m" + text + "\x1b[0m"
}

// wrap breaks text at spaces so that it fits beside an indent of so many columns, which every line but the first begins with.
func (s pen) wrap(text string, indent int) string {
	room := s.width - indent
	if s.width == 0 || room < 20 {
		return text
	}
	var b strings.Builder
	column := 0
	for i, word := range strings.Fields(text) {
		n := columns(word)
		switch {
		case i == 0:
		case column+1+n > room:
			b.WriteString("\n" + strings.Repeat(" ", indent))
			column = 0
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += n
	}
	return b.String()
}

// columns is how much room text takes: colours take none.
func columns(text string) (n int) {
	for text != "" {
		before, after, coloured := strings.Cut(text, "\x1b[")
		n += utf8.RuneCountInString(before)
		if !coloured {
			break
		}
		_, text, _ = strings.Cut(after, "m")
	}
	return n
}

// pad fills text up to a number of columns. Colours are added after it, so that they do not count.
func pad(text string, columns int) string {
	return text + strings.Repeat(" ", max(0, columns-utf8.RuneCountInString(text)))
}
