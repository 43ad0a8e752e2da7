package demo

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/flipside-linux/flipside/partition"
)

// judge looks at what is left: the bits and the bytes on every disk image, and the semaphore. It does not believe the hosts.
func (d *show) judge(ctx context.Context) error {
	d.screen.chapter("What is on the disks, read back from the images")
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	var b strings.Builder
	tw := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "  HOST\tSLOT\tPRIORITY\tTRIES\tSUCCESSFUL\tHOLDS\tSHA-256\t")
	fellBack := 0
	for _, m := range d.machines {
		st, _, _ := m.view()
		if m.booted("3.0.0") {
			fellBack++
		}
		slots, err := readSlots(m.disk)
		if err != nil {
			fail("%s: %w", m.name, err)
			continue
		}
		bootable := 0
		for _, s := range slots {
			sum, err := hashFile(m.disk, s.Start, imageSize)
			if err != nil {
				return err
			}
			holds := "nothing that was released"
			for _, r := range d.releases {
				if r.sha256 == sum {
					holds = "release " + r.version
				}
			}
			mark := ""
			if s.Label == st.Slot {
				mark = "running"
				if holds != "release 2.0.0" || !s.Successful || s.Tries != 0 || s.Priority == 0 {
					fail("%s runs from %s, which holds %s with priority %d, tries %d, successful %v", m.name, s.Label, holds, s.Priority, s.Tries, s.Successful)
				}
			} else if s.Priority != 0 && holds == "release 3.0.0" {
				fail("%s: %s holds the bad release and can be booted", m.name, s.Label)
			}
			if s.Priority > 0 && (s.Tries > 0 || s.Successful) {
				bootable++
			}
			if strings.HasPrefix(holds, "nothing") {
				fail("%s: the bytes of %s are those of no release", m.name, s.Label)
			}
			fmt.Fprintf(tw, "  %s\t%s\t%d\t%d\t%v\t%s\t%s\t%s\n", m.name, s.Label, s.Priority, s.Tries, s.Successful, holds, sum[:16], mark)
		}
		if bootable == 0 {
			fail("%s has no slot to boot", m.name)
		}
	}
	tw.Flush()
	d.screen.print(strings.TrimRight(b.String(), "\n"))
	if fellBack != 1 {
		fail("%d hosts booted release 3.0.0, want exactly one", fellBack)
	}
	errs = append(errs, d.judgeSemaphore(ctx), d.judgeTables(ctx))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("something is not as it should be:\n%w", err)
	}
	d.screen.print("\n" + d.screen.style("1;32", fmt.Sprintf("All as it should be, in %s.", strings.TrimSpace(d.screen.elapsed()))))
	return nil
}

// judgeTables lets the system's own partition tools look at the images, where they are installed.
func (d *show) judgeTables(ctx context.Context) error {
	var errs []error
	var asked []string
	for _, t := range []struct {
		name string
		args []string
	}{{"sgdisk", []string{"-v"}}, {"sfdisk", []string{"--verify"}}, {"cgpt", []string{"show"}}} {
		if _, err := findTool(t.name); err != nil {
			continue
		}
		asked = append(asked, t.name+" "+strings.Join(t.args, " "))
		for _, m := range d.machines {
			out, err := tool(ctx, t.name, append(append([]string(nil), t.args...), m.disk)...)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s finds fault with the disk of %s: %w", t.name, m.name, err))
			} else if t.name == "sgdisk" && !strings.Contains(out, "No problems found") {
				errs = append(errs, fmt.Errorf("sgdisk finds fault with the disk of %s: %s", m.name, strings.TrimSpace(out)))
			}
		}
	}
	if len(asked) > 0 && errors.Join(errs...) == nil {
		d.screen.print("  accepted by " + strings.Join(asked, ", "))
	}
	return errors.Join(errs...)
}

func readSlots(path string) ([]partition.Slot, error) {
	disk, err := partition.OpenDisk(path, partition.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer disk.Close()
	return disk.Slots()
}

// judgeSemaphore looks at what is left in etcd: nobody holds, nobody waits, the bad release is halted.
func (d *show) judgeSemaphore(ctx context.Context) error {
	st, err := d.semaphore.State(ctx, group)
	if err != nil {
		return err
	}
	d.screen.print(fmt.Sprintf("\n  semaphore %q: max %d, %d hold a slot, %d wait", group, st.Policy.Max, len(st.Holders), len(st.Queue)))
	var errs []error
	if len(st.Holders) != 0 || len(st.Queue) != 0 {
		errs = append(errs, fmt.Errorf("the semaphore still has holders %v and waiting hosts %v", st.Holders, st.Queue))
	}
	h, ok := st.Halts["3.0.0"]
	if !ok {
		return errors.Join(append(errs, errors.New("release 3.0.0 is not halted"))...)
	}
	d.screen.print("  release 3.0.0 is halted: " + h.Reason)
	return errors.Join(errs...)
}
