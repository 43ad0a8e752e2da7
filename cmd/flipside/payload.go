package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"sort"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/updater/trust"
)

// payloadCommand makes, reads, checks and applies payloads.
func (a *app) payloadCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "payload",
		Short: "make, read, check and apply signed payloads",
		Args:  cobra.NoArgs,
	}
	cmd.AddCommand(a.payloadKeygenCommand(), a.payloadCreateCommand(), a.payloadHashCommand(), a.payloadAttachCommand(), a.payloadResignCommand(), a.payloadPropsCommand(), a.payloadDiffCommand(), a.payloadInfoCommand(), a.payloadVerifyCommand(), a.payloadApplyCommand(), a.payloadBenchCommand())
	return cmd
}

// payloadInfo is the JSON form of what a payload says of itself.
type payloadInfo struct {
	Schema       string          `json:"schema"`
	File         string          `json:"file"`
	Verified     string          `json:"verified"` // nothing, metadata or everything
	Major        int             `json:"major"`
	Minor        int             `json:"minor"`
	Kind         string          `json:"kind"` // full or delta
	Size         int64           `json:"size"`
	MetadataSize int64           `json:"metadata_size"`
	MaxTimestamp int64           `json:"max_timestamp,omitempty"`
	Product      string          `json:"product,omitempty"`
	Partitions   []partitionInfo `json:"partitions"`
}

type partitionInfo struct {
	Name       string         `json:"name"`
	Size       int64          `json:"size"`
	SHA256     string         `json:"sha256"`
	Operations map[string]int `json:"operations"`
}

func describe(file string, p *payload.Payload, verified string) payloadInfo {
	info := payloadInfo{
		Schema: "flipside.payload/v1", File: file, Verified: verified, Major: p.Major, Minor: p.Minor, Kind: "full",
		Size: p.Size, MetadataSize: p.MetadataSize, MaxTimestamp: p.MaxTimestamp, Product: p.Product,
	}
	if p.Delta() {
		info.Kind = "delta"
	}
	for _, q := range p.Partitions {
		info.Partitions = append(info.Partitions, partitionInfo{q.Name, q.Size, hex.EncodeToString(q.SHA256[:]), q.Counts()})
	}
	return info
}

func (a *app) printInfo(info payloadInfo) error {
	if a.json {
		return a.printJSON(info)
	}
	fmt.Fprintf(a.stdout, "%s: %s payload, major version %d, %s (%d bytes)\n", info.File, info.Kind, info.Major, formatBytes(info.Size), info.Size)
	tw := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(tw, "metadata\t%d bytes\n", info.MetadataSize)
	if p := info.Product; p != "" {
		fmt.Fprintf(tw, "product\t%q\n", p)
	}
	if info.MaxTimestamp != 0 {
		fmt.Fprintf(tw, "timestamp\t%d\n", info.MaxTimestamp)
	}
	for _, q := range info.Partitions {
		var ops []string
		for kind, n := range q.Operations {
			ops = append(ops, fmt.Sprintf("%d %s", n, kind))
		}
		sort.Strings(ops)
		fmt.Fprintf(tw, "partition %s\t%s, SHA-256 %s\n\t%s\n", q.Name, formatBytes(q.Size), q.SHA256, strings.Join(ops, ", "))
	}
	switch info.Verified {
	case "nothing":
		fmt.Fprintf(tw, "verified\tnothing: this is what the file claims (give --key)\n")
	default:
		fmt.Fprintf(tw, "verified\t%s\n", info.Verified)
	}
	return tw.Flush()
}

// payloadError gives an error of package payload its exit code and a hint.
func payloadError(err error) error {
	switch {
	case errors.Is(err, payload.ErrNoKey):
		return withHint(withExit(exitVerify, err), "name the public key of whoever you trust with --key")
	case errors.Is(err, payload.ErrSignature):
		return withHint(withExit(exitVerify, err), "the file was made or changed by somebody whose key is not among those given")
	case errors.Is(err, payload.ErrUnsigned), errors.Is(err, payload.ErrMalformed), errors.Is(err, payload.ErrHash), errors.Is(err, payload.ErrUnsupported), errors.Is(err, payload.ErrBase):
		return withExit(exitVerify, err)
	}
	return err
}

// openPayload opens a file with the keys that were named.
func openPayload(ctx context.Context, file string, keys []string, policy trust.KeyPolicy) (*payload.Payload, error) {
	if len(keys) == 0 {
		return nil, payloadError(fmt.Errorf("%w: none was given", payload.ErrNoKey))
	}
	ring, err := keyring(keys, policy)
	if err != nil {
		return nil, payloadError(err)
	}
	src, err := payload.NewFileSource(file)
	if err != nil {
		return nil, err
	}
	p, err := payload.Open(ctx, src, payload.Options{Keys: ring})
	if err != nil {
		return nil, payloadError(fmt.Errorf("%s: %w", file, err))
	}
	return p, nil
}

func (a *app) payloadInfoCommand() *cobra.Command {
	var keys []string
	cmd := &cobra.Command{
		Use:   "info FILE",
		Short: "say what a payload holds",
		Long: `Info reads the header and the manifest of a payload, checks that they make sense, and prints what they say. Without --key that is only
what the file claims; with one, the signature of the metadata is checked first.`,
		Args: exactArgs(1, "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(keys) > 0 {
				p, err := openPayload(cmd.Context(), args[0], keys, trust.KeyPolicy{})
				if err != nil {
					return err
				}
				verified := "metadata"
				if p.Major == 1 {
					verified = "nothing" // major 1 signs only the whole file
				}
				return a.printInfo(describe(args[0], p, verified))
			}
			src, err := payload.NewFileSource(args[0])
			if err != nil {
				return err
			}
			p, err := payload.Inspect(cmd.Context(), src)
			if err != nil {
				return payloadError(fmt.Errorf("%s: %w", args[0], err))
			}
			return a.printInfo(describe(args[0], p, "nothing"))
		},
	}
	cmd.Flags().StringSliceVar(&keys, "key", nil, "public key (PEM file or directory) to check the metadata's signature with")
	return cmd
}
