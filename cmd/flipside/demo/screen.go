package demo

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"github.com/flipside-linux/flipside/updater"
)

// screen shows the story: on a terminal a log with a live board of the hosts under it, elsewhere plain lines.
type screen struct {
	w     io.Writer
	live  bool
	width int
	start time.Time

	mu    sync.Mutex
	board []string // what is drawn under the log now
	last  map[string]string
}

func newScreen(w io.Writer) *screen {
	s := &screen{w: w, start: time.Now(), width: 110, last: map[string]string{}}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb" {
		s.live = true
		if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 40 {
			s.width = w
		}
	}
	return s
}

// style wraps text in a terminal attribute, on a terminal only.
func (s *screen) style(code, text string) string {
	if !s.live || os.Getenv("NO_COLOR") != "" {
		return text
	}
	return "\033[" + code + "m" + text + "\033[0m"
}

func (s *screen) elapsed() string { return fmt.Sprintf("%5.1fs", time.Since(s.start).Seconds()) }

// chapter begins a part of the story.
func (s *screen) chapter(format string, args ...any) {
	s.print("\n" + s.style("1", fmt.Sprintf(format, args...)))
}

// say adds a line to the log.
func (s *screen) say(format string, args ...any) {
	s.print(s.style("2", s.elapsed()) + "  " + fmt.Sprintf(format, args...))
}

func (s *screen) print(line string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	board := s.board
	s.erase()
	fmt.Fprintln(s.w, line)
	s.draw(board)
}

// erase and draw handle the board below the log; on no terminal there is none.
func (s *screen) erase() {
	if n := len(s.board); n > 0 {
		fmt.Fprintf(s.w, "\033[%dA\033[J", n)
	}
	s.board = nil
}

func (s *screen) draw(board []string) {
	for _, line := range board {
		fmt.Fprintln(s.w, line)
	}
	s.board = board
}

// show updates the hosts: the board on a terminal, a line for each change of phase elsewhere.
func (s *screen) show(ms []*machine) {
	if !s.live {
		for _, m := range ms {
			st, seen, _ := m.view()
			if !seen {
				continue
			}
			key := string(st.Phase) + "|" + gist(st)
			s.mu.Lock()
			changed := s.last[m.name] != key && st.Phase != ""
			s.last[m.name] = key
			s.mu.Unlock()
			if changed {
				s.say("%s  %-9s %s", m.name, st.Phase, st.Why)
			}
		}
		return
	}
	board := []string{""}
	for _, m := range ms {
		st, seen, _ := m.view()
		if !seen {
			board = append(board, fmt.Sprintf("  %s  starting", m.name))
			continue
		}
		line := fmt.Sprintf("  %-7s %-6s %-6s %-9s ", m.name, st.Slot, st.Version, st.Phase)
		colour := map[updater.Phase]string{updater.Idle: "32", updater.Applying: "36", updater.Armed: "33", updater.Rebooting: "35", updater.Trial: "33", updater.Failing: "31"}[st.Phase]
		rest := st.Why
		if p := st.Progress; st.Phase == updater.Applying && p != nil && p.Total > 0 {
			const width = 30
			n := int(p.Done * width / p.Total)
			rest = fmt.Sprintf("%s%s %3d %%  %s", strings.Repeat("█", n), strings.Repeat("░", width-n), p.Done*100/p.Total, p.Step)
		}
		if room := s.width - len(line) - 1; len([]rune(rest)) > room && room > 3 {
			rest = string([]rune(rest)[:room-3]) + "..."
		}
		board = append(board, s.style(colour, line)+rest)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.erase()
	s.draw(board)
}

// gist is what must change in a status for a new plain line.
func gist(st updater.Status) string {
	switch st.Phase {
	case updater.Applying:
		return st.Update.Version + st.LastError
	case updater.Idle:
		return st.LastAnswer + st.LastError
	}
	// Waiting times change all the time; who is in the way does not.
	why, _, _ := strings.Cut(st.Why, ", held for")
	return why
}

// done takes the board away.
func (s *screen) done() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.erase()
}
