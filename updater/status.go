package updater

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/flipside-linux/flipside/reboot"
)

// SlotStatus is one slot as the disk has it.
type SlotStatus struct {
	Label      string `json:"label"`
	Version    string `json:"version,omitempty"` // of the release that is complete in it, if that is known
	UUID       string `json:"uuid"`
	Size       int64  `json:"size"` // bytes
	Priority   uint8  `json:"priority"`
	Tries      uint8  `json:"tries"`
	Successful bool   `json:"successful"`
	Running    bool   `json:"running"`
	Next       bool   `json:"next"` // what the boot loader would choose now
}

// Status is everything that can be asked about a host. Its JSON form is stable within a schema version.
type Status struct {
	Schema  string    `json:"schema"`
	Version string    `json:"version"` // of the running system
	Slot    string    `json:"slot"`    // that it runs from
	BootID  string    `json:"boot_id"`
	Channel string    `json:"channel,omitempty"` // that the server is asked for
	Pin     string    `json:"pin,omitempty"`     // only versions under this one are taken
	Phase   Phase     `json:"phase"`
	Since   time.Time `json:"since,omitzero"`
	Why     string    `json:"why"` // one line: what it does, or why it does not move

	Update     *UpdateStatus      `json:"update,omitempty"`
	Progress   *Progress          `json:"progress,omitempty"`
	Stage      Stage              `json:"gate_stage,omitempty"`
	Gates      []reboot.Answer    `json:"gates,omitempty"`
	Asking     bool               `json:"asking,omitempty"`  // the server or the gates are being asked right now
	Blocked    bool               `json:"blocked,omitempty"` // a gate is against the next step
	Slots      []SlotStatus       `json:"slots,omitempty"`
	Quarantine map[string]Failure `json:"quarantine,omitempty"`

	LastCheck  time.Time `json:"last_check,omitzero"`
	NextCheck  time.Time `json:"next_check,omitzero"`
	LastAnswer string    `json:"last_answer,omitempty"`
	LastError  string    `json:"last_error,omitempty"`
	ErrorAt    time.Time `json:"error_at,omitzero"`
	LastUpdate *Done     `json:"last_update,omitempty"`
	Unsent     int       `json:"unsent_reports,omitempty"`
	Verdict    *Verdict  `json:"unsent_verdict,omitempty"`
	Warnings   []string  `json:"warnings,omitempty"` // what people should do something about before it hurts, such as a key that ends
	KeysEnd    time.Time `json:"keys_end,omitzero"`  // from when on the pinned keys are too few for a release to be taken; zero if they do not end

	holds map[string]string // of the state
}

// UpdateStatus is the update under way.
type UpdateStatus struct {
	Version string    `json:"version"`
	Slot    string    `json:"slot"`
	Size    int64     `json:"size"`            // of the payload, bytes
	Delta   bool      `json:"delta,omitempty"` // it changes the running release
	Started time.Time `json:"started"`

	Rollback string `json:"rollback,omitempty"` // who wants the release of the other slot back
}

const statusSchema = "flipside.status/v1"

// Status describes the core's part of the host at now.
func (c *Core) Status(now time.Time) Status {
	st := c.State
	v := Status{
		Schema: statusSchema, Version: c.Facts.Version, Slot: c.Facts.Running, BootID: c.Facts.BootID,
		Phase: st.Phase, Since: st.Since, Quarantine: maps.Clone(st.Failures),
		LastCheck: st.LastCheck, NextCheck: c.checkDue, LastAnswer: st.LastAnswer, LastError: st.LastError, ErrorAt: st.ErrorAt,
		LastUpdate: st.LastUpdate, Unsent: len(st.Reports),
		holds: st.Holds, Stage: c.answersStage, Gates: slices.Clone(c.answers),
		Asking: c.busy && (st.Phase == Idle || st.Phase == Armed || c.offered != nil),
	}
	if _, stop := reboot.First(c.answers); stop && (st.Phase == Armed) == (c.answersStage == BeforeReboot) {
		v.Blocked = true
	}
	if st.Verdict != nil {
		verdict := *st.Verdict
		v.Verdict = &verdict
	}
	if u := st.Update; u != nil {
		v.Update = &UpdateStatus{u.Offer.Version, u.ToSlot, u.Offer.Size, u.Offer.Delta, u.Started, u.Rollback}
	}
	v.Why = v.why(now)
	return v
}

// why is the answer to "why is this host not moving?" in one line.
func (v *Status) why(now time.Time) string {
	errored := v.LastError != "" && !v.ErrorAt.Before(v.LastCheck)
	next := ""
	if !v.NextCheck.IsZero() {
		next = "; next check in " + until(now, v.NextCheck)
	}
	switch v.Phase {
	case Applying:
		if v.Update != nil && v.Update.Rollback != "" {
			return fmt.Sprintf("making %s boot next: going back to release %s, asked for by %s", v.Update.Slot, v.Update.Version, v.Update.Rollback)
		}
		if errored && v.NextCheck.IsZero() {
			return v.LastError + "; being tried again"
		}
		if errored {
			return fmt.Sprintf("%s; tried again in %s", v.LastError, until(now, v.NextCheck))
		}
		if p := v.Progress; p != nil && p.Total > 0 {
			return fmt.Sprintf("%s release %s to %s: %d %% of %s", p.Step, v.Update.Version, v.Update.Slot, p.Done*100/p.Total, size(p.Total))
		}
		return fmt.Sprintf("taking release %s to %s", v.Update.Version, v.Update.Slot)
	case Armed:
		if v.Verdict != nil {
			what := "the semaphore has not yet taken the verdict on the last reboot: "
			if v.Verdict.Cancelled {
				what = "the reboot slot, which was not used, is not given back yet: "
			}
			return strings.TrimSuffix(what+v.Verdict.Error, ": ")
		}
		if a, stop := reboot.First(v.Gates); stop && v.Stage == BeforeReboot {
			return fmt.Sprintf("release %s is in place on %s and waits to reboot: %s", v.Update.Version, v.Update.Slot, a.Why)
		}
		return fmt.Sprintf("release %s is in place on %s; asking whether the host may reboot", v.Update.Version, v.Update.Slot)
	case Rebooting:
		return fmt.Sprintf("rebooting into release %s on %s", v.Update.Version, v.Update.Slot)
	case Trial:
		return fmt.Sprintf("first boot of release %s: checking whether the host is healthy", v.Update.Version)
	case Failing:
		return v.LastError + "; going back to the other slot"
	}
	if errored {
		return v.LastError + next
	}
	if a, stop := reboot.First(v.Gates); stop && v.Stage == BeforeDownload {
		return a.Why + next
	}
	if v.LastCheck.IsZero() {
		return "the server has not been asked yet" + next
	}
	return fmt.Sprintf("%s (asked %s ago)%s", v.LastAnswer, until(v.LastCheck, now), next)
}

// until prints the time between two instants as people say it.
func until(from, to time.Time) string {
	d := max(0, to.Sub(from))
	switch {
	case d < time.Minute:
		return d.Round(time.Second).String()
	case d < 48*time.Hour:
		d = d.Round(time.Minute)
		if d < time.Hour {
			return fmt.Sprintf("%dm", int(d.Minutes()))
		}
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}

// publish makes the core's state visible to other goroutines.
func (e *Engine) publish() {
	e.mu.Lock()
	defer e.mu.Unlock()
	p := e.view.Progress
	e.view = e.Core.Status(time.Now())
	if e.view.Phase == Applying {
		e.view.Progress = p
	}
	e.notify()
}

func (e *Engine) notify() {
	if e.change != nil {
		close(e.change)
	}
	e.change = make(chan struct{})
}

// Status returns what can be said about the host now, and a channel that is closed when that changes.
func (e *Engine) Status(ctx context.Context) (Status, <-chan struct{}) {
	e.mu.Lock()
	v := e.view
	if e.change == nil {
		e.change = make(chan struct{})
	}
	changed := e.change
	e.mu.Unlock()
	v.Why = v.why(time.Now())
	if slots, err := e.Installer.Slots(ctx); err == nil {
		for i := range slots {
			slots[i].Version = v.holds[slots[i].Label]
		}
		v.Slots = slots
	}
	return v, changed
}

// CheckNow asks the server now, and gives the versions in forgive another chance.
func (e *Engine) CheckNow(ctx context.Context, by string, forgive ...string) error {
	return e.do(ctx, func() []Effect {
		for _, v := range forgive {
			e.Core.Forgive(v)
		}
		return e.Core.Step(time.Now(), CheckNow{by})
	})
}

// do runs f in the loop.
func (e *Engine) do(ctx context.Context, f func() []Effect) error {
	e.start.Do(func() { e.events = make(chan any, 16) })
	r := &request{run: f, done: make(chan struct{})}
	select {
	case e.events <- r:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Hold says why the host does not move, for the server's list of hosts: the name of the gate that is against the next
// step, and its answer, as "window: opens at 22:00". It is empty if the host moves.
func (e *Engine) Hold() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.view.Blocked {
		return ""
	}
	a, stop := reboot.First(e.view.Gates)
	if !stop {
		return e.view.Why
	}
	return a.Gate + ": " + strings.TrimPrefix(a.Why, a.Gate+": ")
}

// size is a number of bytes for people.
func size(n int64) string {
	if n < 10<<20 {
		return fmt.Sprintf("%d KiB", (n+1<<10-1)>>10)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}
