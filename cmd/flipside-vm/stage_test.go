package main

import (
	"fmt"
	"testing"
	"time"
)

// What a machine does is told from its console, its daemon, what the server sends and what is written, through a whole update and the trial boot.
func TestStages(t *testing.T) {
	l := &lab{start: time.Now(), lasted: map[stage]time.Duration{}}
	m := &machine{lab: l, name: "m", door: &door{}, at: progress{tape: &tape{}}}
	say := func(phase, step string) {
		progress := ""
		if step != "" {
			progress = fmt.Sprintf(`,"progress":{"step":%q,"done":1,"total":2}`, step)
		}
		m.read(fmt.Sprintf(`{"status":{"version":"1.0.0","phase":%q,"why":"x"%s}}`, phase, progress))
	}
	write := func(areas ...area) { m.at.tape.areas = append(m.at.tape.areas, areas...) }
	for _, step := range []struct {
		do      func()
		want    stage
		changes bool
	}{
		{func() { write(tableArea) }, booting, true}, // a repair, or a try
		{func() { m.hear("flipside-init: slot USR-A, priority 1, tries 0, successful true") }, booting, true},
		{func() { m.hear("flipside-init: /usr is /dev/nvme0n1p3, verified by /dev/dm-0") }, starting, false},
		{func() { m.read("\x1b[2J" + `{"status":{"version":"1.0.0","phase":"idle","why":"x"}}`) }, idling, false},
		{func() { say("applying", "") }, idling, false},
		{func() { m.door.count(1); say("applying", "writing"); write(tableArea, flushed, "USR-B") }, downloading, false},
		{func() { m.door.count(-1) }, writing, false},
		{func() { say("applying", readingBack); write("ROOT", flushed) }, writing, false},
		{func() { write(bootArea) }, flipping, true},
		{func() { write(tableArea, flushed); say("armed", "") }, flipping, true},
		{func() { say("rebooting", "") }, stopping, false},
		{func() { write("ROOT"); m.hear("[   43.2] reboot: Restarting system") }, booting, false},
		{func() { write(tableArea) }, booting, true},
		{func() { m.hear("flipside-init: /usr is /dev/nvme0n1p4, verified by /dev/dm-0") }, starting, false},
		{func() { say("trial", "") }, confirming, false},
		{func() { write("ROOT", tableArea) }, confirming, true},
		{func() { say("idle", "") }, idling, false},
		{func() { m.hear("[    0.1] Kernel panic - not syncing: x") }, booting, false},
	} {
		step.do()
		if got := m.stageNow(); got != step.want {
			t.Fatalf("after %v: stage %q, want %q", l.events, got, step.want)
		}
		if v := m.view(); v.changes != step.changes || v.stage != step.want {
			t.Fatalf("in stage %q after %v: changes %v, want %v", step.want, l.events, v.changes, step.changes)
		}
	}
	if v := m.view(); v.up || v.resets != 2 || !v.trial {
		t.Errorf("at the end: %+v", v)
	}
}
