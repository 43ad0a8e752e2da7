package host

import (
	"sync"
	"time"

	"github.com/flipside-linux/flipside/omaha"
)

// addresses remembers which payload addresses failed here, so that the next attempt begins with one that has not. None is
// ever left out: an address that failed is better than none. The memory ends with the process.
type addresses struct {
	mu     sync.Mutex
	memory omaha.Failures
}

// order puts the addresses that may be tried first in front; otherwise the server's order stays.
func (a *addresses) order(urls []string) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.memory.Order(urls, time.Now())
}

func (a *addresses) failed(address string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.memory = a.memory.With(address, time.Now(), err.Error(), omaha.AddressBackoff())
}

func (a *addresses) well(address string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.memory = a.memory.Without(address)
}

// downloadOptions are how payloads are fetched on this host.
func (in *installer) downloadOptions() omaha.DownloadOptions {
	opt := omaha.DownloadOptions{AllowPlainHTTP: in.conf.Update.HTTP, MinRate: int64(in.conf.Update.MinRate), Failed: in.addresses.failed}
	if opt.MinRate == 0 {
		opt.MinRate = -1 // zero would be the default
	}
	return opt
}
