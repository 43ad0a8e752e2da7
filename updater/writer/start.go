package writer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/wire"
)

// Start starts a writer. The caller closes the client.
type Start func(context.Context) (*Client, error)

// InProcess starts writers that are goroutines of this process, behind the same socket and with the same checks: for tests, and where there is nothing to be kept apart.
func InProcess(load func() (config.Config, error), log *slog.Logger) Start {
	return func(context.Context) (*Client, error) {
		near, far, err := wire.Pair()
		if err != nil {
			return nil, err
		}
		conn, err := wire.Conn(far)
		if err != nil {
			near.Close()
			return nil, err
		}
		go func() {
			// It ends with the socket, as a process would.
			if err := Serve(context.Background(), conn, load, log); err != nil {
				log.Error("the writer ended", "error", err)
			}
		}()
		return NewClient(near), nil
	}
}

// Part says what a process is for that an agent has started.
type Part byte

// The parts. Each is a process of its own that ends when its work is done or the agent's end of its socket is closed.
const (
	TheWriter  Part = iota // answers a [Client]
	TheErrands             // does one errand of those that need root: see package host
	parts
)

// Spawner is the agent's end of the socket to the process that started it, which keeps the rights that the agent gives up, and does nothing with them but start
// the other parts.
type Spawner struct {
	mu   sync.Mutex
	conn *net.UnixConn
	lost chan struct{}
}

// NewSpawner asks whoever is at the other end of conn, which calls [Spawn] or [Supervise]. told is called with the signals that it passes on.
func NewSpawner(conn *net.UnixConn, told func(syscall.Signal)) *Spawner {
	s := &Spawner{conn: conn, lost: make(chan struct{})}
	go func() {
		defer close(s.lost)
		var b [1]byte
		for {
			if _, err := conn.Read(b[:]); err != nil {
				return
			}
			told(syscall.Signal(b[0]))
		}
	}()
	return s
}

// Lost is closed when the process has ended. Nothing can be written to the disk then.
func (s *Spawner) Lost() <-chan struct{} { return s.lost }

// Start is a [Start]: a process for each writer.
func (s *Spawner) Start(context.Context) (*Client, error) {
	conn, err := s.Connect(TheWriter)
	if err != nil {
		return nil, err
	}
	return NewClient(conn), nil
}

// Connect starts a part, and returns the socket to it.
func (s *Spawner) Connect(which Part) (*net.UnixConn, error) {
	near, far, err := wire.Pair()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrGone, err)
	}
	defer far.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, _, err := s.conn.WriteMsgUnix([]byte{byte(which)}, unix.UnixRights(int(far.Fd())), nil); err != nil {
		near.Close()
		return nil, fmt.Errorf("%w: asking for one: %w", ErrGone, err)
	}
	return near, nil
}

// Close closes the socket. The parts end with their own ones.
func (s *Spawner) Close() error {
	err := s.conn.Close()
	<-s.lost
	return err
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

// Spawn starts a command for every socket that comes over conn, with that socket, until conn is at its end. One byte that says which part is all that it
// is told.
func Spawn(conn *net.UnixConn, command func(Part) *exec.Cmd, log *slog.Logger) error {
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
		cmd := command(Part(b[0]))
		cmd.ExtraFiles = []*os.File{f}
		err = cmd.Start()
		f.Close() // the agent finds out at once when nobody has the other end
		if err != nil {
			<-places
			log.Error("the process that writes to the disk cannot be started", "error", err)
			continue
		}
		go func() {
			defer func() { <-places }()
			var exit *exec.ExitError
			if err := cmd.Wait(); errors.As(err, &exit) && !exit.Exited() { // what it said itself need not be said again
				log.Error("the process that writes to the disk was ended", "error", err)
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
