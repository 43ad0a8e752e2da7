package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flipside-linux/flipside/partition"
	"github.com/flipside-linux/flipside/partition/mounted"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/writer"
)

// slotsFlags say which disk a slots command works on, and how sure the caller is.
type slotsFlags struct {
	app           *app
	disk, running string
	dryRun, yes   bool
	holds         map[string]string // the release in each slot, as far as the daemon noted it
}

func (a *app) slotsCommand() *cobra.Command {
	s := &slotsFlags{app: a}
	cmd := &cobra.Command{
		Use:   "slots",
		Short: "show or change the slots of a disk and what boots next",
		Long: `Slots reads the partition table of the disk itself; flipsided need not run. With boot.backend = "bls" what boots is in systemd-boot's
entries, and is read and changed there.

Priority, tries and successful are the boot loader's: it takes the slot with the highest priority among those with tries left or
success, and spends one try before it loads anything. A slot is good (successful), on trial (it has tries left), failed (its tries are
spent), or not bootable. Its version is what flipsided noted when it completed the slot or ran from it.

Exit status: 0, 3 nothing to change, 5 refused, 6 a hash or the table is not right, 7 not permitted, 8 busy.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return s.show() },
	}
	cmd.PersistentFlags().StringVar(&s.disk, "disk", "", "block device or disk `image` (default from the daemon's configuration)")
	cmd.PersistentFlags().StringVar(&s.running, "running", "", "`label` of the running slot, for images (default: from the configuration, or where /usr is mounted from)")
	cmd.AddCommand(s.markCommand(), s.activateCommand(), s.deactivateCommand(), s.repairCommand())
	return cmd
}

// changes adds the flags of commands that write.
func (s *slotsFlags) changes(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().BoolVarP(&s.dryRun, "dry-run", "n", false, "say what would be done, and do nothing")
	cmd.Flags().BoolVarP(&s.yes, "yes", "y", false, "do not ask")
	return cmd
}

// auto stands in the configuration for what can be found out.
const auto = "auto"

// open opens the disk and finds the label of the running slot, which is empty if nobody knows.
func (s *slotsFlags) open(readOnly bool) (*partition.Disk, string, error) {
	c, err := config.Load(s.app.config)
	if err != nil {
		if s.app.config != "" || s.disk == "" {
			return nil, "", withHint(err, "--disk says which disk to look at without a configuration")
		}
		c = config.Default()
	}
	disk, running := cmp.Or(s.disk, c.Slots.Disk), cmp.Or(s.running, c.Slots.Running)
	if disk == c.Slots.Disk {
		// Whoever may not read the state sees the table without versions.
		if st, err := (updater.Store{Path: filepath.Join(c.Paths.State, "state.json")}).Load(); err == nil {
			s.holds = st.Holds
		}
	}
	if s.disk != "" && s.disk != c.Slots.Disk && s.running == "" {
		running = auto // the configuration speaks of another disk
	}
	var usr mounted.Partition
	if disk == auto || running == auto {
		usr, err = mounted.Usr(os.DirFS("/"))
		if err != nil && disk == auto {
			return nil, "", withHint(err, "--disk DEVICE says which disk to look at")
		}
		if disk == auto {
			disk = usr.Disk
		}
	}
	if s.disk != "" && s.disk != c.Slots.Disk && disk != usr.Disk {
		c.Boot = config.Default().Boot // this host's boot entries say nothing about an image
	}
	d, err := writer.OpenDisk(c, disk, readOnly)
	if err != nil {
		return nil, "", diskHint(err)
	}
	slots, err := d.Slots()
	if err != nil && !errors.Is(err, partition.ErrTable) {
		d.Close()
		return nil, "", withExit(exitVerify, fmt.Errorf("disk %s: %w", disk, err))
	}
	if err != nil {
		table := d.Table()
		d.Close()
		return nil, "", withHint(withExit(exitVerify, fmt.Errorf("disk %s: %w", disk, err)), "both copies are bad (sectors %d and %d); nothing was written. Restore the table from a backup, or reinstall", table.Primary.Sector, table.Backup.Sector)
	}
	if running == auto {
		running = ""
		for _, slot := range slots {
			if usr.Disk == disk && slot.Index == usr.Index {
				running = slot.Label
			}
		}
	}
	return d, running, nil
}

// diskHint gives the errors of package partition exit codes and says what to do.
func diskHint(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrPermission):
		return withHint(withExit(exitPermitted, err), "disks are root's: run it with sudo")
	case errors.Is(err, partition.ErrBusy):
		return withHint(withExit(exitBusy, err), `flipsided or another tool is at work on this disk; "flipside status" tells what it does`)
	case errors.Is(err, partition.ErrMismatch), errors.Is(err, partition.ErrTable):
		return withExit(exitVerify, err)
	case errors.Is(err, partition.ErrRunning):
		return withHint(withExit(exitBlocked, err), "boot the other slot first")
	case errors.Is(err, partition.ErrNotProven):
		return withHint(withExit(exitBlocked, err), `"flipside slots mark-successful" once the running slot is known to be good`)
	case errors.Is(err, partition.ErrLast):
		return withHint(withExit(exitBlocked, err), "make another slot bootable first")
	}
	return err
}

type slotInfo struct {
	Label      string `json:"label"`
	UUID       string `json:"uuid"`
	Version    string `json:"version,omitempty"` // of the release in it, if flipsided knows
	State      string `json:"state"`             // good, on trial, failed, not bootable
	Index      int    `json:"index"`
	Size       int64  `json:"size"`
	Priority   uint8  `json:"priority"`
	Tries      uint8  `json:"tries"`
	Successful bool   `json:"successful"`
	Bootable   bool   `json:"bootable"`
	Running    bool   `json:"running"`
	Next       bool   `json:"next"`
}

// slotState says in a word what the boot bits of a slot mean.
func slotState(s partition.Slot) string {
	switch {
	case s.Bootable() && s.Successful:
		return "good"
	case s.Bootable():
		return "on trial"
	case s.Priority > 0:
		return "failed"
	}
	return "not bootable"
}

type copyInfo struct {
	Sector int64  `json:"sector"`
	Valid  bool   `json:"valid"`
	Error  string `json:"error,omitempty"`
}

func copyInfoOf(c partition.Copy) copyInfo {
	info := copyInfo{Sector: c.Sector, Valid: c.Err == nil}
	if c.Err != nil {
		info.Error = c.Err.Error()
	}
	return info
}

func (s *slotsFlags) show() error {
	d, running, err := s.open(true)
	if err != nil {
		return err
	}
	defer d.Close()
	slots, err := d.Slots()
	if err != nil {
		return diskHint(err)
	}
	next, bootable := partition.Next(slots)
	table := d.Table()
	doc := struct {
		Schema string     `json:"schema"`
		Slots  []slotInfo `json:"slots"`
		Table  struct {
			Healthy bool     `json:"healthy"`
			Primary copyInfo `json:"primary"`
			Backup  copyInfo `json:"backup"`
		} `json:"table"`
	}{Schema: "flipside.slots/v1", Slots: []slotInfo{}}
	doc.Table.Healthy, doc.Table.Primary, doc.Table.Backup = table.Healthy, copyInfoOf(table.Primary), copyInfoOf(table.Backup)
	for _, p := range slots {
		doc.Slots = append(doc.Slots, slotInfo{p.Label, p.UUID.String(), s.holds[p.Label], slotState(p), p.Index, p.Size, p.Priority, p.Tries, p.Successful, p.Bootable(), p.Label == running, bootable && p.Index == next.Index})
	}
	if s.app.json {
		return s.app.printJSON(doc)
	}
	var rows [][]cell
	for _, p := range doc.Slots {
		var marks []string
		if p.Running {
			marks = append(marks, "running")
		}
		if p.Next {
			marks = append(marks, "boots next")
		}
		rows = append(rows, cells(plain, p.Label, fmt.Sprint(p.Index), cmp.Or(p.Version, "-"), p.State, fmt.Sprint(p.Priority), fmt.Sprint(p.Tries), yesNo(p.Successful), formatBytes(p.Size), strings.Join(marks, ", "), p.UUID))
	}
	out := s.app.sheet()
	out.table([]string{"SLOT", "INDEX", "VERSION", "STATE", "PRIORITY", "TRIES", "SUCCESSFUL", "SIZE", "", "UUID"}, rows)
	if err := out.print(s.app.stdout); err != nil {
		return err
	}
	switch t := doc.Table; {
	case t.Healthy:
		fmt.Fprintln(s.app.stdout, "\npartition table: both copies are valid and equal")
	case t.Primary.Valid && t.Backup.Valid:
		fmt.Fprintln(s.app.stdout, "\npartition table: the copies differ, and the primary counts; \"flipside slots repair\" makes them equal")
	case t.Primary.Valid:
		fmt.Fprintf(s.app.stdout, "\npartition table: the backup copy is bad: %s; \"flipside slots repair\" rewrites it\n", t.Backup.Error)
	default:
		fmt.Fprintf(s.app.stdout, "\npartition table: the primary copy is bad: %s; \"flipside slots repair\" rewrites it\n", t.Primary.Error)
	}
	if !bootable {
		fmt.Fprintln(s.app.stdout, "no slot is bootable: the boot loader would stop in its menu")
	}
	return nil
}

// change announces what is to be done, asks if need be, and does it.
func (s *slotsFlags) change(what string, do func() error) error {
	if s.dryRun {
		return s.report("would "+what, false)
	}
	if err := s.app.confirm(s.yes, what); err != nil {
		var usage *usageError
		if errors.As(err, &usage) { // nobody was asked
			err = withHint(err, "--dry-run shows what would be done")
		}
		return err
	}
	if err := do(); err != nil {
		return diskHint(err)
	}
	return s.report("done: "+what, true)
}

func (s *slotsFlags) report(text string, changed bool) error {
	if s.app.json {
		return s.app.printJSON(struct {
			Schema  string `json:"schema"`
			Changed bool   `json:"changed"`
			What    string `json:"what"`
		}{"flipside.slots-change/v1", changed, text})
	}
	_, err := fmt.Fprintln(s.app.stdout, text)
	return err
}

// proof opens the disk for a change that needs to know which slot is running.
func (s *slotsFlags) proof() (*partition.Disk, partition.Running, error) {
	d, running, err := s.open(s.dryRun)
	if err != nil {
		return nil, partition.Running{}, err
	}
	if running == "" {
		d.Close()
		return nil, partition.Running{}, withHint(usagef("which slot of this disk is running is not known"), "--running LABEL says so, for an image or a disk that this host does not run from")
	}
	r, err := d.RunningFromLabel(running)
	if err != nil {
		d.Close()
		return nil, r, fmt.Errorf("the running slot: %w", err)
	}
	return d, r, nil
}

func (s *slotsFlags) markCommand() *cobra.Command {
	return s.changes(&cobra.Command{
		Use:   "mark-successful LABEL",
		Short: "say that the running slot is good",
		Args:  exactly(1, "the label of the running slot"),
		RunE: func(_ *cobra.Command, args []string) error {
			d, r, err := s.proof()
			if err != nil {
				return err
			}
			defer d.Close()
			if _, err := d.Slot(args[0]); err != nil {
				return err
			}
			now := r.Slot()
			if now.Label != args[0] {
				return withHint(withExit(exitBlocked, fmt.Errorf("slot %q is not running: nothing shows that it is good", args[0])), "the running slot is %s", now.Label)
			}
			if now.Successful && now.Tries == 0 && now.Priority > 0 {
				return withExit(exitNothing, fmt.Errorf("slot %s is marked successful already", now.Label))
			}
			return s.change(fmt.Sprintf("mark slot %s successful, with no tries left to spend", now.Label), func() error { return d.MarkSuccessful(r) })
		},
	})
}

func (s *slotsFlags) deactivateCommand() *cobra.Command {
	return s.changes(&cobra.Command{
		Use:   "deactivate LABEL",
		Short: "make a slot that is not running unbootable",
		Args:  exactly(1, "the label of a slot"),
		RunE: func(_ *cobra.Command, args []string) error {
			d, r, err := s.proof()
			if err != nil {
				return err
			}
			defer d.Close()
			slot, err := d.Slot(args[0])
			if err != nil {
				return err
			}
			if slot.Label == r.Slot().Label {
				return diskHint(fmt.Errorf("deactivating slot %q: %w", slot.Label, partition.ErrRunning))
			}
			if slot.Priority == 0 && slot.Tries == 0 && !slot.Successful {
				return withExit(exitNothing, fmt.Errorf("slot %s is not bootable already", slot.Label))
			}
			if !r.Slot().Bootable() {
				return diskHint(fmt.Errorf("deactivating slot %q: %w", slot.Label, partition.ErrLast))
			}
			what := fmt.Sprintf("make slot %s unbootable; %s boots next", slot.Label, r.Slot().Label)
			return s.change(what, func() error { return d.MarkBad(slot.Label) })
		},
	})
}

func (s *slotsFlags) repairCommand() *cobra.Command {
	return s.changes(&cobra.Command{
		Use:   "repair",
		Short: "make both copies of the partition table valid and equal",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			d, _, err := s.open(s.dryRun)
			if err != nil {
				return err
			}
			defer d.Close()
			what, err := d.Damage()
			if err != nil {
				return diskHint(err)
			}
			if what == "" {
				return withExit(exitNothing, errors.New("both copies of the partition table are valid and equal"))
			}
			return s.change("repair the partition table: "+what, func() error {
				_, err := d.Repair()
				return err
			})
		},
	})
}

func (s *slotsFlags) activateCommand() *cobra.Command {
	var size int64
	var sum string
	var tries int
	cmd := s.changes(&cobra.Command{
		Use:   "activate LABEL --size BYTES --sha256 HEX",
		Short: "make a slot boot next, after reading it back and comparing its hash",
		Long: `Activate reads the first BYTES of the slot back from the medium and compares their SHA-256. Only then it makes the slot the
one that boots next, with TRIES boots to prove itself. A slot whose hash nobody can name cannot be activated.`,
		Args: exactly(1, "the label of a slot"),
		RunE: func(cmd *cobra.Command, args []string) error {
			raw, err := hex.DecodeString(sum)
			if err != nil || len(raw) != 32 {
				return usagef("--sha256 %q is not the 64 hexadecimal digits of a SHA-256", sum)
			}
			if size <= 0 {
				return usagef("--size says how many bytes of the slot the hash is of")
			}
			if tries < 1 || tries > 3 {
				return usagef("--tries is %d, want 1 to 3", tries)
			}
			return s.activate(cmd.Context(), args[0], size, [32]byte(raw), tries)
		},
	})
	cmd.Flags().Int64Var(&size, "size", 0, "`bytes` of the image in the slot")
	cmd.Flags().StringVar(&sum, "sha256", "", "SHA-256 of these bytes, in `hex`")
	cmd.Flags().IntVar(&tries, "tries", 1, "`boots` that the slot gets to prove itself, 1 to 3")
	return cmd
}

func (s *slotsFlags) activate(ctx context.Context, label string, size int64, sum [32]byte, tries int) error {
	d, r, err := s.proof()
	if err != nil {
		return err
	}
	defer d.Close()
	if label == r.Slot().Label {
		return diskHint(fmt.Errorf("activating slot %q: %w", label, partition.ErrRunning))
	}
	// A mistyped hash must not cost a slot that is good to fall back to: look first, and take the slot only then.
	if err := d.Check(ctx, label, size, sum); err != nil {
		return withHint(diskHint(err), "nothing was changed")
	}
	return s.change(fmt.Sprintf("make slot %s boot next, with %d boots to prove itself; %s is what it falls back to", label, tries, r.Slot().Label), func() error {
		t, err := d.Begin(r, label)
		if err != nil {
			return err
		}
		v, err := t.Verify(ctx, size, sum)
		if err != nil {
			return err
		}
		return d.Activate(r, v, tries)
	})
}

// exactly says what a command's arguments are when they are not there.
func exactly(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return withHint(usagef("%s takes %s", cmd.Name(), what), "usage: %s", cmd.UseLine())
		}
		return nil
	}
}
