package trust

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
)

// Certificate reads a client certificate and its key: a PEM file, or [KeyName], the device key of the TPM at a path.
func Certificate(certFile, keyName, tpm string) (*tls.Certificate, error) {
	if !IsKeyName(keyName) {
		pair, err := tls.LoadX509KeyPair(certFile, keyName)
		if err != nil {
			return nil, fmt.Errorf("reading the client certificate: %w", err)
		}
		return &pair, nil
	}
	if keyName != KeyName {
		return nil, fmt.Errorf("key %q: the TPM's key is called %q", keyName, KeyName)
	}
	data, err := os.ReadFile(certFile)
	if err != nil {
		return nil, fmt.Errorf("reading the client certificate: %w", err)
	}
	d, err := OpenDevice(tpm)
	if err != nil {
		return nil, err
	}
	// The TPM's key signs SHA-256 digests; without this list TLS might ask for others.
	cert := &tls.Certificate{PrivateKey: d, SupportedSignatureAlgorithms: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}}
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type == "CERTIFICATE" {
			cert.Certificate = append(cert.Certificate, block.Bytes)
		}
	}
	if len(cert.Certificate) == 0 {
		return nil, fmt.Errorf("reading the client certificate: %s holds none", certFile)
	}
	if cert.Leaf, err = x509.ParseCertificate(cert.Certificate[0]); err != nil {
		return nil, fmt.Errorf("reading the client certificate: %s: %w", certFile, err)
	}
	if pub, ok := cert.Leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(d.Public()) {
		return nil, fmt.Errorf("the certificate %s is not for the device key of this TPM; flipside trust request makes a new request", certFile)
	}
	return cert, nil
}
