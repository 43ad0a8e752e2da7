package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/updater/trust"
)

// benchResult is the JSON form of what an apply costs.
type benchResult struct {
	Schema     string            `json:"schema"`
	File       string            `json:"file"`
	Workers    int               `json:"workers"`
	Image      int64             `json:"image_bytes"`
	Payload    int64             `json:"payload_bytes"`
	Seconds    float64           `json:"seconds"`
	Rate       float64           `json:"image_bytes_per_second"`
	PeakMemory int64             `json:"peak_memory_bytes"` // of this process; 0 where it is not known
	Steps      []benchStep       `json:"steps"`
	Decode     []benchOperations `json:"operations"`
}

type benchStep struct {
	Name    string  `json:"name"`
	Seconds float64 `json:"seconds"`
}

type benchOperations struct {
	Kind       string  `json:"kind"`
	Operations int     `json:"operations"`
	Bytes      int64   `json:"bytes"`
	Seconds    float64 `json:"seconds"`
}

func (a *app) payloadBenchCommand() *cobra.Command {
	var keys, from []string
	var workers int
	var dir string
	cmd := &cobra.Command{
		Use:   "bench FILE --key PUB [--from PATH]",
		Short: "apply a payload to a temporary file, and say where the time goes",
		Long: `Bench applies a payload as a host does, with every check, writes the images to temporary files, reads them back and hashes them, and says what
the time went into. Times are sums over all goroutines: with several workers they are more than the time that passes.

The images go to --dir, so that the disk is the one that is of interest, and are removed at the end.`,
		Args: exactArgs(1, "FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := openPayload(cmd.Context(), args[0], keys, trust.KeyPolicy{})
			if err != nil {
				return err
			}
			sources, closeSources, err := openSources(p, from)
			if err != nil {
				return err
			}
			defer closeSources()
			dir, err := os.MkdirTemp(dir, "flipside-bench-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(dir)
			res := benchResult{Schema: "flipside.payload-bench/v1", File: args[0], Workers: workers, Payload: p.Size}
			targets, outs := map[string]payload.Target{}, map[string]*output{}
			for _, q := range p.Partitions {
				o, err := openOutput(filepath.Join(dir, q.Name), q.Size)
				if err != nil {
					return err
				}
				defer o.close(false)
				targets[q.Name], outs[q.Name] = o, o
				res.Image += q.Size
			}
			var trace payload.Trace
			begin := time.Now()
			if err := p.Apply(cmd.Context(), payload.ApplyOptions{Targets: targets, Sources: sources, Workers: workers, Trace: &trace}); err != nil {
				return payloadError(fmt.Errorf("%s: %w", args[0], err))
			}
			verify := time.Now()
			for _, q := range p.Partitions {
				if err := outs[q.Name].Verify(cmd.Context(), q.Size, q.SHA256); err != nil {
					return payloadError(fmt.Errorf("partition %q: %w", q.Name, err))
				}
			}
			trace.Add(payload.TraceVerify, time.Since(verify))
			res.Seconds = time.Since(begin).Seconds()
			res.Rate, res.PeakMemory = float64(res.Image)/res.Seconds, peakMemory()
			for name, d := range trace.Times() {
				res.Steps = append(res.Steps, benchStep{name, d.Seconds()})
			}
			for k, d := range trace.Decoded() {
				res.Decode = append(res.Decode, benchOperations{k.String(), d.Operations, d.Bytes, d.Time.Seconds()})
			}
			sort.Slice(res.Steps, func(i, j int) bool { return res.Steps[i].Seconds > res.Steps[j].Seconds })
			sort.Slice(res.Decode, func(i, j int) bool { return res.Decode[i].Seconds > res.Decode[j].Seconds })
			return a.printBench(res)
		},
	}
	cmd.Flags().StringSliceVar(&keys, "key", nil, "public key (PEM file or directory); any one of several is enough")
	cmd.Flags().StringSliceVar(&from, "from", nil, "old image of a delta; NAME=PATH for one of several partitions")
	cmd.Flags().IntVar(&workers, "workers", 0, "how many operations are decoded at a time (0: one for each processor)")
	cmd.Flags().StringVar(&dir, "dir", "", "where the images are written (default: TMPDIR)")
	return cmd
}

func (a *app) printBench(res benchResult) error {
	if a.json {
		return a.printJSON(res)
	}
	fmt.Fprintf(a.stdout, "%s: %s of image in %.2f s, %s/s", res.File, formatBytes(res.Image), res.Seconds, formatBytes(int64(res.Rate)))
	if res.PeakMemory > 0 {
		fmt.Fprintf(a.stdout, ", %s of memory at the most", formatBytes(res.PeakMemory))
	}
	fmt.Fprint(a.stdout, "\n\n")
	tw := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "step\tseconds\t")
	for _, d := range res.Decode {
		rate := ""
		if d.Seconds > 0 {
			rate = fmt.Sprintf("%d operations, %s, %s/s each", d.Operations, formatBytes(d.Bytes), formatBytes(int64(float64(d.Bytes)/d.Seconds)))
		} else {
			rate = fmt.Sprintf("%d operations, %s, nothing to decode", d.Operations, formatBytes(d.Bytes))
		}
		fmt.Fprintf(tw, "decode %s\t%.3f\t%s\n", d.Kind, d.Seconds, rate)
	}
	for _, s := range res.Steps {
		fmt.Fprintf(tw, "%s\t%.3f\t\n", s.Name, s.Seconds)
	}
	return tw.Flush()
}

// peakMemory is the most memory that this process has had in use.
func peakMemory() int64 {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		return 0
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if v, ok := strings.CutPrefix(s.Text(), "VmHWM:"); ok {
			n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
			return n << 10
		}
	}
	return 0
}
