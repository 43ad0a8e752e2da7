package writer

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

	"golang.org/x/sys/unix"

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

// Supervise runs agent as a child with a socket ([Inherited], [NewSpawner]), starts parts for it as [Spawn] does, passes on the signals that come on told, and returns when
// the agent has ended, with an [*EndedError] if that was not well. The two end together: the agent is killed if this process is, and ends by itself when
// it finds the socket at its end. manager is told what the agent tells the service manager ([TellManager]).
func Supervise(agent *exec.Cmd, told <-chan os.Signal, command func(Part) *exec.Cmd, manager func(string), log *slog.Logger) error {
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
	go func() { failed <- Spawn(near, command, log) }()
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

// managerFd is where the agent finds its end of the socket for what the service manager is told.
const managerFd = socketFd + 1

// maxNotice bounds what the service manager is told at once.
const maxNotice = 4 << 10

// TellManager is how the agent tells the service manager something (sd_notify(3)): through the process that the manager has started, which passes on no more than
// that the agent is ready, alive or about to end, and in one line what it does.
func TellManager() (func(string), error) {
	unix.CloseOnExec(managerFd)
	conn, err := wire.Conn(os.NewFile(managerFd, "manager"))
	if err != nil {
		return nil, err
	}
	return func(state string) { _, _ = conn.Write([]byte(state[:min(len(state), maxNotice)])) }, nil
}

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
