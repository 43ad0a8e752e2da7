package config

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	securejoin "github.com/cyphar/filepath-securejoin"
)

// updateConfFiles are read by the older update engine and its reboot manager; of a key that several files set, the first file counts.
var updateConfFiles = [...]string{"etc/flatcar/update.conf", "usr/share/flatcar/update.conf", "usr/share/flatcar/release"}

// What the older programs do when update.conf says nothing.
const (
	flatcarServer = "https://public.update.flatcar-linux.net/v1/update/"
	flatcarKey    = "usr/share/update_engine/update-payload-key.pub.pem"
	lockEndpoint  = "http://127.0.0.1:2379"
)

// An older setting, and what becomes of it.
type older struct {
	Key string
	To  string // the key here; empty: it means nothing here
	How string // what is changed on the way, or why it means nothing
}

// olderSettings is every setting that the older programs know. The reference in docs/config.md holds the same table.
var olderSettings = []older{
	{"SERVER", "update.server", `without it the public server of Flatcar; "disabled" asks nobody`},
	{"GROUP", "update.channel", ""},
	{"MACHINE_ALIAS", "host.alias", ""},
	{"FLATCAR_RELEASE_BOARD", "update.board", ""},
	{"FLATCAR_RELEASE_APPID", "update.app", "without the braces"},
	{"REBOOT_STRATEGY", "reboot.strategy", `"etcd-lock" is "reboot" with the semaphore at lock.endpoints; "best-effort" is that where LOCKSMITHD_ENDPOINT is set`},
	{"REBOOT_WINDOW_START", "reboot.window_start", "text after the minutes, which the older parser let through, is an error"},
	{"REBOOT_WINDOW_LENGTH", "reboot.window_length", ""},
	{"LOCKSMITHD_REBOOT_WINDOW_START", "reboot.window_start", "wins over REBOOT_WINDOW_START"},
	{"LOCKSMITHD_REBOOT_WINDOW_LENGTH", "reboot.window_length", "wins over REBOOT_WINDOW_LENGTH"},
	{"LOCKSMITHD_ENDPOINT", "lock.endpoints", "separated by commas; etcd must speak its v3 API. Not used with REBOOT_STRATEGY=reboot or off"},
	{"LOCKSMITHD_GROUP", "lock.group", ""},
	{"LOCKSMITHD_ETCD_CAFILE", "lock.ca", ""},
	{"LOCKSMITHD_ETCD_CERTFILE", "lock.cert", ""},
	{"LOCKSMITHD_ETCD_KEYFILE", "lock.key", ""},
	{"LOCKSMITHD_ETCD_USERNAME", "lock.user", ""},
	{"LOCKSMITHD_ETCD_PASSWORD", "", "put it into a file that only root can read and name that in lock.password_file"},
	{"PCR_POLICY_SERVER", "trust.pcr_policy", ""},
	{"DOWNLOAD_USER", "", "payloads are fetched without a password; they are signed"},
	{"DOWNLOAD_PASSWORD", "", "payloads are fetched without a password; they are signed"},
	{"FLATCAR_RELEASE_VERSION", "", "the running version is VERSION_ID in host.os_release"},
}

// Older is what the older programs were told on a host.
type Older struct {
	vars  map[string]olderValue
	files []File // in the order of who wins, the most important first
}

// ReadOlder reads files of KEY=value lines below root; of a key that several files set, the first file counts. A file that is not there is left out.
func ReadOlder(root string, names ...string) (*Older, error) {
	o := &Older{vars: map[string]olderValue{}}
	for _, name := range names {
		found, err := parseUpdateConf(root, name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for key, v := range found {
			o.Add(key, v.value, v.at)
		}
		o.files = append(o.files, File{Path: filepath.Join("/", root, name)})
	}
	return o, nil
}

// Add gives a key a value that it does not have yet.
func (o *Older) Add(key, value string, at Origin) {
	if _, ok := o.vars[key]; !ok {
		o.vars[key] = olderValue{value, at}
	}
}

// Forget takes a key away.
func (o *Older) Forget(key string) { delete(o.vars, key) }

// Over adds what other has and o has not.
func (o *Older) Over(other *Older) *Older {
	for key, v := range other.vars {
		o.Add(key, v.value, v.at)
	}
	o.files = append(o.files, other.files...)
	return o
}

// Value returns what a key was set to.
func (o *Older) Value(key string) (value string, at Origin, ok bool) {
	v, ok := o.vars[key]
	return v.value, v.at, ok
}

// Files returns the files that were read, the most important first.
func (o *Older) Files() []File { return o.files }

// Loaded is the configuration that does here what the older programs did there. It is not checked.
func (o *Older) Loaded(root string) *Loaded {
	l := fresh()
	l.Files = slices.Clone(o.files)
	slices.Reverse(l.Files) // in the order of who wins
	l.takeOver(o.vars)
	key := filepath.Join("/", root, flatcarKey)
	if _, err := os.Stat(key); err == nil {
		l.Update.Keys = append(slices.Clone(l.Update.Keys), key)
		l.Origins["update.keys"] = Origin{File: key, From: "the older update engine's key is there"}
	}
	return l
}

// readUpdateConf takes over what the files of the older programs say. Without any of them it does nothing.
func (l *Loaded) readUpdateConf(root string) error {
	o, err := ReadOlder(root, updateConfFiles[:]...)
	if err != nil {
		return err
	}
	release := filepath.Join("/", root, updateConfFiles[2])
	if !slices.ContainsFunc(o.files, func(f File) bool { return f.Path != release }) {
		l.Files = append(l.Files, o.files...) // the release file alone says nothing of updates
		return nil
	}
	*l = *o.Loaded(root)
	return nil
}

type olderValue struct {
	value string
	at    Origin
}

func (l *Loaded) takeOver(vars map[string]olderValue) {
	set := func(to *string, key, from string) bool {
		v, ok := vars[from]
		if ok && v.value != "" {
			*to = v.value
			l.Origins[key] = Origin{v.at.File, v.at.Line, from}
		}
		return ok && v.value != ""
	}
	if !set(&l.Update.Server, "update.server", "SERVER") {
		l.Update.Server = flatcarServer
		at := Origin{From: "no SERVER, so the older engine's default"}
		if n := len(l.Files); n > 0 {
			at.File = l.Files[n-1].Path
		}
		l.Origins["update.server"] = at
	}
	set(&l.Update.Channel, "update.channel", "GROUP")
	set(&l.Update.Board, "update.board", "FLATCAR_RELEASE_BOARD")
	if set(&l.Update.App, "update.app", "FLATCAR_RELEASE_APPID") {
		l.Update.App = strings.Trim(l.Update.App, "{}")
	}
	set(&l.Host.Alias, "host.alias", "MACHINE_ALIAS")
	for _, prefix := range []string{"", "LOCKSMITHD_"} {
		set(&l.Reboot.WindowStart, "reboot.window_start", prefix+"REBOOT_WINDOW_START")
		set(&l.Reboot.WindowLength, "reboot.window_length", prefix+"REBOOT_WINDOW_LENGTH")
	}
	var endpoints string
	set(&endpoints, "lock.endpoints", "LOCKSMITHD_ENDPOINT")
	list := strings.FieldsFunc(endpoints, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' })
	named := len(list) > 0
	strategy := vars["REBOOT_STRATEGY"]
	locks := strategy.value == "etcd-lock" || (strategy.value == "best-effort" && named)
	if _, ok := vars["REBOOT_STRATEGY"]; ok {
		l.Origins["reboot.strategy"] = Origin{strategy.at.File, strategy.at.Line, "REBOOT_STRATEGY=" + strategy.value}
	}
	switch strategy.value {
	case "etcd-lock", "best-effort":
	case "":
	default:
		l.Reboot.Strategy = strategy.value // and what is not known is refused like everywhere
	}
	switch {
	case locks && named:
		l.Lock.Endpoints = list
	case locks:
		l.Lock.Endpoints = []string{lockEndpoint}
		l.Origins["lock.endpoints"] = l.Origins["reboot.strategy"]
	case endpoints != "":
		delete(l.Origins, "lock.endpoints")
		l.Unused = append(l.Unused, Unused{"LOCKSMITHD_ENDPOINT", vars["LOCKSMITHD_ENDPOINT"].at, "REBOOT_STRATEGY does not ask for the lock"})
	}
	set(&l.Trust.PCRPolicy, "trust.pcr_policy", "PCR_POLICY_SERVER")
	set(&l.Lock.Group, "lock.group", "LOCKSMITHD_GROUP")
	set(&l.Lock.CA, "lock.ca", "LOCKSMITHD_ETCD_CAFILE")
	set(&l.Lock.Cert, "lock.cert", "LOCKSMITHD_ETCD_CERTFILE")
	set(&l.Lock.Key, "lock.key", "LOCKSMITHD_ETCD_KEYFILE")
	set(&l.Lock.User, "lock.user", "LOCKSMITHD_ETCD_USERNAME")
	known := map[string]older{}
	for _, o := range olderSettings {
		known[o.Key] = o
	}
	for _, key := range slices.Sorted(maps.Keys(vars)) {
		v := vars[key]
		switch o, ok := known[key]; {
		case !ok:
			l.Unused = append(l.Unused, Unused{key, v.at, "no program that Flipside replaces is known to read it"})
		case o.To == "" && v.value != "":
			l.Unused = append(l.Unused, Unused{key, v.at, o.How})
		}
	}
}

// parseUpdateConf reads KEY=value lines the way the older programs do: one pair of quotes around a value goes away, the last line
// wins. Comments and empty lines are skipped; anything else is an error, because a setting that is not understood may be a policy.
func parseUpdateConf(root, name string) (map[string]olderValue, error) {
	path := filepath.Join("/", root, name)
	// A link in an image must not lead to this machine's files.
	real, err := securejoin.SecureJoin(filepath.Join("/", root), name)
	if err != nil {
		return nil, fmt.Errorf("reading the older configuration: %w", err)
	}
	info, err := os.Stat(real)
	if err != nil {
		return nil, fmt.Errorf("reading the older configuration: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, fmt.Errorf("reading the older configuration: %s is not a file of at most %d bytes", path, maxFile)
	}
	data, err := os.ReadFile(real)
	if err != nil {
		return nil, fmt.Errorf("reading the older configuration: %w", err)
	}
	vars := map[string]olderValue{}
	for i, line := range strings.Split(strings.TrimPrefix(string(data), "\ufeff"), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		key = strings.TrimSpace(strings.TrimPrefix(key, "export "))
		if !ok || key == "" || strings.ContainsAny(key, " \t") {
			return nil, fmt.Errorf("%s:%d: %q is not KEY=value", path, i+1, line)
		}
		value = strings.TrimSpace(value)
		if n := len(value); n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		vars[key] = olderValue{value, Origin{File: path, Line: i + 1}}
	}
	return vars, nil
}
