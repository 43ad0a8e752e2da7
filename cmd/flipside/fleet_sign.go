package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/updater/config"
	daemon "github.com/flipside-linux/flipside/updater/host"
)

func (a *app) fleetSign(s *semaphoreFlags) *cobra.Command {
	var off, force bool
	cmd := &cobra.Command{
		Use:   "sign",
		Short: "sign the policy of a group, so that only hosts' own keys take and free slots",
		Args:  cobra.NoArgs,
		Long: `Sign signs the policy of a group, as it is, with an owner's key. From then on each host says by its own key that it goes down and that it is well, and
whoever has only the credentials for the store can neither take nor free a slot. Hosts need lock.signer and lock.owners; their keys are accepted
with "fleet accept". It is an error while a host is down that has not signed so.

Run it again to sign with another key, or after somebody has spoilt what was signed. Look at "fleet policy get" first: what it shows is what is signed. If a host
holds a slot then and cannot give it back, look at it, and take the slot with "fleet force-release". A policy that is signed by a key which is no owner's here
(--owner, lock.owners) is left alone; --force signs over it, and drops the hosts' keys that it had accepted.

--off lets the group be used without signatures again. Take lock.owners out of the hosts' configuration before. When it is signed again, it is with the policy
that it has then, and the hosts' keys are accepted anew.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if s.ownerKey == "" {
				return usagef("--owner-key is missing: who signs?")
			}
			if off && force {
				return usagef("--off and --force do not go together: sign with --force first")
			}
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				if off {
					if err := k.Unsign(cmd.Context(), s.group); err != nil {
						return err
					}
					return a.done(fmt.Sprintf("group %s needs no signatures any more", s.group))
				}
				sign := k.Sign
				if force {
					sign = k.SignOver
				}
				if err := sign(cmd.Context(), s.group); err != nil {
					return err
				}
				return a.done(fmt.Sprintf("the policy of group %s is signed; flipside fleet keys --group %[1]s shows whose keys wait to be accepted", s.group))
			})
		},
	}
	cmd.Flags().BoolVar(&off, "off", false, "no signatures any more")
	cmd.Flags().BoolVar(&force, "force", false, "also over what a key has signed that is no owner's here")
	return cmd
}

func (a *app) fleetKeys(s *semaphoreFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "keys",
		Short: "the hosts' keys: which are accepted, which wait for it, what is wrong with them",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				keys, err := k.Keys(cmd.Context(), s.group)
				if err != nil {
					return err
				}
				st, err := k.State(cmd.Context(), s.group)
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(struct {
						Schema   string         `json:"schema"`
						Group    string         `json:"group"`
						Keys     []lock.HostKey `json:"keys"`
						Tampered []string       `json:"tampered,omitempty"`
					}{"flipside.fleet-keys/v1", s.group, keys, st.Tampered})
				}
				out := a.sheet()
				for _, t := range st.Tampered {
					out.line("%s: %s", out.paint(red, "NOT SIGNED"), omaha.Printable(t))
				}
				var rows [][]cell
				for _, h := range keys {
					what, key := "accepted", h.Fingerprint
					switch {
					case h.Fingerprint == "":
						what, key = "not accepted", h.Left
					case h.Left != "":
						what = "accepted; it has left another key: " + h.Left
					}
					if h.Problem != "" {
						what += "; " + omaha.Printable(h.Problem)
					}
					at := "-"
					if !h.At.IsZero() {
						at = when(h.At, time.Now())
					}
					row := cells(plain, h.Host, h.Says, at, key, what)
					row[0].look = bold
					rows = append(rows, row)
				}
				out.table([]string{"HOST", "SAYS", "SINCE", "KEY", "STATE"}, rows)
				return out.print(a.stdout)
			})
		},
	}
}

func (a *app) fleetAccept(s *semaphoreFlags) *cobra.Command {
	var key string
	var unseen, all bool
	cmd := &cobra.Command{
		Use:   "accept HOST --key FINGERPRINT",
		Short: "accept the key of a host into the signed policy of its group",
		Args:  cobra.MaximumNArgs(1),
		Long: `Accept enters the key that a host has left with its group into the signed policy. "flipside trust status" on the host prints the fingerprint of its
device key; compare it, or give --first-sight to take whatever is there. --all accepts the key of every host that has left one and has none yet, at first sight.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case all != (len(args) == 0):
				return usagef("name a HOST, or --all")
			case !all && unseen == (key != ""):
				return usagef("give the fingerprint that it must have with --key, or --first-sight")
			}
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				var list []lock.HostKey
				var err error
				if all {
					if list, err = k.AcceptAll(cmd.Context(), s.group); err == nil && len(list) == 0 {
						err = withExit(exitNothing, errors.New("no key waits to be accepted"))
					}
				} else {
					list = []lock.HostKey{{Host: args[0]}}
					list[0].Fingerprint, err = k.Accept(cmd.Context(), s.group, args[0], key)
				}
				if err != nil {
					return err
				}
				for _, h := range list {
					if err := a.done(fmt.Sprintf("%s is accepted in group %s by key %s", h.Host, s.group, h.Fingerprint)); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&key, "key", "", "`fingerprint` that the key must have: sha256:…")
	cmd.Flags().BoolVar(&unseen, "first-sight", false, "whatever key is there")
	cmd.Flags().BoolVar(&all, "all", false, "every host that has none accepted yet, at first sight")
	return cmd
}

func (a *app) fleetForget(s *semaphoreFlags) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "forget HOST",
		Short: "take the key of a host that is gone out of the signed policy, and its slot with it",
		Args:  exactArgs(1, "the name of the HOST"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				if err := k.Forget(cmd.Context(), s.group, args[0], reason); err != nil {
					return err
				}
				return a.done(fmt.Sprintf("group %s knows no key of %s any more", s.group, args[0]))
			})
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why, in words; kept in the audit trail")
	return cmd
}

func (a *app) fleetEnrol(s *semaphoreFlags) *cobra.Command {
	var host string
	cmd := &cobra.Command{
		Use:   "enrol",
		Short: "leave this host's key (lock.signer) with its group; flipsided does that by itself",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(a.config)
			if err == nil && s.signer == "" {
				s.signer = c.Lock.Signer
			}
			if err == nil && host == "" {
				host, err = daemon.LockName(c)
			}
			if err != nil && (host == "" || s.signer == "") {
				return err
			}
			if s.signer == "" {
				return usagef("this host has no key: lock.signer is not set, nor --signer")
			}
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				if err := k.Enrol(cmd.Context(), s.group, host); err != nil {
					return err
				}
				return a.done(fmt.Sprintf("the key of %s is with group %s", host, s.group))
			})
		},
	}
	cmd.Flags().StringVar(&host, "host", "", "`name` of the host in the semaphore (default the daemon's)")
	return cmd
}
