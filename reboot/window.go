package reboot

import (
	"context"
	"fmt"
	"time"

	"github.com/flipside-linux/flipside/lock/window"
)

// Window lets a reboot pass while a schedule is open. The zero Window is always open.
type Window struct {
	Schedule window.Schedule
	Need     time.Duration // how long a reboot takes: the window must be open for at least so long
}

// ParseWindow reads a window as the older hosts write it, as in "Thu 04:00" and "1h30m". zone is an IANA name; "" is the
// local time of this process. Two empty strings are a window that is always open.
func ParseWindow(start, length, zone string) (Window, error) {
	if start == "" && length == "" {
		return Window{}, nil
	}
	if start == "" || length == "" {
		return Window{}, fmt.Errorf("start %q and length %q of the reboot window belong together", start, length)
	}
	w, err := window.Parse(start, length, zone)
	if err != nil {
		return Window{}, fmt.Errorf("reboot window: %w", err)
	}
	return Window{Schedule: window.Schedule{Windows: []window.Window{w}}}, nil
}

// Name implements [Gate].
func (Window) Name() string { return "window" }

// Ask implements [Gate].
func (w Window) Ask(_ context.Context, now time.Time) Answer {
	st := w.Schedule.At(now, w.Need)
	switch {
	case st.Open && st.Until.IsZero():
		return Answer{Verdict: Go}
	case st.Open:
		return Answer{Verdict: Go, Why: "the reboot window is open until " + st.Until.Format(time.DateTime+" MST")}
	}
	a := Answer{Verdict: Wait, Why: st.Why, Ask: st.Next, Hint: "flipside reboot --now, or change the window (reboot.window_start)", Evidence: "reboot.windows: flipside config show"}
	if !st.Next.IsZero() {
		a.Why += "; the next opens " + st.Next.Format("Mon "+time.DateTime+" MST")
	}
	return a
}
