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
)

// Start starts a writer. The caller closes the client.
type Start func(context.Context) (*Client, error)

// InProcess starts writers that are goroutines of this process, behind the same socket and with the same checks: for tests, and where there is nothing to be kept apart.
func InProcess(load func() (config.Config, error), log *slog.Logger) Start {
	return func(context.Context) (*Client, error) {
		near, far, err := Pair()
		if err != nil {
			return nil, err
		}
		conn, err := Conn(far)
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

// Spawner is a process that does nothing but start writers. It is started before the agent gives its own rights up, and keeps them for the writers.
type Spawner struct {
	cmd  *exec.Cmd
	mu   sync.Mutex
	conn *net.UnixConn
	lost chan struct{}
}

// socketFd is where a process finds its end of the socket.
const socketFd = 3

// StartSpawner starts cmd, which must call [Spawn] with [Inherited].
func StartSpawner(cmd *exec.Cmd) (*Spawner, error) {
	near, far, err := Pair()
	if err != nil {
		return nil, err
	}
	defer far.Close()
	cmd.ExtraFiles = []*os.File{far}
	// What is typed at a terminal is for the agent; the others end after it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		near.Close()
		return nil, fmt.Errorf("starting the process that starts writers: %w", err)
	}
	s := &Spawner{cmd: cmd, conn: near, lost: make(chan struct{})}
	go func() {
		defer close(s.lost)
		cmd.Wait()
	}()
	return s, nil
}

// Lost is closed when the process has ended. Nothing can be written to the disk then.
func (s *Spawner) Lost() <-chan struct{} { return s.lost }

// Start is a [Start]: a process for each writer.
func (s *Spawner) Start(context.Context) (*Client, error) {
	near, far, err := Pair()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrGone, err)
	}
	defer far.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, _, err := s.conn.WriteMsgUnix([]byte{0}, unix.UnixRights(int(far.Fd())), nil); err != nil {
		near.Close()
		return nil, fmt.Errorf("%w: asking for one: %w", ErrGone, err)
	}
	return NewClient(near), nil
}

// Close ends the process, and waits until it has ended. Writers end with their own sockets.
func (s *Spawner) Close() error {
	err := s.conn.Close()
	<-s.lost
	return err
}

// Inherited is the end of the socket that a spawner or a writer was started with. Signals that end a service as a whole are for the agent: this process ends
// with the socket, in order.
func Inherited() (*net.UnixConn, error) {
	signal.Notify(make(chan os.Signal, 1), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	if typ, err := unix.GetsockoptInt(socketFd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || typ != unix.SOCK_STREAM {
		return nil, errors.New("this process was not started by flipsided: it has no socket")
	}
	unix.CloseOnExec(socketFd)
	return Conn(os.NewFile(socketFd, "socket"))
}

// Spawn starts a command for every socket that comes over conn, with that socket, until conn is at its end.
func Spawn(conn *net.UnixConn, command func() *exec.Cmd, log *slog.Logger) error {
	defer conn.Close()
	var b [1]byte
	rights := make([]byte, unix.CmsgSpace(4))
	for {
		_, n, flags, _, err := conn.ReadMsgUnix(b[:], rights)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("waiting for somebody who wants a writer: %w", err)
		}
		f, err := received(rights[:n])
		if err != nil || flags&unix.MSG_CTRUNC != 0 {
			return errors.Join(errors.New("something else than one socket came"), err)
		}
		cmd := command()
		cmd.ExtraFiles = []*os.File{f}
		err = cmd.Start()
		f.Close() // the agent finds out at once when nobody has the other end
		if err != nil {
			log.Error("the process that writes to the disk cannot be started", "error", err)
			continue
		}
		go func() {
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
