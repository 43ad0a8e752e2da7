// Flipside-vm proves the whole on virtual machines: a disk made by packaging/image/build, the boot stage, Linux, systemd and flipsided as
// a host runs them, a real update over the network, a real reboot into the new /usr, and power cuts at random moments.
//
// What is virtual is the hardware, QEMU's, in software emulation where there is no KVM. A power cut is a killed QEMU whose disk
// then loses what a disk may lose: QEMU records every write and every flush, and of the writes after the last flush a random part is dropped and
// the last one torn. After each cut the disk is looked at from outside (what the boot loader would choose must be a whole release, with
// its own kernel), and then switched on again: the host must come up and go on.
//
// It needs what packaging/image/build makes: "make vm" does all of it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	images := flag.String("images", "", "`directory` with the releases that packaging/image/build made")
	out := flag.String("out", "", "`directory` for disks, console logs and the report")
	run := flag.String("run", "update,panic,hang,sick,cuts,table,journal,two,rollback,entries,bls,bls-cuts", "scenarios, in order, of: "+strings.Join(slices.Sorted(keys(scenarios)), ", "))
	cuts := flag.Int("cuts", 30, "power cuts")
	seed := flag.Uint64("seed", 1, "of the moments at which power is cut and of what the disk loses then")
	jobs := flag.Int("jobs", runtime.NumCPU(), "machines that lose power side by side")
	slow := flag.Float64("slow", 1, "multiplies every time limit")
	flag.Parse()
	if *images == "" || *out == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := prove(ctx, *images, *out, strings.Split(*run, ","), *cuts, *jobs, *seed, *slow); err != nil {
		fmt.Fprintln(os.Stderr, "flipside-vm:", err)
		os.Exit(1)
	}
}

func keys(m map[string]func(context.Context, *lab) error) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// prove runs scenarios and writes the report, of those that failed too.
func prove(ctx context.Context, images, out string, names []string, cuts, jobs int, seed uint64, slow float64) error {
	for _, n := range names {
		if scenarios[n] == nil {
			return fmt.Errorf("no scenario is called %q", n)
		}
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	l, err := newLab(ctx, images, out)
	if err != nil {
		return err
	}
	defer l.close()
	l.cuts, l.jobs, l.slow, l.seed = cuts, max(1, jobs), slow, seed
	l.say("seed %d; limits × %.1f; %s", seed, slow, map[bool]string{true: "KVM", false: "software emulation"}[l.kvm])
	var errs []error
	for _, n := range names {
		began := time.Now()
		l.chapter(n)
		err := scenarios[n](ctx, l)
		l.endChapter(err)
		if err != nil {
			l.say("%s FAILED after %.0f s: %v", n, time.Since(began).Seconds(), err)
			errs = append(errs, fmt.Errorf("scenario %s: %w", n, err))
		} else {
			l.say("%s: as it should be, after %.0f s", n, time.Since(began).Seconds())
		}
		l.reset()
		if ctx.Err() != nil {
			break
		}
	}
	report := filepath.Join(out, "report.html")
	if err := l.report(report, seed); err != nil {
		errs = append(errs, err)
	}
	if l.count.cuts > 0 {
		l.say("power cuts by what the machine was seen to do: %s", l.where())
	}
	l.say("%d power cuts, %d boots, %d hosts lost; report: %s", l.count.cuts, l.count.boots, l.count.lost, report)
	return errors.Join(errs...)
}
