package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/payload/build"
)

func (a *app) payloadKeygenCommand() *cobra.Command {
	var kind string
	cmd := &cobra.Command{
		Use:   "keygen FILE",
		Short: "make a key to sign payloads with",
		Long: `Keygen writes a private key to FILE, which only its owner can read, and the public key that hosts pin to FILE.pub.
Nothing is ever overwritten: a key that is lost cannot be made again.`,
		Args: exactArgs(1, "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var key crypto.Signer
			var err error
			switch kind {
			case "rsa2048":
				key, err = rsa.GenerateKey(rand.Reader, 2048)
			case "rsa4096":
				key, err = rsa.GenerateKey(rand.Reader, 4096)
			case "p256":
				key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			default:
				return usagef("--type %q is not one of rsa2048, rsa4096, p256", kind)
			}
			if err != nil {
				return fmt.Errorf("making a key: %w", err)
			}
			private, err1 := x509.MarshalPKCS8PrivateKey(key)
			public, err2 := x509.MarshalPKIXPublicKey(key.Public())
			if err := errors.Join(err1, err2); err != nil {
				return fmt.Errorf("making a key: %w", err)
			}
			if err := writeNew(args[0], pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600); err != nil {
				return err
			}
			if err := writeNew(args[0]+".pub", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), 0o644); err != nil {
				return err
			}
			if a.json {
				return a.printJSON(struct {
					Schema  string `json:"schema"`
					Type    string `json:"type"`
					Private string `json:"private"`
					Public  string `json:"public"`
				}{"flipside.keygen/v1", kind, args[0], args[0] + ".pub"})
			}
			_, err = fmt.Fprintf(a.stdout, "private key %s: keep it off every network\npublic key  %s.pub: pin it on every host\n", args[0], args[0])
			return err
		},
	}
	cmd.Flags().StringVar(&kind, "type", "rsa4096", "rsa2048, rsa4096 or p256")
	return cmd
}

// writeNew writes a file that must not exist.
func writeNew(path string, data []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, os.ErrExist) {
		return withHint(fmt.Errorf("%s exists already", path), "choose another name; keys are never overwritten")
	}
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

// loadSigner reads a private key.
func loadSigner(path string) (crypto.Signer, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading a private key: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("reading a private key: %s holds no PEM block", path)
	}
	var key any
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
		return nil, fmt.Errorf("reading a private key: %s: %w", path, err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("reading a private key: %s: a key of type %T cannot sign", path, key)
	}
	return signer, nil
}

func (a *app) payloadCreateCommand() *cobra.Command {
	var images, keys []string
	var out, compress, product string
	var timestamp int64
	var force bool
	cmd := &cobra.Command{
		Use:   "create --new IMAGE --key KEY --out FILE",
		Short: "make a full, signed payload from image files",
		Long: `Create makes a full payload of major version 2 from one or more images, and signs it with one or more keys: a host that pins any of
them accepts it, which is how keys are rotated. The same images and RSA keys give the same bytes.

Beside FILE it writes FILE.json with the properties that release servers ask for.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if len(images) == 0 || len(keys) == 0 || out == "" {
				return usagef("create needs --new, --key and --out")
			}
			if _, err := os.Stat(out); err == nil && !force {
				return withHint(fmt.Errorf("%s exists already", out), "--force replaces it")
			}
			spec := build.Spec{Compression: build.Compression(compress), MaxTimestamp: timestamp, Product: product, TempDir: filepath.Dir(out)}
			for _, k := range keys {
				s, err := loadSigner(k)
				if err != nil {
					return err
				}
				spec.Keys = append(spec.Keys, s)
			}
			var total int64
			for _, arg := range images {
				name, path, ok := strings.Cut(arg, "=")
				if !ok {
					name, path = "usr", arg
				}
				f, err := os.Open(path)
				if err != nil {
					return fmt.Errorf("opening an image: %w", err)
				}
				defer f.Close()
				size, err := f.Seek(0, 2)
				if err != nil {
					return fmt.Errorf("opening an image: %w", err)
				}
				spec.Images = append(spec.Images, build.Image{Name: name, Data: f, Size: size})
				total += size
			}
			bar := a.progress("compressing", total)
			spec.Progress = func(done, _ int64) { bar.Set(done) }
			tmp, err := os.CreateTemp(filepath.Dir(out), "."+filepath.Base(out)+".partial-")
			if err != nil {
				return err
			}
			defer os.Remove(tmp.Name())
			defer tmp.Close()
			res, err := build.Full(cmd.Context(), tmp, spec)
			if err != nil {
				return err
			}
			bar.Done()
			if err := errors.Join(tmp.Chmod(0o644), tmp.Sync(), os.Rename(tmp.Name(), out)); err != nil {
				return fmt.Errorf("finishing %s: %w", out, err)
			}
			props := properties{
				Schema: "flipside.payload-properties/v1", File: filepath.Base(out), Size: res.Size, SHA256: hex.EncodeToString(res.SHA256[:]),
				SHA256Base64: base64.StdEncoding.EncodeToString(res.SHA256[:]), MetadataSize: res.MetadataSize,
			}
			data, err := json.MarshalIndent(props, "", "  ")
			if err != nil {
				return err
			}
			if err := os.WriteFile(out+".json", append(data, '\n'), 0o644); err != nil {
				return err
			}
			if a.json {
				return a.printJSON(props)
			}
			_, err = fmt.Fprintf(a.stdout, "%s: %s from %s of images (%.0f %%), SHA-256 %s\n", out, formatBytes(res.Size), formatBytes(total), float64(res.Size)*100/float64(total), props.SHA256)
			return err
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&images, "new", nil, "image file, or NAME=FILE for a partition that is not called usr")
	f.StringSliceVar(&keys, "key", nil, "private key to sign with (PEM); more than one while keys are rotated")
	f.StringVarP(&out, "out", "o", "", "payload file to write")
	f.StringVar(&compress, "compress", string(build.Zstd), "zstd, xz, bzip2 or none")
	f.Int64Var(&timestamp, "max-timestamp", 0, "monotonic number of the release, against going back; 0 is none")
	f.StringVar(&product, "product", "", "what the payload is for; a host with trust.product takes no other")
	f.BoolVar(&force, "force", false, "replace the payload file if it exists")
	return cmd
}

// properties are what a release server wants to know of a payload file.
type properties struct {
	Schema       string `json:"schema"`
	File         string `json:"file"`
	Size         int64  `json:"size"`
	SHA256       string `json:"sha256"`
	SHA256Base64 string `json:"sha256_base64"`
	MetadataSize int64  `json:"metadata_size"`
}
