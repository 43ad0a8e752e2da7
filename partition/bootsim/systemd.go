package bootsim

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/flipside-linux/flipside/partition/atomicfile"
)

// ErrNoEntry means that systemd-boot finds no entry that can be started.
var ErrNoEntry = errors.New("systemd-boot finds no entry to start")

// EntryDir is the directory loader/entries of the partition that systemd-boot reads.
type EntryDir interface {
	atomicfile.Dir
	List() ([]string, error)
}

// Entry is a boot entry of the Boot Loader Specification (UAPI.1, type 1).
type Entry struct {
	Name          string // of its file
	ID            string // the name without counter and suffix
	Counted       bool
	Left, Done    int // tries, if counted
	SortKey       string
	MachineID     string
	Version       string
	Program       string // what is started: the value of linux, efi or uki
	Options       string
	digits, digit int // of the counters in the name, so that their width stays
}

// SystemdBoot does what systemd-boot does at power-on with no "default" set: of the entries that start something which is there it takes the first, in
// the order of [Compare]. If its name has a counter, one try is moved from those left to those done, by renaming the file, before anything
// is started; of no tries left none is taken. exists reports whether a program is there.
func SystemdBoot(dir EntryDir, exists func(program string) bool) (Entry, error) {
	list, err := Entries(dir)
	if err != nil {
		return Entry{}, err
	}
	list = slices.DeleteFunc(list, func(e Entry) bool { return exists != nil && !exists(e.Program) })
	if len(list) == 0 {
		return Entry{}, ErrNoEntry
	}
	e := list[0]
	if !e.Counted {
		return e, nil
	}
	old := e.Name
	e.Left, e.Done = max(0, e.Left-1), e.Done+1
	e.Name = fmt.Sprintf("%s+%0*d-%0*d.conf", e.ID, e.digits, e.Left, e.digit, e.Done)
	if err := dir.Rename(old, e.Name); err != nil {
		return Entry{}, fmt.Errorf("counting a try of %s: %w", old, err)
	}
	return e, nil
}

var counter = regexp.MustCompile(`^(.+?)(?:\+(\d+)(?:-(\d+))?)?\.conf$`)

// Entries reads all entries that start something, first the one that is taken. Files that cannot be read are passed over, as systemd-boot does.
func Entries(dir EntryDir) ([]Entry, error) {
	names, err := dir.List()
	if err != nil {
		return nil, err
	}
	var list []Entry
	for _, name := range names {
		m := counter.FindStringSubmatch(name)
		if m == nil {
			continue
		}
		e := Entry{Name: name, ID: m[1], digits: max(1, len(m[2])), digit: max(1, len(m[3]))}
		if e.Counted = m[2] != ""; e.Counted {
			e.Left, _ = strconv.Atoi(m[2])
			e.Done, _ = strconv.Atoi(m[3])
		}
		if text, err := contents(dir, name); err == nil && e.parse(text) {
			list = append(list, e)
		}
	}
	slices.SortStableFunc(list, Compare)
	return list, nil
}

func contents(dir EntryDir, name string) ([]byte, error) {
	f, err := dir.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n, err := f.Size()
	if err != nil || n > 1<<20 {
		return nil, errors.Join(err, errors.New("it is too long"))
	}
	text := make([]byte, n)
	if got, err := f.ReadAt(text, 0); err != nil && !(errors.Is(err, io.EOF) && got == len(text)) {
		return nil, err
	}
	return text, nil
}

// parse reads the lines of an entry, and reports whether it starts something.
func (e *Entry) parse(text []byte) bool {
	text, _, _ = bytes.Cut(text, []byte{0})
	for _, line := range strings.FieldsFunc(string(text), func(r rune) bool { return r == '\n' || r == '\r' }) {
		line = strings.TrimLeft(line, " \t")
		key, value, ok := strings.Cut(strings.ReplaceAll(line, "\t", " "), " ")
		value = strings.TrimSpace(value)
		if !ok || strings.HasPrefix(key, "#") || value == "" {
			continue
		}
		switch key {
		case "sort-key":
			e.SortKey = value
		case "machine-id":
			e.MachineID = value
		case "version":
			e.Version = value
		case "linux", "efi", "uki":
			e.Program = value
		case "options":
			e.Options = strings.TrimSpace(e.Options + " " + value)
		}
	}
	return e.Program != ""
}

// Compare is systemd-boot's order: entries without tries left behind all others; those with a sort key before those without; by sort key and
// machine ID, both ascending; by version, then by name, the newest first; then by the tries left, most first, and the tries done, fewest first.
func Compare(a, b Entry) int {
	spent := func(e Entry) int { return truth(e.Counted && e.Left == 0) }
	if c := cmp.Or(cmp.Compare(spent(a), spent(b)), cmp.Compare(truth(a.SortKey == ""), truth(b.SortKey == ""))); c != 0 {
		return c
	}
	if a.SortKey != "" {
		c := cmp.Or(strings.Compare(a.SortKey, b.SortKey), strings.Compare(a.MachineID, b.MachineID), -CompareVersions(a.Version, b.Version))
		if c != 0 {
			return c
		}
	}
	if c := -CompareVersions(a.ID, b.ID); c != 0 {
		return c
	}
	if !a.Counted || !b.Counted {
		return cmp.Compare(truth(a.Counted), truth(b.Counted))
	}
	return cmp.Or(-cmp.Compare(a.Left, b.Left), cmp.Compare(a.Done, b.Done))
}

func truth(b bool) int {
	if b {
		return 1
	}
	return 0
}

// CompareVersions orders two versions as the Version Format Specification (UAPI.10) has it: -1, 0 or 1.
func CompareVersions(a, b string) int {
	for {
		a, b = strings.TrimLeftFunc(a, ignored), strings.TrimLeftFunc(b, ignored)
		// A tilde is before the end, and the end before everything else.
		for _, c := range "~" {
			if x, y := begins(a, c), begins(b, c); x != y {
				return truth(y) - truth(x)
			} else if x {
				a, b = a[1:], b[1:]
			}
		}
		if a == "" || b == "" {
			return cmp.Compare(truth(a != ""), truth(b != ""))
		}
		separated := false
		for _, c := range "-^." {
			if x, y := begins(a, c), begins(b, c); x != y {
				return truth(y) - truth(x)
			} else if x {
				a, b, separated = a[1:], b[1:], true
				break
			}
		}
		if separated {
			continue
		}
		if digit(rune(a[0])) || digit(rune(b[0])) {
			x, y := span(a, digit), span(b, digit)
			n, m := strings.TrimLeft(a[:x], "0"), strings.TrimLeft(b[:y], "0")
			// No digits are less than any.
			if c := cmp.Or(cmp.Compare(truth(x > 0), truth(y > 0)), cmp.Compare(len(n), len(m)), strings.Compare(n, m)); c != 0 {
				return c
			}
			a, b = a[x:], b[y:]
			continue
		}
		x, y := span(a, letter), span(b, letter)
		if c := strings.Compare(a[:x], b[:y]); c != 0 {
			return c
		}
		a, b = a[x:], b[y:]
	}
}

func begins(s string, c rune) bool { return strings.HasPrefix(s, string(c)) }
func digit(r rune) bool            { return r >= '0' && r <= '9' }
func letter(r rune) bool           { return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' }
func ignored(r rune) bool          { return !digit(r) && !letter(r) && !strings.ContainsRune("~-^.", r) }

// span is the length of the beginning of s that is made of ok.
func span(s string, ok func(rune) bool) int {
	for i, r := range s {
		if !ok(r) {
			return i
		}
	}
	return len(s)
}
