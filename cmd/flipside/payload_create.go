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
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/partition/atomicfile"
	"github.com/flipside-linux/flipside/payload/build"
	"github.com/flipside-linux/flipside/updater/trust"
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
func loadSigner(path string) (crypto.Signer, error) { return trust.Signer(path, "") }

func (a *app) payloadCreateCommand() *cobra.Command {
	var images, olds, keys, postinstall []string
	var out, compress, product string
	var timestamp int64
	var major int
	var force, unsigned, ignoreFiles bool
	cmd := &cobra.Command{
		Use:   "create --new IMAGE [--old IMAGE] --key KEY --out FILE",
		Short: "make a signed payload from image files",
		Long: `Create makes a payload from one or more images, and signs it with one or more keys: a host that pins any of them accepts it, which is
how keys are rotated. With --old it is a delta, which only hosts that run the old image can apply. The same images and RSA keys give
the same bytes.

--compress zstd is read by Flipside only, and decodes many times faster than what others read: xz, bzip2, or smallest, the smaller one
of both for each piece. xz takes the longest to make, and twice that where there is machine code.

--major 1 is for older hosts, such as those with Flatcar's update_engine, which know no other. Its partitions are usr, kernel and pcr_policy, in this
order, and only usr can be a delta, which is applied in place. Data is compressed with bzip2, or not at all. Keys are RSA, three at
the most, of which such hosts look at the last.

--unsigned leaves the signatures out. See "payload hash" for how to sign on a machine without a network, or with an HSM.

Beside FILE it writes FILE.json with the properties that release servers ask for.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(images) == 0 || len(keys) == 0 && !unsigned || out == "" {
				return usagef("create needs --new, --out, and --key or --unsigned")
			}
			if len(keys) > 0 && unsigned {
				return usagef("--key and --unsigned exclude each other")
			}
			if compress == "" && major == 1 {
				compress = string(build.Bzip2)
			}
			spec := build.Spec{
				Compression: build.Compression(compress), MaxTimestamp: timestamp, Product: product, TempDir: filepath.Dir(out), Major: major,
				Unsigned: unsigned, IgnoreFiles: ignoreFiles,
			}
			var err error
			if spec.Keys, err = loadSigners(keys); err != nil {
				return err
			}
			var total int64
			closers, err := openImages(&spec, images, olds, &total)
			defer func() {
				for _, f := range closers {
					f.Close()
				}
			}()
			if err != nil {
				return err
			}
			for _, arg := range postinstall {
				name, path := nameAndPath(arg)
				i := slices.IndexFunc(spec.Images, func(img build.Image) bool { return img.Name == name })
				if i < 0 {
					return usagef("--postinstall names partition %q, which no --new does", name)
				}
				spec.Images[i].PostInstall = path
			}
			bar := a.progress("making", 0)
			spec.Progress = func(done, total int64) {
				bar.total = total
				bar.Set(done)
			}
			res, err := writePayload(out, force, func(w io.Writer) (build.Result, error) { return build.Create(cmd.Context(), w, spec) })
			if err != nil {
				return err
			}
			bar.Done()
			if a.json {
				return a.printJSON(propertiesOf(out, res))
			}
			kind := "full"
			if res.Delta {
				kind = "delta"
			}
			_, err = fmt.Fprintf(a.stdout, "%s: %s payload, %s for %s of images (%.1f %%), SHA-256 %x\n", out, kind, formatBytes(res.Size), formatBytes(total), float64(res.Size)*100/float64(total), res.SHA256)
			return err
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&images, "new", nil, "image file, or NAME=FILE for a partition that is not called usr")
	f.StringSliceVar(&olds, "old", nil, "image that a delta starts from, or NAME=FILE")
	f.StringSliceVar(&keys, "key", nil, "private key to sign with (PEM); more than one while keys are rotated")
	f.BoolVar(&unsigned, "unsigned", false, "do not sign: that is done later")
	f.StringVarP(&out, "out", "o", "", "payload file to write")
	f.IntVar(&major, "major", 2, "major version of the format, 1 or 2")
	f.StringVar(&compress, "compress", "", "zstd, xz, bzip2, smallest or none (default zstd; bzip2 in major version 1)")
	f.Int64Var(&timestamp, "max-timestamp", 0, "monotonic number of the release, against going back; 0 is none")
	f.StringVar(&product, "product", "", "what the payload is for; a host with trust.product takes no other")
	f.StringSliceVar(&postinstall, "postinstall", nil, "path of a program in the image that runs before the image can boot, or NAME=PATH")
	f.BoolVar(&ignoreFiles, "ignore-files", false, "make a delta by content only, without looking into file systems")
	f.BoolVar(&force, "force", false, "replace the payload file if it exists")
	return cmd
}

// nameAndPath divides NAME=PATH; without a name it is usr.
func nameAndPath(arg string) (name, path string) {
	if name, path, ok := strings.Cut(arg, "="); ok {
		return name, path
	}
	return "usr", arg
}

// openImages opens image files for a spec. The caller closes them, also after an error.
func openImages(spec *build.Spec, images, olds []string, total *int64) (files []*os.File, err error) {
	open := func(arg string) (build.Image, error) {
		name, path := nameAndPath(arg)
		f, err := os.Open(path)
		if err != nil {
			return build.Image{}, fmt.Errorf("opening an image: %w", err)
		}
		files = append(files, f)
		if info, err := f.Stat(); err == nil && info.IsDir() {
			return build.Image{}, fmt.Errorf("opening an image: %q is a directory, want a file or a block device", path)
		}
		size, err := f.Seek(0, io.SeekEnd) // of a block device too
		if err != nil {
			return build.Image{}, fmt.Errorf("opening an image: %w", err)
		}
		return build.Image{Name: name, Data: f, Size: size}, nil
	}
	for _, arg := range images {
		img, err := open(arg)
		if err != nil {
			return files, err
		}
		*total += img.Size
		spec.Images = append(spec.Images, img)
	}
	for _, arg := range olds {
		img, err := open(arg)
		if err != nil {
			return files, err
		}
		i := slices.IndexFunc(spec.Images, func(n build.Image) bool { return n.Name == img.Name })
		if i < 0 {
			return files, usagef("--old names partition %q, which no --new does", img.Name)
		}
		if spec.Images[i].Old != nil {
			return files, usagef("--old names partition %q twice", img.Name)
		}
		spec.Images[i].Old = &img
	}
	return files, nil
}

func loadSigners(paths []string) ([]crypto.Signer, error) {
	var keys []crypto.Signer
	for _, p := range paths {
		s, err := loadSigner(p)
		if err != nil {
			return nil, err
		}
		keys = append(keys, s)
	}
	return keys, nil
}

// writePayload writes a payload beside its name and gives it the name when it is complete; and its properties beside it.
func writePayload(out string, force bool, make func(io.Writer) (build.Result, error)) (build.Result, error) {
	if _, err := os.Stat(out); err == nil && !force {
		return build.Result{}, withHint(fmt.Errorf("%s exists already", out), "--force replaces it")
	}
	tmp, err := os.CreateTemp(filepath.Dir(out), "."+filepath.Base(out)+".partial-")
	if err != nil {
		return build.Result{}, err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	res, err := make(tmp)
	if err != nil {
		return build.Result{}, err
	}
	if err := atomicfile.Place(tmp, out, 0o644); err != nil {
		return build.Result{}, err
	}
	data, err := json.MarshalIndent(propertiesOf(out, res), "", "  ")
	if err != nil {
		return build.Result{}, err
	}
	return res, atomicfile.WriteFile(out+".json", append(data, '\n'), 0o644)
}

// properties are what a release server wants to know of a payload file.
type properties struct {
	Schema         string `json:"schema"`
	File           string `json:"file"`
	Size           int64  `json:"size"`
	SHA256         string `json:"sha256"`
	SHA256Base64   string `json:"sha256_base64"`
	MetadataSize   int64  `json:"metadata_size"`
	MetadataSHA256 string `json:"metadata_sha256_base64"`
	Delta          bool   `json:"delta"`
}

func propertiesOf(file string, res build.Result) properties {
	return properties{
		Schema: "flipside.payload-properties/v1", File: filepath.Base(file), Size: res.Size, SHA256: hex.EncodeToString(res.SHA256[:]),
		SHA256Base64: base64.StdEncoding.EncodeToString(res.SHA256[:]), MetadataSize: res.MetadataSize,
		MetadataSHA256: base64.StdEncoding.EncodeToString(res.MetadataSHA256[:]), Delta: res.Delta,
	}
}
