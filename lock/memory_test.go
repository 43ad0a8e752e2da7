package lock_test

import (
	"testing"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/locktest"
)

func TestConformance(t *testing.T) {
	locktest.Run(t, func(*testing.T) locktest.Backend {
		m := lock.NewMemory()
		return locktest.Backend{Open: func(_ *testing.T, opt lock.Options) *lock.Keeper { return lock.On(m, opt) }}
	})
}
