package updater

import (
	"context"
	"time"

	"github.com/flipside-linux/flipside/reboot"
)

// Plan is what would happen if the host looked for an update now. Making one changes nothing on the host.
type Plan struct {
	Schema  string `json:"schema"`
	Version string `json:"version"` // that runs
	Slot    string `json:"slot"`    // that it runs from
	Channel string `json:"channel,omitempty"`

	Offer  *PlannedUpdate `json:"offer,omitempty"`
	Reason string         `json:"reason,omitempty"` // why there is no offer

	Download []reboot.Answer `json:"download_gates,omitempty"`
	Reboot   []reboot.Answer `json:"reboot_gates,omitempty"`
	Earliest time.Time       `json:"earliest_reboot,omitzero"` // when the gates may let the host reboot, as far as they know
}

// PlannedUpdate is a release that is offered.
type PlannedUpdate struct {
	Version   string `json:"version"`
	Size      int64  `json:"size"`  // of the payload, bytes
	Fetch     int64  `json:"fetch"` // bytes that are still to be fetched
	ToSlot    string `json:"to_slot"`
	Delta     bool   `json:"delta,omitempty"`
	Downgrade bool   `json:"downgrade,omitempty"`
	Floor     bool   `json:"floor,omitempty"` // a version on the way that must not be skipped
	InPlace   bool   `json:"in_place,omitempty"`
}

const planSchema = "flipside.plan/v1"

// Plan asks srv, which may be the engine's own server or one that speaks for another channel, and the gates.
func (e *Engine) Plan(ctx context.Context, srv Server) (Plan, error) {
	var p Plan

	ask := AskServer{OnDemand: true}
	err := e.do(ctx, func() []Effect {
		c := e.Core
		ask.Unwedge, ask.Whole = c.State.Unwedge, c.State.Whole
		p = Plan{Schema: planSchema, Version: c.Facts.Version, Slot: c.Facts.Running}
		return nil
	})
	if err != nil {
		return Plan{}, err
	}
	answer := srv.Check(ctx, ask)
	if answer.Err != nil {
		return Plan{}, answer.Err
	}
	o := answer.Offer
	if o == nil {
		p.Reason = answer.Reason
		return p, nil
	}
	offer := PlannedUpdate{Version: o.Version, Size: o.Size, Fetch: o.Size, Delta: o.Delta, Downgrade: o.Downgrade, Floor: o.IsFloor}
	var held []reboot.Answer
	err = e.do(ctx, func() []Effect {
		c := e.Core
		offer.ToSlot = c.Facts.Other
		if u := c.State.Update; u != nil && (samePayload(u.Offer, *o) || c.State.Phase == Armed && sameRelease(u.Offer, *o)) {
			switch {
			case c.State.Phase == Armed:
				offer.InPlace, offer.Fetch = true, 0
			case e.view.Progress != nil:
				offer.Fetch = max(0, o.Size-e.view.Progress.Done)
			}
		}
		if q, ok := (&steps{c: c, now: time.Now()}).quarantine(*o); ok {
			held = append(held, q)
		}
		if c.State.Phase != Applying {
			c.State.Unwedge = true // the server believes now that we took its offer
		}
		return nil
	})
	if err != nil {
		return Plan{}, err
	}
	p.Offer = &offer
	if !offer.InPlace {
		p.Download = append(e.Gates.Forecast(ctx, BeforeDownload, *o), held...)
	}
	p.Reboot = e.Gates.Forecast(ctx, BeforeReboot, *o)
	for _, a := range p.Reboot {
		if a.Verdict != reboot.Go && a.Ask.After(p.Earliest) {
			p.Earliest = a.Ask
		}
	}
	return p, nil
}
