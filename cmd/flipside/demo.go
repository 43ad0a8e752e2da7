package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/cmd/flipside/demo"
)

func (a *app) demoCommand() *cobra.Command {
	o := demo.Options{Out: a.stdout}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "watch three hosts update themselves",
		Long: `Demo makes three releases from this machine's own files, installs the first on three disk images, and starts a release server,
an etcd and three flipsided processes with a reboot semaphore of 1. Then it publishes the second release, which all hosts take one after
another, and a third one whose health check fails: the first host falls back by itself, and the others do not follow it.

It needs no root, binds only to loopback, and touches only its own temporary directory. It ends with a non-zero status if anything on
the disk images is not as it should be.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Flipsided == "" {
				path, err := findFlipsided()
				if err != nil {
					return err
				}
				o.Flipsided = path
			}
			return demo.Run(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Flipsided, "flipsided", "", "the daemon to run (default: beside this program, or in PATH)")
	f.StringVar(&o.Dir, "dir", "", "work in this new or empty directory, and keep it")
	f.BoolVar(&o.Keep, "keep", false, "leave the temporary directory behind, with disk images and logs")
	return cmd
}

// findFlipsided looks for the daemon beside this program, then in PATH.
func findFlipsided() (string, error) {
	if self, err := os.Executable(); err == nil {
		path := filepath.Join(filepath.Dir(self), "flipsided")
		if info, err := os.Stat(path); err == nil && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	path, err := exec.LookPath("flipsided")
	if err != nil {
		return "", withHint(fmt.Errorf("flipsided is neither beside this program nor in PATH: %w", errors.Unwrap(err)), "make build")
	}
	return path, nil
}
