package migrate

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/coreos/go-systemd/v22/unit"

	"github.com/flipside-linux/flipside/updater/config"
)

// unitDirs are where systemd looks for units, the least important first (man 5 systemd.unit).
var unitDirs = []string{"usr/lib/systemd/system", "usr/local/lib/systemd/system", "run/systemd/system", "etc/systemd/system"}

// services finds the two older services.
func (k *look) services() {
	for _, name := range []string{UpdateEngine, Locksmith} {
		s := Service{Unit: name}
		for _, dir := range unitDirs {
			parent, err := k.path(dir)
			if err != nil {
				continue
			}
			s.Enabled = s.Enabled || wanted(parent, name)
			info, err := os.Lstat(filepath.Join(parent, name))
			if err != nil {
				continue
			}
			to, _ := os.Readlink(filepath.Join(parent, name))
			s.Masked = to == os.DevNull // that of the most important directory counts
			s.Own = dir == "etc/systemd/system" && info.Mode().IsRegular()
			s.Found = true
		}
		k.Services = append(k.Services, s)
	}
}

// wanted reports whether a unit in a directory of units wants or requires one of this name, which is what enabling comes to.
func wanted(dir, name string) bool {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false
	}
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); ext != ".wants" && ext != ".requires" {
			continue
		}
		if to, err := os.Lstat(filepath.Join(dir, e.Name(), name)); err == nil && !to.IsDir() {
			return true
		}
	}
	return false
}

// proxies are the variables that name a proxy; a service hands them on to what it starts.
var proxies = []string{"ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "all_proxy", "http_proxy", "https_proxy", "no_proxy"}

// units reads the drop-ins of both services. Settings of theirs become those of k.older; what names a proxy is returned, as lines for a drop-in of
// flipsided, which hands them on to the same programs.
func (k *look) units() (lines string, err error) {
	var drop []string
	for _, name := range []string{UpdateEngine, Locksmith} {
		env, files, err := k.dropIns(name)
		if err != nil {
			return "", err
		}
		for _, f := range files {
			// A file of a drop-in wins over the unit's own, and over Environment=.
			o, err := config.ReadOlder(k.root, f)
			if err != nil {
				return "", err
			}
			if name == Locksmith {
				k.older = o.Over(k.older)
				continue
			}
			drop = append(drop, "EnvironmentFile=-/"+f)
		}
		for _, key := range slices.Sorted(maps.Keys(env)) {
			v := env[key]
			switch {
			case v.specifier != "":
				k.Unused = append(k.Unused, config.Unused{Key: key, Origin: v.at, Why: "it holds " + v.specifier + ", which systemd fills in and this command does not: set it yourself"})
			case slices.Contains(proxies, key) && name == UpdateEngine:
				drop = append(drop, "Environment="+quote(key+"="+v.value))
			case name == Locksmith && (strings.HasPrefix(key, "LOCKSMITHD_") || strings.HasPrefix(key, "REBOOT_")):
				k.older.Add(key, v.value, v.at)
			default:
				k.Unused = append(k.Unused, config.Unused{Key: key, Origin: v.at, Why: "in the environment of " + name + ", which is not known to read it"})
			}
		}
	}
	if len(drop) == 0 {
		return "", nil
	}
	return strings.Join(drop, "\n") + "\n", nil
}

type setting struct {
	value     string
	at        config.Origin
	specifier string // that is in the value and not resolved, such as %H
}

// dropIns reads the environment that the drop-ins of a unit set, and the files that they name, the last of which wins.
func (k *look) dropIns(name string) (env map[string]setting, files []string, err error) {
	found := map[string]string{} // by file name
	for _, dir := range unitDirs {
		dir = filepath.Join(dir, name+".d")
		path, err := k.path(dir)
		if err != nil {
			return nil, nil, err
		}
		entries, err := os.ReadDir(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("reading the drop-ins of %s: %w", name, err)
		}
		for _, e := range entries {
			if filepath.Ext(e.Name()) == ".conf" {
				found[e.Name()] = filepath.Join(dir, e.Name())
			}
		}
	}
	env = map[string]setting{}
	for _, base := range slices.Sorted(maps.Keys(found)) {
		file := found[base]
		if path, err := k.path(filepath.Dir(file)); err == nil {
			if to, _ := os.Readlink(filepath.Join(path, base)); to == os.DevNull {
				continue
			}
		}
		text, err := k.read(file)
		if err != nil {
			return nil, nil, err
		}
		options, err := unit.DeserializeOptions(strings.NewReader(text))
		if err != nil {
			return nil, nil, fmt.Errorf("reading /%s: %w", file, err)
		}
		at := config.Origin{File: "/" + file}
		for _, o := range options {
			if o.Section != "Service" {
				continue
			}
			switch o.Name {
			case "Environment":
				if o.Value == "" {
					clear(env)
				}
				for _, w := range words(o.Value) {
					if key, value, ok := strings.Cut(w, "="); ok {
						value, specifier := resolve(value)
						env[key] = setting{value, at, specifier}
					}
				}
			case "EnvironmentFile":
				if o.Value == "" {
					files = nil
					continue
				}
				files = append(files, strings.TrimPrefix(strings.TrimPrefix(o.Value, "-"), "/"))
			case "ExecStart":
				if o.Value != "" {
					k.Unused = append(k.Unused, config.Unused{Key: "ExecStart", Origin: at, Why: "flags of " + name + " are not read: compare them with the settings above yourself"})
				}
			}
		}
	}
	return env, files, nil
}

// words splits a value as systemd does: at spaces, but not within quotes; a line that ends with a backslash goes on after a space, and other
// backslashes are escapes of C (man 7 systemd.syntax).
func words(s string) (list []string) {
	s = strings.NewReplacer("\\\r\n", " ", "\\\n", " ").Replace(s)
	var b strings.Builder
	var quoted byte
	in := false
	for i := 0; i < len(s); {
		switch c := s[i]; {
		case c == '\\':
			in = true
			text, n := unescape(s[i:])
			b.WriteString(text)
			i += n
			continue
		case quoted != 0 && c == quoted:
			quoted = 0
		case quoted == 0 && (c == '"' || c == '\''):
			in, quoted = true, c
		case quoted == 0 && (c == ' ' || c == '\t'):
			if in {
				list = append(list, b.String())
				b.Reset()
			}
			in = false
		default:
			in = true
			b.WriteByte(c)
		}
		i++
	}
	if in {
		list = append(list, b.String())
	}
	return list
}

// unescape resolves the escape that s begins with, and says how long it is. What is none stays as it is.
func unescape(s string) (string, int) {
	if len(s) < 2 {
		return s, len(s)
	}
	if at := strings.IndexByte(`abfnrtvs\"'`, s[1]); at >= 0 {
		return "\a\b\f\n\r\t\v \\\"'"[at : at+1], 2
	}
	digits, base := 0, 8
	from := 2
	switch s[1] {
	case 'x':
		digits, base = 2, 16
	case 'u':
		digits, base = 4, 16
	case 'U':
		digits, base = 8, 16
	case '0', '1', '2', '3':
		digits, from = 3, 1
	}
	if digits == 0 || len(s) < from+digits {
		return s[:2], 2
	}
	n, err := strconv.ParseUint(s[from:from+digits], base, 32)
	switch {
	case err != nil || n == 0 || n > unicode.MaxRune:
		return s[:2], 2
	case s[1] == 'u' || s[1] == 'U':
		return string(rune(n)), from + digits
	}
	return string([]byte{byte(n)}), from + digits
}

// resolve makes %% a percent sign, and returns the first other specifier that the value holds (man 5 systemd.unit). Before what is no letter a percent sign is
// one.
func resolve(s string) (value, specifier string) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+1 < len(s) {
			switch c := s[i+1]; {
			case c == '%':
				i++
			case specifier == "" && (c|0x20 >= 'a' && c|0x20 <= 'z'):
				specifier = s[i : i+2]
			}
		}
		b.WriteByte(s[i])
	}
	return b.String(), specifier
}

// quote writes one word so that systemd, and words and resolve, find it again.
func quote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, `%`, `%%`).Replace(s) + `"`
}
