package devicetest

import (
	"testing"

	"github.com/flipside-linux/flipside/partition"
)

func TestMemory(t *testing.T) {
	Run(t, func(*testing.T) partition.Device { return NewMemory(make([]byte, 1<<16), 512) })
	Run(t, func(*testing.T) partition.Device {
		return NewStrict(make([]byte, 1<<16), 4096)
	})
}
