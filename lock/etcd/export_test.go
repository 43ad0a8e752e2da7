package etcd

import "time"

// FastRecheck is a configuration whose followers ask for the state all the time.
func FastRecheck(cfg Config) Config {
	cfg.recheck = 20 * time.Millisecond
	return cfg
}
