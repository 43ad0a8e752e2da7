package reboot

import (
	"context"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/flipside-linux/flipside/lock"
)

// Clock says whether this host's clock was set by something that knows the time. In a unit with ProtectClock= the kernel may not be asked; systemd-timedated, which
// may, then is, over the system bus. The zero value is ready to use.
type Clock struct {
	mu    sync.Mutex
	asked time.Time
	is    bool
}

// How long timedated may take to answer, and how long its answer is good for.
const (
	timedatedLimit = 5 * time.Second
	timedatedAgain = time.Minute
)

// Synchronised is for [lock.Options].
func (c *Clock) Synchronised() bool {
	is, err := lock.Synchronised()
	if err == nil {
		return is
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if age := time.Since(c.asked); !c.asked.IsZero() && age < timedatedAgain {
		return c.is
	}
	if says, err := timedated(); err == nil {
		is = says
	}
	c.asked, c.is = time.Now(), is
	return is
}

// timedated asks for org.freedesktop.timedate1's NTPSynchronized, which is what the kernel says.
func timedated() (is bool, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), timedatedLimit)
	defer cancel()
	conn, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	if err != nil {
		return false, err
	}
	defer conn.Close()
	var v dbus.Variant
	err = conn.Object("org.freedesktop.timedate1", "/org/freedesktop/timedate1").
		CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, "org.freedesktop.timedate1", "NTPSynchronized").Store(&v)
	if err != nil {
		return false, err
	}
	return is, v.Store(&is)
}
