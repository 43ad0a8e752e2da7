package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// draft is a text that somebody has edited in a file of its own.
type draft struct {
	path string
	text []byte
}

// remove takes the file away, with its directory.
func (d draft) remove() error { return os.RemoveAll(filepath.Dir(d.path)) }

// edit lets somebody edit a text in $VISUAL, $EDITOR or vi, in a file of this name that nobody else reads. What was written is not lost whatever the editor ends with. An interrupt is
// the editor's to understand.
func (a *app) edit(name string, text []byte) (draft, error) {
	dir, err := os.MkdirTemp("", "flipside-")
	if err != nil {
		return draft{}, fmt.Errorf("editing %s: %w", name, err)
	}
	d := draft{path: filepath.Join(dir, name)}
	if err := os.WriteFile(d.path, text, 0o600); err != nil {
		return draft{}, errors.Join(fmt.Errorf("editing %s: %w", name, err), d.remove())
	}
	editor := cmp.Or(os.Getenv("VISUAL"), os.Getenv("EDITOR"), "vi")
	c := exec.Command("sh", "-c", editor+` "$1"`, "sh", d.path) // an editor may have arguments
	c.Stdin, c.Stdout, c.Stderr = a.stdin, a.stdout, a.stderr
	err = c.Run()
	if err != nil {
		err = fmt.Errorf("editing %s in %q: %w", name, editor, err)
	}
	var unread error
	if d.text, unread = os.ReadFile(d.path); unread != nil {
		return draft{}, errors.Join(cmp.Or(err, fmt.Errorf("editing %s: %w", name, unread)), d.remove())
	}
	if err == nil {
		return d, nil
	}
	if bytes.Equal(d.text, text) {
		return draft{}, errors.Join(err, d.remove())
	}
	return draft{}, withHint(err, "nothing was changed; what you wrote is in %s", d.path)
}
