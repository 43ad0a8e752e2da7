package main

import (
	"context"
	"slices"
	"time"

	"github.com/flipside-linux/flipside/updater"
)

// stage is what a machine does, as far as it can be seen from outside: from its console, from what the release server sends, from the record of writes, and
// from what its daemon says.
type stage string

const (
	booting     stage = "boot"     // from power-on or reset: the boot stage, the slot's kernel, its initramfs
	starting    stage = "start"    // systemd, until the daemon speaks
	idling      stage = "idle"     // nothing under way, or the server is asked
	downloading stage = "download" // the server sends the payload; the slot is written meanwhile
	writing     stage = "write"    // all is sent; the rest is decoded and written, flushed, and read back
	flipping    stage = "flip"     // kernel file, boot bits, and the state that says so
	stopping    stage = "shutdown" // until the reset
	confirming  stage = "confirm"  // trial boot: health checks, "successful" on the disk, semaphore, report
)

// stages in the order in which an update goes through them. Power is cut in each of them.
var stages = []stage{downloading, writing, flipping, stopping, booting, starting, confirming}

// trialStages are those in which a power cut ends the trial: the host goes back, and that release has failed there.
var trialStages = []stage{booting, starting, confirming}

// progress is what was seen of a machine since power-on.
type progress struct {
	tape     *tape
	bls      bool // what boots next is in boot entries
	restarts int  // resets
	reset    int  // entry of the tape at the last one
	system   bool // systemd has been started since
	systemAt int  // entry of the tape then
	trial    bool // at power-on the disk was to boot a release that is new to the host
	reading  int  // entry of the tape when the daemon began to read the slot back; 0: not yet
	stage    stage
	since    time.Time
}

// see takes what the daemon says.
func (p *progress) see(st updater.Status) {
	switch {
	case st.Phase != updater.Applying || st.Progress == nil:
	case st.Progress.Step != readingBack:
		p.reading = 0
	case p.reading == 0:
		p.reading = max(1, p.tape.length())
	}
}

const readingBack = "reading back" // a step of updater.Progress

// stageNow says what the machine does. The caller holds the lock.
func (m *machine) stageNow() stage {
	switch {
	case !m.at.system:
		return booting
	case m.reports == 0:
		return starting
	}
	switch m.status.Phase {
	case updater.Trial:
		return confirming
	case updater.Armed:
		return flipping
	case updater.Rebooting, updater.Failing:
		return stopping
	case updater.Applying:
		switch {
		case m.at.firstOf(flipping) >= 0:
			return flipping
		case m.door.sending():
			return downloading
		case m.status.Progress != nil:
			return writing
		}
	}
	return idling
}

// firstOf returns the entry of the tape with which a stage begins to change what boots next, or -1: such a write has not been seen yet.
func (p *progress) firstOf(s stage) int {
	bits := tableArea
	if p.bls {
		bits = bootArea
	}
	switch {
	case s == flipping && p.reading > 0:
		return p.tape.first(p.reading, tableArea, bootArea)
	case s == booting:
		return p.tape.first(p.reset, bits)
	case s == confirming && p.system:
		return p.tape.first(p.systemAt, bits)
	}
	return -1
}

// followTape reads the record of writes, and measures how long each stage takes.
func (m *machine) followTape(ctx context.Context) {
	look := func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.at.tape.read()
		if s := m.stageNow(); s != m.at.stage {
			if m.at.stage != "" {
				m.lab.took(m.at.stage, time.Since(m.at.since))
			}
			m.at.stage, m.at.since = s, time.Now()
		}
	}
	for ctx.Err() == nil {
		look()
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
	look()
}

// took remembers how long a stage lasted, and typical says how long it will, about.
func (l *lab) took(s stage, d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lasted[s] = d
}

func (l *lab) typical(s stage) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if d := l.lasted[s]; d > 0 {
		return d
	}
	return time.Second // not seen yet: early in it is in it
}

// inOrder sorts stages as an update goes through them.
func inOrder(list []stage) {
	slices.SortFunc(list, func(a, b stage) int { return slices.Index(stages, a) - slices.Index(stages, b) })
}
