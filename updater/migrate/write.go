package migrate

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/flipside-linux/flipside/partition/atomicfile"
)

// Write writes the files that are not there yet, and returns their paths. If one of another origin is in the way, nothing is written, and the error is
// [ErrDiffers].
func (p *Plan) Write() ([]string, error) {
	for _, f := range p.Files {
		if f.State == Differs {
			return nil, fmt.Errorf("%s %w", f.Path, ErrDiffers)
		}
	}
	var written []string
	for i := range p.Files {
		f := &p.Files[i]
		if f.State != New {
			continue
		}
		path, err := p.path(f.Path)
		if err != nil {
			return written, fmt.Errorf("writing %s: %w", f.Path, err)
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return written, fmt.Errorf("writing %s: %w", f.Path, err)
		}
		if err := atomicfile.WriteFile(path, []byte(f.content), f.perm); err != nil {
			return written, fmt.Errorf("writing %s: %w", f.Path, err)
		}
		f.State = Done
		written = append(written, f.Path)
	}
	return written, nil
}

// Disabling returns the commands that put the older services to rest, none if they are. A unit file of the administrator's own cannot be masked.
func (p *Plan) Disabling() (commands [][]string) {
	for _, s := range p.Services {
		switch {
		case !s.Found || s.Masked:
		case s.Own:
			commands = append(commands, []string{"systemctl", "disable", "--now", s.Unit})
		default:
			commands = append(commands, []string{"systemctl", "mask", "--now", s.Unit})
		}
	}
	return commands
}

// Back returns the commands that undo the move. What was masked before it stays so, and what nothing at boot wanted is not started.
func (p *Plan) Back() (commands [][]string) {
	commands = append(commands, []string{"systemctl", "disable", "--now", "flipsided.service"})
	for _, s := range p.Services {
		if !s.Found || s.wasMasked {
			continue
		}
		if !s.Own {
			commands = append(commands, []string{"systemctl", "unmask", s.Unit})
		}
		switch {
		case s.wasOff:
		case s.Own:
			commands = append(commands, []string{"systemctl", "enable", "--now", s.Unit})
		default:
			commands = append(commands, []string{"systemctl", "start", s.Unit})
		}
	}
	return commands
}

// DisableOlder puts the older services to rest: on the running system through systemctl; in an image it makes the links that mask them.
func (p *Plan) DisableOlder() error {
	for i := range p.Services {
		s := &p.Services[i]
		if !s.Found || s.Masked {
			continue
		}
		if err := p.disable(*s); err != nil {
			return fmt.Errorf("disabling %s: %w", s.Unit, err)
		}
		s.Masked = !s.Own
	}
	return nil
}

func (p *Plan) disable(s Service) error {
	verb := "mask"
	if s.Own {
		verb = "disable"
	}
	if p.root == "/" {
		out, err := exec.Command("systemctl", verb, "--now", s.Unit).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	if s.Own {
		return fmt.Errorf("/etc/systemd/system/%s is a file: run systemctl --root %s disable %s", s.Unit, p.root, s.Unit)
	}
	dir, err := p.path("etc/systemd/system")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.Symlink(os.DevNull, filepath.Join(dir, s.Unit)); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}
