package account

import (
	"errors"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/flipside-linux/flipside/updater/config"
)

// somebody is a user that every host has, and that owns nothing here.
func somebody(t *testing.T, c config.Config) *Account {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can give files away")
	}
	u, err := user.Lookup("daemon")
	if err != nil {
		t.Skip(err)
	}
	a, err := Find(u.Username, c, []string{"state.json", "history.log", "history.old.log", "paused", "note", "pipe", "not-there", "boots"})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func owner(t *testing.T, path string) (uid, gid int, mode fs.FileMode) {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	return int(st.Uid), int(st.Gid), info.Mode()
}

// The agent is given its own files and nothing else, whatever lies in the directory.
func TestOwn(t *testing.T) {
	dir := t.TempDir()
	c := config.Default()
	c.Paths.State, c.Paths.Run = filepath.Join(dir, "state"), filepath.Join(dir, "run")
	a := somebody(t, c)
	boot := filepath.Join(c.Paths.State, "boots", "20260101T000000Z-1.0")
	if err := os.MkdirAll(boot, 0o700); err != nil {
		t.Fatal(err)
	}
	in := func(name string) string { return filepath.Join(c.Paths.State, name) }
	secret := filepath.Join(dir, "secret")
	its := []string{in("state.json"), in(".state.json.new"), in("history.log"), in("note"), filepath.Join(boot, "reason"), filepath.Join(boot, "journal")}
	roots := []string{in("trust.json"), in(".trust.json.new"), in("pcrs-USR-A.zip"), in("key.pem"), secret, filepath.Join(dir, "linked")}
	for _, path := range append(its, roots...) {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// What an agent may make to be given more.
	if err := errors.Join(
		os.Link(filepath.Join(dir, "linked"), in("paused")),
		os.Symlink(secret, in("history.old.log")),
		os.Symlink(dir, filepath.Join(boot, "output")),
		syscall.Mkfifo(in("pipe"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	attr, err := a.Prepare(c)
	if err != nil {
		t.Fatal(err)
	}
	if attr.Credential.Uid != uint32(a.uid) || attr.Credential.Gid != uint32(a.gid) || attr.Credential.Uid == 0 {
		t.Errorf("it would be started as %+v", attr.Credential)
	}
	for _, path := range append(its, boot, in("boots"), c.Paths.Run) {
		if uid, gid, _ := owner(t, path); uid != a.uid || gid != a.gid {
			t.Errorf("%s is user %d's, group %d's", path, uid, gid)
		}
	}
	for _, path := range append(roots, in("paused"), in("history.old.log"), dir) {
		if uid, _, _ := owner(t, path); uid != 0 {
			t.Errorf("%s is user %d's", path, uid)
		}
	}
	if uid, gid, mode := owner(t, c.Paths.State); uid != 0 || gid != a.gid || mode.Perm() != 0o770 || mode&fs.ModeSticky == 0 {
		t.Errorf("the state directory is user %d's, group %d's, %s", uid, gid, mode)
	}
	if _, err := a.Prepare(c); err != nil {
		t.Errorf("and again: %v", err)
	}
}

// A directory that others use, too, is not given away, and a user that is root is none.
func TestAccountsThatCannotBe(t *testing.T) {
	for _, tt := range []struct{ name, state, run, want string }{
		{"daemon", "/var/lib", "/run/flipside", "paths.state is /var/lib, which others use"},
		{"daemon", "/var/lib/flipside", "/run/", "paths.run is /run, which others use"},
		{"root", "/var/lib/flipside", "/run/flipside", "cannot be used"},
		{"no-such-user", "/var/lib/flipside", "/run/flipside", "there is no user no-such-user"},
	} {
		c := config.Default()
		c.Paths.State, c.Paths.Run = tt.state, tt.run
		if _, err := Find(tt.name, c, nil); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s, %s, %s: %v", tt.name, tt.state, tt.run, err)
		}
	}
}

// A device is used by the group that has it, and given to the agent's where no group has.
func TestGrant(t *testing.T) {
	a := somebody(t, config.Default())
	device := filepath.Join(t.TempDir(), "device")
	if err := syscall.Mknod(device, syscall.S_IFCHR|0o600, 1<<8|3); err != nil { // that of /dev/null
		t.Skip(err)
	}
	if gid, err := a.grant(device); err != nil || gid != a.gid {
		t.Errorf("group %d, %v", gid, err)
	}
	if uid, gid, mode := owner(t, device); uid != 0 || gid != a.gid || mode.Perm() != 0o660 {
		t.Errorf("it is user %d's, group %d's, %s", uid, gid, mode)
	}
	if err := os.Chown(device, 0, a.gid+1); err != nil {
		t.Fatal(err)
	}
	if gid, err := a.grant(device); err != nil || gid != a.gid+1 {
		t.Errorf("that of another group: %s, %v", strconv.Itoa(gid), err)
	}
	if gid, err := a.grant(device + "-not"); err != nil || gid != 0 {
		t.Errorf("none: %d, %v", gid, err)
	}
}
