// Package account gives the agent a system user of its own: its files, the devices that it uses, and no right of root's but to read.
//
// Root trusts what root says, on the message bus and elsewhere: an agent that is nobody has no more to say there than others on this host. What it may
// still do as that user, and what not, is package confine's.
//
// The user could have planted what is in a directory that it may write to. So nothing there is followed or given away by its name alone ([Account.Own]).
package account

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/trust"
)

// Default is the name of the system user that the agent runs as, where there is one.
const Default = "flipside"

// Account is a system user for the agent.
type Account struct {
	name     string
	uid, gid int
	files    []string
}

// Find looks a user up for the agent of the host that c configures, whose own files in the state directory are called files. An error says why the agent can be no
// such user there.
func Find(name string, c config.Config, files []string) (*Account, error) {
	for key, dir := range map[string]string{"paths.state": c.Paths.State, "paths.run": c.Paths.Run} {
		if dir = filepath.Clean(dir); slices.Contains(shared, dir) || filepath.Dir(dir) == "/" {
			return nil, fmt.Errorf("%s is %s, which others use too, and cannot be given to the user %s", key, dir, name)
		}
	}
	u, err := user.Lookup(name)
	var unknown user.UnknownUserError
	if errors.As(err, &unknown) {
		return nil, fmt.Errorf("there is no user %s on this host; systemd-sysusers makes it, as sysusers.d/flipside.conf says", name)
	}
	if err != nil {
		return nil, fmt.Errorf("looking up the user %s: %w", name, err)
	}
	a := &Account{name: name, files: files}
	if a.uid, err = strconv.Atoi(u.Uid); err == nil {
		a.gid, err = strconv.Atoi(u.Gid)
	}
	if err != nil || a.uid <= 0 || a.gid <= 0 {
		return nil, fmt.Errorf("the user %s cannot be used: uid %s, gid %s", name, u.Uid, u.Gid)
	}
	return a, nil
}

// shared are directories that are not one daemon's.
var shared = []string{"/", "/var/lib", "/var/run", "/var/tmp", "/var/cache", "/var/log", "/run/user", "/usr/lib", "/usr/local", "/usr/share"}

// Prepare gives the account what the agent of the host that c configures writes to, and returns how to start it. This is done anew at every start: what root, or a release
// from before there was such a user, wrote meanwhile must not lock it out.
func (a *Account) Prepare(c config.Config) (*syscall.SysProcAttr, error) {
	if err := a.Own(c); err != nil {
		return nil, err
	}
	var groups []uint32
	if g, err := user.LookupGroup("tty"); err == nil { // to tell people who are logged in of a reboot
		if gid, err := strconv.Atoi(g.Gid); err == nil && gid > 0 {
			groups = append(groups, uint32(gid))
		}
	}
	for _, device := range []string{cmp.Or(c.Trust.TPM, trust.DefaultDevice), c.Health.Watchdog} {
		gid, err := a.grant(device)
		if err != nil {
			return nil, err
		}
		if gid > 0 && !slices.Contains(groups, uint32(gid)) {
			groups = append(groups, uint32(gid))
		}
	}
	return &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid), Groups: groups},
		// To read the disk, keys and certificates, as before.
		AmbientCaps: []uintptr{unix.CAP_DAC_READ_SEARCH},
	}, nil
}

// grant lets the account use a device, if there is one: by the group that it belongs to, or, if none may use it, by giving it to the account's. It returns the group.
func (a *Account) grant(device string) (gid int, err error) {
	if device == "" {
		return 0, nil
	}
	info, err := os.Stat(device)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("giving %s to the user %s: %w", device, a.name, err)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || info.Mode()&fs.ModeCharDevice == 0 {
		return 0, nil
	}
	if st.Gid != 0 && info.Mode()&0o060 == 0o060 {
		return int(st.Gid), nil
	}
	if err := errors.Join(os.Chown(device, -1, a.gid), os.Chmod(device, info.Mode().Perm()|0o060)); err != nil {
		return 0, fmt.Errorf("giving %s to the user %s: %w", device, a.name, err)
	}
	return a.gid, nil
}

// Own gives the account the agent's files, with those that are about to replace them, and no others. The state directory itself stays root's, and its sticky bit keeps the account from taking the place of what is not its own there,
// such as the floor of releases.
func (a *Account) Own(c config.Config) error {
	fail := func(what string, err error) error {
		return fmt.Errorf("giving the user %s %s: %w", a.name, what, err)
	}
	for dir, mode := range map[string]os.FileMode{c.Paths.State: 0o700, c.Paths.Run: 0o755} {
		if err := os.MkdirAll(dir, mode); err != nil {
			return fail("a directory", err)
		}
	}
	if err := a.lend(c.Paths.Run); err != nil {
		return fail("paths.run", err)
	}
	d, err := os.Open(c.Paths.State)
	if err != nil {
		return fail("paths.state", err)
	}
	defer d.Close()
	if err := errors.Join(d.Chown(os.Geteuid(), a.gid), d.Chmod(0o770|fs.ModeSticky)); err != nil {
		return fail("paths.state", err)
	}
	for _, name := range a.files {
		for _, name := range []string{name, "." + name + ".new"} {
			if err := a.take(int(d.Fd()), name, 2); err != nil {
				return fail(filepath.Join(c.Paths.State, name), err)
			}
		}
	}
	return nil
}

// lend gives a directory that the agent fills to the account, if it is not its own already.
func (a *Account) lend(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) == a.uid {
		return nil
	}
	return errors.Join(os.Chmod(dir, 0o755), os.Chown(dir, a.uid, a.gid)) // in this order: afterwards it is another's
}

// maxEntries bounds what is looked at in a directory that the account could have filled.
const maxEntries = 1000

// take gives the account one entry of a directory that it may write to, and what is in it, depth levels deep. No link is followed, and what has another name elsewhere is left
// alone: the account may have made the one here.
func (a *Account) take(dir int, name string, depth int) error {
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	folder := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if !folder && (st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1) {
		return nil
	}
	if int(st.Uid) == os.Geteuid() {
		if err := unix.Fchownat(fd, "", a.uid, a.gid, unix.AT_EMPTY_PATH); err != nil && !errors.Is(err, fs.ErrPermission) { // such as one that nobody may change
			return err
		}
	}
	if !folder || depth == 0 {
		return nil
	}
	in, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(in), name)
	defer f.Close()
	names, err := f.Readdirnames(maxEntries)
	if err != nil && err != io.EOF {
		return err
	}
	for _, n := range names {
		if err := a.take(in, n, depth-1); err != nil {
			return err
		}
	}
	return nil
}
