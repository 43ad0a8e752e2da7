package reboot

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/flipside-linux/flipside/reboot/health"
)

// Inhibitors waits while a program holds an inhibitor of mode "block" against a shutdown. logind before systemd 257 would let root
// pass them; this gate does not.
type Inhibitors struct{ Logind Logind }

// Name implements [Gate].
func (Inhibitors) Name() string { return "inhibitors" }

// Ask implements [Gate].
func (g Inhibitors) Ask(ctx context.Context, _ time.Time) Answer {
	all, err := g.Logind.Inhibitors(ctx)
	if err != nil {
		return Answer{Verdict: Unknown, Why: "logind cannot be asked: " + err.Error(), Hint: "systemctl restart systemd-logind", Evidence: "systemctl status systemd-logind"}
	}
	var blocking []Inhibitor
	for _, i := range all {
		if i.Blocks() {
			blocking = append(blocking, i)
		}
	}
	if len(blocking) == 0 {
		return Answer{Verdict: Go}
	}
	return Answer{Verdict: Wait, Why: "blocked by " + list(blocking), Hint: "it ends by itself, or with that program", Evidence: "systemd-inhibit --list"}
}

// Users waits while people are logged in, but not for ever: they are told on their terminals from when on the machine may reboot, again
// in the last minute, and then it does. It is one of the gates that are asked last: nobody is told to leave while something
// else is against the reboot, and then the time begins anew.
type Users struct {
	Logind Logind
	Grace  time.Duration // how long they may stay
	// Tell writes a text to a terminal; nil writes to its device.
	Tell func(tty, text string) error

	mu    sync.Mutex
	since time.Time
	told  map[string]int // by session: how often
}

var _ Withdrawer = (*Users)(nil)

// Withdraw implements [Withdrawer]: the time that people have begins anew.
func (g *Users) Withdraw(context.Context, string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.since, g.told = time.Time{}, nil
	return nil
}

// Name implements [Gate].
func (*Users) Name() string { return "users" }

// Session is somebody who is logged in.
type Session struct {
	ID   string
	User string
	TTY  string
}

// Ask implements [Gate].
func (g *Users) Ask(ctx context.Context, now time.Time) Answer {
	sessions, err := g.Logind.Sessions(ctx)
	if err != nil {
		return Answer{Verdict: Unknown, Why: "logind cannot be asked who is logged in: " + err.Error(), Hint: "systemctl restart systemd-logind", Evidence: "systemctl status systemd-logind"}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(sessions) == 0 {
		g.since, g.told = time.Time{}, nil
		return Answer{Verdict: Go}
	}
	if g.since.IsZero() || now.Before(g.since) { // the clock was set back
		g.since, g.told = now, map[string]int{}
	}
	until := g.since.Add(g.Grace)
	last := until.Add(-lastWord)
	for _, s := range sessions {
		if s.TTY == "" || g.told[s.ID] > 1 || g.told[s.ID] == 1 && now.Before(last) {
			continue
		}
		g.told[s.ID]++
		if !now.Before(last) {
			g.told[s.ID] = 2
		}
		// Nobody can be told on a terminal that is gone; that is no reason to stop.
		_ = g.tell(s.TTY, fmt.Sprintf("\r\n*** This machine may reboot at any time from %s on, for an update. Save your work and log out.\r\n", until.Format(time.TimeOnly)))
	}
	if !now.Before(until) {
		return Answer{Verdict: Go, Why: fmt.Sprintf("%s logged in for longer than %s", who(sessions), rounded(g.Grace))}
	}
	a := Answer{Verdict: Wait, Why: fmt.Sprintf("%s logged in; they have until %s", who(sessions), until.Format(time.TimeOnly)), Ask: until, Since: g.since, Hint: "their time ends; flipside reboot --now passes over it", Evidence: "loginctl list-sessions"}
	if now.Before(last) {
		a.Ask = last
	}
	return a
}

// lastWord is how long before the end of their time people are told again.
const lastWord = time.Minute

func who(sessions []Session) string {
	var names []string
	for _, s := range sessions {
		name := s.User
		if s.TTY != "" {
			name += " on " + s.TTY
		}
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}

func (g *Users) tell(tty, text string) error {
	if g.Tell != nil {
		return g.Tell(tty, text)
	}
	if !filepath.IsLocal(tty) {
		return fmt.Errorf("terminal %q is not a name below /dev", tty)
	}
	f, err := os.OpenFile(filepath.Join("/dev", tty), os.O_WRONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.SetWriteDeadline(time.Now().Add(time.Second)); err != nil && !errors.Is(err, os.ErrNoDeadline) {
		return err
	}
	_, err = io.WriteString(f, text)
	return err
}

// Sessions lists who is logged in: sessions of people, not those of services, greeters and background jobs.
func (l Logind) Sessions(ctx context.Context) ([]Session, error) {
	conn, call, cancel, err := l.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer cancel()
	defer conn.Close()
	var listed []struct {
		ID         string
		UID        uint32
		User, Seat string
		Path       dbus.ObjectPath
	}
	if err := conn.Object(login1, login1Path).CallWithContext(call, login1Iface+".ListSessions", 0).Store(&listed); err != nil {
		return nil, fmt.Errorf("listing sessions: %w", err)
	}
	var sessions []Session
	for _, s := range listed {
		var props map[string]dbus.Variant
		err := conn.Object(login1, s.Path).CallWithContext(call, "org.freedesktop.DBus.Properties.GetAll", 0, "org.freedesktop.login1.Session").Store(&props)
		if named(err, "org.freedesktop.DBus.Error.UnknownObject", "org.freedesktop.login1.NoSuchSession") {
			continue // logged out meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("looking at session %q of %q: %w", s.ID, s.User, err)
		}
		text := func(name string) string { v, _ := props[name].Value().(string); return v }
		// Since systemd 256 there are user-early (root's) and user-light beside user; user-incomplete has not logged in yet.
		if class := text("Class"); !strings.HasPrefix(class, "user") || class == "user-incomplete" || text("State") == "closing" {
			continue
		}
		sessions = append(sessions, Session{ID: s.ID, User: s.User, TTY: text("TTY")})
	}
	return sessions, nil
}

// Files waits while there are files in a directory; the first line of each is the reason.
type Files struct{ Dir string }

// Name implements [Gate].
func (Files) Name() string { return "inhibit files" }

// Ask implements [Gate].
func (g Files) Ask(context.Context, time.Time) Answer {
	entries, err := os.ReadDir(g.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return Answer{Verdict: Go}
	}
	if err != nil {
		return Answer{Verdict: Unknown, Why: err.Error(), Hint: "make it a directory that can be read", Evidence: g.Dir}
	}
	var reasons, names []string
	var since time.Time
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		path := filepath.Join(g.Dir, e.Name())
		names = append(names, path)
		reasons = append(reasons, e.Name()+": "+firstLine(path))
		if info, err := e.Info(); err == nil && (since.IsZero() || info.ModTime().Before(since)) {
			since = info.ModTime()
		}
	}
	if len(reasons) == 0 {
		return Answer{Verdict: Go}
	}
	return Answer{Verdict: Wait, Why: strings.Join(reasons, "; "), Since: since, Hint: "rm " + strings.Join(names, " "), Evidence: "the files in " + g.Dir}
}

// maxReason bounds what is shown of a reason.
const maxReason = 200

func firstLine(path string) string {
	// A pipe or a device in the directory must not hang or flood the gate; that it is there is enough.
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
		return "no reason given"
	}
	f, err := os.Open(path)
	if err != nil {
		return "no reason given"
	}
	defer f.Close()
	line, err := bufio.NewReader(io.LimitReader(f, maxReason)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "no reason given"
	}
	if line = oneLine(line); line == "" {
		return "no reason given"
	}
	return line
}

// Commands runs every program in a directory; one that ends with another status than 0 is against the reboot, and the last line
// that it printed says why.
type Commands struct {
	Dir     string
	Timeout time.Duration // for each; 0 means one minute
	// Run runs them in their order until one fails, which is a *[health.Failure]; nil does that in this process.
	Run func(context.Context) error
}

// Name implements [Gate].
func (Commands) Name() string { return "commands" }

// Ask implements [Gate].
func (g Commands) Ask(ctx context.Context, _ time.Time) Answer {
	run := g.Run
	if run == nil {
		run = health.Checks{Dir: g.Dir, Timeout: g.Timeout}.Run
	}
	err := run(ctx)
	var f *health.Failure
	switch {
	case err == nil:
		return Answer{Verdict: Go}
	case errors.As(err, &f):
		return Answer{
			Verdict: Wait, Why: f.Program + ": " + f.Reason,
			Hint: "do what it wants; flipside reboot --now passes over it", Evidence: "what " + filepath.Join(g.Dir, f.Program) + " prints and ends with",
		}
	}
	return Answer{Verdict: Unknown, Why: err.Error(), Hint: "make it a directory with programs (reboot.gate_dir)", Evidence: g.Dir}
}
