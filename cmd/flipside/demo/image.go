package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
)

const (
	mib = int64(1) << 20

	// payloadBytes of real files go into a release: enough that nothing can be fast by being small.
	payloadBytes = 132 * mib
	imageSize    = 192 * mib
	slotSize     = 200 * mib
)

// A release is one /usr image of the demo.
type release struct {
	version string
	image   string // path of the file system image
	sha256  string
	sick    bool
}

// stageTree copies real files of this machine to dir until it holds payloadBytes, and returns how many files it took.
func stageTree(ctx context.Context, dir string) (files int, total int64, err error) {
	for _, root := range []string{"/usr/bin", "/usr/sbin", "/usr/lib", "/usr/share", "/bin", "/lib"} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil // what this user cannot read is left out
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if total >= payloadBytes {
				return filepath.SkipAll
			}
			if d.IsDir() || !d.Type().IsRegular() {
				return nil
			}
			info, err := d.Info()
			if err != nil || info.Size() == 0 || info.Size() > 24*mib {
				return nil
			}
			n, err := copyFile(filepath.Join(dir, strings.TrimPrefix(path, "/usr")), path)
			if errors.Is(err, fs.ErrPermission) {
				return nil
			}
			files++
			total += n
			return err
		})
		if err != nil {
			return 0, 0, fmt.Errorf("collecting files for a release: %w", err)
		}
	}
	if total < 128*mib {
		return 0, 0, fmt.Errorf("collecting files for a release: this machine has only %d MiB of readable files in /usr, want 128", total/mib)
	}
	return files, total, nil
}

func copyFile(to, from string) (int64, error) {
	in, err := os.Open(from)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return 0, err
	}
	out, err := os.Create(to)
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(out, in)
	return n, errors.Join(err, out.Close())
}

// dressTree makes the staged tree a release: its os-release, the health checks that its first boot must pass, and some changed files.
func dressTree(dir string, r release) error {
	check := "#!/bin/sh\n# Shipped in the image; runs on every first boot.\ntest -r \"$FLIPSIDE_OS_RELEASE\" || { echo 'no os-release'; exit 1; }\n"
	if r.sick {
		check += "echo 'web: port 80 does not answer'\nexit 1\n"
	}
	for name, body := range map[string]string{
		"lib/os-release":                      fmt.Sprintf("NAME=\"Flipside demo\"\nID=flipside-demo\nVERSION_ID=%s\n", r.version),
		"lib/flipside/health.d/10-os":         check,
		"share/flipside/release-" + r.version: strings.Repeat("release "+r.version+"\n", 4096),
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		os.Remove(path)
		if err := os.WriteFile(path, []byte(body), 0o755); err != nil {
			return err
		}
	}
	// A new release changes part of what was there: every 20th file gets a new tail.
	var files []string
	err := filepath.WalkDir(filepath.Join(dir, "bin"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	sort.Strings(files)
	for i := 0; i < len(files); i += 20 {
		f, err := os.OpenFile(files[i], os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(f, "\n# release %s\n", r.version)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// makeExt4 makes an ext4 file system of size bytes with the contents of dir.
func makeExt4(ctx context.Context, image, dir string, size int64) error {
	f, err := os.Create(image)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return err
	}
	_, err = tool(ctx, "mke2fs", "-q", "-t", "ext4", "-F", "-m", "0", "-L", "usr", "-O", "^has_journal", "-E", "root_owner=0:0", "-d", dir, image)
	return err
}

// tool runs a program of the system. The directories where Debian keeps file system tools are searched even if a user's PATH lacks them.
func tool(ctx context.Context, name string, args ...string) (string, error) {
	path, err := findTool(name)
	if err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

func findTool(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is not installed (Debian: apt-get install %s)", name, map[string]string{"mke2fs": "e2fsprogs", "debugfs": "e2fsprogs"}[name])
}
