package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"

	"github.com/BurntSushi/toml"

	"github.com/flipside-linux/flipside/omaha/shallow"
)

// Dirs are where configuration files are looked for, the least important first. The order is that of the UAPI group's
// configuration files specification (UAPI.6).
var dirs = [...]string{"usr/lib", "usr/local/lib", "run", "etc"}

const (
	mainName   = "flipside/flipside.toml"
	dropinName = "flipside/flipside.toml.d"
	choiceName = "operator.toml" // in the state directory
	maxFile    = 1 << 20
	maxChoices = 4 << 10 // of that file, which more than root may write
)

// Source says where a configuration comes from. The zero Source is the running system.
type Source struct {
	Root string // before every path; "" is /
	File string // if set, only this file is read, and what an operator chose at run time
	// Fixed leaves out what an operator chose at run time. That file is in the state directory, where more than root may write.
	Fixed bool

	draft *draft
}

// draft is what somebody would like a file to hold.
type draft struct {
	path string
	data []byte
}

// Origin is where a setting was made.
type Origin struct {
	File string `json:"file"`
	Line int    `json:"line,omitempty"`
	From string `json:"from,omitempty"` // the setting of update.conf that it was made from
}

func (o Origin) String() string {
	s := o.File
	if o.Line > 0 {
		s = fmt.Sprintf("%s:%d", o.File, o.Line)
	}
	if o.From != "" {
		s += " (" + o.From + ")"
	}
	return s
}

// File is a file that was found, in the order of reading: a later one wins.
type File struct {
	Path   string `json:"path"`
	Masked bool   `json:"masked,omitempty"` // a link to /dev/null: whatever it hides is not read
	Hides  string `json:"hides,omitempty"`  // a file of the same name in a less important directory that is not read for its sake
}

// Unused is a setting of an older update.conf that means nothing here, and why.
type Unused struct {
	Key    string `json:"key"`
	Origin Origin `json:"origin"`
	Why    string `json:"why"`
}

// Loaded is a configuration with its story.
type Loaded struct {
	Config
	Origins map[string]Origin // by key; a key that is not there has its default
	Files   []File
	Unused  []Unused

	draft *draft
}

// Load reads and checks the configuration in one file, or, if path is empty, that of the running system.
func Load(path string) (Config, error) {
	l, err := Read(Source{File: path})
	if err != nil {
		return Config{}, err
	}
	return l.Config, nil
}

// Parse reads and checks a configuration. The name is for errors.
func Parse(name string, data []byte) (Config, error) {
	l := fresh()
	if err := l.merge(name, data, nil); err != nil {
		return Config{}, err
	}
	if err := l.check(name); err != nil {
		return Config{}, err
	}
	return l.Config, nil
}

// Read reads and checks a configuration. In this order, a later one winning key by key:
//
//  1. the defaults;
//  2. usr/share/flatcar/release, usr/share/flatcar/update.conf and etc/flatcar/update.conf, as older hosts have them;
//  3. flipside/flipside.toml from the most important of usr/lib, usr/local/lib, run and etc that has one;
//  4. flipside/flipside.toml.d/*.toml from all four, sorted by name; of files with the same name only the one from the most important
//     directory counts, and one that is a link to /dev/null masks the others;
//  5. operator.toml in the state directory: what somebody chose with "flipside channel set" or "flipside pin".
func Read(src Source) (*Loaded, error) {
	l := fresh()
	l.draft = src.draft
	if src.File != "" {
		if err := l.read(File{Path: src.File}, nil); err != nil {
			return nil, err
		}
		return l.finish(src)
	}
	if err := l.readUpdateConf(src.Root); err != nil {
		return nil, err
	}
	var main *File
	for _, dir := range dirs {
		path := filepath.Join("/", src.Root, dir, mainName)
		if _, err := os.Lstat(path); err != nil {
			continue
		}
		f := File{Path: path, Masked: masked(path)}
		if main != nil {
			f.Hides = main.Path
		}
		main = &f
	}
	if d := src.draft; d != nil && (main == nil || main.Path != d.path) { // there is no such file yet
		main = &File{Path: d.path}
	}
	dropins := map[string]File{}
	for _, dir := range dirs {
		path := filepath.Join("/", src.Root, dir, dropinName)
		entries, err := os.ReadDir(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading the configuration: %w", err)
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), ".") || filepath.Ext(e.Name()) != ".toml" || e.IsDir() {
				continue
			}
			full := filepath.Join(path, e.Name())
			dropins[e.Name()] = File{Path: full, Masked: masked(full), Hides: dropins[e.Name()].Path}
		}
	}
	var files []File
	if main != nil {
		files = append(files, *main)
	}
	for _, name := range slices.Sorted(maps.Keys(dropins)) {
		files = append(files, dropins[name])
	}
	for _, f := range files {
		if err := l.read(f, nil); err != nil {
			return nil, err
		}
	}
	if len(files) == 0 && len(l.Files) == 0 {
		return nil, fmt.Errorf("there is no configuration: %s is the place for it: %w", DefaultPath, fs.ErrNotExist)
	}
	return l.finish(src)
}

func fresh() *Loaded { return &Loaded{Config: Default(), Origins: map[string]Origin{}} }

// finish adds what the operator chose and checks the whole.
func (l *Loaded) finish(src Source) (*Loaded, error) {
	if src.Fixed {
		if err := l.check(src.File); err != nil {
			return nil, err
		}
		return l, nil
	}
	path := filepath.Join("/", src.Root, l.Paths.State, choiceName)
	if src.File != "" {
		path = filepath.Join(l.Paths.State, choiceName)
	}
	if err := l.read(File{Path: path}, choosable); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
		return nil, err
	}
	if err := l.check(src.File); err != nil {
		return nil, err
	}
	return l, nil
}

func masked(path string) bool {
	to, err := os.Readlink(path)
	return err == nil && to == os.DevNull
}

// read merges one file. With only, no other key may be set in it.
func (l *Loaded) read(f File, only func(key string) bool) error {
	path := f.Path
	if f.Masked {
		l.Files = append(l.Files, f)
		return nil
	}
	if l.draft != nil && l.draft.path == path {
		if err := l.merge(path, l.draft.data, only); err != nil {
			return err
		}
		l.Files = append(l.Files, f)
		return nil
	}
	limit := int64(maxFile)
	if only != nil {
		limit = maxChoices
	}
	data, err := load(path, limit)
	if err != nil {
		return fmt.Errorf("reading the configuration: %w", err)
	}
	if err := l.merge(path, data, only); err != nil {
		return err
	}
	l.Files = append(l.Files, f)
	return nil
}

// load reads a file of at most limit bytes. It waits for no writer of a pipe that stands in its place.
func load(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if !info.Mode().IsRegular() || int64(len(data)) > limit {
		return nil, fmt.Errorf("%s is not a file of at most %d bytes", path, limit)
	}
	return data, err
}

// merge puts the settings of a file over those that are there. A list replaces a list.
func (l *Loaded) merge(name string, data []byte, only func(key string) bool) error {
	clearLists(&l.Config, data)
	meta, err := shallow.Decode(data, &l.Config)
	if err != nil {
		var pe toml.ParseError
		if errors.As(err, &pe) {
			return fmt.Errorf("%s:%d: %s", name, pe.Position.Line, pe.Message)
		}
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, k := range meta.Keys() {
		if known(k) { // the decoder would also take one that is written in other letters
			continue
		}
		key := k.String()
		err := fmt.Errorf("%s:%d: unknown key %q", name, lineOf(data, key), key)
		if near := nearest(key); near != "" {
			err = fmt.Errorf("%w; did you mean %q?", err, near)
		}
		return err
	}
	for _, k := range meta.Keys() {
		key := k.String()
		if meta.Type(k...) == "Hash" {
			continue
		}
		if only != nil && !only(key) {
			return fmt.Errorf("%s:%d: %s cannot be set here", name, lineOf(data, key), key)
		}
		l.Origins[key] = Origin{File: name, Line: lineOf(data, key)}
	}
	return nil
}

// clearLists empties the lists that data sets, because the decoder would write into the memory of the list that is there: the tables of a list
// would keep what they do not set from the tables of an earlier file.
func clearLists(c *Config, data []byte) {
	var probe Config
	meta, err := shallow.Decode(data, &probe)
	if err != nil {
		return
	}
	for _, s := range settings(c) {
		switch s.field.Kind() {
		case reflect.Slice, reflect.Map, reflect.Pointer:
			if meta.IsDefined(strings.Split(s.Key, ".")...) {
				s.field.SetZero()
			}
		}
	}
}

// check reports everything that is wrong, with the place where it was set.
func (l *Loaded) check(name string) error {
	var errs []error
	for _, err := range l.Config.check() {
		key, _, _ := strings.Cut(err.Error(), " ")
		key = strings.TrimSuffix(key, ":")
		switch o, ok := l.Origins[key]; {
		case ok:
			err = fmt.Errorf("%s: %w", o, err)
		case name != "":
			err = fmt.Errorf("%s: %w", name, err)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// lineOf finds the line of a key that the TOML library does not place.
func lineOf(data []byte, key string) int {
	section := ""
	for i, line := range strings.Split(string(data), "\n") {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			section, _, _ = strings.Cut(strings.TrimLeft(line, "["), "]")
			section = strings.TrimSpace(section)
			if section == key {
				return i + 1
			}
			continue
		}
		name, _, ok := strings.Cut(line, "=")
		full := strings.Trim(strings.TrimSpace(name), `"'`)
		if section != "" {
			full = section + "." + full
		}
		if ok && (full == key || strings.HasPrefix(key, full+".")) {
			return i + 1
		}
	}
	return 1
}

// Check says whether the configuration, with all its files, would be right if the main file at path held data. With file set, only that file is read, as by [Source].
func Check(file, path string, data []byte) error {
	_, err := Read(Source{File: file, draft: &draft{path, data}})
	return err
}
