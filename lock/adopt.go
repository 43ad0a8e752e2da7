package lock

import (
	"context"
	"slices"
)

// Adopted is the reason that the holders of another semaphore are recorded with.
const Adopted = "taken over from another semaphore"

// Adopt records the holders of another semaphore, which admits nobody any more, and gives back what holders that were adopted
// earlier have given back there. max is the new limit; -1 leaves it. It may be called again until the other semaphore is empty.
func (k *Keeper) Adopt(ctx context.Context, group string, hosts []string, max int) error {
	for _, h := range hosts {
		if err := CheckHost(h); err != nil {
			return err
		}
	}
	return k.change(ctx, group, "", "", func(s *step) error {
		s.Holders = slices.DeleteFunc(s.Holders, func(h Holder) bool {
			gone := h.Reason == Adopted && h.Phase == Rebooting && !slices.Contains(hosts, h.Host)
			if gone {
				s.log("given back", h.Host, "", "", Adopted)
			}
			return gone
		})
		for _, host := range hosts {
			if s.holder(host) >= 0 {
				continue
			}
			s.Holders = append(s.Holders, Holder{Host: host, Phase: Rebooting, Granted: s.now, Rebooting: s.now, Unsure: s.unsure, Reason: Adopted})
			s.log("adopted", host, "", "", Adopted)
		}
		if max >= 0 && max != s.Policy.Max {
			p := s.Policy
			p.Max = max
			return s.setPolicy(p, Adopted)
		}
		return nil
	})
}
