package atomicfile

import (
	"crypto/sha256"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
)

// traced is a directory that notes the order of what reaches the kernel.
type traced struct {
	OS
	ops  *[]string
	free int64 // 0: as the file system says
	fail string
}

func (d traced) note(op string) error {
	*d.ops = append(*d.ops, op)
	if op == d.fail {
		return errors.New("input/output error")
	}
	return nil
}

func (d traced) Create(name string) (File, error) {
	f, err := d.OS.Create(name)
	return tracedFile{f, d}, err
}

func (d traced) Rename(from, to string) error {
	if err := d.note("rename"); err != nil {
		return err
	}
	return d.OS.Rename(from, to)
}

func (d traced) Remove(name string) error {
	if err := d.note("remove " + name); err != nil {
		return err
	}
	return d.OS.Remove(name)
}

func (d traced) Sync() error { return errors.Join(d.note("sync directory"), d.OS.Sync()) }

func (d traced) Free() (int64, error) {
	if d.free > 0 {
		return d.free, nil
	}
	return d.OS.Free()
}

type tracedFile struct {
	File
	d traced
}

func (f tracedFile) WriteAt(b []byte, off int64) (int, error) {
	if err := f.d.note("write"); err != nil {
		return 0, err
	}
	return f.File.WriteAt(b, off)
}

func (f tracedFile) Sync() error { return errors.Join(f.d.note("sync file"), f.File.Sync()) }

func TestOrder(t *testing.T) {
	var ops []string
	dir := traced{OS: OS(t.TempDir()), ops: &ops}
	for _, data := range []string{"old and longer", "new"} {
		ops = nil
		if err := Write(dir, "file", []byte(data)); err != nil {
			t.Fatal(err)
		}
		if want := []string{"write", "sync file", "rename", "sync file", "sync directory"}; !slices.Equal(ops, want) {
			t.Errorf("%q, want %q", ops, want)
		}
		if got, err := os.ReadFile(filepath.Join(string(dir.OS), "file")); err != nil || string(got) != data {
			t.Errorf("%q, %v", got, err)
		}
	}
	if list, _ := os.ReadDir(string(dir.OS)); len(list) != 1 {
		t.Errorf("left: %v", list)
	}
}

// Whatever fails, it is said, and the old file is what it was or the new one is whole.
func TestFailures(t *testing.T) {
	for _, op := range []string{"write", "sync file", "rename", "sync directory"} {
		var ops []string
		dir := traced{OS: OS(t.TempDir()), ops: &ops}
		if err := Write(dir, "file", []byte("old")); err != nil {
			t.Fatal(err)
		}
		dir.fail = op
		if err := Write(dir, "file", []byte("new")); err == nil {
			t.Errorf("%s fails and nothing is said", op)
		}
		got, err := os.ReadFile(filepath.Join(string(dir.OS), "file"))
		if err != nil || string(got) != "old" && op != "sync directory" {
			t.Errorf("%s fails: %q, %v", op, got, err)
		}
	}
}

func TestMismatch(t *testing.T) {
	dir := OS(t.TempDir())
	if err := Write(dir, "file", []byte("old")); err != nil {
		t.Fatal(err)
	}
	p, err := Begin(dir, "file")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.WriteAt([]byte("nex"), 0); err != nil {
		t.Fatal(err)
	}
	if err := p.Commit(t.Context(), 3, sha256.Sum256([]byte("new"))); !errors.Is(err, ErrMismatch) {
		t.Errorf("other contents: %v", err)
	}
	if err := p.Commit(t.Context(), 4, sha256.Sum256([]byte("nex\x00"))); err != nil {
		t.Errorf("a file that ends in a hole: %v", err)
	}
	p.Close()
	if err := Check(t.Context(), dir, "file", 3, sha256.Sum256([]byte("nex"))); !errors.Is(err, ErrMismatch) {
		t.Errorf("another size: %v", err)
	}
}

// What a killed process left is there for the next one; Discard removes it.
func TestGoesOn(t *testing.T) {
	dir := OS(t.TempDir())
	for i, part := range []string{"ne", "w"} {
		p, err := Begin(dir, "file")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.WriteAt([]byte(part), int64(2*i)); err != nil {
			t.Fatal(err)
		}
		if err := p.Flush(); err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			if err := p.Commit(t.Context(), 3, sha256.Sum256([]byte("new"))); err != nil {
				t.Fatal(err)
			}
		}
		p.Close()
	}
	p, err := Begin(dir, "file")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Discard(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(string(dir), temporary("file"))); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the temporary file: %v", err)
	}
}

// A process that ended after the file was in its place need not be given it again; a file that is another one, or half of one, does not pass for it.
func TestInPlaceAlready(t *testing.T) {
	want := sha256.Sum256([]byte("new"))
	for name, tt := range map[string]struct {
		there, begun string
		written      bool
		ok           bool
	}{
		"the same":                     {there: "new", ok: true},
		"another one":                  {there: "old"},
		"none":                         {},
		"something was left beside it": {there: "new", begun: "ne"},
		"something else was written":   {there: "new", written: true},
	} {
		dir := OS(t.TempDir())
		for file, text := range map[string]string{"file": tt.there, temporary("file"): tt.begun} {
			if text == "" {
				continue
			}
			if err := os.WriteFile(filepath.Join(string(dir), file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		p, err := Begin(dir, "file")
		if err != nil {
			t.Fatal(err)
		}
		if tt.written {
			if _, err := p.WriteAt([]byte("x"), 0); err != nil {
				t.Fatal(err)
			}
		}
		err = p.Commit(t.Context(), 3, want)
		if (err == nil) != tt.ok || err != nil && !errors.Is(err, ErrMismatch) {
			t.Errorf("%s: %v", name, err)
		}
		if tt.ok {
			if _, err := os.Stat(filepath.Join(string(dir), temporary("file"))); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: the temporary file: %v", name, err)
			}
		}
		p.Close()
	}
}

func TestReserve(t *testing.T) {
	for _, tt := range []struct {
		free  int64
		spare bool
		ok    bool
		old   bool // the old file is still there
	}{{1000, false, true, true}, {10, false, false, true}, {10, true, false, true}, {60, true, true, false}, {60, false, false, true}} {
		var ops []string
		dir := traced{OS: OS(t.TempDir()), ops: &ops, free: tt.free}
		if err := Write(dir, "file", make([]byte, 50)); err != nil {
			t.Fatal(err)
		}
		p, err := Begin(dir, "file")
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if err := p.Reserve(100, tt.spare); (err == nil) != tt.ok || err != nil && !errors.Is(err, ErrSpace) {
			t.Errorf("%+v: %v", tt, err)
		}
		if _, err := os.Stat(filepath.Join(string(dir.OS), "file")); (err == nil) != tt.old {
			t.Errorf("%+v: the old file: %v", tt, err)
		}
	}
}

func TestNames(t *testing.T) {
	dir := OS(t.TempDir())
	for _, name := range []string{"", ".", "..", "a/b", "/etc/passwd"} {
		if _, err := dir.Create(name); err == nil {
			t.Errorf("%q was made", name)
		}
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(string(dir), ".file.new")); err != nil {
		t.Fatal(err)
	}
	if err := Write(dir, "file", []byte("x")); err == nil {
		t.Error("a symbolic link was followed")
	}
}

func TestRemove(t *testing.T) {
	var ops []string
	dir := traced{OS: OS(t.TempDir()), ops: &ops}
	if err := Remove(dir, "file"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	for _, fail := range []string{"", "remove file", "sync directory"} {
		if err := os.WriteFile(filepath.Join(string(dir.OS), "file"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		ops, dir.fail = nil, fail
		if err := Remove(dir, "file"); (err == nil) != (fail == "") {
			t.Errorf("%q fails: %v", fail, err)
		}
		if want := []string{"remove file", "sync directory"}; fail != "remove file" && !slices.Equal(ops, want) {
			t.Errorf("%q, want %q", ops, want)
		}
	}
}

// In a directory where others make files, too, what is there under the temporary name is not written into unless it is this user's own, and only there.
func TestOthersInTheDirectory(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can make another user's file")
	}
	for what, put := range map[string]func(path, victim string) error{
		"another's file": func(path, _ string) error {
			return errors.Join(os.WriteFile(path, []byte("xyz"), 0o666), os.Chown(path, 1, 1))
		},
		"a link to a file":        func(path, victim string) error { return os.Symlink(victim, path) },
		"another name of a file":  func(path, victim string) error { return os.Link(victim, path) },
		"a directory":             func(path, _ string) error { return os.Mkdir(path, 0o700) },
		"what was begun, its own": func(path, _ string) error { return os.WriteFile(path, []byte("begun"), 0o600) },
	} {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o770|fs.ModeSticky); err != nil {
			t.Fatal(err)
		}
		victim := filepath.Join(dir, "victim")
		if err := errors.Join(os.WriteFile(victim, []byte("precious"), 0o600), put(filepath.Join(dir, temporary("f")), victim)); err != nil {
			t.Fatal(err)
		}
		if err := Write(OS(dir), "f", []byte("new")); err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		f, err := OS(dir).Open("f")
		if err != nil {
			t.Fatal(err)
		}
		if !own(f) {
			t.Errorf("%s: the file is not this user's own", what)
		}
		f.Close()
		for name, want := range map[string]string{"f": "new", "victim": "precious"} {
			if data, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(data) != want {
				t.Errorf("%s: %s holds %q, %v", what, name, data, err)
			}
		}
	}
}

// What cannot be flushed replaces nothing.
func TestPlaceOneAfterTheOther(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "payload")
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	broken, err := os.CreateTemp(dir, ".new-")
	if err != nil {
		t.Fatal(err)
	}
	broken.Close()
	if err := Place(broken, path, 0o644); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Place = %v, want what was wrong with the file", err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "old" {
		t.Errorf("the old file holds %q, %v", got, err)
	}
}

// A file that is replaced has its new mode from the start, and the owner that it had.
func TestWriteFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	owner := os.Getuid()
	if owner == 0 {
		owner = 65534
	}
	for i, mode := range []os.FileMode{0o640, 0o644, 0o600} {
		if err := WriteFile(path, []byte{byte(i)}, mode); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		uid := int(info.Sys().(*syscall.Stat_t).Uid)
		if got, err := os.ReadFile(path); err != nil || len(got) != 1 || got[0] != byte(i) || info.Mode() != mode || i > 0 && uid != owner {
			t.Errorf("it holds %q with mode %v of user %d, %v; want mode %v of user %d", got, info.Mode(), uid, err, mode, owner)
		}
		if err := os.Chown(path, owner, -1); err != nil {
			t.Fatal(err)
		}
	}
	if names, err := os.ReadDir(filepath.Dir(path)); err != nil || len(names) != 1 {
		t.Errorf("left behind: %v, %v", names, err)
	}
}
