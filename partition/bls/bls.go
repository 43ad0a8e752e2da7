package bls

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/atomicfile"
)

// ErrForeign means that an entry has the name of one of ours and was written by somebody who has not read how. Nothing is guessed about it.
var ErrForeign = errors.New("the boot entry is not one of ours")

const (
	prefix  = "flipside-"
	suffix  = ".conf"
	sortKey = "flipside"

	sector   = 512  // bytes that reach a medium together
	maxEntry = 4096 // bytes of an entry
	most     = 15   // priority and tries, as in a partition table
)

// Dir is the directory of the entries, loader/entries on the partition that systemd-boot reads.
type Dir interface {
	atomicfile.Dir
	// List returns the names of all files.
	List() ([]string, error)
}

// Entries are the boot bits of slots, kept in boot entries.
type Entries struct {
	Dir Dir
	// Template are the lines of an entry beside sort-key and version. {label}, {letter} and {uuid} are the slot's label, the last part of it in small
	// letters, and the UUID of its partition.
	Template string
}

var _ partition.Bits = (*Entries)(nil)

// entry is one file.
type entry struct {
	name    string
	counted bool
	left    uint8  // tries, if counted
	version uint8  // 1 to 15
	text    []byte // what it holds
}

// names are those of the entries of a letter, with and without a counter.
var names = regexp.MustCompile(`^flipside-([^+/]+?)(?:\+(\d{1,4})(?:-(\d{1,4}))?)?\.conf$`)

// letters returns the letter of each slot, by which its entries are named.
func letters(slots []partition.Slot) ([]string, error) {
	list, of := make([]string, len(slots)), map[string]string{}
	for i, s := range slots {
		at := strings.LastIndexByte(s.Label, '-')
		letter := strings.ToLower(s.Label[at+1:])
		if at < 0 || letter == "" || strings.ContainsAny(letter, "+/\x00") {
			return nil, fmt.Errorf("slot %q has no letter to name its entry by: want a label such as USR-B", s.Label)
		}
		if other, ok := of[letter]; ok {
			return nil, fmt.Errorf("slots %q and %q would both have the entry %s%s%s", other, s.Label, prefix, letter, suffix)
		}
		list[i], of[letter] = letter, s.Label
	}
	return list, nil
}

// files returns the names of all our entries, by letter. On a FAT, and for systemd-boot, names that differ in case only are one.
func (e *Entries) files() (map[string][]string, error) {
	all, err := e.Dir.List()
	if err != nil {
		return nil, fmt.Errorf("looking for boot entries: %w", err)
	}
	of := map[string][]string{}
	for _, name := range slices.Sorted(slices.Values(all)) {
		if m := names.FindStringSubmatch(strings.ToLower(name)); m != nil {
			of[m[1]] = append(of[m[1]], name)
		}
	}
	return of, nil
}

// read reads an entry. One that systemd-boot passes over, because it starts nothing, is none.
func (e *Entries) read(name string) (entry, bool, error) {
	fail := func(err error) (entry, bool, error) {
		return entry{}, false, fmt.Errorf("boot entry %s: %w", name, err)
	}
	if ours := strings.ToLower(name); name != ours {
		return fail(fmt.Errorf("%w: ours are named in small letters; if it is one, rename it to %s", ErrForeign, ours))
	}
	f, err := e.Dir.Open(name)
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return fail(err)
	}
	text := make([]byte, min(size, maxEntry))
	if n, err := f.ReadAt(text, 0); err != nil && !(errors.Is(err, io.EOF) && n == len(text)) {
		return fail(err)
	}
	m := names.FindStringSubmatch(name)
	x := entry{name: name, counted: m[2] != "", text: text}
	if x.counted {
		n, _ := strconv.Atoi(m[2])
		x.left = uint8(min(n, most))
	}
	if !starts(text) {
		return x, false, nil
	}
	if size > maxEntry {
		return fail(fmt.Errorf("%w: it has %d bytes, more than %d", ErrForeign, size, maxEntry))
	}
	at, err := version(text)
	if err != nil {
		return fail(err)
	}
	n, _ := strconv.Atoi(string(text[at : at+2]))
	x.version = uint8(n)
	return x, true, nil
}

// starts reports whether an entry has something to start. What comes after a zero byte nobody reads.
func starts(text []byte) bool {
	text, _, _ = bytes.Cut(text, []byte{0})
	for line := range bytes.Lines(text) {
		switch key, value := keyValue(line); key {
		case "linux", "efi", "uki", "uki-url":
			if value != "" {
				return true
			}
		}
	}
	return false
}

func keyValue(line []byte) (key, value string) {
	line = bytes.TrimSpace(line)
	at := bytes.IndexAny(line, " \t")
	if at < 0 || line[0] == '#' {
		return "", ""
	}
	return string(line[:at]), strings.TrimSpace(string(line[at:]))
}

// version finds where the two digits of the version are. They and the sort key must be in the first sector, once.
func version(text []byte) (int, error) {
	at, keys, versions := 0, 0, 0
	pos := 0
	for line := range bytes.Lines(text) {
		switch key, value := keyValue(line); {
		case key == "sort-key":
			if keys++; value != sortKey {
				return 0, fmt.Errorf("%w: it has the sort-key %q, want %q", ErrForeign, value, sortKey)
			}
		case key == "version":
			versions++
			n, err := strconv.Atoi(value)
			if err != nil || len(value) != 2 || n < 1 || n > most || pos+len(line) > sector {
				return 0, fmt.Errorf("%w: it has the version %q, want two digits, 01 to %d, among the first %d bytes", ErrForeign, value, most, sector)
			}
			at = pos + bytes.Index(line, []byte(value))
		case key != "" && (keys == 0 || versions == 0):
			return 0, fmt.Errorf("%w: want the lines sort-key and version before the line %s", ErrForeign, key)
		}
		pos += len(line)
	}
	if keys != 1 || versions != 1 {
		return 0, fmt.Errorf("%w: it has %d lines sort-key and %d lines version, want one of each", ErrForeign, keys, versions)
	}
	return at, nil
}

// of reads the entries of a slot. now are those that count: of the highest version.
func (e *Entries) of(names []string) (now []entry, err error) {
	for _, name := range names {
		x, ok, err := e.read(name)
		if err != nil {
			return nil, err
		}
		if ok {
			now = append(now, x)
		}
	}
	top := uint8(0)
	for _, x := range now {
		top = max(top, x.version)
	}
	return slices.DeleteFunc(now, func(x entry) bool { return x.version < top }), nil
}

// Read says what the entries say.
func (e *Entries) Read(slots []partition.Slot) error {
	of, err := e.files()
	if err != nil {
		return err
	}
	letter, err := letters(slots)
	if err != nil {
		return err
	}
	for i := range slots {
		s := &slots[i]
		s.Priority, s.Tries, s.Successful = 0, 0, false
		now, err := e.of(of[letter[i]])
		if err != nil {
			return err
		}
		for _, x := range now {
			s.Priority = x.version
			if x.counted {
				s.Tries = max(s.Tries, x.left)
			} else {
				s.Successful = true
			}
		}
	}
	return nil
}

// Settle flushes all our entries and the directory.
func (e *Entries) Settle() error {
	of, err := e.files()
	if err != nil {
		return err
	}
	for _, list := range of {
		for _, name := range list {
			if err := e.flush(name); err != nil {
				return fmt.Errorf("flushing the boot entry %s: %w", name, err)
			}
		}
	}
	return e.Dir.Sync()
}

func (e *Entries) flush(name string) error {
	f, err := e.Dir.Create(name) // opens it for writing
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Write makes the entries say what now says.
func (e *Entries) Write(was, now []partition.Slot) error {
	letter, err := letters(now)
	if err != nil {
		return err
	}
	var order []int
	for i := range now {
		if was[i] != now[i] {
			order = append(order, i)
		}
	}
	// Priorities that are made smaller keep their order all the way if the lowest goes first.
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(now[a].Priority, now[b].Priority) })
	for _, i := range order {
		if err := e.change(letter[i], now[i]); err != nil {
			return fmt.Errorf("the boot entry of slot %s: %w", now[i].Label, err)
		}
	}
	return nil
}

// change makes the entries of one slot say what its bits are: first what is to be there, then what is not.
func (e *Entries) change(letter string, s partition.Slot) error {
	of, err := e.files()
	if err != nil {
		return err
	}
	have, err := e.of(of[letter])
	if err != nil {
		return err
	}
	// What has booted keeps its lines; only a slot without an entry gets the template's.
	var text []byte
	if len(have) > 0 {
		text = have[0].text
	}
	keep := map[string]bool{}
	want := func(name string) error {
		keep[name] = true
		for _, x := range have {
			if x.name == name {
				return e.renumber(x, s.Priority)
			}
		}
		if text == nil {
			if text, err = e.text(letter, s); err != nil {
				return err
			}
		}
		at, err := version(text)
		if err != nil {
			return err
		}
		fresh := bytes.Clone(text)
		copy(fresh[at:], fmt.Sprintf("%02d", s.Priority))
		return e.put(name, fresh)
	}
	if s.Priority > 0 && s.Successful {
		if err := want(prefix + letter + suffix); err != nil {
			return err
		}
	}
	if s.Priority > 0 && (!s.Successful || s.Tries > 0) {
		name := fmt.Sprintf("%s%s+%d%s", prefix, letter, s.Tries, suffix)
		for _, x := range have { // one that was counted down already
			if x.counted && x.left == s.Tries {
				name = x.name
			}
		}
		if err := want(name); err != nil {
			return err
		}
	}
	for _, name := range of[letter] {
		if !keep[name] {
			if err := e.drop(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// text makes an entry from the template.
func (e *Entries) text(letter string, s partition.Slot) ([]byte, error) {
	lines := strings.NewReplacer("{label}", s.Label, "{letter}", letter, "{uuid}", s.UUID.String()).Replace(e.Template)
	text := fmt.Appendf(nil, "sort-key %s\nversion %02d\n%s", sortKey, s.Priority, strings.TrimRight(lines, "\n")+"\n")
	if len(text) > maxEntry {
		return nil, fmt.Errorf("it would have %d bytes, more than %d", len(text), maxEntry)
	}
	if bytes.ContainsRune(text, 0) || !starts(text) {
		return nil, errors.New("the template has no line linux, efi or uki: there is nothing to start")
	}
	_, err := version(text)
	return text, err
}

// Check reports what is wrong with the template.
func (e *Entries) Check() error {
	_, err := e.text("a", partition.Slot{Label: "USR-A", Priority: 1})
	return err
}

// put makes an entry, which may be there with nothing in it.
func (e *Entries) put(name string, text []byte) (err error) {
	f, err := e.Dir.Create(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	head, tail := text[:min(len(text), sector)], text[min(len(text), sector):]
	for _, step := range []func() error{
		func() error { return write(f, make([]byte, len(head)), 0) },
		func() error { return f.Truncate(int64(len(head))) },
		f.Sync,
		func() error { return write(f, tail, sector) },
		f.Sync,
		func() error { return write(f, head, 0) },
		f.Sync,
		e.Dir.Sync,
	} {
		if err := step(); err != nil {
			return fmt.Errorf("writing %s: %w", name, err)
		}
	}
	return e.check(name, text)
}

// check reads an entry back.
func (e *Entries) check(name string, text []byte) error {
	if err := atomicfile.Check(context.Background(), e.Dir, name, int64(len(text)), sha256.Sum256(text)); err != nil {
		return fmt.Errorf("reading back %s: %w", name, err)
	}
	return nil
}

// renumber changes an entry's version in its place.
func (e *Entries) renumber(x entry, priority uint8) error {
	if x.version == priority {
		return nil
	}
	at, err := version(x.text)
	if err != nil {
		return err
	}
	text := bytes.Clone(x.text)
	copy(text[at:], fmt.Sprintf("%02d", priority))
	f, err := e.Dir.Create(x.name)
	if err != nil {
		return err
	}
	err = write(f, text[:min(len(text), sector)], 0)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("changing the version of %s: %w", x.name, err)
	}
	return e.check(x.name, text)
}

// drop removes an entry that may be what boots next.
func (e *Entries) drop(name string) error {
	fail := func(err error) error { return fmt.Errorf("removing %s: %w", name, err) }
	f, err := e.Dir.Create(name)
	if err != nil {
		return fail(err)
	}
	size, err := f.Size()
	if err == nil && size > 0 {
		err = write(f, make([]byte, min(size, sector)), 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fail(err)
	}
	if err := e.Dir.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fail(err)
	}
	if err := e.Dir.Sync(); err != nil {
		return fail(err)
	}
	return nil
}

func write(f atomicfile.File, b []byte, off int64) error {
	if len(b) == 0 {
		return nil
	}
	n, err := f.WriteAt(b, off)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	return err
}
