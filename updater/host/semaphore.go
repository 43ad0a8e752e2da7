package host

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/fleetlock"
	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/trust"
)

// semaphore connects to the cluster's semaphore; without an address there is none.
func semaphore(c config.Lock, tpm string) (lock.Semaphore, func() error, error) {
	switch {
	case c.FleetLock != "":
		return fleetLock(c, tpm)
	case len(c.Endpoints) == 0:
		return nil, func() error { return nil }, nil
	}
	password := ""
	if c.Password != "" {
		var err error
		if password, err = readLine("etcd password", c.Password); err != nil {
			return nil, nil, err
		}
	}
	cert, err := clientCertificate(c.Cert, c.Key, tpm)
	if err != nil {
		return nil, nil, fmt.Errorf("the semaphore: %w", err)
	}
	opt := lock.Options{Synchronised: new(reboot.Clock).Synchronised}
	if c.Signer != "" {
		if opt.Signer, err = trust.Signer(c.Signer, tpm); err != nil {
			return nil, nil, fmt.Errorf("the semaphore: lock.signer: %w", err)
		}
	}
	if opt.Owners, err = trust.PublicKeys(c.Owners); err != nil {
		return nil, nil, fmt.Errorf("the semaphore: lock.owners: %w", err)
	}
	k, err := etcd.New(etcd.Config{
		Endpoints: c.Endpoints, CA: c.CA, Certificate: cert, User: c.User, Password: password, RequestTimeout: time.Duration(c.Timeout), Keeper: opt,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("the semaphore: %w", err)
	}
	return k, k.Close, nil
}

func fleetLock(c config.Lock, tpm string) (lock.Semaphore, func() error, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CA != "" {
		pem, err := os.ReadFile(c.CA)
		if err != nil {
			return nil, nil, fmt.Errorf("the semaphore: reading lock.ca: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, nil, fmt.Errorf("the semaphore: lock.ca: %s holds no certificate", c.CA)
		}
	}
	cert, err := clientCertificate(c.Cert, c.Key, tpm)
	if err != nil {
		return nil, nil, fmt.Errorf("the semaphore: lock.cert, lock.key: %w", err)
	}
	if cert != nil {
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert() }
	}
	tr := http.DefaultTransport.(*http.Transport).Clone()
	tr.TLSClientConfig, tr.Proxy = conf, nil // the environment's proxy is for what is fetched, from outside
	if c.Proxy != "" && c.Proxy != "direct" {
		u, err := url.Parse(c.Proxy)
		if err != nil {
			return nil, nil, errors.New("the semaphore: lock.proxy cannot be read as a URL")
		}
		tr.Proxy = http.ProxyURL(u)
	}
	f, err := fleetlock.New(c.FleetLock, fleetlock.Options{HTTP: &http.Client{Transport: tr}, Timeout: time.Duration(c.Timeout)})
	if err != nil {
		return nil, nil, fmt.Errorf("the semaphore: %w", err)
	}
	return f, func() error { tr.CloseIdleConnections(); return nil }, nil
}

// clientCertificate returns what reads a client certificate at every handshake, because certificates are renewed while the daemon runs; nil if there is
// none. One that cannot be read now is an error now.
func clientCertificate(cert, key, tpm string) (func() (*tls.Certificate, error), error) {
	if cert == "" {
		return nil, nil
	}
	read := func() (*tls.Certificate, error) { return trust.Certificate(cert, key, tpm) }
	_, err := read()
	return read, err
}
