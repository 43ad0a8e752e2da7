package wire

import (
	"fmt"
	"net"
	"os"
	"syscall"
)

// Pair makes a socket between two processes. The second end is for the other one: a child gets it among its ExtraFiles.
func Pair() (*net.UnixConn, *os.File, error) { return pair(syscall.SOCK_STREAM) }

// Ends is a [Pair] with both ends in this process.
func Ends() (near, far *net.UnixConn, err error) {
	near, f, err := Pair()
	if err != nil {
		return nil, nil, err
	}
	if far, err = Conn(f); err != nil {
		near.Close()
		return nil, nil, err
	}
	return near, far, nil
}

// Packets is a [Pair] that keeps what is written at once together.
func Packets() (*net.UnixConn, *os.File, error) { return pair(syscall.SOCK_SEQPACKET) }

func pair(kind int) (*net.UnixConn, *os.File, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, kind|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("making a socket between two processes: %w", err)
	}
	far := os.NewFile(uintptr(fds[1]), "far end")
	near, err := Conn(os.NewFile(uintptr(fds[0]), "near end"))
	if err != nil {
		far.Close()
		return nil, nil, err
	}
	return near, far, nil
}

// Conn makes a connection of one end of a socket, and closes the file.
func Conn(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("taking the socket over: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("taking the socket over: it is one of %s", c.LocalAddr().Network())
	}
	return u, nil
}
