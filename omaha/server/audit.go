package server

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// lock keeps two changes of the directory's files apart, also of two programs: the server that stops a rollout and a
// person who moves a channel at the same moment.
func (p *Publisher) lock() (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(p.Dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock the release directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock the release directory: %w", err)
	}
	return func() { f.Close() }, nil
}

// audit appends one line of JSON to DIR/audit.jsonl: what was changed, when, and by whom as far as is known.
func (p *Publisher) audit(what string, detail map[string]any) error {
	who := p.Who
	if who == "" {
		who = fmt.Sprintf("uid %d", os.Getuid())
	}
	line, err := json.Marshal(struct {
		At     time.Time      `json:"at"`
		Who    string         `json:"who"`
		What   string         `json:"what"`
		Detail map[string]any `json:"detail"`
	}{p.now().UTC(), who, what, detail})
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(p.Dir, "audit.jsonl"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("write the audit log: %w", err)
	}
	defer f.Close()
	if _, err := f.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("write the audit log: %w", err)
	}
	return f.Sync()
}
