package supervisor

import (
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/flipside-linux/flipside/updater/wire"
)

// Client is the agent's end of the sockets to the process that started it.
type Client struct {
	mu      sync.Mutex // a message at a time
	conn    *net.UnixConn
	manager *net.UnixConn
	lost    chan struct{}
}

// managerFd is where the agent finds its end of the socket for what the service manager is told.
const managerFd = socketFd + 1

// Connect takes over what [Run] has started the agent with. told is called with the signals that it passes on.
func Connect(told func(syscall.Signal)) (*Client, error) {
	conn, err := Inherited()
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(managerFd)
	manager, err := wire.Conn(os.NewFile(managerFd, "manager"))
	if err != nil {
		conn.Close()
		return nil, err
	}
	return newClient(conn, manager, told), nil
}

func newClient(conn, manager *net.UnixConn, told func(syscall.Signal)) *Client {
	c := &Client{conn: conn, manager: manager, lost: make(chan struct{})}
	go func() {
		defer close(c.lost)
		var b [1]byte
		for {
			if _, err := conn.Read(b[:]); err != nil {
				return
			}
			told(syscall.Signal(b[0]))
		}
	}()
	return c
}

// Lost is closed when the supervisor has ended. Nothing that needs its rights can be done then.
func (c *Client) Lost() <-chan struct{} { return c.lost }

// Start has a part started, and returns the socket to it. One that could not be started is found out by its first answer: the socket is at its end.
func (c *Client) Start(which Part) (*net.UnixConn, error) {
	near, far, err := wire.Pair()
	if err != nil {
		return nil, err
	}
	defer far.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, _, err := c.conn.WriteMsgUnix([]byte{byte(which)}, unix.UnixRights(int(far.Fd())), nil); err != nil {
		near.Close()
		return nil, fmt.Errorf("asking for a process (%s): %w", which, err)
	}
	return near, nil
}

// Tell tells the service manager something (sd_notify(3)), of which the supervisor passes on how the service is and no more. It is lost if that has ended.
func (c *Client) Tell(state string) {
	_, _ = c.manager.Write([]byte(state[:min(len(state), maxNotice)]))
}
