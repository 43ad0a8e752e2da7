// Package atomicfile replaces a file so that a power cut leaves the old one or the new one: a slot's kernel on the boot partition, and
// the saved state of an update.
//
// # Order of durability
//
//  1. The new contents go to a temporary file in the same directory, are flushed, read back and compared.
//  2. The temporary file is renamed over the old one.
//  3. The file is flushed again, under its new name. On FAT a name and where its contents begin are one record of the directory, which
//     belongs to the file and not to the directory: without this flush the new name may lead to the old, freed clusters.
//  4. The directory is flushed.
//
// On a file system with a journal the file is at every instant the old or the new one. FAT has none: between 2 and 4 it may be neither. So a
// slot's kernel is replaced only while the slot is not bootable.
package atomicfile

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync/atomic"
)

// Errors that callers decide on.
var (
	ErrMismatch = errors.New("the file does not hold what was promised")
	ErrSpace    = errors.New("not enough space")
)

// Dir is one directory, as far as replacing a file in it needs it. [OS] is a real one.
type Dir interface {
	// Create opens a file for reading and writing, and makes it if there is none. What it holds stays.
	Create(name string) (File, error)
	// Open opens a file for reading.
	Open(name string) (File, error)
	// Rename gives a file another name, in place of the file that had it.
	Rename(from, to string) error
	Remove(name string) error
	// Sync makes the names in the directory durable.
	Sync() error
	// Free is the space for new files, in bytes.
	Free() (int64, error)
}

// File is an open file.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Size() (int64, error)
	Truncate(size int64) error
	// Sync makes contents, size and place durable.
	Sync() error
	// Uncache makes the next read come from the medium, as far as that can be had.
	Uncache() error
}

// temporary is the name of the file that is to become name. There is one for each, so that what a killed process left is used again.
func temporary(name string) string { return "." + name + ".new" }

// Write replaces the file name by data.
func Write(dir Dir, name string, data []byte) error {
	p, err := Begin(dir, name)
	if err != nil {
		return err
	}
	defer p.Close()
	if _, err := p.WriteAt(data, 0); err != nil {
		return err
	}
	return p.Commit(context.Background(), int64(len(data)), sha256.Sum256(data))
}

// Remove removes the file name. When it returns nil, a power cut does not bring the file back. That there is none is an error that is [fs.ErrNotExist].
func Remove(dir Dir, name string) error {
	if err := dir.Remove(name); err != nil {
		return fmt.Errorf("removing %q: %w", name, err)
	}
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("removing %q: flushing its directory: %w", name, err)
	}
	return nil
}

// Pending is a file that is being written, beside the one that it will replace.
type Pending struct {
	dir     Dir
	name    string
	file    File
	written atomic.Bool
}

// Begin opens the file that will replace name. It may hold what an earlier process wrote: a download may go on in it.
func Begin(dir Dir, name string) (*Pending, error) {
	f, err := dir.Create(temporary(name))
	if err != nil {
		return nil, fmt.Errorf("replacing %q: %w", name, err)
	}
	return &Pending{dir: dir, name: name, file: f}, nil
}

// Reserve finds out whether size bytes fit. If they do not and the old file is all that is in the way, it is removed when spare says that
// nobody needs it. It is called before anything is written.
func (p *Pending) Reserve(size int64, spare bool) error {
	have, err := p.file.Size()
	if err != nil {
		return fmt.Errorf("replacing %q: %w", p.name, err)
	}
	free, err := p.dir.Free()
	if err != nil {
		return fmt.Errorf("replacing %q: asking for free space: %w", p.name, err)
	}
	need := size - have
	if free >= need {
		return nil
	}
	old, err := p.dir.Open(p.name)
	if err == nil && spare {
		n, err := old.Size()
		old.Close()
		if err == nil && free+n >= need {
			if err := errors.Join(p.dir.Remove(p.name), p.dir.Sync()); err != nil {
				return fmt.Errorf("replacing %q: making space: %w", p.name, err)
			}
			return nil
		}
	} else if err == nil {
		old.Close()
	}
	return fmt.Errorf("replacing %q: %w: %d bytes are needed, %d are free", p.name, ErrSpace, need, free)
}

// WriteAt writes into the new file.
func (p *Pending) WriteAt(b []byte, off int64) (int, error) {
	p.written.Store(true)
	n, err := p.file.WriteAt(b, off)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return n, fmt.Errorf("writing the new %q: %w", p.name, err)
	}
	return n, nil
}

// ReadAt reads from the new file.
func (p *Pending) ReadAt(b []byte, off int64) (int, error) { return p.file.ReadAt(b, off) }

// Flush makes what was written durable. The file keeps its temporary name.
func (p *Pending) Flush() error {
	if err := p.file.Sync(); err != nil {
		return fmt.Errorf("flushing the new %q: %w", p.name, err)
	}
	return nil
}

// Close gives the new file up without putting it into place. After Commit it does nothing of consequence.
func (p *Pending) Close() error { return p.file.Close() }

// Discard is Close for contents that nobody will go on with: the temporary file is removed.
func (p *Pending) Discard() error {
	err := p.dir.Remove(temporary(p.name))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, p.file.Close())
}

// Commit cuts the new file to size bytes, reads it back, compares its SHA-256, and puts it into the old one's place. When it returns nil,
// a power cut does not take that back. Where nothing was written, and an earlier process left nothing, because it had put the same file into its place
// already, that one stays.
func (p *Pending) Commit(ctx context.Context, size int64, want [32]byte) error {
	fail := func(what string, err error) error { return fmt.Errorf("replacing %q: %s: %w", p.name, what, err) }
	if have, err := p.file.Size(); err == nil && have == 0 && size > 0 && !p.written.Load() && p.inPlace(ctx, size, want) == nil {
		if err := errors.Join(p.dir.Remove(temporary(p.name)), p.dir.Sync()); err != nil {
			return fail("flushing its directory", err)
		}
		return nil
	}
	if err := p.file.Truncate(size); err != nil {
		return fail("setting its size", err)
	}
	if err := p.file.Sync(); err != nil {
		return fail("flushing it", err)
	}
	if err := check(ctx, p.file, size, want); err != nil {
		return fail("reading it back", err)
	}
	if err := p.dir.Rename(temporary(p.name), p.name); err != nil {
		return fail("renaming it", err)
	}
	if err := p.file.Sync(); err != nil {
		return fail("flushing it in its place", err)
	}
	if err := p.dir.Sync(); err != nil {
		return fail("flushing its directory", err)
	}
	if err := Check(ctx, p.dir, p.name, size, want); err != nil {
		return fail("reading it back in its place", err)
	}
	return nil
}

// inPlace makes sure that the file that is to be replaced is what would replace it, on the medium.
func (p *Pending) inPlace(ctx context.Context, size int64, want [32]byte) error {
	f, err := p.dir.Open(p.name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return err
	}
	return check(ctx, f, size, want)
}

// Check compares a file with a size and a SHA-256.
func Check(ctx context.Context, dir Dir, name string, size int64, want [32]byte) error {
	f, err := dir.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return check(ctx, f, size, want)
}

func check(ctx context.Context, f File, size int64, want [32]byte) error {
	if n, err := f.Size(); err != nil || n != size {
		return errors.Join(err, fmt.Errorf("%w: it has %d bytes, want %d", ErrMismatch, n, size))
	}
	if err := f.Uncache(); err != nil {
		return err
	}
	h := sha256.New()
	buf := make([]byte, min(1<<20, max(size, 1)))
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := buf[:min(int64(len(buf)), size-off)]
		n, err := f.ReadAt(b, off)
		if n < len(b) {
			return fmt.Errorf("at byte %d: %w", off+int64(n), err)
		}
		h.Write(b)
		off += int64(n)
	}
	if got := h.Sum(nil); !bytes.Equal(got, want[:]) {
		return fmt.Errorf("%w: it has SHA-256 %x, want %x", ErrMismatch, got, want)
	}
	return nil
}
