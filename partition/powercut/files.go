package powercut

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/partition/devicetest"
)

// FileSystem is a kind of file system, by what a power cut may do to it.
type FileSystem string

// The kinds. In both, contents that were not flushed may be lost, sector by sector, and so may changes of names.
const (
	// Journal keeps its names in order: a rename happened or it did not. It takes the directory's flush to make that last.
	Journal FileSystem = "journal"
	// FAT has a record for each name, which says where the contents begin, too. That of a file that was renamed is written when the file is
	// flushed, not with its directory; and the clusters of the file that had the name are free at once.
	FAT FileSystem = "FAT"
)

// files is a file system with one directory and few files, in a range of a device: a model of what reaches the medium when. It stands for the file
// systems of the kernel, which cannot be cut off between two sectors here.
//
// On the device come first the names, one sector each with FAT and one for all with a journal, then the files: a sector for the size, and the contents.
type files struct {
	dev    partition.Device // of the whole rig; flushed by ranges
	sector int64
	kind   FileSystem
	off    int64
	names  []string // that there may be
	count  int      // of files
	data   int64    // sectors of contents in each

	owed  map[string]bool // FAT: names whose records wait for the flush of their file
	freed []int           // FAT: files whose contents are gone
	last  int             // file that was made last
}

var _ atomicfile.Dir = (*files)(nil)

const recordSize = 2 // used, file

func newFiles(dev partition.Device, kind FileSystem, off, data int64, names ...string) *files {
	return &files{dev: dev, sector: int64(dev.SectorSize()), kind: kind, off: off, names: names, count: len(names) + 2, data: data, owed: map[string]bool{}}
}

// size is the number of bytes that it takes on the device.
func (f *files) size() int64 { return f.place(f.count) - f.off }

func (f *files) recordOff(name string) (int64, int, error) {
	i := slices.Index(f.names, name)
	if i < 0 {
		return 0, 0, fmt.Errorf("the model has no file %q", name)
	}
	if f.kind == FAT {
		return f.off + int64(i)*f.sector, 0, nil
	}
	return f.off, i * recordSize, nil
}

// place is where a file is.
func (f *files) place(file int) int64 {
	head := f.sector
	if f.kind == FAT {
		head *= int64(len(f.names))
	}
	return f.off + head + int64(file)*(1+f.data)*f.sector
}

// record is what a name leads to.
type record struct {
	used bool
	file int
}

func (f *files) record(name string) (record, error) {
	off, at, err := f.recordOff(name)
	if err != nil {
		return record{}, err
	}
	b := make([]byte, f.sector)
	if _, err := f.dev.ReadAt(b, off); err != nil {
		return record{}, err
	}
	b = b[at:]
	return record{b[0] == 1, int(b[1]) % f.count}, nil
}

// setRecords changes records; with a journal all at once.
func (f *files) setRecords(names []string, rs []record) error {
	b := make([]byte, f.sector)
	for i, name := range names {
		off, at, err := f.recordOff(name)
		if err != nil {
			return err
		}
		if f.kind == FAT || i == 0 {
			if _, err := f.dev.ReadAt(b, off); err != nil {
				return err
			}
		}
		clear(b[at : at+recordSize])
		if rs[i].used {
			b[at], b[at+1] = 1, byte(rs[i].file)
		}
		if f.kind == FAT || i == len(names)-1 {
			if err := f.write(b, off); err != nil {
				return err
			}
		}
	}
	return nil
}

// write writes what is the file system's own: there is no half of it.
func (f *files) write(b []byte, off int64) error {
	n, err := f.dev.WriteAt(b, off)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	return err
}

func (f *files) flush(off, n int64) error { return f.dev.(devicetest.RangeFlusher).FlushRange(off, n) }

// Create opens a file, or makes one where no name leads to.
func (f *files) Create(name string) (atomicfile.File, error) {
	r, err := f.record(name)
	if err != nil {
		return nil, err
	}
	if r.used {
		return &openFile{f, r.file}, nil
	}
	taken := map[int]bool{}
	for _, n := range f.names {
		if r, err := f.record(n); err == nil && r.used {
			taken[r.file] = true
		}
	}
	for k := 1; k <= f.count; k++ {
		if i := (f.last + k) % f.count; !taken[i] {
			f.last = i
			file := &openFile{f, i}
			if err := file.Truncate(0); err != nil {
				return nil, err
			}
			return file, f.setRecords([]string{name}, []record{{used: true, file: i}})
		}
	}
	return nil, errors.New("the model is full")
}

// Open opens a file.
func (f *files) Open(name string) (atomicfile.File, error) {
	r, err := f.record(name)
	if err == nil && !r.used {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, err
	}
	return &openFile{f, r.file}, nil
}

// List returns the names of all files.
func (f *files) List() ([]string, error) {
	var list []string
	for _, name := range f.names {
		r, err := f.record(name)
		if err != nil {
			return nil, err
		}
		if r.used {
			list = append(list, name)
		}
	}
	return list, nil
}

// Rename renames a file.
func (f *files) Rename(from, to string) error {
	a, err := f.record(from)
	if err != nil {
		return err
	}
	b, err := f.record(to)
	if err != nil {
		return err
	}
	if !a.used {
		return fs.ErrNotExist
	}
	if f.kind == FAT && b.used && b.file != a.file {
		if err := f.free(b.file); err != nil {
			return err
		}
	}
	if f.kind == FAT {
		f.owed[to] = true
	}
	return f.setRecords([]string{to, from}, []record{a, {}})
}

// free gives the clusters of a file to whoever wants them.
func (f *files) free(file int) error {
	f.freed = append(f.freed, file)
	garbage := make([]byte, f.sector)
	for i := range garbage {
		garbage[i] = 0xdb
	}
	return f.write(garbage, f.place(file)+f.sector)
}

// Remove removes a file.
func (f *files) Remove(name string) error {
	r, err := f.record(name)
	if err == nil && !r.used {
		err = fs.ErrNotExist
	}
	if err != nil {
		return err
	}
	if f.kind == FAT {
		if err := f.free(r.file); err != nil {
			return err
		}
	}
	return f.setRecords([]string{name}, []record{{}})
}

// Sync flushes the names.
func (f *files) Sync() error {
	if f.kind == Journal {
		return f.flush(f.off, f.sector)
	}
	for _, name := range f.names {
		if !f.owed[name] {
			off, _, _ := f.recordOff(name)
			if err := f.flush(off, f.sector); err != nil {
				return err
			}
		}
	}
	for _, file := range f.freed {
		if err := f.flush(f.place(file), (1+f.data)*f.sector); err != nil {
			return err
		}
	}
	f.freed = nil
	return nil
}

// Free is enough.
func (f *files) Free() (int64, error) { return 1 << 30, nil }

// read returns what a file holds, nil if there is none or what there is cannot be read.
func (f *files) read(name string) []byte {
	file, err := f.Open(name)
	if err != nil {
		return nil
	}
	n, err := file.Size()
	if err != nil || n < 0 || n > f.data*f.sector {
		return nil
	}
	b := make([]byte, n)
	if _, err := file.ReadAt(b, 0); err != nil {
		return nil
	}
	return b
}

// openFile is an open file. It stays what it is when it is renamed.
type openFile struct {
	f    *files
	file int
}

// where finds the name that leads to the file now.
func (o *openFile) where() (string, record, error) {
	for _, n := range o.f.names {
		if r, err := o.f.record(n); err != nil || r.used && r.file == o.file {
			return n, r, err
		}
	}
	return "", record{}, fs.ErrNotExist
}

func (o *openFile) WriteAt(b []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(b)) > o.f.data*o.f.sector {
		return 0, errors.New("no space left in the model")
	}
	n, err := o.f.dev.WriteAt(b, o.f.place(o.file)+o.f.sector+off)
	if err != nil || n < len(b) {
		return n, err
	}
	if size, err := o.Size(); err != nil || size < off+int64(len(b)) {
		return n, errors.Join(err, o.Truncate(off+int64(len(b))))
	}
	return n, nil
}

func (o *openFile) ReadAt(b []byte, off int64) (int, error) {
	size, err := o.Size()
	if err != nil {
		return 0, err
	}
	if off+int64(len(b)) > size {
		return 0, io.EOF
	}
	if m, ok := o.f.dev.(partition.MediumReader); ok {
		return m.ReadMedium(b, o.f.place(o.file)+o.f.sector+off)
	}
	return o.f.dev.ReadAt(b, o.f.place(o.file)+o.f.sector+off)
}

// Size is in the file's own sector, and flushed with it. (FAT has it in the record of the name, which is flushed with the file as well.)
func (o *openFile) Size() (int64, error) {
	b := make([]byte, o.f.sector)
	if _, err := o.f.dev.ReadAt(b, o.f.place(o.file)); err != nil {
		return 0, err
	}
	return int64(binary.LittleEndian.Uint32(b)), nil
}

func (o *openFile) Truncate(size int64) error {
	b := make([]byte, o.f.sector)
	binary.LittleEndian.PutUint32(b, uint32(size))
	return o.f.write(b, o.f.place(o.file))
}

// Sync flushes the file, and with FAT the record of its name.
func (o *openFile) Sync() error {
	if o.f.kind == FAT {
		name, r, err := o.where()
		if err != nil {
			return err
		}
		if err := o.f.setRecords([]string{name}, []record{r}); err != nil {
			return err
		}
		off, _, _ := o.f.recordOff(name)
		if err := o.f.flush(off, o.f.sector); err != nil {
			return err
		}
		delete(o.f.owed, name)
	}
	return o.f.flush(o.f.place(o.file), (1+o.f.data)*o.f.sector)
}

// Uncache does nothing: all reads of contents are from the medium.
func (o *openFile) Uncache() error { return nil }
func (o *openFile) Close() error   { return nil }
