package server

import (
	"testing"
	"time"

	"github.com/flipside-linux/flipside/omaha"
)

// The clock was a year ahead for a while. When it is put right, limits, places, failures and proofs of that time are over as soon as any others, whether or not the server
// is started anew.
func TestClockThatWasAhead(t *testing.T) {
	const year = 365 * 24 * time.Hour
	for name, again := range map[string]func(*lab){
		"it runs on": func(l *lab) { l.clock.Add(-year) },
		"it starts anew": func(l *lab) {
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			l.clock.Add(-year)
			l.start()
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.publishVersion("1.1.0", 1)
			l.change(func(c *Channel) { c.MaxConcurrent, c.MaxPerPeriod = 2, 3 })
			l.clock.Add(year)
			for i := range 2 {
				l.wants(l.client(i, "1.0.0"), "1.1.0", "")
			}
			l.report(l.client(1, "1.0.0"), omaha.Failed(omaha.CodePayloadHash+2))
			l.wants(l.client(2, "1.0.0"), "1.1.0", "")
			ev := Evidence{Key: "sha256:1", Version: "1.0.0"}
			if err := l.proven(l.client(0, "1.0.0").MachineID, ev, l.clock.Now(), l.clock.Now()); err != nil {
				t.Fatal(err)
			}
			again(l)
			l.wants(l.client(3, "1.0.0"), "", "2 hosts update now, the limit is 2")
			l.clock.Add(2*time.Hour + time.Minute)
			for _, i := range []int{1, 3} { // the places of 0 and 2 are free, the failure of 1 is long ago, and so is the hour with three
				l.wants(l.client(i, "1.0.0"), "1.1.0", "")
			}
			err := l.proven(l.client(0, "1.0.0").MachineID, ev, l.clock.Now(), l.clock.Now())
			if err != nil {
				t.Errorf("a proof: %v", err)
			}
		})
	}
}
