package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/single"
	"github.com/flipside-linux/flipside/updater/config"
	daemon "github.com/flipside-linux/flipside/updater/host"
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

func (a *app) lockCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lock",
		Short: "the cluster's reboot semaphore: see it, take it, give it back",
		Args:  cobra.NoArgs,
		Long: `Lock speaks with the reboot semaphore that the hosts of a group share.

Exit status: 0 done, 3 nothing to do, 5 blocked (no slot is free, the version is halted, the window is closed), 7 etcd does not permit it, 8 too much competition, 1 otherwise.`,
	}
	s := a.semaphore(cmd)
	cmd.AddCommand(a.lockStatus(s), a.lockAcquire(s), a.lockRelease(s), a.lockSetMax(s), a.lockResume(s))
	return cmd
}

func (a *app) lockStatus(s *semaphoreFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "who holds a slot, who waits, what is halted",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				st, err := k.State(cmd.Context(), s.group)
				if err != nil {
					return err
				}
				return a.printGroup(s.group, st)
			})
		},
	}
}

func (a *app) lockAcquire(s *semaphoreFlags) *cobra.Command {
	var c lock.Claim
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "acquire",
		Short: "take a slot for a host, or a place in the queue",
		Args:  cobra.NoArgs,
		Long: `Acquire asks for a slot and prints where the host stands. With --wait it waits until the slot is granted. A host that does not
get a slot keeps its place in the queue for some minutes; asking again keeps it longer.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := s.host(&c.Host); err != nil {
				return err
			}
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				c.Group = s.group
				st, err := a.acquire(cmd.Context(), k, c, wait)
				if err == nil && st.Granted {
					// Nobody knows what the caller does with it: from now on only a release frees it.
					err = k.Mark(cmd.Context(), c.Group, c.Host, lock.Mark{Phase: lock.Rebooting, Token: st.Token})
				}
				if err != nil {
					return err
				}
				if a.json {
					err = a.printJSON(struct {
						Schema string `json:"schema"`
						Group  string `json:"group"`
						Host   string `json:"host"`
						lock.Standing
					}{"flipside.lock-standing/v1", c.Group, c.Host, st})
				} else {
					fmt.Fprintln(a.stdout, standingLine(c, st))
				}
				if err == nil && !st.Granted {
					err = quiet(exitBlocked)
				}
				return err
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Host, "host", "", "`name` of the host (default this host's)")
	f.StringVar(&c.From, "from", "", "`version` that runs")
	f.StringVar(&c.To, "to", "", "`version` that the reboot leads to")
	f.StringVar(&c.Reason, "reason", "", "why, in words")
	f.StringVar(&c.Zone, "zone", "", "failure domain of the host")
	f.StringVar(&c.Class, "class", "", "priority class")
	f.DurationVar(&wait, "wait", 0, "how long to wait for the slot")
	return cmd
}

func (s *semaphoreFlags) host(host *string) error {
	if *host != "" {
		return nil
	}
	name, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("looking for this host's name: %w", err)
	}
	*host = name
	return nil
}

func (a *app) acquire(ctx context.Context, k *lock.Keeper, c lock.Claim, patience time.Duration) (lock.Standing, error) {
	limit, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	last := ""
	for {
		st, err := k.Request(ctx, c)
		if err != nil || st.Granted || st.Halted != "" || patience <= 0 {
			return st, err
		}
		if line := standingLine(c, st); line != last && !a.json {
			fmt.Fprintln(a.stderr, line)
			last = line
		}
		err = k.Wait(limit, c)
		switch {
		case ctx.Err() != nil:
			return st, errors.Join(ctx.Err(), k.Release(context.WithoutCancel(ctx), c.Group, c.Host, lock.Verdict{Outcome: lock.Withdrawn, Reason: "interrupted"}))
		case limit.Err() != nil:
			return st, nil
		case err != nil:
			return st, err
		}
	}
}

func standingLine(c lock.Claim, st lock.Standing) string {
	switch {
	case st.Halted != "":
		return fmt.Sprintf("%s: release %s is halted for group %s: %s", c.Host, c.To, c.Group, st.Halted)
	case st.Granted:
		return fmt.Sprintf("%s holds a slot of group %s, token %d", c.Host, c.Group, st.Token)
	}
	line := fmt.Sprintf("%s waits at position %d for a slot of group %s", c.Host, st.Position, c.Group)
	if st.Blocked != "" {
		line += ": " + st.Blocked
	}
	var names []string
	for _, h := range st.Holders {
		names = append(names, h.Host)
	}
	if len(names) > 0 {
		line += fmt.Sprintf(" (%d of %d held by %s)", len(names), st.Max, strings.Join(names, ", "))
	}
	return line
}

func (a *app) lockRelease(s *semaphoreFlags) *cobra.Command {
	var host, verdict string
	var v lock.Verdict
	outcomes := []lock.Outcome{lock.Healthy, lock.Failed, lock.Cancelled}
	cmd := &cobra.Command{
		Use:   "release",
		Short: "give a host's slot, or its place in the queue, back",
		Args:  cobra.NoArgs,
		Long: `Release gives back what acquire has taken under the same name, by default that of the machine. The slot of the host's own daemon has another name,
which flipside lock status shows, and the daemon gives it back itself. Ends with 3 if there was nothing to give back.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := s.host(&host); err != nil {
				return err
			}
			if v.Outcome = lock.Outcome(verdict); !slices.Contains(outcomes, v.Outcome) {
				return usagef("--verdict %q is not one of healthy, failed, cancelled", verdict)
			}
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				st, err := k.State(cmd.Context(), s.group)
				if err != nil {
					return err
				}
				if err := k.Release(cmd.Context(), s.group, host, v); err != nil {
					return err
				}
				if v.Outcome != lock.Failed && !has(st, host) { // a failure counts without a slot too
					return a.nothingReleased(st, s.group, host)
				}
				return a.done(fmt.Sprintf("%s holds no slot of group %s any more", host, s.group))
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&host, "host", "", "`name` of the host (default this host's)")
	f.StringVar(&verdict, "verdict", string(lock.Cancelled), "what became of the reboot: healthy, failed, cancelled")
	f.StringVar(&v.Version, "version", "", "`version` that was tried")
	f.StringVar(&v.Reason, "reason", "", "why, in words")
	f.Int64Var(&v.Token, "token", 0, "only release the grant with this `token`")
	return cmd
}

// has reports whether a host has a slot, or waits for one.
func has(st lock.State, host string) bool {
	_, held := st.Holder(host)
	return held || slices.ContainsFunc(st.Queue, func(w lock.Waiter) bool { return w.Host == host })
}

// nothingReleased says that a host had nothing to give back, and who it was that was meant, perhaps: the daemon goes by another name than the machine's.
func (a *app) nothingReleased(st lock.State, group, host string) error {
	err := withExit(exitNothing, fmt.Errorf("%s holds no slot of group %s, and does not wait for one", host, group))
	c, loadErr := config.Load(a.config)
	if loadErr != nil {
		return err
	}
	if name, nameErr := daemon.LockName(c); nameErr == nil && name != host && has(st, name) {
		return withHint(err, "flipsided of this host goes by %s there: --host %s", name, name)
	}
	return err
}

// done says that something was done, in words or as JSON.
func (a *app) done(what string) error {
	if !a.json {
		fmt.Fprintln(a.stdout, what)
		return nil
	}
	return a.printJSON(struct {
		Schema string `json:"schema"`
		Done   string `json:"done"`
	}{"flipside.done/v1", what})
}

func (a *app) lockSetMax(s *semaphoreFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "set-max N",
		Short: "change how many hosts may be down at once; 0 pauses the group",
		Args:  exactArgs(1, "the number N"),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := strconv.Atoi(args[0])
			if err != nil || n < 0 {
				return usagef("max %q is not a number from 0 on", args[0])
			}
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				if err := k.SetMax(cmd.Context(), s.group, n); err != nil {
					return err
				}
				return a.done(fmt.Sprintf("up to %d host(s) of group %s may be down at once", n, s.group))
			})
		},
	}
}

func (a *app) lockResume(s *semaphoreFlags) *cobra.Command {
	var all bool
	var reason string
	cmd := &cobra.Command{
		Use:   "resume [VERSION]",
		Short: "go on after a pause, or lift the halt of a version and forget its failures",
		Args:  cobra.MaximumNArgs(1),
		Long: `Resume without a VERSION lets a group go on that was paused, with the max that it had. With a VERSION, or --all, it lifts halts:
what failed is forgotten, and the next host may try. Look first.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 && all {
				return usagef("name a VERSION, or --all")
			}
			version := strings.Join(args, "")
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				st, err := k.State(cmd.Context(), s.group)
				if err != nil {
					return err
				}
				if version == "" && !all {
					return a.unpause(cmd.Context(), k, s.group, st, reason)
				}
				if _, halted := st.Halts[version]; len(st.Halts) == 0 || !all && !halted {
					return withExit(exitNothing, fmt.Errorf("nothing is halted in group %s%s", s.group, strings.TrimRight(" under version "+version, " ")))
				}
				if err := k.Resume(cmd.Context(), s.group, version, reason); err != nil {
					return err
				}
				return a.done(fmt.Sprintf("group %s goes on with %s", s.group, cmp.Or(version, "all versions")))
			})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "lift the halt of every version")
	cmd.Flags().StringVar(&reason, "reason", "", "why, in words; kept in the audit trail")
	return cmd
}

func (a *app) unpause(ctx context.Context, k *lock.Keeper, group string, st lock.State, reason string) error {
	switch {
	case st.Policy.Max > 0 && len(st.Halts) > 0:
		return usagef("group %s is not paused; halted is %s: name it, or --all", group, strings.Join(slices.Sorted(maps.Keys(st.Halts)), ", "))
	case st.Policy.Max > 0:
		return withExit(exitNothing, fmt.Errorf("group %s is not paused, and nothing is halted", group))
	case st.Policy.PausedMax == 0:
		return withHint(usagef("group %s has max 0, and it is not on record what it was before", group), "flipside lock set-max --group %s N", group)
	}
	if err := k.Unpause(ctx, group, reason); err != nil {
		return err
	}
	return a.done(fmt.Sprintf("group %s goes on: up to %d host(s) may be down at once", group, st.Policy.PausedMax))
}

// printGroup prints the state of one group.
func (a *app) printGroup(group string, st lock.State) error {
	if a.json {
		return a.printJSON(groupDoc(groupSchema, group, st))
	}
	a.groupScreen(group, st, time.Now()).print(a.stdout)
	return nil
}

const groupSchema = "flipside.lock-status/v1"

type groupDocument struct {
	Schema   string                  `json:"schema"`
	Group    string                  `json:"group"`
	Policy   lock.Policy             `json:"policy"`
	Holders  []lock.Holder           `json:"holders"`
	Queue    []lock.Waiter           `json:"queue"`
	Failures map[string]lock.Failure `json:"failures,omitempty"`
	Halts    map[string]lock.Halt    `json:"halts,omitempty"`
	Measured lock.Duration           `json:"measured,omitempty"`
	Tampered []string                `json:"tampered,omitempty"`
}

func groupDoc(schema, group string, st lock.State) groupDocument {
	d := groupDocument{schema, group, st.Policy, st.Holders, st.Queue, st.Failures, st.Halts, st.Measured, st.Tampered}
	if d.Holders == nil {
		d.Holders = []lock.Holder{}
	}
	if d.Queue == nil {
		d.Queue = []lock.Waiter{}
	}
	return d
}
