package main

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
)

func (a *app) fleetImport(s *semaphoreFlags) *cobra.Command {
	var from string
	cmd := &cobra.Command{
		Use:   "import",
		Short: "take over the semaphore that airlock keeps in the same etcd",
		Args:  cobra.NoArgs,
		Long: `Import takes the slots of a group over from airlock. It pauses the group here, takes all slots away from airlock so that it admits
nobody any more, and records airlock's holders as holders here; so there is no moment at which both give out slots. Hosts that still
speak with airlock can give their slots back there: run import again, until airlock holds nobody. Then point the clients to
"flipside fleet serve", or run flipsided on them.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := s.config()
			if err != nil {
				return err
			}
			return s.with(func(k *lock.Keeper) error {
				store, err := etcd.OpenStore(cfg)
				if err != nil {
					return err
				}
				defer store.Close()
				ctx, group := cmd.Context(), cmp.Or(from, s.group)
				for range 20 {
					old, err := store.ReadAirlock(ctx, group)
					if err != nil {
						return err
					}
					if old == nil {
						return withExit(exitNothing, fmt.Errorf("airlock keeps no semaphore for group %q in this etcd", group))
					}
					slots := -1 // it is frozen already: the limit here stays as it is
					if old.Slots > 0 {
						slots = old.Slots
						if err := k.SetMax(ctx, s.group, 0); err != nil {
							return err
						}
					}
					err = store.FreezeAirlock(ctx, group, old)
					if errors.Is(err, lock.ErrConflict) {
						continue
					}
					if err != nil {
						return err
					}
					if err := k.Adopt(ctx, s.group, old.Holders, slots); err != nil {
						return err
					}
					if len(old.Holders) == 0 {
						return a.done(fmt.Sprintf("group %s is taken over; airlock holds nobody any more", s.group))
					}
					return a.done(fmt.Sprintf("group %s is taken over; airlock still holds %s: run import again when they are back", s.group, strings.Join(old.Holders, ", ")))
				}
				return fmt.Errorf("taking airlock's group %q over: %w", group, lock.ErrConflict)
			})
		},
	}
	cmd.Flags().StringVar(&from, "airlock-group", "", "airlock's `group`, if it has another name there")
	return cmd
}
