package main

import (
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/payload/build"
)

// openFile opens a payload file to be read at any place.
func openFile(path string) (*os.File, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

// loadPublic reads public keys, one from each file.
func loadPublic(paths []string) ([]crypto.PublicKey, error) {
	var keys []crypto.PublicKey
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("reading a public key: %w", err)
		}
		block, _ := pem.Decode(data)
		if block == nil || block.Type != "PUBLIC KEY" {
			return nil, fmt.Errorf("reading a public key: %s holds no PEM block PUBLIC KEY", path)
		}
		key, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("reading a public key: %s: %w", path, err)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

func (a *app) payloadHashCommand() *cobra.Command {
	var pins []string
	var dir string
	cmd := &cobra.Command{
		Use:   "hash FILE --key PUB",
		Short: "say what is to be signed by a key that is elsewhere",
		Long: `Hash prints the two SHA-256 digests that signatures of a payload are made over: of the payload, and of its metadata. They depend on how
many signatures there will be and of which kind, so --key names the public key of everybody who will sign, in the order in which
"payload attach" gets the signatures. Signatures that the file has already have no influence.

With --out-dir it writes payload.digest and metadata.digest, 32 bytes each, for the signing machine. There, for an RSA key:

    openssl pkeyutl -sign -inkey key.pem -pkeyopt digest:sha256 -in payload.digest -out payload.sig

and the same for metadata.digest; for a P-256 key without -pkeyopt. Payloads of major version 1 have no signature of the metadata.`,
		Args: exactArgs(1, "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(pins) == 0 {
				return usagef("hash needs --key, once for each key that will sign")
			}
			keys, err := loadPublic(pins)
			if err != nil {
				return err
			}
			f, size, err := openFile(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			whole, meta, err := build.Digests(cmd.Context(), f, size, keys)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			if dir != "" {
				for name, sum := range map[string][32]byte{"payload.digest": whole, "metadata.digest": meta} {
					if err := os.WriteFile(filepath.Join(dir, name), sum[:], 0o644); err != nil {
						return err
					}
				}
			}
			if a.json {
				return a.printJSON(struct {
					Schema   string   `json:"schema"`
					Keys     []string `json:"keys"`
					Payload  string   `json:"payload_sha256"`
					Metadata string   `json:"metadata_sha256"`
				}{"flipside.payload-digests/v1", pins, hex.EncodeToString(whole[:]), hex.EncodeToString(meta[:])})
			}
			_, err = fmt.Fprintf(a.stdout, "payload   %x\nmetadata  %x\n", whole, meta)
			return err
		},
	}
	cmd.Flags().StringSliceVar(&pins, "key", nil, "public key (PEM file) of a key that will sign; once for each")
	cmd.Flags().StringVar(&dir, "out-dir", "", "directory to write the digests to")
	return cmd
}

func (a *app) payloadAttachCommand() *cobra.Command {
	var payloads, metas, pins []string
	var out string
	var force bool
	cmd := &cobra.Command{
		Use:   "attach FILE --key PUB --signature FILE --metadata-signature FILE --out FILE",
		Short: "put signatures that were made elsewhere into a payload",
		Long: `Attach writes a payload with signatures over the digests that "payload hash" printed for the same public keys. Each key, signature and metadata
signature belong together; give them in the same order. A signature that is not by its key is refused.

Exit status: 0 the payload is signed, 6 a signature does not verify.`,
		Args: exactArgs(1, "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			keys, err := loadPublic(pins)
			if err != nil {
				return err
			}
			if len(keys) == 0 || len(keys) != len(payloads) || len(metas) > 0 && len(metas) != len(keys) || out == "" {
				return usagef("attach needs --out, and as many --key, --signature and --metadata-signature as there are keys")
			}
			var sigs []build.Signature
			for i, key := range keys {
				s := build.Signature{Key: key}
				if s.Payload, err = os.ReadFile(payloads[i]); err != nil {
					return fmt.Errorf("reading a signature: %w", err)
				}
				if len(metas) > 0 {
					if s.Metadata, err = os.ReadFile(metas[i]); err != nil {
						return fmt.Errorf("reading a signature: %w", err)
					}
				}
				sigs = append(sigs, s)
			}
			err = a.rewrite(args[0], out, force, func(w io.Writer, f *os.File, size int64) (build.Result, error) {
				return build.Attach(cmd.Context(), w, f, size, sigs)
			})
			if errors.Is(err, build.ErrSignature) {
				return withHint(withExit(exitVerify, err), "sign what \"payload hash\" prints for the same keys in the same order")
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&pins, "key", nil, "public key (PEM file) that each signature is by")
	f.StringSliceVar(&payloads, "signature", nil, "file with the signature of the payload's digest")
	f.StringSliceVar(&metas, "metadata-signature", nil, "file with the signature of the metadata's digest; not in major version 1")
	f.StringVarP(&out, "out", "o", "", "payload file to write")
	f.BoolVar(&force, "force", false, "replace the payload file if it exists")
	return cmd
}

func (a *app) payloadResignCommand() *cobra.Command {
	var keys []string
	var out string
	var force bool
	cmd := &cobra.Command{
		Use:   "resign FILE --key KEY --out FILE",
		Short: "sign a payload with other keys",
		Long: `Resign writes a payload with signatures by the keys given, instead of those that it has, if it has any. Everything else in it stays as
it is: this is how a release that was tested with one key is released with another.`,
		Args: exactArgs(1, "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(keys) == 0 || out == "" {
				return usagef("resign needs --key and --out")
			}
			signers, err := loadSigners(keys)
			if err != nil {
				return err
			}
			return a.rewrite(args[0], out, force, func(w io.Writer, f *os.File, size int64) (build.Result, error) {
				return build.Sign(cmd.Context(), w, f, size, signers)
			})
		},
	}
	cmd.Flags().StringSliceVar(&keys, "key", nil, "private key to sign with (PEM)")
	cmd.Flags().StringVarP(&out, "out", "o", "", "payload file to write")
	cmd.Flags().BoolVar(&force, "force", false, "replace the payload file if it exists")
	return cmd
}

// rewrite makes one payload file of another.
func (a *app) rewrite(from, out string, force bool, do func(io.Writer, *os.File, int64) (build.Result, error)) error {
	f, size, err := openFile(from)
	if err != nil {
		return err
	}
	defer f.Close()
	res, err := writePayload(out, force, func(w io.Writer) (build.Result, error) { return do(w, f, size) })
	if err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	return a.printProperties(out, res)
}

func (a *app) payloadPropsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "props FILE",
		Short: "print the sizes and hashes that release servers ask for",
		Long: `Props reads a payload and prints its properties as KEY=VALUE lines, hashes as base64, as servers of older engines want them; with --json
as FILE.json holds them.`,
		Args: exactArgs(1, "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, size, err := openFile(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			res, err := build.Properties(cmd.Context(), f, size)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			if a.json {
				return a.printJSON(propertiesOf(args[0], res))
			}
			p := propertiesOf(args[0], res)
			_, err = fmt.Fprint(a.stdout, strings.Join([]string{
				"FILE_HASH=" + p.SHA256Base64, fmt.Sprintf("FILE_SIZE=%d", p.Size), "METADATA_HASH=" + p.MetadataSHA256, fmt.Sprintf("METADATA_SIZE=%d", p.MetadataSize), "",
			}, "\n"))
			return err
		},
	}
	return cmd
}

func (a *app) printProperties(file string, res build.Result) error {
	if a.json {
		return a.printJSON(propertiesOf(file, res))
	}
	_, err := fmt.Fprintf(a.stdout, "%s: %s, SHA-256 %x\n", file, formatBytes(res.Size), res.SHA256)
	return err
}
