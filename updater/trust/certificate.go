package trust

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"

	"github.com/flipside-linux/flipside/payload"
)

// Signer reads a private key: a PEM file, or [KeyName], the device key of the TPM at a path.
func Signer(keyName, tpm string) (crypto.Signer, error) {
	if IsKeyName(keyName) {
		if keyName != KeyName {
			return nil, fmt.Errorf("key %q: the TPM's key is called %q", keyName, KeyName)
		}
		return OpenDevice(tpm)
	}
	data, err := os.ReadFile(keyName)
	if err != nil {
		return nil, fmt.Errorf("reading a private key: %w", err)
	}
	key, err := parsePrivate(data)
	if err != nil {
		return nil, fmt.Errorf("reading a private key: %s: %w", keyName, err)
	}
	return key, nil
}

func parsePrivate(data []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("it holds no PEM block")
	}
	var key any
	var err error
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	default:
		err = fmt.Errorf("a PEM block of type %q is not a private key", block.Type)
	}
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a key of type %T cannot sign", key)
	}
	return signer, nil
}

// PublicKeys reads public keys from PEM files.
func PublicKeys(files []string) ([]crypto.PublicKey, error) {
	var keys []crypto.PublicKey
	for _, file := range files {
		data, err := readKeyFile(file)
		if err != nil {
			return nil, fmt.Errorf("reading a public key: %w", err)
		}
		list, err := payload.ParsePEM(data)
		if err != nil {
			return nil, fmt.Errorf("reading a public key: %s: %w", file, err)
		}
		keys = append(keys, list...)
	}
	return keys, nil
}

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
