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
	"time"
)

const (
	// maxKept is how many bad boots are remembered. The oldest goes first.
	maxKept = 5
	// maxJournal bounds what is kept of the journal of one boot, its end, in bytes.
	maxJournal = 512 << 10
	// journalLines is how many lines of it are asked for.
	journalLines = "2000"
)

// Bad is a boot that is not good.
type Bad struct {
	Version string
	BootID  string
	Reason  string
	Output  string // of the check that failed
}

// Keep writes what is known of a bad boot to a new directory in dir: reason, output and the end of the boot's journal, one file each.
// It returns the directory. A journal that cannot be read is no error; its file says why.
func Keep(ctx context.Context, dir string, b Bad, now time.Time) (string, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("keeping what the bad boot left: %w", err)
	}
	if err := makeRoom(dir); err != nil {
		return "", fmt.Errorf("keeping what the bad boot left: %w", err)
	}
	path := filepath.Join(dir, now.UTC().Format("20060102T150405Z")+"-"+fileName(b.Version))
	if err := os.MkdirAll(path, 0o700); err != nil {
		return "", fmt.Errorf("keeping what the bad boot left: %w", err)
	}
	for _, f := range []struct{ name, text string }{
		{"reason", b.Reason + "\n"}, {"output", b.Output}, {"journal", journal(ctx, b.BootID)},
	} {
		if err := store(filepath.Join(path, f.name), f.text); err != nil {
			return "", fmt.Errorf("keeping what the bad boot left: %w", err)
		}
	}
	return path, nil
}

// store flushes the file: the machine is about to go down.
func store(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Sync(), f.Close())
}

func makeRoom(dir string) error {
	entries, err := os.ReadDir(dir) // sorted by name, which begins with the time
	if err != nil {
		return err
	}
	for _, e := range entries[:max(0, len(entries)-maxKept+1)] {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// fileName makes a version safe as part of a file name.
func fileName(s string) string {
	s = strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || strings.ContainsRune(".+-_", r) {
			return r
		}
		return '_'
	}, s)
	return s[:min(len(s), 64)]
}

// journal reads the end of a boot's journal, of this boot if id is empty.
func journal(ctx context.Context, id string) string {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	boot := "0"
	if id = strings.ReplaceAll(id, "-", ""); len(id) == 32 {
		boot = id
	}
	cmd := exec.CommandContext(ctx, "journalctl", "--boot="+boot, "--lines="+journalLines, "--output=short-iso-precise", "--no-pager", "--quiet")
	out := &tail{max: maxJournal}
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = out, &stderr
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil && out.String() == "" {
		return fmt.Sprintf("the journal cannot be read: %v: %s\n", err, strings.TrimSpace(stderr.String()))
	}
	return out.String()
}
