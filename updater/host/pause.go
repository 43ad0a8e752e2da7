package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
)

// pause is what the pause file holds. Its first line is the reason; a file that somebody made with touch or echo is one too.
type pause struct {
	Reason string
	By     string
	Until  time.Time // zero: until somebody resumes
}

const maxPause = 4 << 10

func (p pause) write(path string) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", strings.ReplaceAll(omaha.Printable(p.Reason), "\n", " "))
	fmt.Fprintf(&b, "by: %s\n", p.By)
	if !p.Until.IsZero() {
		fmt.Fprintf(&b, "until: %s\n", p.Until.Format(time.RFC3339))
	}
	if err := atomicfile.Write(atomicfile.OS(filepath.Dir(path)), filepath.Base(path), []byte(b.String())); err != nil {
		return fmt.Errorf("pausing updates: %w", err)
	}
	return nil
}

func readPause(path string) (pause, error) {
	f, err := os.Open(path)
	if err != nil {
		return pause{}, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxPause))
	if err != nil {
		return pause{}, err
	}
	var p pause
	for i, line := range strings.Split(string(data), "\n") {
		line = strings.TrimSpace(line)
		key, value, _ := strings.Cut(line, ": ")
		switch {
		case i == 0:
			p.Reason = omaha.Printable(line)
		case key == "by":
			p.By = omaha.Printable(value)
		case key == "until":
			// What cannot be read is no end: the pause stays until somebody resumes.
			p.Until, _ = time.Parse(time.RFC3339, value)
		}
	}
	return p, nil
}

func unpause(path string) error {
	err := atomicfile.Remove(atomicfile.OS(filepath.Dir(path)), filepath.Base(path))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: updates are not paused", updater.ErrNothing)
	}
	if err != nil {
		return fmt.Errorf("resuming updates: %w", err)
	}
	return nil
}

// pauseGate stops updates while the pause file exists and its time is not over.
type pauseGate struct{ path string }

func (g pauseGate) Name() string { return "pause" }

func (g pauseGate) Ask(_ context.Context, now time.Time) reboot.Answer {
	info, err := os.Stat(g.path)
	if errors.Is(err, fs.ErrNotExist) {
		return reboot.Answer{Verdict: reboot.Go}
	}
	a := reboot.Answer{Verdict: reboot.Unknown, Hint: "flipside resume", Evidence: g.path}
	if err != nil {
		a.Why = fmt.Sprintf("cannot see whether updates are paused: %v", err)
		return a
	}
	a.Verdict, a.Since, a.Why = reboot.Wait, info.ModTime(), "updates are paused on this host"
	p, err := readPause(g.path)
	if err != nil {
		return a
	}
	if !p.Until.IsZero() && !now.Before(p.Until) {
		return reboot.Answer{Verdict: reboot.Go}
	}
	if p.Reason != "" {
		a.Why += ": " + p.Reason
	}
	if p.By != "" {
		a.Evidence += ", by " + p.By
	}
	a.Ask = p.Until
	return a
}
