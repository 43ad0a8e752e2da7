// Package host builds the engine of a real host from its configuration and runs it: the one place where all rooms meet.
package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/writer"
)

// assemble builds the engine that c describes, what it aims at, and what releases its connections, and its writer, when the engine has ended.
func assemble(c config.Config, opt Options, log *slog.Logger) (*updater.Engine, *target, func() error, error) {
	machineID, err := readLine("machine id", c.Host.MachineID)
	if err != nil {
		return nil, nil, nil, err
	}
	bootID, err := readLine("boot id", c.Host.BootID)
	if err != nil {
		return nil, nil, nil, err
	}
	version, err := writer.RunningVersion(c)
	if err != nil {
		return nil, nil, nil, err
	}
	if err := os.MkdirAll(c.Paths.State, 0o700); err != nil {
		return nil, nil, nil, fmt.Errorf("making the state directory: %w", err)
	}
	certificate, err := clientCertificate(c.Update.ClientCert, c.Update.ClientKey, c.Trust.TPM)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("update.client_cert, update.client_key: %w", err)
	}
	h, err := omaha.NewHTTP(omaha.HTTPOptions{
		Proxy: c.Update.Proxy, CAFiles: c.Update.CA, CAOnly: c.Update.CAOnly, Certificate: certificate,
		RateLimit: int64(c.Update.RateLimit), Logger: log,
	})
	if err != nil {
		return nil, nil, nil, err
	}
	checks, programs := healthChecks(c, version).Run, gatePrograms(c).Run
	var rebooter reboot.Rebooter = reboot.Logind{}
	if opt.Errands != nil {
		s := errands{opt.Errands}
		checks, programs, rebooter = s.health, s.gates(c.Reboot.GateDir), s
	}
	if c.Reboot.Method == "exit" {
		rebooter = reboot.Exit{}
	}
	gates, err := rebootGates(c, programs)
	if err != nil {
		return nil, nil, nil, err
	}
	store := updater.Store{Path: filepath.Join(c.Paths.State, "state.json")}
	state, err := loadState(store, log)
	if err != nil {
		return nil, nil, nil, err
	}
	sem, closer, err := semaphore(c.Lock, c.Trust.TPM)
	if err != nil {
		return nil, nil, nil, err
	}
	guard, err := newGuard(c, h, opt.Start, log)
	if err != nil {
		return nil, nil, nil, errors.Join(err, closer())
	}
	guard.machineID = machineID
	in := &installer{conf: c, http: h, log: log, bootID: bootID, version: version, guard: guard, deadman: newDeadman(c, bootID, version), start: opt.Start}
	if in.where, err = writer.Locate(c, os.DirFS("/")); err != nil {
		return nil, nil, nil, errors.Join(err, closer())
	}
	in.deadman.slot = in.where.Running
	if facts, err := in.Facts(context.Background()); err == nil {
		if err := in.deadman.start(state, facts); err != nil {
			log.Warn(err.Error())
		}
		if facts.Slots[facts.Running].Successful {
			guard.raise(context.Background(), facts.Running, version) // what power or a missing TPM kept from being done after the last confirmation
			guard.proves(facts.Running, version)                      // with the first check
		}
	}
	goal := &target{channel: c.Update.Channel, pin: c.Update.Pin}
	e := &updater.Engine{
		Core: &updater.Core{
			State: state, Rand: rand.Float64,
			Timing: updater.Timing{
				FirstCheck: time.Duration(c.Update.FirstCheck), Interval: time.Duration(c.Update.Interval), Jitter: 0.1,
				MinRetry: time.Duration(c.Update.Retry), GateRetry: time.Duration(c.Reboot.GateRetry), Quarantine: time.Duration(c.Update.Quarantine),
			},
		},
		Store:     store,
		Installer: in,
		Gates: &gatekeeper{
			download: []reboot.Gate{pauseGate{c.PauseFile()}}, panel: gates,
			target: goal, semaphore: sem, group: c.Lock.Group, zone: c.Lock.Zone, class: c.Lock.Class,
			host: lockName(c.Host.Alias, machineID), bootID: bootID, version: version,
			timeout: time.Duration(c.Lock.Timeout), now: time.Now,
		},
		Health:   judge(c, version, bootID, checks, log),
		Rebooter: rebooter,
		Log:      log,
	}
	oem := releaseFile(c.Host.OEM)
	e.Server = &server{
		client: omaha.Client{
			OEM: oem["ID"], OEMVersion: oem["VERSION_ID"],
			URL: c.Update.Server, AppID: c.Update.App, Version: version, Track: c.Update.Channel, Board: c.Update.Board,
			MachineID: machineID, MachineAlias: c.Host.Alias, BootID: bootID, HTTP: h, AllowPlainHTTP: c.Update.HTTP,
		},
		target: goal, downgrade: c.Update.Downgrade,
		why: e.Hold, checked: guard.prove,
	}
	if c.Update.Server == config.Disabled {
		e.Server = noServer{}
	}
	release := func() error {
		in.forget() // an engine that ended before it armed what it had written: a writer that is kept would hold the slot
		return closer()
	}
	return e, goal, release, nil
}

// loadState reads the saved state. One that cannot be read is put aside, not thrown away, and the host goes on from what its disk says.
func loadState(store updater.Store, log *slog.Logger) (updater.State, error) {
	st, err := store.Load()
	if !errors.Is(err, updater.ErrState) {
		return st, err
	}
	aside := store.Path + ".unreadable"
	log.Error("the saved state cannot be read; it is put aside and the host goes on from what the disk says", "error", err, "aside", aside)
	if err := os.Rename(store.Path, aside); err != nil {
		return st, fmt.Errorf("putting the unreadable state aside: %w", err)
	}
	return store.Load()
}

// releaseFile reads a file of that form which need not be there. What could not travel to the server is left out.
func releaseFile(path string) map[string]string {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	fields := writer.ReleaseFields(data)
	for key, value := range fields {
		if omaha.Printable(value) != value || len(value) > 100 || strings.ContainsFunc(value, func(r rune) bool { return r > '~' }) {
			delete(fields, key)
		}
	}
	return fields
}
