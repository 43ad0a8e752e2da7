// Package config is the daemon's configuration: defaults, the update.conf of older hosts, TOML files, and what an operator chose
// at run time, each over the one before, and checked whole before anything starts.
//
// Every key has a default that fits a host in the field, so that a file with nothing but the server's address is a complete
// configuration. A key that is not known is an error with its file and line: a typing mistake must not silently turn a
// policy off. [Read] remembers for every key which file set it.
package config

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/window"
	"github.com/flipside-linux/flipside/partition/bls"
)

// DefaultPath is the administrator's configuration file. [Read] tells where else settings may come from.
const DefaultPath = "/etc/flipside/flipside.toml"

// Disabled as update.server means that no server is asked, as in the update.conf of older hosts.
const Disabled = "disabled"

// Config is the whole configuration.
type Config struct {
	Update  Update  `toml:"update"`
	Slots   Slots   `toml:"slots"`
	Boot    Boot    `toml:"boot"`
	Reboot  Reboot  `toml:"reboot"`
	Lock    Lock    `toml:"lock"`
	Health  Health  `toml:"health"`
	Metrics Metrics `toml:"metrics"`
	Host    Host    `toml:"host"`
	Trust   Trust   `toml:"trust"`
	Paths   Paths   `toml:"paths"`
}

// Update says where releases come from and who may sign them.
type Update struct {
	Server     string   `toml:"server"`      // URL of the Omaha server; "disabled": no server is asked
	App        string   `toml:"app"`         // Omaha application id
	Channel    string   `toml:"channel"`     // Omaha track
	Board      string   `toml:"board"`       // decides the architecture on Nebraska
	Keys       []string `toml:"keys"`        // PEM files and directories of them: whose signature is believed
	Partition  string   `toml:"partition"`   // the payload's partition that goes to the slot, for payloads that hold several
	Pin        string   `toml:"pin"`         // only this version, or versions that begin with it
	Downgrade  bool     `toml:"downgrade"`   // a release older than the running one may be taken
	HTTP       bool     `toml:"allow_http"`  // payloads may come over plain HTTP (they are signed all the same)
	FirstCheck Duration `toml:"first_check"` // after the start
	Interval   Duration `toml:"interval"`    // between checks
	Retry      Duration `toml:"retry"`       // first wait after a failure; doubles
	RateLimit  Bytes    `toml:"rate_limit"`  // of downloads, per second; 0 is unlimited
	MinRate    Bytes    `toml:"min_rate"`    // per second; a download that is slower for a minute tries another connection; 0 never does
	Quarantine Duration `toml:"quarantine"`  // a version that failed here is left alone for this long; doubles

	Proxy      string   `toml:"proxy"`       // for what is fetched, not the semaphore or reboot.alerts: http://, https:// or socks5://; "": as the environment says; "direct": none
	CA         []string `toml:"ca"`          // PEM files with authorities to trust besides the system's
	CAOnly     bool     `toml:"ca_only"`     // trust only those
	ClientCert string   `toml:"client_cert"` // PEM file of a certificate to show to servers
	ClientKey  string   `toml:"client_key"`  // its key: a PEM file, or "tpm:device"
}

// Slots says which disk holds the slots.
type Slots struct {
	Disk    string `toml:"disk"`    // block device or image; "auto": the disk that the running slot is on
	Running string `toml:"running"` // label of the running slot, or "auto": found by what is mounted
	Type    string `toml:"type"`    // partition type GUID of the slots
	Tries   uint8  `toml:"tries"`   // boots that a new slot gets to prove itself, 1 to 3
	Kernels string `toml:"kernels"` // directory on the boot partition of vmlinuz-a and vmlinuz-b, for payloads that bring a kernel

	PostInstall        string   `toml:"post_install"`         // "auto": the program that the release brings is run if it asks for that; "off": never
	PostInstallTimeout Duration `toml:"post_install_timeout"` // for it
}

// Boot says how the boot loader is told which slot to start.
type Boot struct {
	Backend string `toml:"backend"` // "gpt": by bits in the partition table, as GRUB's gptprio and flipside-init read them; "bls": by boot entries with counters, as systemd-boot reads them
	Entries string `toml:"entries"` // bls: directory of the entries, on the partition that systemd-boot reads
	Entry   string `toml:"entry"`   // bls: the lines of an entry beside sort-key and version; {letter}, {label} and {uuid} are those of the slot
}

// Reboot says when and how the host reboots.
type Reboot struct {
	Strategy     string   `toml:"strategy"`     // "reboot": by itself; "off": never by itself
	Method       string   `toml:"method"`       // "logind", or "exit": the process ends with status 133 and whoever supervises it starts the machine again
	WindowStart  string   `toml:"window_start"` // one window, as in the older hosts' update.conf
	WindowLength string   `toml:"window_length"`
	TimeZone     string   `toml:"time_zone"` // of the windows and blackouts that name none; "": this machine's
	GateRetry    Duration `toml:"gate_retry"`

	Windows   []Window   `toml:"windows"`   // when it may; none: always
	Blackouts []Blackout `toml:"blackouts"` // when not, whatever the windows say

	Inhibitors  bool     `toml:"inhibitors"`   // wait for programs that hold a logind inhibitor of mode block
	UsersGrace  Duration `toml:"users_grace"`  // how long people who are logged in may stay, after they were told; 0: nobody is waited for
	InhibitDir  string   `toml:"inhibit_dir"`  // a file in it is against the reboot, its first line is the reason; "": inhibit.d in paths.run
	GateDir     string   `toml:"gate_dir"`     // a program in it that fails is against the reboot, the last line that it prints is the reason
	GateTimeout Duration `toml:"gate_timeout"` // for each program
	Alerts      string   `toml:"alerts"`       // URL of a Prometheus server; what fires is against the reboot
	AlertsQuery string   `toml:"alerts_query"` // another query; each series in its answer is against the reboot
}

// Window is a reboot window.
type Window struct {
	Days   []string `toml:"days"`   // three letters each; none: every day
	Start  string   `toml:"start"`  // 04:00
	Length string   `toml:"length"` // 1h30m
	Zone   string   `toml:"zone"`   // IANA name
}

// Blackout is days without reboots.
type Blackout struct {
	From   string `toml:"from"` // 2026-12-24
	To     string `toml:"to"`   // included; the same day if empty
	Zone   string `toml:"zone"` // IANA name
	Reason string `toml:"reason"`
}

// Schedule is when the host's own configuration lets it reboot.
func (r Reboot) Schedule() (window.Schedule, error) {
	s, errs := r.schedule()
	return s, errors.Join(errs...)
}

func (r Reboot) schedule() (s window.Schedule, errs []error) {
	if r.WindowStart != "" && r.WindowLength != "" {
		w, err := window.Parse(r.WindowStart, r.WindowLength, r.TimeZone)
		if err != nil {
			errs = append(errs, fmt.Errorf("reboot.window_start: %w", err))
		}
		s.Windows = append(s.Windows, w)
	}
	for i, v := range r.Windows {
		w, err := window.New(v.Days, v.Start, v.Length, cmp.Or(v.Zone, r.TimeZone))
		if err != nil {
			errs = append(errs, fmt.Errorf("reboot.windows: number %d: %w", i+1, err))
		}
		s.Windows = append(s.Windows, w)
	}
	for i, v := range r.Blackouts {
		b, err := window.ParseBlackout(v.From, v.To, cmp.Or(v.Zone, r.TimeZone), v.Reason)
		if err != nil {
			errs = append(errs, fmt.Errorf("reboot.blackouts: number %d: %w", i+1, err))
		}
		s.Blackouts = append(s.Blackouts, b)
	}
	return s, errs
}

// Lock says which semaphore the host asks before a reboot: in etcd, or behind a FleetLock server. Without either there is none.
type Lock struct {
	Endpoints []string `toml:"endpoints"` // URLs of etcd
	FleetLock string   `toml:"fleetlock"` // URL of a FleetLock server: "flipside fleet serve", airlock
	Proxy     string   `toml:"proxy"`     // for fleetlock: http://, https:// or socks5://; "" and "direct": none, whatever the environment says. etcd is asked directly
	Zone      string   `toml:"zone"`      // failure domain of this host: a rack, a data centre
	Class     string   `toml:"class"`     // its priority class
	Group     string   `toml:"group"`
	CA        string   `toml:"ca"`
	Cert      string   `toml:"cert"`
	Key       string   `toml:"key"`
	User      string   `toml:"user"`
	Password  string   `toml:"password_file"`
	Timeout   Duration `toml:"timeout"` // for each question to the semaphore; at most a minute
	Signer    string   `toml:"signer"`  // key by which this host says that it goes down and is well: a PEM file, or "tpm:device"
	Owners    []string `toml:"owners"`  // PEM files of those who may sign the group's policy; with any, what they and the hosts' keys have not signed does not count
}

// Health says what makes a boot good.
type Health struct {
	Dir     string   `toml:"dir"`     // every executable in it must succeed
	Timeout Duration `toml:"timeout"` // for each
	Soak    Duration `toml:"soak"`    // all must still succeed after this time
	// Units that must be active, such as boot-complete.target, and units of which none may have failed (patterns; "*" is every unit).
	// Empty lists ask systemd for nothing.
	Units     []string `toml:"units"`
	NotFailed []string `toml:"not_failed"`
	Patience  Duration `toml:"patience"` // how long the units may take to become active
	Watchdog  string   `toml:"watchdog"` // device that resets the machine if a trial boot hangs; "" is none, and so is one that is not there
}

// Metrics says how Prometheus learns what the host does.
type Metrics struct {
	Textfile string `toml:"textfile"` // for node-exporter's textfile collector; must end in .prom
	Listen   string `toml:"listen"`   // loopback address such as 127.0.0.1:9476
}

// Host says where the host's own facts are read.
type Host struct {
	OSRelease string `toml:"os_release"` // VERSION_ID is the running version
	MachineID string `toml:"machine_id"`
	BootID    string `toml:"boot_id"`
	Alias     string `toml:"alias"`       // a name for people
	OEM       string `toml:"oem_release"` // ID and VERSION_ID say what the host runs on, for the server's list of hosts; need not exist
	Bus       string `toml:"bus"`         // "system": the system's message bus is served; "off"; "auto": where reboot.method is "logind"
}

// Trust says how much a host believes, and how it proves who it is.
type Trust struct {
	Floor       string   `toml:"floor"`       // where the lowest acceptable release is remembered: "auto" (the TPM once it is provisioned, and the file), "tpm", "file"
	TPM         string   `toml:"tpm"`         // device of the TPM, or the socket of an emulator
	Product     string   `toml:"product"`     // only payloads that are signed as being for this product; "": any
	Signatures  int      `toml:"signatures"`  // by different keys, that a payload needs
	Development bool     `toml:"development"` // development keys count
	Manifests   bool     `toml:"manifests"`   // only payloads whose manifest is signed by itself: not those of major 1 for which the server sends no signature of it
	Unlock      string   `toml:"unlock"`      // program that lets the next boot's secrets open, and says if they will not: then the slot is not armed; "": none
	Proof       string   `toml:"proof"`       // URL of the release server (…/v1/proof) that gets a TPM quote of every boot that is good; "": none
	Endorsement string   `toml:"endorsement"` // file with the certificate of the TPM's endorsement key, PEM or DER, where the TPM does not hold it itself; "": none
	PCRKeys     []string `toml:"pcr_keys"`    // PEM files of RSA keys whose signed PCR policies open this host's secrets; a slot without such a policy is not armed
	PCRPhase    string   `toml:"pcr_phase"`   // of the boot in which the secrets are opened, as systemd-measure names it
	PCRPolicy   string   `toml:"pcr_policy"`  // URL that a payload's PCR policy is posted to before the slot is armed; "": none
}

// Paths says where things are kept.
type Paths struct {
	State string `toml:"state"` // directory that both slots share
	Run   string `toml:"run"`   // directory of the control socket and the pause file

	Writable []string `toml:"writable"` // directories that health checks and gate programs may write to, beside state, run and those for temporary files
}

// Duration is a time.Duration that is written as 45m or 1h30m.
type Duration time.Duration

// UnmarshalText parses a Go duration.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return err
	}
	if v < 0 {
		return fmt.Errorf("duration %q is negative", text)
	}
	*d = Duration(v)
	return nil
}

// String prints the duration as it is written in a file, without the zero parts that Go adds.
func (d Duration) String() string {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// MarshalText is String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Bytes is a number of bytes that is written as 16MiB, 500KiB or 1GiB, or as a plain number.
type Bytes int64

// String prints the number in the largest unit that is exact.
func (b Bytes) String() string {
	for i, suffix := range []string{"GiB", "MiB", "KiB"} {
		if shift := 10 * (3 - i); b != 0 && b&(1<<shift-1) == 0 {
			return fmt.Sprintf("%d%s", b>>shift, suffix)
		}
	}
	return strconv.FormatInt(int64(b), 10)
}

// UnmarshalText parses a number of bytes.
func (b *Bytes) UnmarshalText(text []byte) error {
	s, shift := string(text), 0
	for i, suffix := range []string{"KiB", "MiB", "GiB"} {
		if rest, ok := strings.CutSuffix(s, suffix); ok {
			s, shift = strings.TrimSpace(rest), 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64>>shift {
		return fmt.Errorf("%q is not a number of bytes such as 16MiB", text)
	}
	*b = Bytes(n << shift)
	return nil
}

// MarshalText is String.
func (b Bytes) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// Default is the configuration of a host in the field. Server and Keys have no default.
func Default() Config {
	return Config{
		Update: Update{
			App: "e96281a6-d1af-4bde-9a0a-97b76e56dc57", Channel: "stable", Board: "amd64-usr",
			Keys:       []string{"/usr/share/flipside/keys.d", "/etc/flipside/keys.d"},
			FirstCheck: Duration(7 * time.Minute), Interval: Duration(45 * time.Minute), Retry: Duration(time.Minute), Quarantine: Duration(24 * time.Hour),
			MinRate: 1 << 10,
		},
		Slots: Slots{Disk: "auto", Running: "auto", Type: "5dfbf5f4-2848-4bac-aa5e-0d9a20b745a6", Tries: 1, Kernels: "/boot/flatcar", PostInstall: "auto", PostInstallTimeout: Duration(10 * time.Minute)},
		Boot:  Boot{Backend: "gpt", Entries: "/boot/loader/entries", Entry: "efi /flipside/vmlinuz-{letter}"},
		Reboot: Reboot{
			Strategy: "reboot", Method: "logind", GateRetry: Duration(time.Minute),
			Inhibitors: true, UsersGrace: Duration(5 * time.Minute), GateDir: "/etc/flipside/gate.d", GateTimeout: Duration(time.Minute),
		},
		Lock: Lock{Group: "default", Timeout: Duration(10 * time.Second)},
		Health: Health{
			Dir: "/etc/flipside/health.d", Timeout: Duration(time.Minute), Soak: Duration(30 * time.Second),
			Units: []string{"boot-complete.target"}, Patience: Duration(5 * time.Minute), Watchdog: "/dev/watchdog",
		},
		Host:  Host{OSRelease: "/usr/lib/os-release", MachineID: "/etc/machine-id", BootID: "/proc/sys/kernel/random/boot_id", OEM: "/etc/oem-release", Bus: "auto"},
		Trust: Trust{Floor: "auto", TPM: "/dev/tpmrm0", Signatures: 1, PCRPhase: "enter-initrd"},
		Paths: Paths{State: "/var/lib/flipside", Run: "/run/flipside"},
	}
}

// Socket is the path of the control socket.
func (c Config) Socket() string { return filepath.Join(c.Paths.Run, "control.sock") }

// InhibitDir is the directory whose files are against a reboot.
func (c Config) InhibitDir() string {
	return cmp.Or(c.Reboot.InhibitDir, filepath.Join(c.Paths.Run, "inhibit.d"))
}

// PauseFile is the path of the file that pauses updates while it exists.
func (c Config) PauseFile() string { return filepath.Join(c.Paths.State, "paused") }

// maxLockTimeout keeps the engine's loop, which waits that long for the semaphore, well below what the service's watchdog takes for a hang.
const maxLockTimeout = time.Minute

// minInterval keeps what was meant as minutes from becoming an attack on the server.
const minInterval = time.Second

// check returns what is wrong with a configuration. Each error begins with the key that it speaks of.
func (c *Config) check() (errs []error) {
	add := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Update.Server == "" {
		add("update.server is not set: where do releases come from?")
	} else if c.Update.Server == Disabled {
		// nobody is asked
	} else if u, err := url.Parse(c.Update.Server); err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		add("update.server %q is not an http or https URL", c.Update.Server)
	}
	for _, p := range [...]struct{ key, url string }{{"update.proxy", c.Update.Proxy}, {"lock.proxy", c.Lock.Proxy}} {
		if p.url == "" || p.url == "direct" {
			continue
		}
		if u, err := url.Parse(p.url); err != nil {
			add("%s cannot be read as a URL", p.key) // it may hold a password
		} else if u.Host == "" || !slices.Contains([]string{"http", "https", "socks5"}, u.Scheme) {
			add("%s %q is not an http://, https:// or socks5:// URL, nor \"direct\"", p.key, u.Redacted())
		}
	}
	if time.Duration(c.Update.Interval) < minInterval {
		add("update.interval is %s, want at least %s", c.Update.Interval, Duration(minInterval))
	}
	if (c.Update.ClientCert == "") != (c.Update.ClientKey == "") {
		add("update.client_cert and update.client_key belong together")
	}
	if c.Update.CAOnly && len(c.Update.CA) == 0 {
		add("update.ca_only without update.ca trusts nobody")
	}
	if c.Update.RateLimit > 0 && c.Update.MinRate > c.Update.RateLimit {
		add("update.min_rate is more than update.rate_limit: no download would ever be fast enough")
	}
	if c.Update.Retry <= 0 {
		add("update.retry must be more than zero")
	}
	if _, err := uuid.Parse(c.Slots.Type); err != nil {
		add("slots.type %q is not a partition type GUID: %w", c.Slots.Type, err)
	}
	if c.Slots.Tries < 1 || c.Slots.Tries > 3 {
		add("slots.tries is %d, want 1 to 3: GRUB stops in its menu when more tries fail in one power-on", c.Slots.Tries)
	}
	switch c.Boot.Backend {
	case "gpt":
	case "bls":
		if c.Boot.Entries == "" {
			add("boot.entries is not set: where does systemd-boot read its entries?")
		}
		if err := (&bls.Entries{Template: c.Boot.Entry}).Check(); err != nil {
			add("boot.entry: %w", err)
		}
	default:
		add("boot.backend %q is not one of gpt, bls", c.Boot.Backend)
	}
	switch c.Slots.PostInstall {
	case "auto", "off":
	default:
		add("slots.post_install %q is not one of auto, off", c.Slots.PostInstall)
	}
	if c.Slots.PostInstallTimeout <= 0 {
		add("slots.post_install_timeout must be more than zero")
	}
	switch c.Reboot.Strategy {
	case "reboot", "off":
	default:
		add("reboot.strategy %q is not one of reboot, off", c.Reboot.Strategy)
	}
	switch c.Reboot.Method {
	case "logind", "exit":
	default:
		add("reboot.method %q is not one of logind, exit", c.Reboot.Method)
	}
	if (c.Reboot.WindowStart == "") != (c.Reboot.WindowLength == "") {
		add("reboot.window_start and reboot.window_length belong together")
	}
	if _, err := window.New(nil, "00:00", "1h", c.Reboot.TimeZone); err != nil {
		add("reboot.time_zone: %w", err)
	}
	_, bad := c.Reboot.schedule()
	errs = append(errs, bad...)
	if u, err := url.Parse(c.Reboot.Alerts); err != nil || c.Reboot.Alerts != "" && (u.Host == "" || u.Scheme != "http" && u.Scheme != "https") {
		add("reboot.alerts %q is not an http or https URL", c.Reboot.Alerts)
	}
	if c.Reboot.Alerts == "" && c.Reboot.AlertsQuery != "" {
		add("reboot.alerts_query is set, and reboot.alerts is not: which server answers it?")
	}
	if u, err := url.Parse(c.Lock.FleetLock); err != nil || c.Lock.FleetLock != "" && (u.Host == "" || u.Scheme != "http" && u.Scheme != "https") {
		add("lock.fleetlock %q is not an http or https URL", redacted(c.Lock.FleetLock))
	}
	for _, e := range c.Lock.Endpoints {
		if !isEndpoint(e) {
			add("lock.endpoints: %q is neither an http or https URL nor HOST:PORT", redacted(e))
		}
	}
	if c.Lock.FleetLock != "" && len(c.Lock.Endpoints) > 0 {
		add("lock.endpoints and lock.fleetlock are two semaphores; set one")
	}
	if c.Lock.Proxy != "" && c.Lock.FleetLock == "" {
		add("lock.proxy is for a FleetLock server (lock.fleetlock); etcd is asked directly")
	}
	if (c.Lock.Signer != "" || len(c.Lock.Owners) > 0) && len(c.Lock.Endpoints) == 0 {
		add("lock.signer and lock.owners are for a semaphore in etcd; set lock.endpoints")
	}
	if len(c.Lock.Owners) > 0 && c.Lock.Signer == "" {
		add("lock.owners without lock.signer: a group whose policy is signed takes no host without a key")
	}
	if c.Reboot.GateRetry <= 0 {
		add("reboot.gate_retry must be more than zero")
	}
	if c.Metrics.Textfile != "" && !strings.HasSuffix(c.Metrics.Textfile, ".prom") {
		add("metrics.textfile %q does not end in .prom: node-exporter would not read it", c.Metrics.Textfile)
	}
	if c.Metrics.Listen != "" {
		host, port, err := net.SplitHostPort(c.Metrics.Listen)
		if err == nil {
			_, err = net.LookupPort("tcp", port)
		}
		if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() {
			add("metrics.listen %q is not a port of a loopback address such as 127.0.0.1:9476", c.Metrics.Listen)
		}
	}
	if c.Lock.Timeout <= 0 || time.Duration(c.Lock.Timeout) > maxLockTimeout {
		add("lock.timeout is %s, want more than zero and at most %s: the engine stands still while a place in the queue is given back", c.Lock.Timeout, Duration(maxLockTimeout))
	}
	if c.Lock.Group == "" {
		add("lock.group is empty")
	} else if err := lock.CheckGroup(c.Lock.Group); err != nil && (c.Lock.FleetLock != "" || len(c.Lock.Endpoints) > 0) {
		add("lock.group: %w", err) // older hosts without a lock may have had other names
	}
	if (c.Lock.Cert == "") != (c.Lock.Key == "") {
		add("lock.cert and lock.key belong together")
	}
	switch c.Trust.Floor {
	case "auto", "tpm", "file":
	default:
		add("trust.floor %q is not one of auto, tpm, file", c.Trust.Floor)
	}
	if c.Trust.Signatures < 1 || c.Trust.Signatures > 16 {
		add("trust.signatures is %d, want 1 to 16", c.Trust.Signatures)
	}
	for _, u := range [...]struct{ key, url string }{{"trust.proof", c.Trust.Proof}, {"trust.pcr_policy", c.Trust.PCRPolicy}} {
		if p, err := url.Parse(u.url); u.url != "" && (err != nil || p.Host == "" || p.Scheme != "http" && p.Scheme != "https") {
			add("%s %q is not an http or https URL", u.key, u.url)
		}
	}
	switch c.Host.Bus {
	case "auto", "system", "off":
	default:
		add("host.bus %q is not one of auto, system, off", c.Host.Bus)
	}
	if c.Paths.State == "" || c.Paths.Run == "" {
		add("paths.state and paths.run must be set")
	}
	return errs
}

// isEndpoint reports whether the client of etcd can make an address of e. What it cannot it would take for the name of a host, and ask for ever.
func isEndpoint(e string) bool {
	scheme, _, ok := strings.Cut(e, "://")
	if !ok {
		host, port, err := net.SplitHostPort(e)
		return err == nil && host != "" && port != ""
	}
	u, err := url.Parse(e)
	return err == nil && u.Host+u.Path != "" && (slices.Contains([]string{"unix", "unixs"}, scheme) || u.Host != "" && slices.Contains([]string{"http", "https"}, scheme))
}
