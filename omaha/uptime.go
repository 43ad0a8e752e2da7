package omaha

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Uptime returns the time since boot, counted through suspend: the clock that a [Schedule] is to be given.
func Uptime() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0, fmt.Errorf("omaha: read the time since boot: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}
