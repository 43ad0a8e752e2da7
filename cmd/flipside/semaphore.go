package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/single"
	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/trust"
)

// semaphoreFlags say which semaphore a command speaks with.
type semaphoreFlags struct {
	app                                       *app
	endpoints                                 []string
	group                                     string
	ca, cert, key, user, passwordFile, prefix string
	store                                     string // directory of a semaphore without etcd
	ownerKey                                  string // private key of an owner of the group
	owners                                    []string
	signer                                    string
	asHosts                                   bool // what is done is done by the hosts that ask, not by an operator
	timeout                                   time.Duration
}

func (a *app) semaphore(cmd *cobra.Command) *semaphoreFlags {
	s := &semaphoreFlags{app: a}
	f := cmd.PersistentFlags()
	f.StringSliceVar(&s.endpoints, "endpoints", nil, "etcd `URLs`; may be repeated (default from the daemon's configuration)")
	f.StringVar(&s.group, "group", "", "`group` of hosts (default from the daemon's configuration, or \"default\")")
	f.StringVar(&s.ca, "ca", "", "PEM `file` of the authorities that sign etcd's certificate")
	f.StringVar(&s.cert, "cert", "", "PEM `file` of this client's certificate")
	f.StringVar(&s.key, "key", "", "PEM `file` of this client's key")
	f.StringVar(&s.user, "user", "", "etcd `user`")
	f.StringVar(&s.passwordFile, "password-file", "", "`file` whose first line is the password")
	f.StringVar(&s.prefix, "prefix", etcd.DefaultPrefix, "`prefix` of the keys in etcd")
	f.StringVar(&s.store, "store", "", "`directory` of a semaphore that \"fleet serve\" keeps on this machine, instead of etcd")
	f.StringVar(&s.ownerKey, "owner-key", "", "PEM `file` of an owner's private key, for changes in a group whose policy is signed")
	f.StringSliceVar(&s.owners, "owner", nil, "PEM `file` of an owner's public key; may be repeated (default lock.owners)")
	f.StringVar(&s.signer, "signer", "", "PEM `file` of the key of the host that is spoken for, or \"tpm:device\", in a group whose policy is signed")
	f.DurationVar(&s.timeout, "timeout", 10*time.Second, "how long etcd may take to answer")
	return s
}

// config says where the semaphore is. What is not given as a flag is taken from the daemon's configuration if there is one.
func (s *semaphoreFlags) config() (etcd.Config, error) {
	path := cmp.Or(s.app.config, config.DefaultPath)
	c, err := config.Load(s.app.config)
	switch {
	case err == nil && len(s.endpoints) == 0:
		s.endpoints = c.Lock.Endpoints
		s.ca, s.cert, s.key = cmp.Or(s.ca, c.Lock.CA), cmp.Or(s.cert, c.Lock.Cert), cmp.Or(s.key, c.Lock.Key)
		s.user, s.passwordFile = cmp.Or(s.user, c.Lock.User), cmp.Or(s.passwordFile, c.Lock.Password)
		s.group = cmp.Or(s.group, c.Lock.Group)
		if len(s.owners) == 0 {
			s.owners = c.Lock.Owners
		}
	case err != nil && (s.app.config != "" || !errors.Is(err, os.ErrNotExist)) && len(s.endpoints) == 0:
		return etcd.Config{}, err
	}
	s.group = cmp.Or(s.group, "default")
	if err := lock.CheckGroup(s.group); err != nil {
		return etcd.Config{}, &usageError{err}
	}
	if len(s.endpoints) == 0 {
		return etcd.Config{}, withHint(usagef("no etcd to ask"), "--endpoints http://host:2379, or lock.endpoints in %s, or --store where there is no etcd", path)
	}
	password := ""
	if s.passwordFile != "" {
		data, err := os.ReadFile(s.passwordFile)
		if err != nil {
			return etcd.Config{}, fmt.Errorf("reading the etcd password: %w", err)
		}
		password, _, _ = strings.Cut(strings.TrimSpace(string(data)), "\n")
	}
	opt, err := s.options(c.Trust.TPM)
	if err != nil {
		return etcd.Config{}, err
	}
	cfg := etcd.Config{
		Endpoints: s.endpoints, CA: s.ca, Cert: s.cert, Key: s.key, User: s.user, Password: password, Prefix: s.prefix,
		RequestTimeout: s.timeout, Keeper: opt,
	}
	if trust.IsKeyName(s.key) {
		cfg.Cert, cfg.Key = "", ""
		cfg.Certificate = func() (*tls.Certificate, error) { return trust.Certificate(s.cert, s.key, c.Trust.TPM) }
	}
	return cfg, nil
}

// options say who acts, and whose signatures count.
func (s *semaphoreFlags) options(tpm string) (opt lock.Options, err error) {
	opt.Synchronised = new(reboot.Clock).Synchronised // servers run in units that may not ask the kernel
	if !s.asHosts {
		opt.By = operator()
	}
	if s.ownerKey != "" {
		if opt.Owner, err = trust.Signer(s.ownerKey, tpm); err != nil {
			return opt, err
		}
	}
	if opt.Owners, err = trust.PublicKeys(s.owners); err != nil {
		return opt, err
	}
	if s.signer != "" {
		opt.Signer, err = trust.Signer(s.signer, tpm)
	}
	return opt, err
}

// operator names whoever runs this command, for the audit trail.
func operator() string {
	who, err := os.Hostname()
	if err != nil {
		who = "unknown host"
	}
	if u := cmp.Or(os.Getenv("SUDO_USER"), os.Getenv("USER")); u != "" {
		who = u + " on " + who
	}
	return who
}

func (s *semaphoreFlags) connect(ctx context.Context) (*lock.Keeper, error) {
	if s.store == "" {
		cfg, err := s.config()
		if err != nil {
			return nil, err
		}
		k, err := etcd.New(cfg)
		if errors.Is(err, lock.ErrInvalid) {
			err = &usageError{err}
		}
		return k, err
	}
	s.group = cmp.Or(s.group, "default")
	if err := lock.CheckGroup(s.group); err != nil {
		return nil, &usageError{err}
	}
	if len(s.endpoints) > 0 {
		return nil, usagef("--store and --endpoints are two semaphores; name one")
	}
	store, err := single.Attach(ctx, s.store)
	switch {
	case errors.Is(err, single.ErrBusy):
		return nil, withExit(exitBusy, err)
	case errors.Is(err, os.ErrNotExist):
		return nil, withHint(err, "flipside fleet serve --store %s makes one", s.store)
	case err != nil:
		return nil, err
	}
	opt, err := s.options("")
	if err != nil {
		return nil, errors.Join(err, store.Close())
	}
	return lock.On(store, opt), nil
}

// with runs f on the semaphore and gives its errors exit codes and hints.
func (s *semaphoreFlags) with(ctx context.Context, f func(*lock.Keeper) error) error {
	k, err := s.connect(ctx)
	if err != nil {
		return err
	}
	defer k.Close()
	err = f(k)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrPermission):
		return withHint(withExit(exitPermitted, err), "etcd refuses these credentials: --user, --password-file, --cert, --key")
	case errors.Is(err, lock.ErrUnavailable) && s.store == "":
		return withHint(err, "is etcd running at %s?", strings.Join(s.endpoints, ", "))
	case errors.Is(err, lock.ErrUnsigned) && s.ownerKey == "":
		return withHint(withExit(exitPermitted, err), "--owner-key names the file of an owner's key; flipside fleet keys shows what is signed in the group")
	case errors.Is(err, lock.ErrUnsigned):
		return withHint(withExit(exitPermitted, err), "flipside fleet keys shows what is signed in the group, and by whom")
	case errors.Is(err, lock.ErrInvalid):
		return &usageError{err}
	case errors.Is(err, lock.ErrHalted), errors.Is(err, lock.ErrClosed):
		return withExit(exitBlocked, err)
	case errors.Is(err, lock.ErrConflict):
		return withHint(withExit(exitBusy, err), "try again")
	}
	return err
}
