// Package history is the black box of a host: what happened to it, what it decided, and why, in the order in which it happened.
//
// # The files
//
// A history is two files in the state directory, which both slots share: history.log, which is written, and history.old.log, the one
// before it. When the first has reached half of the bound it becomes the second, and the second is gone. Nothing else is ever
// changed: records are only added at the end, and each is flushed before [Log.Append] returns.
//
// A record is one line:
//
//	9c1f02ab {"seq":17,"time":"2026-11-23T04:00:00Z","boot":"…","kind":"update-armed","text":"release 2.0.0 is in place …"}\n
//
// The eight hex digits are the CRC-32C of the JSON text. Sequence numbers grow by one from record to record, also over restarts,
// so that what was lost is seen. A power cut may leave a torn last line; it is reported as [Damage], and the next record begins on a
// line of its own. The checksum finds accidents, not forgery: whoever may write the state directory may write a history.
//
// # Reading
//
// [Read] gives the records oldest first, also while a daemon writes. It needs no daemon, so that a rescue system can read what the
// host did last.
package history

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

// Record is one thing that happened.
type Record struct {
	Seq     uint64    `json:"seq"`  // given by Append
	Time    time.Time `json:"time"` // by the host's clock, which may have been wrong
	Boot    string    `json:"boot,omitempty"`
	Kind    string    `json:"kind"` // a stable word, such as update-armed
	Warn    bool      `json:"warn,omitempty"`
	Text    string    `json:"text"`              // one line for people
	Version string    `json:"version,omitempty"` // of the release that it is about
	Slot    string    `json:"slot,omitempty"`    // that it is about
	Phase   string    `json:"phase,omitempty"`   // where the update stands after it
}

const (
	current  = "history.log"
	previous = "history.old.log"

	// DefaultMax bounds both files together, in bytes: several years of a host that updates every two weeks.
	DefaultMax = 2 << 20
	// maxLine bounds a record; a longer text is cut.
	maxLine = 8 << 10
	maxText = 2 << 10
)

// output is the file that a Log writes, or in tests one that fails.
type output interface {
	io.WriteCloser
	Truncate(size int64) error
	Sync() error
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Log is a history that is written. One process at a time writes; a Log may be used by several goroutines.
type Log struct {
	dir string
	max int64

	unsafe bool // nothing is flushed: for tests that look at what is written, not at when

	mu     sync.Mutex
	f      output // nil while there is none: closed, or the disk was full as a new one was begun
	closed bool
	size   int64
	seq    uint64
}

// Open opens the history in dir for writing, and makes it if there is none. max bounds its size in bytes; 0 is [DefaultMax].
func Open(dir string, max int64) (*Log, error) {
	return open(&Log{dir: dir, max: max})
}

func open(l *Log) (*Log, error) {
	if l.max <= 0 {
		l.max = DefaultMax
	}
	for r, err := range Read(l.dir) {
		var damage *Damage
		if err != nil && !errors.As(err, &damage) {
			return nil, err
		}
		l.seq = r.Seq // a damaged line carries the number of the last sound one
	}
	if err := l.begin(); err != nil {
		return nil, err
	}
	return l, nil
}

func (l *Log) begin() error {
	f, err := os.OpenFile(filepath.Join(l.dir, current), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return fmt.Errorf("opening the history: %w", err)
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err == nil && size > 0 {
		last := []byte{0}
		if _, err = f.ReadAt(last, size-1); err == nil && last[0] != '\n' {
			_, err = f.Write([]byte{'\n'}) // a torn line keeps its damage to itself
			size++
		}
	}
	if err == nil && !l.unsafe {
		err = syncDir(l.dir)
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("opening the history: %w", err)
	}
	l.f, l.size = f, size
	return nil
}

// Append gives r the next number, adds it at the end and flushes it to the disk. After an error the record may or may not be there.
func (l *Log) Append(r Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return fmt.Errorf("adding to the history: %w", fs.ErrClosed)
	}
	if l.f == nil {
		if err := l.begin(); err != nil {
			return err
		}
	}
	r.Seq = l.seq + 1
	line, err := encode(r)
	if err != nil {
		return fmt.Errorf("adding to the history: %w", err)
	}
	if l.size > 0 && l.size+int64(len(line)) > l.max/2 {
		if err := l.turn(); err != nil {
			return err
		}
	}
	n, err := l.f.Write(line)
	l.size += int64(n)
	if err != nil {
		if n > 0 && n < len(line) { // the disk is full: the next record must not be glued to this one
			if terr := l.f.Truncate(l.size - int64(n)); terr == nil {
				l.size -= int64(n)
			} else { // then it begins on a line of its own
				l.f.Close()
				l.f = nil
			}
		}
		return fmt.Errorf("adding to the history: %w", err)
	}
	l.seq = r.Seq
	if l.unsafe {
		return nil
	}
	if err := l.f.Sync(); err != nil {
		return fmt.Errorf("adding to the history: %w", err)
	}
	return nil
}

// turn begins a new file. The one before the last is gone.
func (l *Log) turn() error {
	if err := os.Rename(filepath.Join(l.dir, current), filepath.Join(l.dir, previous)); err != nil {
		return fmt.Errorf("beginning a new file of the history: %w", err)
	}
	l.f.Close()
	l.f = nil
	return l.begin()
}

// Close closes the history.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	if l.f == nil {
		return nil
	}
	err := l.f.Close()
	l.f = nil
	return err
}

func encode(r Record) ([]byte, error) {
	r.Time = r.Time.UTC().Round(time.Millisecond)
	r.Text = oneLine(r.Text)
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(r); err != nil {
		return nil, err
	}
	data := bytes.TrimSuffix(b.Bytes(), []byte("\n"))
	if len(data) > maxLine-10 {
		return nil, fmt.Errorf("a record of %d bytes is too long", len(data))
	}
	return fmt.Appendf(nil, "%08x %s\n", crc32.Checksum(data, castagnoli), data), nil
}

// oneLine makes a text safe to print, and short.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n', r == '\t':
			return ' '
		case !unicode.IsGraphic(r), r == utf8.RuneError: // control characters, also those of eight bits, and marks that turn the writing around
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, ""))
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText], "") + "…"
	}
	return s
}

// errChecksum and the others say what is wrong with a line.
var (
	errShape    = errors.New("it is not a record")
	errChecksum = errors.New("its checksum does not match")
)

func decode(line []byte) (Record, error) {
	if len(line) < 10 || line[8] != ' ' {
		return Record{}, errShape
	}
	sum, err := strconv.ParseUint(string(line[:8]), 16, 32)
	if err != nil {
		return Record{}, errShape
	}
	if crc32.Checksum(line[9:], castagnoli) != uint32(sum) {
		return Record{}, errChecksum
	}
	var r Record
	if err := json.Unmarshal(bytes.TrimSpace(line[9:]), &r); err != nil {
		return Record{}, errShape
	}
	return r, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
