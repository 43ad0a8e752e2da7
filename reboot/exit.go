package reboot

import (
	"context"
	"fmt"
)

// Rebooter makes the reboot happen. A nil error means that the machine is on its way down. An *[ExitError] means that this process
// must end with its status; what must be saved is saved first.
type Rebooter interface {
	Reboot(ctx context.Context, reason string) error
}

// ExitStatus is the status by which a process asks whoever supervises it for a reboot, as containers do.
const ExitStatus = 133

// ExitError says that the process is to end, and how.
type ExitError struct{ Status int }

func (e *ExitError) Error() string {
	return fmt.Sprintf("the process ends with status %d to be started again", e.Status)
}

// Exit reboots by ending the process: for containers, and for simulated machines.
type Exit struct{}

// Reboot returns an *[ExitError].
func (Exit) Reboot(context.Context, string) error { return &ExitError{ExitStatus} }
