package supervisor

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/flipside-linux/flipside/updater/wire"
)

// EndedError says how the agent ended, where that is not what it should have been.
type EndedError struct {
	// Status is what this process should end with: the agent's own, or 128 and the number of the signal that ended it.
	Status int
	Signal syscall.Signal // 0 if it ended by itself
}

func (e *EndedError) Error() string {
	if e.Signal != 0 {
		return fmt.Sprintf("the agent was ended by the signal %q", e.Signal)
	}
	return fmt.Sprintf("the agent ended with status %d", e.Status)
}

// Run runs agent as a child that calls [Connect], starts the parts that it asks for by their commands, passes on the signals that come on told, and returns when
// the agent has ended, with an [*EndedError] if that was not well. The two end together: the agent is killed if this process is, and ends by itself when
// it finds the socket at its end. manager is told what the agent tells the service manager ([Client.Tell]).
func Run(agent *exec.Cmd, told <-chan os.Signal, command func(Part) *exec.Cmd, manager func(string), log *slog.Logger) error {
	near, far, err := wire.Pair()
	if err != nil {
		return err
	}
	hears, says, err := wire.Packets()
	if err != nil {
		return errors.Join(err, near.Close(), far.Close())
	}
	defer hears.Close()
	agent.ExtraFiles = []*os.File{far, says}
	if agent.SysProcAttr == nil {
		agent.SysProcAttr = &syscall.SysProcAttr{}
	}
	// It is about the thread that starts the agent, which must not end before this process does.
	agent.SysProcAttr.Pdeathsig = syscall.SIGKILL
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err = agent.Start()
	far.Close()
	says.Close()
	if err != nil {
		near.Close()
		return fmt.Errorf("starting the agent: %w", err)
	}
	ended, failed := make(chan error, 1), make(chan error, 1)
	go func() { ended <- agent.Wait() }()
	go func() { failed <- spawn(near, command, log) }()
	go relay(hears, manager)
	for {
		select {
		case sig := <-told:
			if s, ok := sig.(syscall.Signal); ok {
				tell(near, s)
			}
		case err := <-failed:
			if err != nil {
				return errors.Join(fmt.Errorf("the agent asks for what there is not: %w", err), dismiss(agent, ended))
			}
			failed = nil // its end is closed: it is about to end
		case err := <-ended:
			near.Close()
			return outcome(err)
		}
	}
}

// maxNotice bounds what the service manager is told at once.
const maxNotice = 4 << 10

// relay passes on no more than that the agent is ready, alive or about to end, and in one line what it does.
func relay(conn *net.UnixConn, manager func(string)) {
	b := make([]byte, maxNotice)
	for {
		n, err := conn.Read(b)
		if err != nil || n == 0 {
			return
		}
		var lines []string
		for line := range strings.SplitSeq(string(b[:n]), "\n") {
			switch key, _, _ := strings.Cut(line, "="); key {
			case "READY", "RELOADING", "MONOTONIC_USEC", "STOPPING", "STATUS", "WATCHDOG":
				lines = append(lines, line)
			}
		}
		if len(lines) > 0 {
			manager(strings.Join(lines, "\n"))
		}
	}
}

// tell passes a signal on as its number: the agent may be another user's process, to which a signal needs a right that this one need not have.
func tell(conn *net.UnixConn, s syscall.Signal) {
	conn.SetWriteDeadline(time.Now().Add(time.Second)) // one that does not read is not waited for
	_, _ = conn.Write([]byte{byte(s)})
}

// patience is how long an agent that was killed may take to be gone.
const patience = 20 * time.Second

// dismiss ends an agent that is not to be trusted any more. Its socket is closed already.
func dismiss(agent *exec.Cmd, ended <-chan error) error {
	err := agent.Process.Kill()
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		err = fmt.Errorf("ending the agent: %w", err)
	}
	select {
	case <-ended:
		return nil
	case <-time.After(patience): // the service manager ends what is left
		return err
	}
}

func outcome(err error) error {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	if w, ok := exit.Sys().(syscall.WaitStatus); ok && w.Signaled() {
		return &EndedError{Status: 128 + int(w.Signal()), Signal: w.Signal()}
	}
	return &EndedError{Status: exit.ExitCode()}
}
