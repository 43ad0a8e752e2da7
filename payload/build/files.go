package build

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"time"

	"github.com/diskfs/go-diskfs/backend"
	"github.com/diskfs/go-diskfs/filesystem/ext4"
	"github.com/diskfs/go-diskfs/filesystem/squashfs"
)

// ErrNoFileSystem is an image whose file system cannot be read here: it is neither squashfs nor ext4 with checksums of its metadata (mke2fs's
// default), or damaged, or has features that the reader does not know.
var ErrNoFileSystem = errors.New("no file system that can be read")

// File is a file in an image.
type File struct {
	Path   string
	Size   int64
	Mode   fs.FileMode
	SHA256 [32]byte
	// Blocks of the image that the file's data was read from, in the order of the file. In squashfs a block may belong to several files, and of the
	// small files that are packed together only the first is known to be there.
	Blocks []int
}

// maxFiles bounds what is asked of an image.
const maxFiles = 1 << 20

// Files lists the regular files in an image, by path. Where their data is, is found by watching what the file system's
// reader reads of the image while it reads the file.
func Files(ctx context.Context, img Image) (files []File, err error) {
	defer func() {
		if r := recover(); r != nil { // the reader is not ours, and an image may be damaged
			err = fmt.Errorf("%w: its reader failed: %v", ErrNoFileSystem, r)
		}
	}()
	w := &watched{img: img}
	system, content, err := openFileSystem(w)
	if err != nil {
		return nil, err
	}
	sum := onlyHash{sha256.New()}
	err = fs.WalkDir(system, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if !d.Type().IsRegular() {
			return nil
		}
		if len(files) == maxFiles {
			return fmt.Errorf("more than %d files", maxFiles)
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		f := File{Path: path.Clean("/" + name), Size: info.Size(), Mode: info.Mode()}
		w.seen = w.seen[:0]
		sum.Reset()
		if err := content(ctx, sum, name, info); err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
		f.Blocks, f.SHA256 = slices.Clone(w.seen), [32]byte(sum.Sum(nil))
		files = append(files, f)
		return nil
	})
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("%w: %w", ErrNoFileSystem, err)
	}
	slices.SortFunc(files, func(a, b File) int { return cmp.Compare(a.Path, b.Path) })
	return files, nil
}

// onlyHash keeps io.CopyBuffer from finding a way around the buffer.
type onlyHash struct{ hash.Hash }

// content writes what a file of a file system holds.
type content func(ctx context.Context, to io.Writer, name string, info fs.FileInfo) error

func openFileSystem(w *watched) (fs.FS, content, error) {
	head := make([]byte, 2048)
	if err := readAt(w.img, 0, head); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrNoFileSystem, err)
	}
	switch {
	case string(head[:4]) == "hsqs":
		s, err := squashfs.Read(w, w.img.Size, 0, 0)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", ErrNoFileSystem, err)
		}
		buf := make([]byte, 1<<20)
		return s, func(ctx context.Context, to io.Writer, name string, info fs.FileInfo) error {
			return copyFile(ctx, to, s, name, info.Size(), buf)
		}, nil
	case head[1080] == 0x53 && head[1081] == 0xef:
		s, err := ext4.Read(w, w.img.Size, 0, 512)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", ErrNoFileSystem, err)
		}
		e, err := newExtentReader(w, head)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", ErrNoFileSystem, err)
		}
		return s, func(ctx context.Context, to io.Writer, name string, info fs.FileInfo) error {
			stat, ok := info.Sys().(*ext4.StatT)
			if !ok || stat.Ino == 0 {
				return errors.New("its inode is not known")
			}
			return e.copyTo(ctx, to, stat.Ino, info.Size())
		}, nil
	}
	return nil, nil, ErrNoFileSystem
}

// copyFile writes a file that the file system's reader can read.
func copyFile(ctx context.Context, to io.Writer, system fs.FS, name string, size int64, buf []byte) error {
	r, err := system.Open(name)
	if err != nil {
		return err
	}
	defer r.Close()
	n, err := io.CopyBuffer(to, advancing{ctx, r}, buf)
	if err == nil && n != size {
		err = fmt.Errorf("%d of %d bytes could be read", n, size)
	}
	return err
}

// advancing is a reader that does not go on when it is told to end, or comes no further.
type advancing struct {
	ctx context.Context
	r   io.Reader
}

func (a advancing) Read(p []byte) (int, error) {
	if err := a.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := a.r.Read(p)
	if n == 0 && err == nil {
		err = io.ErrNoProgress
	}
	return n, err
}

// watched is an image that remembers which of its blocks were read.
type watched struct {
	img  Image
	pos  int64
	seen []int
}

func (w *watched) ReadAt(p []byte, off int64) (int, error) {
	n, err := w.img.Data.ReadAt(p, off)
	for b := off / blockSize; n > 0 && b <= (off+int64(n)-1)/blockSize; b++ {
		if k := len(w.seen); k == 0 || w.seen[k-1] != int(b) {
			w.seen = append(w.seen, int(b))
		}
	}
	return n, err
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.ReadAt(p[:min(int64(len(p)), max(0, w.img.Size-w.pos))], w.pos)
	w.pos += int64(n)
	if n == 0 && err == nil && len(p) > 0 {
		err = io.EOF
	}
	return n, err
}

func (w *watched) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += w.pos
	case io.SeekEnd:
		offset += w.img.Size
	}
	if offset < 0 {
		return 0, fs.ErrInvalid
	}
	w.pos = offset
	return offset, nil
}

func (w *watched) Close() error                            { return nil }
func (w *watched) Stat() (fs.FileInfo, error)              { return imageInfo{w.img}, nil }
func (w *watched) Sys() (*os.File, error)                  { return nil, backend.ErrNotSuitable }
func (w *watched) Writable() (backend.WritableFile, error) { return nil, backend.ErrIncorrectOpenMode }
func (w *watched) Path() string                            { return "" }

type imageInfo struct{ img Image }

func (i imageInfo) Name() string       { return i.img.Name }
func (i imageInfo) Size() int64        { return i.img.Size }
func (i imageInfo) Mode() fs.FileMode  { return 0o444 }
func (i imageInfo) ModTime() time.Time { return time.Time{} }
func (i imageInfo) IsDir() bool        { return false }
func (i imageInfo) Sys() any           { return nil }

// pair is a file of the new image, and what it was in the old one.
type pair struct {
	new, old []int // blocks, in the order of the file
}

// pairs matches the files of two images by path. Where one of them cannot be read there are none, and everything is matched by content.
func pairs(ctx context.Context, old, new Image) ([]pair, error) {
	before, err := Files(ctx, old)
	if err == nil {
		var after []File
		if after, err = Files(ctx, new); err == nil {
			var list []pair
			for _, f := range after {
				p := pair{new: f.Blocks}
				if i, ok := slices.BinarySearchFunc(before, f.Path, func(f File, p string) int { return cmp.Compare(f.Path, p) }); ok {
					p.old = before[i].Blocks
				}
				list = append(list, p)
			}
			return list, nil
		}
	}
	if errors.Is(err, ErrNoFileSystem) {
		return nil, nil
	}
	return nil, err
}
