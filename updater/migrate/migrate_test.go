package migrate

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// tree makes files below a new root. A body that begins with "-> " is a link.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, body := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		to, link := strings.CutPrefix(body, "-> ")
		err := error(nil)
		if link {
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

// What tells the older programs something, and what of it arrives. The order in which they believe it is systemd's: a later EnvironmentFile= wins
// over an earlier one, and each over Environment= (man 5 systemd.exec).
func TestWhatBecomesOfIt(t *testing.T) {
	const engine, locksmith = "usr/lib/systemd/system/update-engine.service", "usr/lib/systemd/system/locksmithd.service"
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  []string // lines of the new files
		never []string
	}{
		{"a host that was told nothing", map[string]string{engine: "", locksmith: ""},
			[]string{`server = "https://public.update.flatcar-linux.net/v1/update/"`}, []string{"strategy", "endpoints", "channel"}},
		{"no locksmith: nobody rebooted it", map[string]string{engine: "", "etc/flatcar/update.conf": "GROUP=beta\n"},
			[]string{`strategy = "off"`, `channel = "beta"`}, nil},
		{"CoreOS", map[string]string{engine: "", locksmith: "", "etc/coreos/update.conf": "SERVER=https://a.example/\nREBOOT_STRATEGY=off\n",
			"usr/share/coreos/release": "COREOS_RELEASE_BOARD=arm64-usr\nCOREOS_RELEASE_APPID={e96281a6-d1af-4bde-9a0a-97b76e56dc57}\n"},
			[]string{`server = "https://a.example/"`, `strategy = "off"`, `board = "arm64-usr"`, `app = "e96281a6-d1af-4bde-9a0a-97b76e56dc57"`}, nil},
		{"one directory under two names", map[string]string{locksmith: "", "etc/flatcar/update.conf": "GROUP=beta\n", "etc/coreos": "-> flatcar"},
			[]string{`channel = "beta"`}, []string{"/etc/coreos"}},
		{"plain HTTP goes on", map[string]string{locksmith: "", "etc/flatcar/update.conf": "SERVER=http://10.0.0.1:8000/v1/update/\n"},
			[]string{"allow_http = true"}, nil},
		{"disabled needs no HTTP", map[string]string{locksmith: "", "etc/flatcar/update.conf": "SERVER=disabled\n"},
			[]string{`server = "disabled"`}, []string{"allow_http"}},
		{"update.conf wins over Environment=", map[string]string{locksmith: "", "etc/flatcar/update.conf": "REBOOT_STRATEGY=etcd-lock\nLOCKSMITHD_GROUP=file\n",
			locksmithDrop("a"): "[Service]\nEnvironment=LOCKSMITHD_GROUP=unit LOCKSMITHD_ENDPOINT=http://e:2379\n"},
			[]string{`group = "file"`, `endpoints = ["http://e:2379"]`}, nil},
		{"a drop-in's EnvironmentFile= wins over update.conf", map[string]string{locksmith: "", "etc/flatcar/update.conf": "LOCKSMITHD_GROUP=file\n",
			"etc/locksmith.env": "LOCKSMITHD_GROUP=env\n", locksmithDrop("a"): "[Service]\nEnvironmentFile=-/etc/locksmith.env\n"},
			[]string{`group = "env"`}, nil},
		{"Environment= alone resets, a link to /dev/null masks, /etc wins over /usr", map[string]string{locksmith: "",
			locksmithDrop("a"): "[Service]\nEnvironment=LOCKSMITHD_GROUP=one REBOOT_STRATEGY=off\n",
			locksmithDrop("b"): "[Service]\nEnvironment=\nEnvironment=LOCKSMITHD_GROUP=two\n",
			locksmithDrop("c"): "-> /dev/null",
			"usr/lib/systemd/system/locksmithd.service.d/b.conf": "[Service]\nEnvironment=LOCKSMITHD_GROUP=vendor\n",
			"usr/lib/systemd/system/locksmithd.service.d/c.conf": "[Service]\nEnvironment=LOCKSMITHD_GROUP=three\n"},
			[]string{`group = "two"`}, []string{"strategy", "vendor", "three"}},
		{"proxies go with the service", map[string]string{locksmith: "", engine: "",
			"etc/systemd/system/update-engine.service.d/p.conf": "[Service]\nEnvironment=\"ALL_PROXY=socks5://p:1\"\nEnvironmentFile=-/etc/proxy.env\n", "etc/proxy.env": "HTTPS_PROXY=x\n"},
			[]string{`Environment="ALL_PROXY=socks5://p:1"`, "EnvironmentFile=-/etc/proxy.env"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := Look(tree(t, tt.files))
			if err != nil {
				t.Fatal(err)
			}
			var lines []string
			for _, f := range p.Files {
				lines = append(lines, strings.Split(f.content, "\n")...)
			}
			for _, w := range tt.want {
				if !slices.Contains(lines, w) {
					t.Errorf("no line %q in\n%s", w, strings.Join(lines, "\n"))
				}
			}
			for _, n := range tt.never {
				if strings.Contains(strings.Join(lines, "\n"), n) {
					t.Errorf("%q is in\n%s", n, strings.Join(lines, "\n"))
				}
			}
		})
	}
}

func locksmithDrop(name string) string {
	return "etc/systemd/system/locksmithd.service.d/" + name + ".conf"
}

func TestNothingIsThere(t *testing.T) {
	for _, files := range []map[string]string{nil, {"usr/share/flatcar/release": "FLATCAR_RELEASE_VERSION=1\n"}} {
		if _, err := Look(tree(t, files)); !errors.Is(err, ErrNothing) {
			t.Errorf("%v: %v, want ErrNothing", files, err)
		}
	}
}

// A host's own files are found where they really are, and a unit file of the administrator's own is not masked over.
func TestOwnUnit(t *testing.T) {
	root := tree(t, map[string]string{"etc/systemd/system/locksmithd.service": "[Service]\n", "usr/lib/systemd/system/update-engine.service": ""})
	p, err := Look(root)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range p.Disabling() {
		got = append(got, strings.Join(c, " "))
	}
	if want := []string{"systemctl mask --now update-engine.service", "systemctl disable --now locksmithd.service"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if err := p.DisableOlder(); err == nil || !strings.Contains(err.Error(), "locksmithd.service is a file") {
		t.Errorf("an image's own unit: %v", err)
	}
}

// The way back starts no service that somebody had masked before the move, whichever run it is asked of.
func TestBackLeavesWhatWasMasked(t *testing.T) {
	root := tree(t, map[string]string{
		"usr/lib/systemd/system/locksmithd.service": "", "usr/lib/systemd/system/update-engine.service": "",
		"etc/systemd/system/locksmithd.service": "-> /dev/null", "etc/flatcar/update.conf": "GROUP=beta\n",
		"usr/lib/systemd/system/multi-user.target.wants/update-engine.service": "-> ../update-engine.service",
	})
	want := []string{"systemctl disable --now flipsided.service", "systemctl unmask update-engine.service", "systemctl start update-engine.service"}
	for run := range 3 {
		p, err := Look(root)
		if err != nil {
			t.Fatal(err)
		}
		if run == 1 {
			if _, err := p.Write(); err != nil {
				t.Fatal(err)
			}
			if err := p.DisableOlder(); err != nil {
				t.Fatal(err)
			}
		}
		var got []string
		for _, c := range p.Back() {
			got = append(got, strings.Join(c, " "))
		}
		if !slices.Equal(got, want) {
			t.Errorf("run %d: %q, want %q", run, got, want)
		}
	}
}

// The way back starts no service that was not to run before the move, whichever run it is asked of.
func TestBackLeavesWhatWasOff(t *testing.T) {
	root := tree(t, map[string]string{
		"usr/lib/systemd/system/update-engine.service": "", "etc/systemd/system/locksmithd.service": "[Service]\n", "etc/flatcar/update.conf": "GROUP=beta\n",
	})
	want := []string{"systemctl disable --now flipsided.service", "systemctl unmask update-engine.service"}
	for run := range 3 {
		p, err := Look(root)
		if err != nil {
			t.Fatal(err)
		}
		if run == 1 {
			if _, err := p.Write(); err != nil {
				t.Fatal(err)
			}
		}
		var got []string
		for _, c := range p.Back() {
			got = append(got, strings.Join(c, " "))
		}
		if !slices.Equal(got, want) {
			t.Errorf("run %d: %q, want %q", run, got, want)
		}
		if p.Services[1].Enabled {
			t.Errorf("run %d: %+v", run, p.Services)
		}
	}
}

// A run that ended between two files goes on where it was.
func TestWriteGoesOn(t *testing.T) {
	root := tree(t, map[string]string{"etc/flatcar/update.conf": "REBOOT_STRATEGY=etcd-lock\nLOCKSMITHD_ETCD_USERNAME=u\nLOCKSMITHD_ETCD_PASSWORD=secret\n"})
	for range 2 {
		p, err := Look(root)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Write(); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(root, passwordFile)); err != nil {
			t.Fatal(err)
		}
	}
	p, err := Look(root)
	if err != nil {
		t.Fatal(err)
	}
	written, err := p.Write()
	if err != nil || !slices.Equal(written, []string{"/" + passwordFile}) {
		t.Errorf("wrote %v, %v", written, err)
	}
	for _, f := range p.Files {
		if strings.Contains(f.Text, "secret") {
			t.Errorf("%s shows the password", f.Path)
		}
	}
}

func TestWords(t *testing.T) {
	for in, want := range map[string][]string{
		`A=1 B=2`:               {"A=1", "B=2"},
		`"A=1 2" 'B=3 4'  C=5`:  {"A=1 2", "B=3 4", "C=5"},
		`A="1 2"`:               {"A=1 2"},
		`A=\"x`:                 {`A="x`},
		`'A=\x'`:                {`A=\x`},
		``:                      nil,
		"A=x\\\nB=y \\\n C=z":   {"A=x", "B=y", "C=z"},
		`A=pa\x24\044\sword`:    {`A=pa$$ word`},
		`'A=\x24' B=\u00e9\q\x`: {`A=$`, `B=é\q\x`},
	} {
		if got := words(in); !slices.Equal(got, want) {
			t.Errorf("words(%s) = %q, want %q", in, got, want)
		}
	}
	const awkward = "K=a \"b\" \\c d 100%% %H\ne"
	got := words(quote(awkward))
	if value, _ := resolve(strings.Join(got, "|")); value != awkward || len(got) != 1 {
		t.Errorf("quote, words and resolve: %q", got)
	}
}

// What systemd makes of lines that go on, of escapes and of specifiers is what arrives, or it is said that it does not.
func TestValuesAsSystemdReadsThem(t *testing.T) {
	p, err := Look(tree(t, map[string]string{
		"usr/lib/systemd/system/locksmithd.service": "", "usr/lib/systemd/system/update-engine.service": "",
		"etc/systemd/system/update-engine.service.d/p.conf": "[Service]\nEnvironment=HTTPS_PROXY=http://u:p%%40@p:1 \\\n  NO_PROXY=localhost\\\n ALL_PROXY=http://%H:1\n",
		"etc/flatcar/update.conf":                           "REBOOT_STRATEGY=etcd-lock\n",
		locksmithDrop("a"):                                  "[Service]\nEnvironment=LOCKSMITHD_ETCD_USERNAME=u LOCKSMITHD_ETCD_PASSWORD=pa%%ss\\x24\n",
	}))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range p.Files {
		switch want := "Environment=\"HTTPS_PROXY=http://u:p%%40@p:1\"\nEnvironment=\"NO_PROXY=localhost\"\n"; {
		case f.Path == "/"+unitFile && !strings.HasSuffix(f.content, want):
			t.Errorf("the drop-in is %q", f.content)
		case f.Path == "/"+passwordFile && f.content != "pa%ss$\n":
			t.Errorf("the password is %q", f.content)
		}
	}
	if len(p.Files) != 3 || len(p.Unused) != 1 || p.Unused[0].Key != "ALL_PROXY" || !strings.Contains(p.Unused[0].Why, "%H") {
		t.Errorf("%d files, unused: %+v", len(p.Files), p.Unused)
	}
}
