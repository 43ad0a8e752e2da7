package atomicfile

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// WriteFile replaces the file at a path by data, with this mode, or makes it. A file that is there keeps its owner; a symbolic link is replaced. It is for what people write with commands, of
// which two may run at once: [Write] has one temporary file for each name, in which they would meet, and a [Dir], which may be on FAT, knows no owners and modes.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".new-")
	if err != nil {
		return fmt.Errorf("replacing %s: %w", path, err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return fmt.Errorf("replacing %s: %w", path, err)
	}
	var old, new unix.Stat_t
	switch err := unix.Stat(path, &old); {
	case err == nil && old.Mode&unix.S_IFMT != unix.S_IFREG:
		return fmt.Errorf("replacing %s: it is not a file", path) // but a device, perhaps, that all programs need
	case err == nil && unix.Fstat(int(f.Fd()), &new) == nil && (old.Uid != new.Uid || old.Gid != new.Gid):
		if err := f.Chown(int(old.Uid), int(old.Gid)); err != nil {
			return fmt.Errorf("replacing %s: keeping its owner: %w", path, err)
		}
	}
	return Place(f, path, mode)
}

// Place gives a file that is complete another name, in the same directory, and this mode; it replaces what has that name. Only what is on the disk is renamed:
// after an error in what comes before, the old file is still there.
func Place(f *os.File, path string, mode fs.FileMode) error {
	if err := f.Chmod(mode); err != nil {
		return fmt.Errorf("replacing %s: %w", path, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("replacing %s: flushing the new one: %w", path, err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("replacing %s: %w", path, err)
	}
	if err := OS(filepath.Dir(path)).Sync(); err != nil {
		return fmt.Errorf("replacing %s: flushing its directory: %w", path, err)
	}
	return nil
}
