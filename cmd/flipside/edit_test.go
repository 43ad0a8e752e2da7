package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What somebody has written is put in place, or is still there: whatever the editor ends with, and whoever presses Ctrl-C in it.
func TestConfigEdit(t *testing.T) {
	const before = "[update]\nserver = \"https://updates.example.org/v1/update/\"\n"
	stopped, stop := context.WithCancel(t.Context())
	stop()
	for _, tt := range []struct {
		name, editor, says string
		ctx                context.Context
		code               int
		kept               bool
		after              string // "": as before
	}{
		{name: "right", editor: `echo 'channel = "beta"' >>`, says: "is in place", after: before + "channel = \"beta\"\n"},
		{name: "interrupted meanwhile", editor: `echo 'channel = "beta"' >>`, ctx: stopped, says: "is in place", after: before + "channel = \"beta\"\n"},
		{name: "wrong", editor: `echo 'chanel = "beta"' >>`, code: exitFailed, says: "unknown key", kept: true},
		{name: "not changed", editor: `true`, code: exitNothing, says: "nothing was changed"},
		{name: "failed, and had not saved", editor: `false`, code: exitFailed, says: "exit status 1"},
		{name: "failed, and had saved", editor: `f() { echo 'channel = "beta"' >>"$1"; exit 1; }; f`, code: exitFailed, says: "exit status 1", kept: true},
		{name: "removed it", editor: `rm`, code: exitFailed, says: "no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			t.Setenv("TMPDIR", dir)
			t.Setenv("VISUAL", tt.editor)
			file := filepath.Join(dir, "flipside.toml")
			if err := os.WriteFile(file, []byte(before), 0o640); err != nil {
				t.Fatal(err)
			}
			if tt.ctx == nil {
				tt.ctx = t.Context()
			}
			var out bytes.Buffer
			a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &out}
			if code := a.run(tt.ctx, []string{"--config", file, "config", "edit"}); code != tt.code || !strings.Contains(out.String(), tt.says) {
				t.Errorf("it ends with %d, want %d, and says %q, want %q", code, tt.code, out.String(), tt.says)
			}
			after := tt.after
			if after == "" {
				after = before
			}
			if data, err := os.ReadFile(file); err != nil || string(data) != after {
				t.Errorf("the file holds %q, %v; want %q", data, err, after)
			}
			drafts, err := filepath.Glob(filepath.Join(dir, "flipside-*"))
			if err != nil || (len(drafts) == 1) != tt.kept {
				t.Fatalf("drafts %q, %v", drafts, err)
			}
			if tt.kept {
				named := regexp.MustCompile(regexp.QuoteMeta(drafts[0]) + `/\S+`).FindString(out.String())
				if data, err := os.ReadFile(named); err != nil || !strings.Contains(string(data), "beta") {
					t.Errorf("%q, %v; in\n%s", data, err, out.String())
				}
			}
		})
	}
}

// What is no file is not replaced by one: a link to /dev/null, which masks the file, leads to one that every program needs.
func TestConfigEditMasked(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("VISUAL", `echo 'channel = "beta"' >`)
	pipe, link := filepath.Join(dir, "pipe"), filepath.Join(dir, "flipside.toml")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(pipe, link); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &out}
	if code := a.run(t.Context(), []string{"--config", link, "config", "edit"}); code != exitFailed || !strings.Contains(out.String(), "pipe is not a file") {
		t.Errorf("it ends with %d, and says %q", code, out.String())
	}
	if info, err := os.Lstat(pipe); err != nil || info.Mode().Type() != os.ModeNamedPipe {
		t.Errorf("the pipe is %v, %v", info, err)
	}
}

// What the daemon would not start without is missed when it is checked; and a root is one from where the command is started.
func TestConfigCheckNamedFiles(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	conf := filepath.Join(dir, "r/etc/flipside/flipside.toml")
	if err := os.MkdirAll(filepath.Dir(conf), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		more, says string
		code       int
	}{
		{"ca = [\"/etc/flipside/ca.pem\"]\n", "r/etc/flipside/flipside.toml:3: update.ca: there is no /etc/flipside/ca.pem: flipsided will not start without it", exitOK},
		{"ca = [\"/etc/flipside/flipside.toml\"]\n", "the configuration is right", exitOK}, // below the root
		{"", "the configuration is right", exitOK},
	} {
		text := "[update]\nserver = \"https://updates.example.org/v1/update/\"\n" + tt.more
		if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &out}
		if code := a.run(t.Context(), []string{"config", "--root", "r", "check"}); code != tt.code || !strings.Contains(out.String(), tt.says) {
			t.Errorf("%q: it ends with %d, and says %q; want %d, %q", tt.more, code, out.String(), tt.code, tt.says)
		}
	}
	text := "[update]\nserver = \"https://updates.example.org/v1/update/\"\nca = [\"" + dir + "/ca.pem\"]\n"
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &out}
	if code := a.run(t.Context(), []string{"config", "check", conf}); code != exitFailed || !strings.Contains(out.String(), "flipside.toml:3: update.ca: there is no "+dir) {
		t.Errorf("on the host itself it ends with %d, and says %q", code, out.String())
	}
}
