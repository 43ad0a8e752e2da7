package etcd_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
)

// authority signs certificates for a test and writes them to files.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t *testing.T, name string) *authority {
	a := &authority{t: t, dir: t.TempDir()}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.key = key
	a.file = a.write("ca.pem", "CERTIFICATE", der)
	return a
}

func (a *authority) write(name, kind string, der []byte) string {
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

func (a *authority) issue(name string, usage ...x509.ExtKeyUsage) (cert, key string) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: usage,
	}, a.cert, &k.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	kd, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	return a.write(name+".pem", "CERTIFICATE", der), a.write(name+".key", "PRIVATE KEY", kd)
}

func TestTLS(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t, "ours"), newAuthority(t, "another")
	serverCert, serverKey := ca.issue("server", x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth)
	clientCert, clientKey := ca.issue("client", x509.ExtKeyUsageClientAuth)
	strangerCert, strangerKey := other.issue("stranger", x509.ExtKeyUsageClientAuth)
	for _, mutual := range []bool{false, true} {
		cfg := etcdtest.Config(t.TempDir())
		cfg.ListenClientUrls = []url.URL{{Scheme: "https", Host: "127.0.0.1:0"}}
		cfg.AdvertiseClientUrls = cfg.ListenClientUrls
		cfg.ClientTLSInfo = transport.TLSInfo{CertFile: serverCert, KeyFile: serverKey}
		if mutual {
			cfg.ClientTLSInfo.TrustedCAFile, cfg.ClientTLSInfo.ClientCertAuth = ca.file, true
		}
		e, err := etcdtest.Start(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		endpoint := "https://" + e.Clients[0].Addr().String()
		for _, tt := range []struct {
			name          string
			ca, cert, key string
			ok            bool
		}{
			{"authority and certificate", ca.file, clientCert, clientKey, true},
			{"authority alone", ca.file, "", "", !mutual}, // older tools insisted on a certificate here
			{"no authority", "", clientCert, clientKey, false},
			{"the wrong authority", other.file, clientCert, clientKey, false},
			{"a stranger's certificate", ca.file, strangerCert, strangerKey, !mutual},
		} {
			patience := time.Minute
			if !tt.ok { // as long as it may take, where nothing comes of it
				patience = 1500 * time.Millisecond
			}
			k, err := etcd.New(etcd.Config{Endpoints: []string{endpoint}, CA: tt.ca, Cert: tt.cert, Key: tt.key, RequestTimeout: patience})
			if err != nil {
				t.Fatal(err)
			}
			_, err = k.Request(t.Context(), lock.Claim{Group: "g", Host: "a"})
			if (err == nil) != tt.ok || err != nil && !errors.Is(err, lock.ErrUnavailable) {
				t.Errorf("%s, mutual %v: %v", tt.name, mutual, err)
			}
			k.Close()
		}
	}
}

// A token of etcd's own authentication ends while the daemon runs; the next call gets a new one.
func TestTokenExpires(t *testing.T) {
	t.Parallel()
	cfg := etcdtest.Config(t.TempDir())
	cfg.AuthTokenTTL = 1
	e, err := etcdtest.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	endpoint := "http://" + e.Clients[0].Addr().String()
	c := client(t, endpoint)
	ctx := t.Context()
	for _, step := range []func() error{
		func() error { _, err := c.UserAdd(ctx, "root", "secret"); return err },
		func() error { _, err := c.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := c.AuthEnable(ctx); return err },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	k := open(t, etcd.Config{Endpoints: []string{endpoint}, User: "root", Password: "secret"})
	for range 3 {
		if st, err := k.Request(ctx, lock.Claim{Group: "g", Host: "a"}); err != nil || !st.Granted {
			t.Fatalf("%+v, %v", st, err)
		}
		time.Sleep(1500 * time.Millisecond)
	}
	if err := k.Release(ctx, "g", "a", lock.Verdict{Outcome: lock.Healthy}); err != nil {
		t.Error(err)
	}
}
