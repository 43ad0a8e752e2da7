package writer

import (
	"bytes"
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/trust"
)

// What a guard may stop an update for.
var (
	ErrGuard   = errors.New("nothing can be believed now")             // and later it may be
	ErrSecrets = errors.New("the next boot's secrets would stay shut") // and trying again does not help
)

// Guard decides what is believed, by the configuration, the pinned keys, the floor and the TPM alone. It does not use the network.
type Guard struct {
	conf  config.Config
	floor *trust.Floor
	log   *slog.Logger
}

// NewGuard makes the guard of the host that c configures.
func NewGuard(c config.Config, log *slog.Logger) (*Guard, error) {
	f, err := Floor(c)
	if err != nil {
		return nil, err
	}
	return &Guard{c, f, log}, nil
}

// Floor is the floor of releases of the host that c configures.
func Floor(c config.Config) (*trust.Floor, error) {
	f := &trust.Floor{Path: filepath.Join(c.Paths.State, "trust.json"), Mode: trust.Mode(c.Trust.Floor), Device: c.Trust.TPM}
	data, err := os.ReadFile(c.Host.OSRelease)
	if err == nil {
		f.Release, err = trust.ReleaseNumber(data)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the running release's number in %s: %w", c.Host.OSRelease, err)
	}
	return f, nil
}

// Keys reads the pinned keys of the host that c configures. An error comes with the keys that were read, for showing why none of them counts.
func Keys(c config.Config, floor int64) (*trust.Keys, error) {
	return trust.LoadKeys(c.Update.Keys, trust.KeyPolicy{Signatures: c.Trust.Signatures, Development: c.Trust.Development, Floor: floor})
}

// Floor is the number below which no release is accepted.
func (g *Guard) Floor() *trust.Floor { return g.floor }

// Options says which payloads are believed.
func (g *Guard) Options() (payload.Options, error) {
	level, err := g.floor.Level()
	if err != nil {
		return payload.Options{}, fmt.Errorf("%w: %w", ErrGuard, err)
	}
	if level.Warning != "" {
		g.log.Warn("the floor of releases is lower than it may have been", "warning", level.Warning, "floor", level.Number)
	}
	keys, err := Keys(g.conf, level.Number)
	if err != nil { // of files on this host, whatever the release is
		return payload.Options{}, fmt.Errorf("%w: %w", ErrGuard, err)
	}
	for _, w := range keys.Warnings(time.Now()) {
		g.log.Warn(w)
	}
	if _, err := g.pcrKeys(); err != nil {
		return payload.Options{}, err
	}
	return payload.Options{Keys: keys.Ring(), MinTimestamp: level.Number, Product: g.conf.Trust.Product, SignedMetadata: g.conf.Trust.Manifests}, nil
}

// Admits refuses to go back to a release below the floor, or to one of which nobody knows whether it is.
func (g *Guard) Admits(slot string) error { return g.floor.Admits(slot) }

// Opens asks whether the secrets of the next boot will open in a slot: by the signed PCR policy of its release, if the host knows the key, and then by the host's
// own program. A policy that cannot be judged leaves it to that program; without one it is a no.
func (g *Guard) Opens(ctx context.Context, slot string, files map[string]string, env ...string) error {
	if len(g.conf.Trust.PCRKeys) > 0 {
		err := g.checkPCRs(files)
		switch {
		case errors.Is(err, trust.ErrUnpredictable) && g.conf.Trust.Unlock != "":
			g.log.Warn("trust.unlock alone decides whether the secrets of the next boot will open", "slot", slot, "reason", err)
		case errors.Is(err, trust.ErrUnpredictable), errors.Is(err, trust.ErrShut):
			return fmt.Errorf("%w: slot %s: %w", ErrSecrets, slot, err)
		case errors.Is(err, ErrGuard):
			return fmt.Errorf("slot %s: %w", slot, err)
		case err != nil:
			return fmt.Errorf("%w: slot %s: %w", ErrGuard, slot, err)
		}
	}
	return g.secrets(ctx, "arm", slot, append(env, "KERNEL="+files[KernelPart], "PCR_POLICY="+files[PolicyPart])...)
}

// pcrKeys reads the keys anew. Whether it can is known before a slot is written, not only before it is armed.
func (g *Guard) pcrKeys() ([]*rsa.PublicKey, error) {
	keys, err := trust.LoadPCRKeys(g.conf.Trust.PCRKeys)
	if err != nil {
		return nil, fmt.Errorf("%w: trust.pcr_keys: %w", ErrGuard, err)
	}
	return keys, nil
}

func (g *Guard) checkPCRs(files map[string]string) error {
	keys, err := g.pcrKeys()
	if err != nil {
		return err
	}
	path := files[KernelPart]
	if path == "" {
		return fmt.Errorf("%w: the release brings no kernel", trust.ErrUnpredictable)
	}
	kernel, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("looking at what the next boot will measure: %w", err)
	}
	defer kernel.Close()
	var beside []byte
	if path := files[PolicyPart]; path != "" {
		data, err := readSome(path)
		if err != nil {
			return fmt.Errorf("reading the release's PCR policy: %w", err)
		}
		if bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) { // not the archive of older payloads
			beside = data
		}
	}
	check := trust.PCRKeys{Keys: keys, Phase: g.conf.Trust.PCRPhase, Current: func(list []uint) (map[uint][]byte, error) {
		t, err := trust.OpenTPM(g.conf.Trust.TPM)
		if err != nil {
			return nil, err
		}
		defer t.Close()
		return t.PCRs(list)
	}}
	return check.Check(kernel, beside)
}

// readSome reads the beginning of a file that should be small.
func readSome(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 1<<20))
}

// secrets runs the host's program for secrets that are bound to a boot, if there is one: "arm SLOT" before a slot is armed, "confirm SLOT" when it has booted
// well, "disarm SLOT" when it will not boot any more. Status 75 (EX_TEMPFAIL) means not now.
func (g *Guard) secrets(ctx context.Context, action, slot string, env ...string) error {
	if g.conf.Trust.Unlock == "" {
		return nil
	}
	limit := time.Duration(g.conf.Slots.PostInstallTimeout)
	timed, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(timed, g.conf.Trust.Unlock, action, slot)
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "SLOT=" + slot, "TPM=" + g.conf.Trust.TPM}, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	var out excerpt
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if err == nil || errors.Is(err, exec.ErrWaitDelay) { // the latter: it succeeded, and what it left behind keeps its output open
		return nil
	}
	why := fmt.Sprintf("%s %s %s: %v", g.conf.Trust.Unlock, action, slot, err)
	if line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n"); line != "" {
		why += ": " + omaha.Printable(line)
	}
	var exit *exec.ExitError
	switch {
	case timed.Err() != nil && ctx.Err() == nil:
		return fmt.Errorf("%w: %s: it took longer than %s", ErrGuard, why, limit)
	case ctx.Err() != nil, !errors.As(err, &exit), exit.ExitCode() == 75:
		return fmt.Errorf("%w: %s", ErrGuard, why)
	}
	return fmt.Errorf("%w: %s", ErrSecrets, why)
}

// excerpt keeps the beginning of what is written to it.
type excerpt []byte

func (h *excerpt) Write(p []byte) (int, error) {
	*h = append(*h, p[:min(len(p), 4096-len(*h))]...)
	return len(p), nil
}
