package writer

import (
	"context"
	"log/slog"

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
