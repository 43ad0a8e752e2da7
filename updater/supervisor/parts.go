package supervisor

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/updater/wire"
)

// Part says what a process is for that the agent has started.
type Part byte

// The parts. Each is a process of its own that ends when its work is done or the agent's end of its socket is closed.
const (
	Writer Part = iota // may write to the disk: package writer
	Errand             // does one errand of those that need root: package host
	parts
)

// String is the part's name.
func (p Part) String() string {
	switch p {
	case Writer:
		return "writer"
	case Errand:
		return "errand"
	}
	return fmt.Sprintf("part %d", byte(p))
}

// socketFd is where a process finds its end of the socket.
const socketFd = 3

// Inherited is the end of the socket that a part, or the agent, was started with. Signals that end a service as a whole end none of them by themselves: the parts end
// with the socket, in order.
func Inherited() (*net.UnixConn, error) {
	signal.Notify(make(chan os.Signal, 1), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	if typ, err := unix.GetsockoptInt(socketFd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || typ != unix.SOCK_STREAM {
		return nil, errors.New("this process was not started by flipsided: it has no socket")
	}
	unix.CloseOnExec(socketFd)
	return wire.Conn(os.NewFile(socketFd, "socket"))
}

// atOnce is how many processes of parts there may be. An honest agent has few at a time.
const atOnce = 16

// spawn starts a command for every socket that comes over conn, with that socket, until conn is at its end. One byte that says which part is all that it
// is told.
func spawn(conn *net.UnixConn, command func(Part) *exec.Cmd, log *slog.Logger) error {
	defer conn.Close()
	var b [1]byte
	rights := make([]byte, unix.CmsgSpace(4))
	places := make(chan struct{}, atOnce)
	for {
		read, n, flags, _, err := conn.ReadMsgUnix(b[:], rights)
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("waiting for somebody who wants a part started: %w", err)
		}
		f, err := received(rights[:n])
		if err != nil || flags&unix.MSG_CTRUNC != 0 || read != 1 || b[0] >= byte(parts) {
			return errors.Join(fmt.Errorf("something else than one part's number and one socket came: %d bytes, %v", read, b), err)
		}
		select {
		case places <- struct{}{}:
		default:
			f.Close()
			log.Error("too many processes are under way for the agent; it gets no other one", "processes", atOnce)
			continue
		}
		part := Part(b[0])
		cmd := command(part)
		cmd.ExtraFiles = []*os.File{f}
		err = cmd.Start()
		f.Close() // the agent finds out at once when nobody has the other end
		if err != nil {
			<-places
			log.Error("a process that the agent asks for cannot be started", "part", part, "error", err)
			continue
		}
		go func() {
			defer func() { <-places }()
			var exit *exec.ExitError
			if err := cmd.Wait(); errors.As(err, &exit) && !exit.Exited() { // what it said itself need not be said again
				log.Error("a process that the agent has asked for was ended", "part", part, "error", err)
			}
		}()
	}
}

// received takes the one file out of a message.
func received(rights []byte) (*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("%d messages: %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, fmt.Errorf("%d files: %w", len(fds), err)
	}
	unix.CloseOnExec(fds[0])
	return os.NewFile(uintptr(fds[0]), "socket"), nil
}
