package atomicfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// OS is a directory of the host, by its path.
type OS string

var _ Dir = OS("")

func (d OS) path(name string) (string, error) {
	if name == "" || name == "." || name == ".." || filepath.Base(name) != name {
		return "", fmt.Errorf("%q is not the name of a file in a directory", name)
	}
	return filepath.Join(string(d), name), nil
}

// Create opens or makes a file, which only its owner may read. A symbolic link is not followed. In a directory with a sticky bit others make files, too: what is
// not this user's own there, or has another name as well, is removed and made anew.
func (d OS) Create(name string) (File, error) {
	f, err := d.open(name, os.O_RDWR|os.O_CREATE)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if own(f) {
		return f, err
	}
	if info, serr := os.Stat(string(d)); serr != nil || info.Mode()&fs.ModeSticky == 0 {
		return f, err
	}
	if err == nil {
		f.Close()
	}
	if err := d.Remove(name); err != nil {
		return nil, fmt.Errorf("making way for a file: %w", err)
	}
	return d.open(name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
}

// own reports whether an open file is this user's, and has no other name.
func own(f File) bool {
	o, ok := f.(osFile)
	if !ok {
		return false
	}
	var st unix.Stat_t
	return unix.Fstat(int(o.Fd()), &st) == nil && int(st.Uid) == os.Geteuid() && st.Nlink == 1
}

// Open opens a file for reading. A symbolic link is not followed.
func (d OS) Open(name string) (File, error) {
	return d.open(name, os.O_RDONLY)
}

func (d OS) open(name string, flags int) (File, error) {
	path, err := d.path(name)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, flags|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	return osFile{f}, nil
}

// Rename renames a file.
func (d OS) Rename(from, to string) error {
	a, err := d.path(from)
	if err != nil {
		return err
	}
	b, err := d.path(to)
	if err != nil {
		return err
	}
	return os.Rename(a, b)
}

// Remove removes a file.
func (d OS) Remove(name string) error {
	path, err := d.path(name)
	if err != nil {
		return err
	}
	return os.Remove(path)
}

// List returns the names of all regular files, in order.
func (d OS) List() ([]string, error) {
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.Type().IsRegular() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Sync flushes the directory.
func (d OS) Sync() error {
	f, err := os.Open(string(d))
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// Free is the space that is left on the file system.
func (d OS) Free() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(string(d), &st); err != nil {
		return 0, fmt.Errorf("%s: %w", string(d), err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

type osFile struct{ *os.File }

// Size is that of the file.
func (f osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// Uncache drops the file's pages, which the kernel does for clean ones that nobody has mapped.
func (f osFile) Uncache() error { return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) }
