// Package migrate moves a host over from update_engine and locksmith: it reads what they were told, and makes of it what tells Flipside the same.
//
// [Look] only reads, and says everything that would be done. [Plan.Write] writes files that are not there yet, and [Plan.DisableOlder] masks the
// two older services. Nothing that belongs to the older programs is changed, so the way back is to mask the other side.
package migrate

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	securejoin "github.com/cyphar/filepath-securejoin"

	"github.com/flipside-linux/flipside/updater/config"
)

// The services that Flipside takes the place of.
const (
	UpdateEngine = "update-engine.service"
	Locksmith    = "locksmithd.service"
)

// ErrNothing means that nothing of the older programs is on this host.
var ErrNothing = errors.New("neither update_engine nor locksmith was ever set up here")

// ErrDiffers means that a file is in the way that this package did not write.
var ErrDiffers = errors.New("is there already, and was not written by this command")

const (
	mainFile     = "etc/flipside/flipside.toml"
	passwordFile = "etc/flipside/etcd-password"
	unitFile     = "etc/systemd/system/flipsided.service.d/10-migrated.conf"
	maskedOrigin = "it is masked"      // begins the comment of a setting that is made because of it
	offRemark    = " was not enabled." // of a service, in a comment at the beginning
	signature    = "# Written by flipside migrate"
)

// confFiles hold the older settings, the most important first: those of Flatcar, and of CoreOS before it.
var confFiles = []string{
	"etc/flatcar/update.conf", "etc/coreos/update.conf", "usr/share/flatcar/update.conf", "usr/share/coreos/update.conf",
	"usr/share/flatcar/release", "usr/share/coreos/release",
}

// State says what is to be done about a file.
type State string

// The states of a file.
const (
	New     State = "new"     // it is not there
	Done    State = "done"    // it was written before, and perhaps edited since; it stays
	Differs State = "differs" // somebody else wrote it; it stays, and nothing is written
)

// File is a file that belongs to the new side.
type File struct {
	Path   string `json:"path"`
	Mode   string `json:"mode"` // octal
	Text   string `json:"text,omitempty"`
	Secret bool   `json:"secret,omitempty"` // its text is not shown
	State  State  `json:"state"`

	content string
	perm    fs.FileMode
}

// Service is one of the older services.
type Service struct {
	Unit    string `json:"unit"`
	Found   bool   `json:"found"`
	Masked  bool   `json:"masked"`
	Enabled bool   `json:"enabled"`       // something at boot wants it
	Own     bool   `json:"own,omitempty"` // the administrator's own unit file is in /etc: it can be disabled, not masked

	wasMasked bool // before the move, by somebody who did not want it to run
	wasOff    bool // before the move: nothing at boot wanted it
}

// Plan is what moving over comes to.
type Plan struct {
	Read     []config.File   `json:"read"` // what the settings are from, a later one wins
	Files    []File          `json:"files"`
	Services []Service       `json:"services"`
	Unused   []config.Unused `json:"unused,omitempty"` // what has no equivalent
	Notes    []string        `json:"notes,omitempty"`  // what a person should know first

	root string
}

// look is a plan in the making.
type look struct {
	Plan
	older *config.Older
	l     *config.Loaded
	moved bool // an earlier run wrote the configuration
}

// Look reads what the older programs left below root and says what becomes of it. It writes nothing.
func Look(root string) (*Plan, error) {
	k := &look{Plan: Plan{root: filepath.Join("/", root)}}
	k.services()
	older, err := config.ReadOlder(root, k.distinct(confFiles)...)
	if err != nil {
		return nil, err
	}
	k.older = older
	k.coreosRelease()
	drop, err := k.units()
	if err != nil {
		return nil, err
	}
	if !k.Services[0].Found && !k.Services[1].Found && !slices.ContainsFunc(older.Files(), func(f config.File) bool { return filepath.Base(f.Path) == "update.conf" }) {
		return nil, ErrNothing
	}
	old, err := k.read(mainFile)
	if err != nil {
		return nil, err
	}
	k.moved = old != ""
	head := signature + " from what update_engine and locksmith were told. It wins over update.conf, and is yours to edit.\n"
	for i := range k.Services {
		s := &k.Services[i]
		// After a move what it found is in the comments of the file that it wrote.
		s.wasMasked = s.Masked && (!k.moved || strings.Contains(old, s.Unit+" ("+maskedOrigin))
		s.wasOff = s.Found && (!k.moved && !s.Enabled || strings.Contains(old, s.Unit+offRemark))
		if s.wasOff {
			head += "# " + s.Unit + offRemark + "\n"
		}
	}
	if err := k.settings(); err != nil {
		return nil, err
	}
	text, err := k.l.Document(head)
	if err != nil {
		return nil, err
	}
	files := []File{{Path: mainFile, content: string(text), perm: 0o644}}
	if password, _, ok := older.Value("LOCKSMITHD_ETCD_PASSWORD"); ok && password != "" && k.l.Lock.User != "" {
		files = append(files, File{Path: passwordFile, content: password + "\n", perm: 0o600, Secret: true})
	}
	if drop != "" {
		secret := strings.Contains(drop, "@") // a proxy's password
		f := File{Path: unitFile, content: signature + ".\n[Service]\n" + drop, perm: 0o644, Secret: secret}
		if secret {
			f.perm = 0o600
		}
		files = append(files, f)
	}
	for _, f := range files {
		if err := k.compare(&f); err != nil {
			return nil, err
		}
		k.Files = append(k.Files, f)
	}
	k.underWay()
	k.Read = slices.Clone(older.Files())
	slices.Reverse(k.Read)
	for i := range k.Read {
		k.Read[i].Path = k.inside(k.Read[i].Path)
	}
	return &k.Plan, nil
}

// settings fills in what the files of the older programs do not say: what they did without being told.
func (k *look) settings() error {
	k.l = k.older.Loaded(k.root)
	for key, o := range k.l.Origins {
		o.File = k.inside(o.File)
		k.l.Origins[key] = o
	}
	for i, key := range k.l.Update.Keys {
		k.l.Update.Keys[i] = k.inside(key)
	}
	for _, u := range k.l.Unused {
		u.Origin.File = k.inside(u.Origin.File)
		if u.Key == "LOCKSMITHD_ETCD_PASSWORD" && k.l.Lock.User != "" {
			k.l.Lock.Password = "/" + passwordFile
			k.l.Origins["lock.password_file"] = config.Origin{File: u.Origin.File, Line: u.Origin.Line, From: u.Key}
			continue
		}
		k.Unused = append(k.Unused, u)
	}
	if strings.HasPrefix(k.l.Update.Server, "http://") {
		k.l.Update.HTTP = true
		k.l.Origins["update.allow_http"] = config.Origin{File: k.l.Origins["update.server"].File, From: "SERVER is plain HTTP"}
	}
	engine, locksmith := k.Services[0], k.Services[1]
	// After a move both are masked because of the move, which says nothing of what somebody wanted before it.
	if engine.Masked && !k.moved {
		k.l.Update.Server = config.Disabled
		k.l.Origins["update.server"] = config.Origin{File: "/etc/systemd/system/" + UpdateEngine, From: maskedOrigin + ": this host was not to update"}
		delete(k.l.Origins, "update.allow_http")
		k.l.Update.HTTP = false
	}
	switch {
	case k.moved:
	case locksmith.Masked:
		k.l.Reboot.Strategy = "off"
		k.l.Origins["reboot.strategy"] = config.Origin{File: "/etc/systemd/system/" + Locksmith, From: maskedOrigin + ": this host was not to reboot by itself"}
	case engine.Found && !locksmith.Found:
		k.l.Reboot.Strategy = "off"
		k.l.Origins["reboot.strategy"] = config.Origin{File: UpdateEngine, From: "without locksmith, which alone would have rebooted this host"}
	}
	if k.l.Reboot.Strategy == "off" && len(k.l.Lock.Endpoints) > 0 {
		k.Notes = append(k.Notes, "This host asked etcd before a reboot and has no locksmith that would have rebooted it; lock.endpoints is kept, for the reboots that you order.")
	}
	return nil
}

// coreosRelease takes the names of CoreOS for those of Flatcar.
func (k *look) coreosRelease() {
	for _, key := range []string{"VERSION", "BOARD", "APPID"} {
		if v, at, ok := k.older.Value("COREOS_RELEASE_" + key); ok {
			k.older.Add("FLATCAR_RELEASE_"+key, v, at)
			k.older.Forget("COREOS_RELEASE_" + key)
		}
	}
}

// underWay looks for what the older programs had begun.
func (k *look) underWay() {
	if k.exists("run/update_engine_autoupdate_completed") || k.exists("var/run/update_engine_autoupdate_completed") {
		k.Notes = append(k.Notes, "An update by update_engine waits for a reboot. Reboot first: flipsided would find an armed slot that it did not write, and write the next release over it.")
	}
	if text, err := k.read("run/update-engine/coordinator.conf"); err == nil {
		for line := range strings.Lines(text) {
			if state, ok := strings.CutPrefix(strings.TrimSpace(line), "STATE="); ok && (state == "reboot-planned" || state == "rebooting") {
				k.Notes = append(k.Notes, "locksmithd is about to reboot this host ("+state+") and may hold a slot of the semaphore; let it, and move over after the boot.")
			}
		}
	}
	if len(k.l.Lock.Endpoints) > 0 {
		k.Notes = append(k.Notes, `The semaphore moves, too, once for the whole cluster: "flipside fleet import --from locksmith" on one host takes it over with its holders. etcd must speak its v3 API.`)
	}
	if k.exists("var/lib/update_engine/prefs/aleph-version") {
		k.Notes = append(k.Notes, "update_engine's own memory in /var/lib/update_engine stays where it is and is not read: a download that it had begun begins anew.")
	}
}

// inside takes the root away from a path.
func (k *look) inside(path string) string {
	if rest, err := filepath.Rel(k.root, path); err == nil && k.root != "/" && !strings.HasPrefix(rest, "..") {
		return "/" + rest
	}
	return path
}

// path is where a file below the root really is: a link in an image leads to no file of this machine.
func (p *Plan) path(name string) (string, error) { return securejoin.SecureJoin(p.root, name) }

func (p *Plan) exists(name string) bool {
	path, err := p.path(name)
	if err != nil {
		return false
	}
	_, err = os.Stat(path)
	return err == nil
}

// read returns the text of a small file, "" if there is none.
func (p *Plan) read(name string) (string, error) {
	path, err := p.path(name)
	if err != nil {
		return "", fmt.Errorf("reading /%s: %w", name, err)
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err == nil && (!info.Mode().IsRegular() || info.Size() > 1<<20) {
		err = errors.New("not a file of at most 1 MiB")
	}
	if err != nil {
		return "", fmt.Errorf("reading /%s: %w", name, err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("reading /%s: %w", name, err)
	}
	return string(data), nil
}

// distinct leaves out files that are another one of the list under a second name: one of the two directories is often a link to the other.
func (k *look) distinct(names []string) (list []string) {
	seen := map[string]bool{}
	for _, name := range names {
		path, err := k.path(name)
		if err == nil && !seen[path] {
			seen[path] = true
			list = append(list, name)
		}
	}
	return list
}

// compare says what is to be done about a file.
func (k *look) compare(f *File) error {
	old, err := k.read(f.Path)
	if err != nil {
		return err
	}
	switch {
	case !k.exists(f.Path):
		f.State = New
	case old == f.content || strings.HasPrefix(old, signature):
		f.State = Done
	default:
		f.State = Differs
	}
	f.Path, f.Mode = "/"+f.Path, fmt.Sprintf("%#o", f.perm)
	if !f.Secret {
		f.Text = f.content
	}
	return nil
}
