// Package journal writes the daemon's log to systemd's journal with its fields, so that programs need not parse sentences.
//
// An attribute such as "version" becomes the field FLIPSIDE_VERSION; the level becomes PRIORITY; the kind of an
// [updater.Note] becomes FLIPSIDE_KIND and a MESSAGE_ID that never changes, by which journalctl finds it
// (journalctl MESSAGE_ID=…) and explains it (journalctl --catalog).
package journal

import (
	"context"
	"log/slog"
	"strings"

	"github.com/coreos/go-systemd/v22/journal"

	"github.com/flipside-linux/flipside/updater"
)

// Handler is a [slog.Handler] that writes to the journal.
type Handler struct {
	level  slog.Leveler
	prefix string            // of groups
	fields map[string]string // of With
	send   func(message string, priority journal.Priority, fields map[string]string) error
}

// New returns a handler for records of at least level. Connected reports whether this process's standard error goes to the
// journal, which is when it is of use.
func New(level slog.Leveler) *Handler { return &Handler{level: level, send: journal.Send} }

// Connected reports whether standard error is a stream to the journal.
func Connected() bool {
	ok, err := journal.StderrIsJournalStream()
	return ok && err == nil
}

// Enabled implements [slog.Handler].
func (h *Handler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level.Level() }

// Handle implements [slog.Handler]. Attributes that are not fields of a note are also added to the message, because that is what
// people see.
func (h *Handler) Handle(_ context.Context, r slog.Record) error {
	fields := map[string]string{"SYSLOG_IDENTIFIER": "flipsided"}
	for k, v := range h.fields {
		fields[k] = v
	}
	message := r.Message
	r.Attrs(func(a slog.Attr) bool {
		if text := add(fields, h.prefix, a); !quiet[a.Key] && text != "" {
			message += " " + a.Key + "=" + text
		}
		return true
	})
	if id := ID(updater.Kind(fields["FLIPSIDE_KIND"])); id != "" {
		fields["MESSAGE_ID"] = id
	}
	return h.send(message, priority(r.Level), fields)
}

// quiet are the attributes that the message says already.
var quiet = map[string]bool{"kind": true, "version": true, "slot": true, "phase": true, "gate": true}

func add(fields map[string]string, prefix string, a slog.Attr) string {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		for _, b := range v.Group() {
			add(fields, prefix+a.Key+"_", b)
		}
		return ""
	}
	text := v.String()
	if name := fieldName(prefix + a.Key); name != "" {
		fields[name] = text
	}
	return text
}

// fieldName makes a field of the journal: capitals, digits and underscores, at most 64.
func fieldName(s string) string {
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, s)
	if name = "FLIPSIDE_" + name; s == "" || len(name) > 64 {
		return ""
	}
	return name
}

func priority(l slog.Level) journal.Priority {
	switch {
	case l >= slog.LevelError:
		return journal.PriErr
	case l >= slog.LevelWarn:
		return journal.PriWarning
	case l >= slog.LevelInfo:
		return journal.PriInfo
	}
	return journal.PriDebug
}

// WithAttrs implements [slog.Handler].
func (h *Handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.fields = map[string]string{}
	for k, v := range h.fields {
		c.fields[k] = v
	}
	for _, a := range attrs {
		add(c.fields, h.prefix, a)
	}
	return &c
}

// WithGroup implements [slog.Handler].
func (h *Handler) WithGroup(name string) slog.Handler {
	c := *h
	if name != "" {
		c.prefix += name + "_"
	}
	return &c
}
