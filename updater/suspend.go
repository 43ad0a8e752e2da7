package updater

import "time"

// sleepwatch notices that the machine was suspended: the clock that counts through suspend has run ahead of the one that
// timers and time.Time go by.
type sleepwatch struct {
	uptime func() (time.Duration, error)
	up     time.Duration
	at     time.Time
	slept  time.Duration
}

// minSleep keeps the clocks' small differences from counting as sleep.
const minSleep = 5 * time.Second

// look returns how long the machine has slept since the last look.
func (w *sleepwatch) look(now time.Time) time.Duration {
	up, err := w.uptime()
	if err != nil {
		return 0 // without that clock a check comes later after a suspend, and that is all
	}
	if w.at.IsZero() {
		w.up, w.at = up, now
		return 0
	}
	d := (up - w.up) - now.Sub(w.at) - w.slept
	if d < minSleep {
		return 0
	}
	w.slept += d
	return d
}
