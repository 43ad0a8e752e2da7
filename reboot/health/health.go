// Package health decides whether a boot is good: systemd must have reached what it must reach, nothing of a list may have failed, and
// every program in a directory must succeed, each within its time; all of that once more after a soak time.
//
// [Units] asks systemd, [Watchdog] lets the machine's own watchdog end a trial boot that hangs, and [Keep] keeps what a bad boot
// leaves behind where the release that the host goes back to can read it.
//
// A program that cannot be run, that runs out of time, or that ends with another status than 0 makes the boot bad; the last
// line that it printed is the reason, because that is what a person wants to read first. A directory that is not there
// or empty has nothing against the boot. A directory that cannot be read has: what cannot be asked never counts as good.
package health

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unicode"
)

// Checks are the health checks of one boot. Their zero value finds every boot good.
type Checks struct {
	Units   Units         // are asked first
	Dir     string        // of the programs; they run in the order of their names
	Timeout time.Duration // for each program; 0 means one minute
	Soak    time.Duration // the time between the first and the second round; 0 means one round
	Env     []string      // added to the environment of the programs
}

// maxOutput is what is kept of a program's output, its end.
const maxOutput = 16 << 10

// Failure is a check that did not succeed.
type Failure struct {
	Program string // or unit
	Reason  string // one line
	Output  string // the end of what it printed
}

func (f *Failure) Error() string { return fmt.Sprintf("health check %s: %s", f.Program, f.Reason) }

// Run runs the checks. It returns nil for a good boot, a *Failure for a bad one, and another error if ctx ended or the
// directory cannot be read.
func (c Checks) Run(ctx context.Context) error {
	if err := c.round(ctx); err != nil {
		return err
	}
	if c.Soak <= 0 {
		return nil
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(c.Soak):
	}
	return c.round(ctx)
}

func (c Checks) round(ctx context.Context) error {
	if err := c.Units.check(ctx); err != nil {
		return err
	}
	if c.Dir == "" {
		return nil
	}
	entries, err := os.ReadDir(c.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking for health checks: %w", err)
	}
	for _, e := range entries {
		info, err := os.Stat(filepath.Join(c.Dir, e.Name()))
		if err != nil {
			return &Failure{e.Name(), fmt.Sprintf("cannot be looked at: %v", err), ""}
		}
		if !info.Mode().IsRegular() || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		if info.Mode()&0o111 == 0 {
			return &Failure{e.Name(), "is not executable", ""}
		}
		if err := c.run(ctx, e.Name()); err != nil {
			return err
		}
	}
	return nil
}

func (c Checks) run(ctx context.Context, name string) error {
	timeout := c.Timeout
	if timeout <= 0 {
		timeout = time.Minute
	}
	run, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	out := &tail{max: maxOutput}
	cmd := exec.CommandContext(run, filepath.Join(c.Dir, name))
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.Stdout, cmd.Stderr = out, out
	// Its own process group, so that what it started ends with it when its time is over: it is run again and again. What one that ends by itself
	// leaves behind is its own affair.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error {
		err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		if errors.Is(err, syscall.ESRCH) {
			return os.ErrProcessDone
		}
		return err
	}
	cmd.WaitDelay = time.Second // for children that keep the output open
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil, errors.Is(err, exec.ErrWaitDelay): // the latter: it succeeded, and what it left behind keeps its output open
		return nil
	case run.Err() != nil:
		return &Failure{name, fmt.Sprintf("did not end within %s", timeout), out.String()}
	}
	reason := err.Error()
	if line := out.lastLine(); line != "" {
		reason = line + " (" + reason + ")"
	}
	return &Failure{name, reason, out.String()}
}

// tail keeps the last max bytes that are written to it.
type tail struct {
	buf bytes.Buffer
	max int
}

func (t *tail) Write(p []byte) (int, error) {
	t.buf.Write(p)
	if over := t.buf.Len() - t.max; over > 0 {
		t.buf.Next(over)
	}
	return len(p), nil
}

func (t *tail) String() string { return t.buf.String() }

func (t *tail) lastLine() string {
	s := strings.TrimSpace(t.buf.String())
	s = s[strings.LastIndexByte(s, '\n')+1:]
	s = strings.Map(func(r rune) rune {
		if !unicode.IsGraphic(r) { // no control characters, also those of eight bits, and no marks that turn the writing around
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > 200 {
		s = strings.ToValidUTF8(s[:200], "") + "..."
	}
	return s
}
