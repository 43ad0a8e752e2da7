package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// ErrLocked is returned when another program does not let go of the directory's lock.
var ErrLocked = errors.New("another program is changing the release directory and does not end")

// lockWait is how long the lock is waited for. Nobody holds it for longer than it takes to write small files.
const lockWait = 30 * time.Second

// lock keeps two changes of the directory's files apart, also of two programs: a person who moves a channel, and a mirror that does so at the same moment.
func (p *Publisher) lock() (unlock func(), err error) {
	f, err := p.lockFile()
	if err != nil {
		return nil, err
	}
	wait := lockWait
	if p.patience > 0 {
		wait = p.patience
	}
	for end := time.Now().Add(wait); ; time.Sleep(20 * time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock the release directory: %w", err)
		}
		if time.Now().After(end) {
			f.Close()
			return nil, fmt.Errorf("%w: waited %s for it, see who it is with: fuser -v %s", ErrLocked, wait, f.Name())
		}
	}
}

// lockFile opens the lock, which needs no leave to write to it.
func (p *Publisher) lockFile() (*os.File, error) {
	f, err := p.shared(".lock", os.O_RDONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("lock the release directory: %w", err)
	}
	return f, nil
}

// shared opens a file that all who change the directory use. It is made for those who may write to the directory; others may read it if more says so.
// The lock they may not even open: who can, can hold it.
func (p *Publisher) shared(name string, flag int, more os.FileMode) (*os.File, error) {
	path := filepath.Join(p.Dir, name)
	for {
		f, err := os.OpenFile(path, flag|syscall.O_NOFOLLOW, 0)
		if !errors.Is(err, os.ErrNotExist) {
			return f, err
		}
		info, err := os.Stat(p.Dir)
		if err != nil {
			return nil, err
		}
		writers := info.Mode().Perm() & 0o222
		f, err = os.OpenFile(path, flag|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, os.ErrExist) {
			continue // somebody else was faster
		}
		if err != nil {
			return nil, err
		}
		if err := errors.Join(inherit(f, p.Dir), f.Chmod(0o600|writers|writers<<1|more)); err != nil {
			f.Close()
			return nil, err
		}
		return f, nil
	}
}

// inherit gives a file that root has just made to the owner of the folder that it goes into: people publish as root into the directory of a server that
// runs as a user of its own. Whoever may not do that has made the file as well as they can.
func inherit(f *os.File, folder string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	info, err := os.Stat(folder)
	if err != nil {
		return err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return nil
	}
	if err := f.Chown(int(owner.Uid), int(owner.Gid)); err != nil && !errors.Is(err, os.ErrPermission) {
		return err
	}
	return nil
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
	f, err := p.shared("audit.jsonl", os.O_RDWR|os.O_APPEND, 0o044)
	if err != nil {
		return fmt.Errorf("write the audit log: %w", err)
	}
	defer f.Close()
	line = append(line, '\n')
	if torn(f) {
		line = append([]byte{'\n'}, line...)
	}
	if _, err := f.Write(line); err != nil {
		return fmt.Errorf("write the audit log: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("write the audit log: %w", err)
	}
	return nil
}

// torn says whether a file does not end with a whole line: the disk was full, or the power went. What is appended would be as unreadable as the part of a line before it.
func torn(f *os.File) bool {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil || end == 0 {
		return false
	}
	var last [1]byte
	_, err = f.ReadAt(last[:], end-1)
	return err == nil && last[0] != '\n'
}
