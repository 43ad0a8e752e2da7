package writer

import (
	"context"
	"fmt"
	"log/slog"
	"net"

	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/wire"
)

// Start starts a writer. The caller closes the client.
type Start func(context.Context) (*Client, error)

// InProcess starts writers that are goroutines of this process, behind the same socket and with the same checks: for tests, and where there is nothing to be kept apart.
func InProcess(load func() (config.Config, error), log *slog.Logger) Start {
	return func(context.Context) (*Client, error) {
		near, far, err := wire.Ends()
		if err != nil {
			return nil, err
		}
		go func() {
			// It ends with the socket, as a process would.
			if err := Serve(context.Background(), far, load, log); err != nil {
				log.Error("the writer ended", "error", err)
			}
		}()
		return NewClient(near), nil
	}
}

// Over starts writers that are processes: connect starts one, and returns the socket to it.
func Over(connect func() (*net.UnixConn, error)) Start {
	return func(context.Context) (*Client, error) {
		conn, err := connect()
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrGone, err)
		}
		return NewClient(conn), nil
	}
}
