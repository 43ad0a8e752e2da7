package history

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
)

// Damage is a place where the history is not whole: a line that cannot be read, or records that are missing.
type Damage struct {
	File string
	Line int // 1 is the first
	Err  error
}

func (d *Damage) Error() string {
	return fmt.Sprintf("history: %s line %d: %v", d.File, d.Line, d.Err)
}

func (d *Damage) Unwrap() error { return d.Err }

// ErrMissing means that records between two others are gone.
var ErrMissing = errors.New("records are missing before it")

// Read gives the records in dir, oldest first. A directory without a history has none. A *[Damage] comes with a Record of
// which only Seq is set, to the number of the last sound one, and reading goes on after it; after any other error it ends. Memory
// is bounded whatever the files hold.
func Read(dir string) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		// The newer file is opened first: if the daemon turns to a new one meanwhile, the older one is read twice and told apart by its numbers.
		newer, err := file(dir, current)
		if err != nil {
			yield(Record{}, err)
			return
		}
		defer newer.Close()
		older, err := file(dir, previous)
		if err != nil {
			yield(Record{}, err)
			return
		}
		defer older.Close()
		rd := reader{yield: yield}
		if rd.file(previous, older) {
			rd.file(current, newer)
		}
	}
}

// Last gives the last n records that are sound, oldest first, and how many places are damaged.
func Last(dir string, n int) (records []Record, damaged int, err error) {
	for r, err := range Read(dir) {
		var damage *Damage
		switch {
		case errors.As(err, &damage):
			damaged++
			continue
		case err != nil:
			return records, damaged, err
		}
		if records = append(records, r); len(records) > 2*n+64 {
			records = append(records[:0], records[len(records)-n:]...)
		}
	}
	return records[max(0, len(records)-n):], damaged, nil
}

func file(dir, name string) (io.ReadCloser, error) {
	f, err := os.Open(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return io.NopCloser(nothing{}), nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the history: %w", err)
	}
	return f, nil
}

type nothing struct{}

func (nothing) Read([]byte) (int, error) { return 0, io.EOF }

type reader struct {
	yield func(Record, error) bool
	last  uint64
}

// file reads one file and reports whether to go on.
func (rd *reader) file(name string, f io.Reader) bool {
	b := bufio.NewReaderSize(f, maxLine)
	for n := 1; ; n++ {
		line, err := b.ReadSlice('\n')
		torn := errors.Is(err, io.EOF)
		switch {
		case torn && len(line) == 0:
			return true
		case errors.Is(err, bufio.ErrBufferFull):
			for errors.Is(err, bufio.ErrBufferFull) { // not one of ours
				_, err = b.ReadSlice('\n')
			}
			if !rd.damage(name, n, errShape) {
				return false
			}
			continue
		case err != nil && !torn:
			rd.yield(Record{}, fmt.Errorf("reading the history: %w", err))
			return false
		}
		if !torn {
			line = line[:len(line)-1]
		}
		if len(line) == 0 {
			continue
		}
		r, err := decode(line)
		switch {
		case err != nil:
			if !rd.damage(name, n, err) {
				return false
			}
			continue
		case r.Seq <= rd.last:
			continue // read before the daemon turned to a new file
		case rd.last != 0 && r.Seq != rd.last+1:
			if !rd.damage(name, n, fmt.Errorf("%d %w", r.Seq-rd.last-1, ErrMissing)) {
				return false
			}
		}
		rd.last = r.Seq
		if !rd.yield(r, nil) {
			return false
		}
	}
}

func (rd *reader) damage(name string, line int, err error) bool {
	return rd.yield(Record{Seq: rd.last}, &Damage{name, line, err})
}
