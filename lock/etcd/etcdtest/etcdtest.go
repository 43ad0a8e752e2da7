// Package etcdtest runs a real etcd inside this process, on loopback, for tests and demonstrations.
package etcdtest

import (
	"errors"
	"fmt"
	"net/url"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// startTimeout is how long a member may take to be ready; it flushes its first log while other programs use the disk too.
const startTimeout = 60 * time.Second

// StartEmbedded runs an etcd of one member that keeps its data in dir. It returns the address of its clients and what ends it.
func StartEmbedded(dir string) (endpoint string, stop func(), err error) {
	e, err := Start(Config(dir))
	if err != nil {
		return "", nil, err
	}
	return "http://" + e.Clients[0].Addr().String(), e.Close, nil
}

// Config is what StartEmbedded uses: quiet, on free ports of the loopback interface.
func Config(dir string) *embed.Config {
	cfg := embed.NewConfig()
	cfg.Dir = dir
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	loopback := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenClientUrls, cfg.ListenPeerUrls = []url.URL{loopback}, []url.URL{loopback}
	cfg.AdvertiseClientUrls, cfg.AdvertisePeerUrls = cfg.ListenClientUrls, cfg.ListenPeerUrls
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	return cfg
}

// Start runs one member and returns when it is ready.
func Start(cfg *embed.Config) (*embed.Etcd, error) {
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, fmt.Errorf("starting etcd in %s: %w", cfg.Dir, err)
	}
	select {
	case <-e.Server.ReadyNotify():
		return e, nil
	case err = <-e.Err():
	case <-time.After(startTimeout):
		err = errors.New("it is not ready in time")
	}
	e.Close()
	return nil, fmt.Errorf("starting etcd in %s: %w", cfg.Dir, err)
}
