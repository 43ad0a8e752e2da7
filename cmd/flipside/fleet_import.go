package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
)

func (a *app) fleetImport(s *semaphoreFlags) *cobra.Command {
	var t etcd.Takeover
	var from string
	var endpoints []string
	cmd := &cobra.Command{
		Use:   "import",
		Short: "take over the semaphore of airlock or locksmith",
		Args:  cobra.NoArgs,
		Long: `Import takes the slots of a group over from an older reboot manager: airlock, or locksmith (through etcd's v2 API, or in etcd v3).
It never lets more hosts be down than before, however many still ask there and how many here. It pauses the group here, takes the slots
away there, so that nobody is admitted any more, records the holders there as holders here, and sets max. Holders can give their
slots back there: run import again, until nobody holds one.

Hosts that cannot ask here before they have rebooted need a slot there: --leave 1 leaves one, and gives this side the others. When all
hosts have moved, import with --leave 0 and --max takes that one too.

The older etcd may be another one than that of the semaphore here (--from-endpoints). Import into a group before its first host
asks here.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if t.Leave < 0 || t.Max < 0 {
				return usagef("--leave and --max are numbers of hosts, from 0 on")
			}
			return s.with(cmd.Context(), func(k *lock.Keeper) error {
				t.Group, t.FromGroup = s.group, cmp.Or(t.FromGroup, s.group)
				sources, closer, err := s.predecessors(from, endpoints)
				if err != nil {
					return err
				}
				defer closer()
				return a.takeOver(cmd.Context(), k, t, sources)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&from, "from", "", "airlock, locksmith, or locksmith-v3 (default: whichever has a semaphore)")
	f.StringVar(&t.FromGroup, "from-group", "", "the `group` there, if it has another name")
	f.StringSliceVar(&endpoints, "from-endpoints", nil, "`URLs` of the etcd there, if it is another one")
	f.IntVar(&t.Leave, "leave", 0, "slots that stay there")
	f.IntVar(&t.Max, "max", 0, "hosts that may be down in all (default: as many as there)")
	return cmd
}

// predecessors opens the places where an older semaphore may be.
func (s *semaphoreFlags) predecessors(from string, endpoints []string) ([]etcd.Predecessor, func() error, error) {
	var cfg etcd.Config
	var err error
	if s.store == "" {
		if cfg, err = s.config(); err != nil {
			return nil, nil, err
		}
	} else {
		cfg.RequestTimeout = s.timeout
	}
	if len(endpoints) > 0 {
		cfg.Endpoints = endpoints
	}
	if len(cfg.Endpoints) == 0 {
		return nil, nil, usagef("--from-endpoints is missing: in which etcd is the semaphore to take over?")
	}
	store, err := etcd.OpenStore(cfg)
	if err != nil {
		return nil, nil, err
	}
	v2, err := etcd.NewLocksmith(cfg)
	if err != nil {
		return nil, nil, errors.Join(err, store.Close())
	}
	var list []etcd.Predecessor
	switch from {
	case "":
		list = []etcd.Predecessor{store.Airlock(), store.Locksmith(), v2}
	case "airlock":
		list = []etcd.Predecessor{store.Airlock()}
	case "locksmith":
		list = []etcd.Predecessor{v2}
	case "locksmith-v3":
		list = []etcd.Predecessor{store.Locksmith()}
	default:
		return nil, nil, errors.Join(usagef("--from %q is not one of airlock, locksmith, locksmith-v3", from), store.Close())
	}
	return list, store.Close, nil
}

func (a *app) takeOver(ctx context.Context, k *lock.Keeper, t etcd.Takeover, sources []etcd.Predecessor) error {
	var nothing []error
	for _, t.From = range sources {
		holders, err := t.Run(ctx, k)
		if errors.Is(err, etcd.ErrNothing) || len(sources) > 1 && errors.Is(err, lock.ErrUnavailable) {
			nothing = append(nothing, err)
			continue
		}
		if err != nil {
			return err
		}
		done := fmt.Sprintf("group %s is taken over from %s", t.Group, t.From.Name())
		if t.Leave > 0 {
			st, err := k.State(ctx, t.Group)
			if err != nil {
				return err
			}
			done = fmt.Sprintf("group %s has %d slot(s) here and %d at %s", t.Group, st.Policy.Max, t.Leave, t.From.Name())
		}
		switch {
		case len(holders) == 0:
			done += "; it holds nobody there any more"
		case len(holders) > t.Leave:
			done += fmt.Sprintf("; still held there by %s: run import again when they are back", strings.Join(holders, ", "))
		}
		return a.done(done)
	}
	return withExit(exitNothing, errors.Join(nothing...))
}
