package migrate

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

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
	value string
	at    config.Origin
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
						env[key] = setting{value, at}
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

// words splits a value as systemd does: at spaces, but not within quotes; a backslash takes the next letter as it is (man 7 systemd.syntax).
func words(s string) (list []string) {
	var b strings.Builder
	var quoted rune
	in, escaped := false, false
	for _, r := range s {
		switch {
		case escaped:
			b.WriteRune(r)
			escaped = false
		case r == '\\' && quoted != '\'':
			in, escaped = true, true
		case quoted != 0 && r == quoted:
			quoted = 0
		case quoted == 0 && (r == '"' || r == '\''):
			in, quoted = true, r
		case quoted == 0 && (r == ' ' || r == '\t'):
			if in {
				list = append(list, b.String())
				b.Reset()
			}
			in = false
		default:
			in = true
			b.WriteRune(r)
		}
	}
	if in {
		list = append(list, b.String())
	}
	return list
}

// quote writes one word so that words finds it again.
func quote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}
