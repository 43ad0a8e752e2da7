package config

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// tree makes files under a new root. A body that begins with "-> " is a symbolic link.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, body := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		err := error(nil)
		if to, ok := strings.CutPrefix(body, "-> "); ok {
			err = os.Symlink(to, path)
		} else {
			err = os.WriteFile(path, []byte(body), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func read(t *testing.T, files map[string]string) (*Loaded, string) {
	t.Helper()
	root := tree(t, files)
	l, err := Read(Source{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	return l, root
}

// origin is where a key was set, without the root.
func (l *Loaded) origin(root, key string) string {
	return strings.TrimPrefix(l.Origins[key].String(), root+"/")
}

func TestDropInsAreMergedInTheOrderOfUAPI(t *testing.T) {
	l, root := read(t, map[string]string{
		"usr/lib/flipside/flipside.toml":                    "[update]\nserver = \"https://vendor.example/\"\nchannel = \"vendor\"\n",
		"etc/flipside/flipside.toml":                        minimal + "keys = [\"/a\", \"/b\"]\n",
		"usr/lib/flipside/flipside.toml.d/10-x.toml":        "[update]\nchannel = \"ten-usr\"\nboard = \"from-usr\"\n",
		"usr/local/lib/flipside/flipside.toml.d/20-x.toml":  "[update]\nchannel = \"twenty-local\"\npin = \"1\"\n",
		"run/flipside/flipside.toml.d/20-x.toml":            "[update]\nchannel = \"twenty-run\"\n",
		"etc/flipside/flipside.toml.d/30-keys.toml":         "[update]\nkeys = [\"/c\"]\n",
		"usr/lib/flipside/flipside.toml.d/40-masked.toml":   "[reboot]\nstrategy = \"off\"\n",
		"etc/flipside/flipside.toml.d/40-masked.toml":       "-> /dev/null",
		"etc/flipside/flipside.toml.d/50-other.txt":         "not read",
		"usr/lib/flipside/flipside.toml.d/.60-hidden.toml":  "not read",
		"etc/flipside/flipside.toml.d/70-directory.toml/no": "not read",
	})
	for key, want := range map[string][2]string{
		"update.server":   {l.Update.Server, "https://updates.example/v1/update/"},
		"update.channel":  {l.Update.Channel, "twenty-run"},
		"update.board":    {l.Update.Board, "from-usr"},
		"update.pin":      {l.Update.Pin, ""}, // the file that set it is replaced by the one of the same name in /run
		"update.keys":     {strings.Join(l.Update.Keys, " "), "/c"},
		"reboot.strategy": {l.Reboot.Strategy, "reboot"},
	} {
		if want[0] != want[1] {
			t.Errorf("%s = %q, want %q", key, want[0], want[1])
		}
	}
	for key, want := range map[string]string{
		"update.server":   "etc/flipside/flipside.toml:2",
		"update.channel":  "run/flipside/flipside.toml.d/20-x.toml:2",
		"update.board":    "usr/lib/flipside/flipside.toml.d/10-x.toml:3",
		"update.keys":     "etc/flipside/flipside.toml.d/30-keys.toml:2",
		"reboot.strategy": "",
	} {
		if got := l.origin(root, key); got != want {
			t.Errorf("%s comes from %q, want %q", key, got, want)
		}
	}
	var files []string
	for _, f := range l.Files {
		files = append(files, strings.TrimPrefix(f.Path, root+"/"))
		if strings.Contains(f.Path, "40-masked") != f.Masked {
			t.Errorf("%s: masked = %v", f.Path, f.Masked)
		}
	}
	want := []string{
		"etc/flipside/flipside.toml", "usr/lib/flipside/flipside.toml.d/10-x.toml", "run/flipside/flipside.toml.d/20-x.toml",
		"etc/flipside/flipside.toml.d/30-keys.toml", "etc/flipside/flipside.toml.d/40-masked.toml",
	}
	if !slices.Equal(files, want) {
		t.Errorf("files:\n%s\nwant:\n%s", strings.Join(files, "\n"), strings.Join(want, "\n"))
	}
}

func TestErrorsNameTheirFileAndLine(t *testing.T) {
	for _, tt := range []struct {
		name, file, body, want string
	}{
		{"unknown key", "etc/flipside/flipside.toml.d/10-x.toml", "[update]\nchanel = \"x\"\n", `10-x.toml:2: unknown key "update.chanel"; did you mean "update.channel"?`},
		{"bad value", "usr/lib/flipside/flipside.toml.d/10-x.toml", "\n[reboot]\nstrategy = \"never\"\n", `10-x.toml:3: reboot.strategy "never"`},
		{"a semaphore that may take too long", "etc/flipside/flipside.toml.d/10-x.toml", "[lock]\n\ntimeout = \"61s\"\n", `10-x.toml:3: lock.timeout is 1m1s`},
		{"bad window", "etc/flipside/flipside.toml.d/10-x.toml", "[reboot]\nwindow_start = \"2:30pm\"\nwindow_length = \"1h\"\n", `10-x.toml:2: reboot.window_start`},
		{"bad old window", "etc/flatcar/update.conf", "REBOOT_WINDOW_START=2:30pm\nREBOOT_WINDOW_LENGTH=1h\n", `update.conf:1 (REBOOT_WINDOW_START): reboot.window_start`},
		{"bad old strategy", "etc/flatcar/update.conf", "GROUP=beta\nREBOOT_STRATEGY=nevr\n", `update.conf:2 (REBOOT_STRATEGY=nevr): reboot.strategy "nevr"`},
		{"old nonsense", "etc/flatcar/update.conf", "GROUP=beta\nnonsense\n", `update.conf:2: "nonsense" is not KEY=value`},
		{"type", "etc/flipside/flipside.toml.d/10-x.toml", "[slots]\ntries = \"one\"\n", `10-x.toml`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Read(Source{Root: tree(t, map[string]string{"etc/flipside/flipside.toml": minimal, tt.file: tt.body})})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
}

func TestUpdateConfOfOlderHosts(t *testing.T) {
	l, root := read(t, map[string]string{
		"usr/share/flatcar/release":     "FLATCAR_RELEASE_VERSION=4152.2.0\nFLATCAR_RELEASE_BOARD=\"arm64-usr\"\nFLATCAR_RELEASE_APPID={e96281a6-d1af-4bde-9a0a-97b76e56dc57}\n",
		"usr/share/flatcar/update.conf": "GROUP=stable\nSERVER=https://vendor.example/v1/update/\n",
		"etc/flatcar/update.conf": `# what the owner wrote
GROUP='beta'
REBOOT_STRATEGY="etcd-lock"
REBOOT_WINDOW_START=04:00
LOCKSMITHD_REBOOT_WINDOW_START="Thu 05:00"
LOCKSMITHD_REBOOT_WINDOW_LENGTH=1h30m
LOCKSMITHD_ENDPOINT=https://a:2379,https://b:2379
LOCKSMITHD_GROUP=workers
LOCKSMITHD_ETCD_CAFILE=/ca.pem
LOCKSMITHD_ETCD_PASSWORD=secret
MACHINE_ALIAS=node-7
PCR_POLICY_SERVER=https://pcr.example
COLOUR=red
`,
		"usr/share/update_engine/update-payload-key.pub.pem": "key",
	})
	for _, tt := range []struct{ key, value, origin string }{
		{"update.server", `"https://vendor.example/v1/update/"`, "usr/share/flatcar/update.conf:2 (SERVER)"},
		{"update.channel", `"beta"`, "etc/flatcar/update.conf:2 (GROUP)"},
		{"update.board", `"arm64-usr"`, "usr/share/flatcar/release:2 (FLATCAR_RELEASE_BOARD)"},
		{"update.app", `"e96281a6-d1af-4bde-9a0a-97b76e56dc57"`, "usr/share/flatcar/release:3 (FLATCAR_RELEASE_APPID)"},
		{"reboot.strategy", `"reboot"`, "etc/flatcar/update.conf:3 (REBOOT_STRATEGY=etcd-lock)"},
		{"reboot.window_start", `"Thu 05:00"`, "etc/flatcar/update.conf:5 (LOCKSMITHD_REBOOT_WINDOW_START)"},
		{"lock.endpoints", `["https://a:2379", "https://b:2379"]`, "etc/flatcar/update.conf:7 (LOCKSMITHD_ENDPOINT)"},
		{"lock.group", `"workers"`, "etc/flatcar/update.conf:8 (LOCKSMITHD_GROUP)"},
		{"lock.ca", `"/ca.pem"`, "etc/flatcar/update.conf:9 (LOCKSMITHD_ETCD_CAFILE)"},
		{"trust.pcr_policy", `"https://pcr.example"`, "etc/flatcar/update.conf:12 (PCR_POLICY_SERVER)"},
		{"host.alias", `"node-7"`, "etc/flatcar/update.conf:11 (MACHINE_ALIAS)"},
	} {
		for _, s := range l.Settings() {
			if s.Key == tt.key && s.Value != tt.value {
				t.Errorf("%s = %s, want %s", s.Key, s.Value, tt.value)
			}
		}
		if got := l.origin(root, tt.key); got != tt.origin {
			t.Errorf("%s comes from %q, want %q", tt.key, got, tt.origin)
		}
	}
	if !slices.Contains(l.Update.Keys, root+"/usr/share/update_engine/update-payload-key.pub.pem") {
		t.Errorf("the older engine's key is not used: %q", l.Update.Keys)
	}
	var unused []string
	for _, u := range l.Unused {
		unused = append(unused, u.Key)
		if u.Why == "" || strings.Contains(u.Why, "secret") {
			t.Errorf("%s is not used because %q", u.Key, u.Why)
		}
	}
	if want := []string{"COLOUR", "FLATCAR_RELEASE_VERSION", "LOCKSMITHD_ETCD_PASSWORD"}; !slices.Equal(unused, want) {
		t.Errorf("not used: %q, want %q", unused, want)
	}
}

func TestStrategiesOfOlderHosts(t *testing.T) {
	for _, tt := range []struct {
		conf, strategy string
		endpoints      []string
	}{
		{"GROUP=stable\n", "reboot", nil},
		{"REBOOT_STRATEGY=reboot\nLOCKSMITHD_ENDPOINT=http://a:2379\n", "reboot", nil},
		{"REBOOT_STRATEGY=off\n", "off", nil},
		{"REBOOT_STRATEGY=etcd-lock\n", "reboot", []string{"http://127.0.0.1:2379"}},
		{"REBOOT_STRATEGY=best-effort\n", "reboot", nil},
		{"REBOOT_STRATEGY=best-effort\nLOCKSMITHD_ENDPOINT=http://a:2379\n", "reboot", []string{"http://a:2379"}},
	} {
		l, _ := read(t, map[string]string{"etc/flatcar/update.conf": tt.conf})
		if l.Reboot.Strategy != tt.strategy || !slices.Equal(l.Lock.Endpoints, tt.endpoints) {
			t.Errorf("%q: strategy %q and endpoints %q, want %q and %q", tt.conf, l.Reboot.Strategy, l.Lock.Endpoints, tt.strategy, tt.endpoints)
		}
		if l.Update.Server != flatcarServer {
			t.Errorf("%q: server %q, want the one that the older engine would ask", tt.conf, l.Update.Server)
		}
	}
	l, _ := read(t, map[string]string{"etc/flatcar/update.conf": "SERVER=disabled\n"})
	if l.Update.Server != Disabled {
		t.Errorf("server %q, want %q", l.Update.Server, Disabled)
	}
}

func TestChoicesOfTheOperator(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(t.TempDir(), "flipside.toml")
	body := minimal + "channel = \"stable\"\n[paths]\nstate = \"" + dir + "\"\n"
	if err := os.WriteFile(path, []byte(body), 0o644); err != nil {
		t.Fatal(err)
	}
	load := func() *Loaded {
		t.Helper()
		l, err := Read(Source{File: path})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	beta, pin := "beta", "1.2"
	if err := (Choices{Channel: &beta, Pin: &pin}).Save(dir); err != nil {
		t.Fatal(err)
	}
	l := load()
	if l.Update.Channel != beta || l.Update.Pin != pin || l.Origins["update.pin"].File != filepath.Join(dir, "operator.toml") {
		t.Errorf("channel %q, pin %q from %v", l.Update.Channel, l.Update.Pin, l.Origins["update.pin"])
	}
	got, err := ReadChoices(dir)
	if err != nil || *got.Channel != beta || *got.Pin != pin {
		t.Errorf("read back %+v: %v", got, err)
	}
	if err := (Choices{}).Save(dir); err != nil {
		t.Fatal(err)
	}
	if l := load(); l.Update.Channel != "stable" || l.Update.Pin != "" {
		t.Errorf("after forgetting: channel %q, pin %q", l.Update.Channel, l.Update.Pin)
	}
	if _, err := os.Stat(filepath.Join(dir, "operator.toml")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing is chosen, and the file is there: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "operator.toml"), []byte("[reboot]\nstrategy = \"off\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(Source{File: path}); err == nil || !strings.Contains(err.Error(), "reboot.strategy cannot be set here") {
		t.Errorf("a policy in the operator's file: %v", err)
	}
}

// What Settings prints can be read again, and means the same.
func TestSettingsAreTOML(t *testing.T) {
	var b strings.Builder
	c := Default()
	c.Update.Server, c.Update.RateLimit = "https://user:secret@updates.example/", 3<<20
	section := ""
	for _, s := range c.Settings() {
		table, key, _ := strings.Cut(s.Key, ".")
		if table != section {
			section = table
			b.WriteString("[" + table + "]\n")
		}
		b.WriteString(key + " = " + s.Value + "\n")
	}
	if strings.Contains(b.String(), "secret") {
		t.Errorf("a password is shown:\n%s", b.String())
	}
	again, err := Parse("settings", []byte(b.String()))
	if err != nil {
		t.Fatalf("%v in\n%s", err, b.String())
	}
	c.Update.Server = again.Update.Server
	for i, s := range again.Settings() {
		if want := c.Settings()[i].Value; s.Value != want {
			t.Errorf("%s = %s, want %s", s.Key, s.Value, want)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add("GROUP=beta\nREBOOT_STRATEGY=etcd-lock\nLOCKSMITHD_ENDPOINT=a,b\n", minimal)
	f.Add("SERVER=disabled", "[lock]\nendpoints = []\n")
	f.Add("export X='", "update.channel = \"x\"\n[update.keys]\n")
	f.Fuzz(func(t *testing.T, conf, main string) {
		l, err := Read(Source{Root: tree(t, map[string]string{"etc/flatcar/update.conf": conf, "etc/flipside/flipside.toml.d/a.toml": main})})
		if err != nil {
			return
		}
		if l.Update.Server == "" || l.Reboot.GateRetry <= 0 {
			t.Errorf("a configuration that cannot work was accepted: %+v", l.Config)
		}
	})
}

// A list replaces a list whole, whatever it is a list of: a table of a drop-in has nothing of the table that stood in its place.
func TestAListOfTablesReplacesAList(t *testing.T) {
	l, root := read(t, map[string]string{
		"etc/flipside/flipside.toml": minimal + "[[reboot.windows]]\ndays = [\"Sat\"]\nstart = \"03:00\"\nlength = \"3h\"\nzone = \"Europe/Berlin\"\n" +
			"[[reboot.windows]]\nstart = \"12:00\"\nlength = \"1h\"\n[[reboot.blackouts]]\nfrom = \"2026-12-24\"\nto = \"2027-01-02\"\nreason = \"holidays\"\n",
		"etc/flipside/flipside.toml.d/10-x.toml": "[[reboot.windows]]\nstart = \"04:00\"\nlength = \"1h\"\n[reboot]\nblackouts = [{from = \"2026-11-01\"}]\n",
	})
	if want := []Window{{Start: "04:00", Length: "1h"}}; !reflect.DeepEqual(l.Reboot.Windows, want) {
		t.Errorf("windows %+v, want %+v", l.Reboot.Windows, want)
	}
	if want := []Blackout{{From: "2026-11-01"}}; !reflect.DeepEqual(l.Reboot.Blackouts, want) {
		t.Errorf("blackouts %+v, want %+v", l.Reboot.Blackouts, want)
	}
	if got := l.origin(root, "reboot.windows"); got != "etc/flipside/flipside.toml.d/10-x.toml:1" {
		t.Errorf("the windows come from %q", got)
	}
}

// A key of many parts takes the decoder memory with their square. The operator's file is in a directory where more than root may write.
func TestAFileThatWouldFillTheMemoryIsNotDecoded(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "flipside.toml")
	deep := strings.Repeat("a.", 100) + "a = 1\n"
	for _, tt := range []struct{ name, main, choices, want string }{
		{"a deep key", minimal + deep, "", "more than 64 parts"},
		{"a deep key in the operator's file", minimal, deep, "more than 64 parts"},
		{"a long operator's file", minimal, "[update]\npin = '1.2.3'\n" + strings.Repeat("#\n", 2<<10), "not a file of at most 4096 bytes"},
	} {
		if err := os.WriteFile(path, []byte(tt.main+"[paths]\nstate = '"+dir+"'\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "operator.toml"), []byte(tt.choices), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(Source{File: path}); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want one with %q", tt.name, err, tt.want)
		}
		if _, err := ReadChoices(dir); tt.choices != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: reading the choices: error %v, want one with %q", tt.name, err, tt.want)
		}
	}
}

func TestUpdateConfAsEditorsLeaveIt(t *testing.T) {
	l, _ := read(t, map[string]string{"etc/flatcar/update.conf": "\ufeffSERVER=https://a.example/\nREBOOT_STRATEGY=etcd-lock\nLOCKSMITHD_ENDPOINT=http://a:1,, http://b:1,\n"})
	if l.Update.Server != "https://a.example/" || len(l.Unused) > 0 {
		t.Errorf("server %q, not used: %v", l.Update.Server, l.Unused)
	}
	if want := []string{"http://a:1", "http://b:1"}; !slices.Equal(l.Lock.Endpoints, want) {
		t.Errorf("endpoints %q, want %q", l.Lock.Endpoints, want)
	}
}

// What is edited is judged together with all other files.
func TestCheckDraft(t *testing.T) {
	const etcd = "[lock]\nendpoints = [\"https://etcd.example:2379\"]\n"
	root := tree(t, map[string]string{"etc/flipside/flipside.toml": minimal, "etc/flipside/flipside.toml.d/lock.toml": etcd + "cert = \"/c.pem\"\n", "usr/lib/flipside/flipside.toml": minimal})
	path := filepath.Join("/", root, "etc", mainName)
	check := func(path, text string) error {
		_, err := Read(Source{Root: root, draft: &draft{path, []byte(text)}})
		return err
	}
	for text, want := range map[string]string{
		minimal + "[lock]\nkey = \"/k.pem\"\n":                      "",
		minimal + "[lock]\nfleetlock = \"https://lock.example/\"\n": "lock.fleetlock",
		minimal:                       "lock.cert",
		"[lock]\nkey = \"/k.pem\"\n":  "update.server",
		minimal + "[lock]\nkee = 1\n": path + ":",
	} {
		err := check(path, text)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	// A file that there is not yet counts too.
	root = tree(t, map[string]string{"usr/lib/flipside/flipside.toml": "oops"})
	if err := check(filepath.Join("/", root, "etc", mainName), minimal); err != nil {
		t.Error(err)
	}
}
