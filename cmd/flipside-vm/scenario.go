package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/partition/gptimage"
	"github.com/flipside-linux/flipside/updater"
)

// Limits on what a machine may take in software emulation on two cores that do nothing else. They only end what hangs.
const (
	bootLimit   = 3 * time.Minute
	updateLimit = 8 * time.Minute
)

var scenarios = map[string]func(context.Context, *lab) error{
	"update": update, "panic": fallback("panic"), "hang": fallback("hang"), "sick": fallback("sick"), "cuts": cuts, "bls-cuts": cutsOnEntries, "table": table, "journal": journal, "two": two, "rollback": rollback, "entries": entries, "bls": onEntries,
}

var stories = map[string]string{
	"update":   "A good release: the host takes it, reboots into it, and confirms it",
	"panic":    "A release whose kernel panics: the host falls back",
	"hang":     "A release whose init hangs: the watchdog restarts the host, and it falls back",
	"sick":     "A release that fails its health check: the host falls back",
	"cuts":     "Power cuts at random moments of an update, of the reboot and of the confirmation",
	"bls-cuts": "The same on hosts whose boot loader is systemd-boot, under a UEFI firmware",
	"table":    "A disk whose primary partition table is damaged",
	"journal":  "A root file system whose journal ends in a record that was written in half",
	"two":      "Two hosts and one reboot semaphore",
	"entries":  "Boot entries for systemd-boot: what it starts and counts is what the specification in package bootsim says",
	"bls":      "A whole system on systemd-boot: a release that fails its health check, and a good one",
	"rollback": "An old signed release under a new name, and an old copy of the whole disk: the floor in the TPM refuses",
}

// confirmed reports whether a host runs a version and has confirmed it.
func confirmed(version string) func(view) bool {
	return func(v view) bool {
		if !v.up || v.status.Version != version || v.status.Phase != updater.Idle {
			return false
		}
		for _, s := range v.status.Slots {
			if s.Running {
				return s.Successful
			}
		}
		return false
	}
}

// begin makes a machine on release base, switches it on, and waits until it is up.
func begin(ctx context.Context, l *lab, name, channel string) (*machine, error) {
	base, err := l.release("base")
	if err != nil {
		return nil, err
	}
	if err := l.publish(ctx, channel, base); err != nil {
		return nil, err
	}
	m, err := l.machine(ctx, name, channel, name == "bls")
	if err != nil {
		return nil, err
	}
	if name == "hang" {
		m.watchdog = 90 // it is waited for
	}
	if err := m.on(ctx); err != nil {
		return nil, err
	}
	return m, m.until(ctx, bootLimit, "the host is up on release "+base.version, confirmed(base.version))
}

// rollback: a host with a TPM takes a release, and then is offered an older one, which the same key has signed, as if it were newer. It refuses. Then
// somebody puts back a copy of its disk from before, with the old release, the old state and the old floor in it, and offers it the same again. It still
// refuses, by what the TPM alone knows; and it takes the newer release once more.
func rollback(ctx context.Context, l *lab) error {
	const name = "rollback"
	base, err := l.release("base")
	if err != nil {
		return err
	}
	good, err := l.release("good")
	if err != nil {
		return err
	}
	if err := l.publish(ctx, name, base); err != nil {
		return err
	}
	m, err := l.machine(ctx, name, name, false)
	if err != nil {
		return err
	}
	m.tpm = true
	if err := m.on(ctx); err != nil {
		return err
	}
	err = m.until(ctx, bootLimit, "the host is up, and its floor is in the TPM", func(v view) bool {
		return confirmed(base.version)(v) && v.floor.Keeper == "tpm" && v.floor.TPM > 0
	})
	if err != nil {
		return err
	}
	before := m.view().floor
	if err := m.offOn(ctx, base.version); err != nil {
		return err
	}
	old := m.path("old.img")
	if err := copySparse(old, m.disk()); err != nil {
		return err
	}
	update := func() error {
		if err := l.publish(ctx, name, good); err != nil {
			return err
		}
		return m.until(ctx, updateLimit, "the host runs release "+good.version+", confirmed, and the TPM knows it", func(v view) bool {
			return confirmed(good.version)(v) && v.floor.TPM > before.TPM
		})
	}
	refuses := func(version, disguise string) error {
		if _, err := l.server.Publish(ctx, name, disguise, base.payload); err != nil {
			return err
		}
		err := m.until(ctx, updateLimit, "release "+disguise+" is refused", func(v view) bool {
			_, failed := v.status.Quarantine[disguise]
			return failed && v.status.Phase == updater.Idle
		})
		if err != nil {
			return err
		}
		v := m.view()
		reason := v.status.Quarantine[disguise].Reason
		l.mark(m, "refused", reason)
		if !strings.Contains(reason, fmt.Sprintf("the floor %d", v.floor.Number)) {
			return fmt.Errorf("release %s was refused for another reason: %s", disguise, reason)
		}
		if v.status.Version != version {
			return fmt.Errorf("the host runs release %s, want %s", v.status.Version, version)
		}
		return nil
	}
	if err := m.on(ctx); err != nil {
		return err
	}
	if err := update(); err != nil {
		return err
	}
	if err := refuses(good.version, "3.0.0"); err != nil {
		return err
	}
	if err := m.offOn(ctx, good.version); err != nil {
		return err
	}
	if err := copySparse(m.disk(), old); err != nil {
		return err
	}
	l.mark(m, "replaced", "the disk is that of before the update")
	if err := m.on(ctx); err != nil {
		return err
	}
	if err := m.until(ctx, bootLimit, "the host is up on the old disk", func(v view) bool { return v.up && v.floor.TPM > 0 }); err != nil {
		return err
	}
	if f := m.view().floor; f.TPM <= max(f.File, f.Release) || f.Number != f.TPM {
		return fmt.Errorf("the floor on the old disk is %+v: it should be the TPM alone that keeps it", f)
	}
	if err := refuses(base.version, "3.1.0"); err != nil {
		return err
	}
	if err := update(); err != nil {
		return err
	}
	if err := os.Remove(old); err != nil {
		return err
	}
	return m.offOn(ctx, good.version)
}

func update(ctx context.Context, l *lab) error {
	m, err := begin(ctx, l, "update", "update")
	if err != nil {
		return err
	}
	good, err := l.release("good")
	if err != nil {
		return err
	}
	if err := l.publish(ctx, "update", good); err != nil {
		return err
	}
	if err := m.until(ctx, updateLimit, "the host runs release "+good.version+", confirmed", confirmed(good.version)); err != nil {
		return err
	}
	return m.offOn(ctx, good.version)
}

// offOn switches a machine off and looks at its disk, which must boot into a version.
func (m *machine) offOn(ctx context.Context, version string) error {
	if err := m.off(); err != nil {
		return err
	}
	m.lab.mark(m, "off", "")
	v, err := m.whole(ctx)
	if err != nil {
		m.lab.lose()
		return fmt.Errorf("%s: the disk: %w", m.name, err)
	}
	if v != version {
		return fmt.Errorf("%s: the disk boots into release %s, want %s", m.name, v, version)
	}
	return nil
}

// fallback gives a host a bad release.
func fallback(name string) func(context.Context, *lab) error {
	return func(ctx context.Context, l *lab) error {
		m, err := begin(ctx, l, name, name)
		if err != nil {
			return err
		}
		if err := m.fallsBack(ctx, name, name); err != nil {
			return err
		}
		return m.offOn(ctx, l.releases[0].version)
	}
}

// fallsBack gives a host on release base a bad release: it must be back on the old one by itself, and the cluster must have halted the bad one.
func (m *machine) fallsBack(ctx context.Context, channel, release string) error {
	base, err1 := m.lab.release("base")
	bad, err2 := m.lab.release(release)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if err := m.lab.publish(ctx, channel, bad); err != nil {
		return err
	}
	err := m.until(ctx, updateLimit, "the host is back on release "+base.version+" and says that "+bad.version+" failed", func(v view) bool {
		_, failed := v.status.Quarantine[bad.version]
		return v.up && v.status.Version == base.version && v.status.Phase == updater.Idle && failed && v.status.Verdict == nil
	})
	if err != nil {
		return err
	}
	st, err := m.lab.semaphore.State(ctx, "vm-"+channel)
	if err != nil {
		return err
	}
	if _, halted := st.Halts[bad.version]; !halted {
		return fmt.Errorf("release %s failed on a host, and is not halted for its group", bad.version)
	}
	return nil
}

func table(ctx context.Context, l *lab) error {
	base, err := l.release("base")
	if err != nil {
		return err
	}
	good, err := l.release("good")
	if err != nil {
		return err
	}
	if err := errors.Join(l.publish(ctx, "table", base), l.publish(ctx, "table", good)); err != nil {
		return err
	}
	m, err := l.machine(ctx, "table", "table", false)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(m.disk(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(make([]byte, 2*512), 512) // the primary header and the first entries
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := m.on(ctx); err != nil {
		return err
	}
	resets := 0
	if err := m.until(ctx, bootLimit, "the host is up", func(v view) bool { resets = v.resets; return v.up }); err != nil {
		return err
	}
	if resets > 0 {
		return fmt.Errorf("with a bad primary table the host is up only after %d resets", resets)
	}
	if err := m.until(ctx, updateLimit, "the host runs release "+good.version+", confirmed", confirmed(good.version)); err != nil {
		return err
	}
	return m.offOn(ctx, good.version)
}

// journal lets a machine lose power, and spoils the last record of its root file system's journal, as a medium does that does not write a page whole.
// The kernel refuses to mount that.
func journal(ctx context.Context, l *lab) error {
	base, err := l.release("base")
	if err != nil {
		return err
	}
	m, err := begin(ctx, l, "journal", "journal")
	if err != nil {
		return err
	}
	if err := m.off(); err != nil {
		return err
	}
	root, err := partitionOf(m.disk(), gptimage.TypeLinux, "ROOT")
	if err != nil {
		return err
	}
	if err := tearJournal(m.disk(), root.Start, root.Size); err != nil {
		return fmt.Errorf("tearing the journal of %s: %w", m.name, err)
	}
	if err := m.on(ctx); err != nil {
		return err
	}
	resets := 0
	if err := m.until(ctx, bootLimit, "the host is up with a torn journal", func(v view) bool { resets = v.resets; return v.up }); err != nil {
		l.lose()
		return err
	}
	if console, err := os.ReadFile(m.path("console")); err != nil || !bytes.Contains(console, []byte("it is checked")) || resets > 0 {
		return fmt.Errorf("the host is up after %d resets, and did not check its root file system (%v)", resets, err)
	}
	return m.offOn(ctx, base.version)
}

// tearJournal spoils the second half of the last commit record (a block that begins with jbd2's magic number and type 2) of an ext4 journal.
func tearJournal(disk string, start, size int64) error {
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var head [12]byte
	last, at := uint32(0), int64(-1)
	for off := start; off < start+size; off += 4096 {
		if _, err := f.ReadAt(head[:], off); err != nil {
			return err
		}
		if n := binary.BigEndian.Uint32(head[8:]); binary.BigEndian.Uint32(head[:]) == 0xc03b3998 && binary.BigEndian.Uint32(head[4:]) == 2 && n >= last {
			last, at = n, off
		}
	}
	if at < 0 {
		return errors.New("it holds no commit")
	}
	_, err = f.WriteAt(bytes.Repeat([]byte{0x55}, 2048), at+2048)
	return err
}

func two(ctx context.Context, l *lab) error {
	good, err := l.release("good")
	if err != nil {
		return err
	}
	if err := l.semaphore.SetMax(ctx, "vm-two", 1); err != nil {
		return err
	}
	var pair []*machine
	for _, name := range []string{"left", "right"} {
		m, err := begin(ctx, l, name, "two")
		if err != nil {
			return err
		}
		pair = append(pair, m)
	}
	if err := l.publish(ctx, "two", good); err != nil {
		return err
	}
	// Looked at from outside, all the time: no more than one holds, and only one is away.
	most, watching := 0, make(chan struct{})
	watch, stop := context.WithCancel(ctx)
	go func() {
		defer close(watching)
		for watch.Err() == nil {
			if st, err := l.semaphore.State(watch, "vm-two"); err == nil {
				most = max(most, len(st.Holders))
			}
			time.Sleep(50 * time.Millisecond)
		}
	}()
	for _, m := range pair {
		err = errors.Join(err, m.until(ctx, 2*updateLimit, "the host runs release "+good.version+", confirmed", confirmed(good.version)))
	}
	var st lock.State
	if err == nil {
		for range 100 { // the last verdict is on its way
			if st, err = l.semaphore.State(ctx, "vm-two"); err != nil || len(st.Holders) == 0 {
				break
			}
			time.Sleep(200 * time.Millisecond)
		}
	}
	stop()
	<-watching
	if err != nil {
		return err
	}
	if most != 1 || len(st.Holders) != 0 {
		return fmt.Errorf("at most %d hosts held the semaphore of 1, and %d do at the end", most, len(st.Holders))
	}
	for _, m := range pair {
		err = errors.Join(err, m.offOn(ctx, good.version))
	}
	return err
}

// onEntries is a host whose boot loader is systemd-boot: it takes a bad release, falls back, and takes a good one. The partition table stays as it was.
func onEntries(ctx context.Context, l *lab) error {
	const name = "bls"
	m, err := begin(ctx, l, name, name)
	if err != nil {
		return err
	}
	good, err := l.release("good")
	if err != nil {
		return err
	}
	if err := m.fallsBack(ctx, name, "sick"); err != nil {
		return err
	}
	if err := l.publish(ctx, name, good); err != nil {
		return err
	}
	if err := m.until(ctx, updateLimit, "the host runs release "+good.version+", confirmed", confirmed(good.version)); err != nil {
		return err
	}
	if err := m.offOn(ctx, good.version); err != nil {
		return err
	}
	const table = 34 * 512 // bytes of the primary copy
	was, err1 := hashFile(filepath.Join(l.images, name, "disk.img"), 0, table)
	is, err2 := hashFile(m.disk(), 0, table)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if was != is {
		return fmt.Errorf("%s: the partition table was written to", m.name)
	}
	return nil
}
