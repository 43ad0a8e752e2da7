package host

import (
	"bytes"
	"context"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/updater"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/trust"
)

// guard decides what is believed: it is asked before the first write, before a slot is armed, and told of a good boot.
type guard struct {
	conf  config.Config
	floor *trust.Floor
	log   *slog.Logger
	http  *omaha.HTTP

	machineID string

	owed [2]string // slot and version that the TPM has not been told of

	proving  sync.Mutex
	unproven [2]string // slot and version that run, are good, and have not been proven to the release server
}

// What the guard may stop an update for.
var (
	errGuard   = errors.New("nothing can be believed now")             // and later it may be
	errSecrets = errors.New("the next boot's secrets would stay shut") // and trying again does not help
)

// exchangeLimit bounds one exchange with the release server beside the protocol.
const exchangeLimit = time.Minute

func newGuard(c config.Config, h *omaha.HTTP, log *slog.Logger) (*guard, error) {
	f, err := Floor(c)
	if err != nil {
		return nil, err
	}
	return &guard{conf: c, floor: f, log: log, http: h}, nil
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

// tpmWarnings says what the host's TPM cannot do and its configuration asks for. It does not change before the next boot.
func tpmWarnings(c config.Config) []string {
	var wants []string
	if c.Trust.Proof != "" {
		wants = append(wants, "trust.proof")
	}
	if len(c.Trust.PCRKeys) > 0 {
		wants = append(wants, "trust.pcr_keys")
	}
	if len(wants) == 0 {
		return nil
	}
	t, err := trust.OpenTPM(c.Trust.TPM)
	if err == nil {
		defer t.Close()
		_, err = t.PCRs(trust.ProofPCRs)
	}
	if errors.Is(err, trust.ErrNoBank) || errors.Is(err, trust.ErrNoTPM) && c.Trust.Proof != "" {
		return []string{fmt.Sprintf("%s cannot work here: %v", strings.Join(wants, " and "), err)}
	}
	return nil
}

// options says which payloads are believed.
func (g *guard) options(ctx context.Context) (payload.Options, error) {
	if g.owed != [2]string{} {
		g.raise(ctx, g.owed[0], g.owed[1])
	}
	level, err := g.floor.Level()
	if err != nil {
		return payload.Options{}, fmt.Errorf("%w: %w", errGuard, err)
	}
	if level.Warning != "" {
		g.log.Warn("the floor of releases is lower than it may have been", "warning", level.Warning, "floor", level.Number)
	}
	keys, err := Keys(g.conf, level.Number)
	if err != nil {
		return payload.Options{}, err
	}
	for _, w := range keys.Warnings(time.Now()) {
		g.log.Warn(w)
	}
	if _, err := g.pcrKeys(); err != nil {
		return payload.Options{}, err
	}
	return payload.Options{Keys: keys.Ring(), MinTimestamp: level.Number, Product: g.conf.Trust.Product}, nil
}

// prepare is called when a slot is verified and not yet armed. It hands the release's PCR policy on, and asks whether the secrets of the next boot will open.
func (g *guard) prepare(ctx context.Context, slot, version string, files map[string]string) error {
	if path, ok := files[policyPart]; ok && g.conf.Trust.PCRPolicy != "" {
		if err := g.post(ctx, path); err != nil {
			return fmt.Errorf("%w: handing on the PCR policy of release %s: %w", errGuard, version, err)
		}
	}
	return g.opens(ctx, slot, files, "VERSION="+version)
}

// opens asks whether the secrets of the next boot will open in a slot: by the signed PCR policy of its release, if the host knows the key, and then by the host's
// own program. A policy that cannot be judged leaves it to that program; without one it is a no.
func (g *guard) opens(ctx context.Context, slot string, files map[string]string, env ...string) error {
	if len(g.conf.Trust.PCRKeys) > 0 {
		err := g.checkPCRs(files)
		switch {
		case errors.Is(err, trust.ErrUnpredictable) && g.conf.Trust.Unlock != "":
			g.log.Warn("trust.unlock alone decides whether the secrets of the next boot will open", "slot", slot, "reason", err)
		case errors.Is(err, trust.ErrUnpredictable), errors.Is(err, trust.ErrShut):
			return fmt.Errorf("%w: slot %s: %w", errSecrets, slot, err)
		case errors.Is(err, errGuard):
			return fmt.Errorf("slot %s: %w", slot, err)
		case err != nil:
			return fmt.Errorf("%w: slot %s: %w", errGuard, slot, err)
		}
	}
	return g.secrets(ctx, "arm", slot, append(env, "KERNEL="+files[kernelPart], "PCR_POLICY="+files[policyPart])...)
}

// pcrKeys reads the keys anew. Whether it can is known before a slot is written, not only before it is armed.
func (g *guard) pcrKeys() ([]*rsa.PublicKey, error) {
	keys, err := trust.LoadPCRKeys(g.conf.Trust.PCRKeys)
	if err != nil {
		return nil, fmt.Errorf("%w: trust.pcr_keys: %w", errGuard, err)
	}
	return keys, nil
}

func (g *guard) checkPCRs(files map[string]string) error {
	keys, err := g.pcrKeys()
	if err != nil {
		return err
	}
	path := files[kernelPart]
	if path == "" {
		return fmt.Errorf("%w: the release brings no kernel", trust.ErrUnpredictable)
	}
	kernel, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("looking at what the next boot will measure: %w", err)
	}
	defer kernel.Close()
	var beside []byte
	if path := files[policyPart]; path != "" {
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

// post sends a PCR policy as the older update engine did: the file as application/octet-stream, before the slot is armed.
func (g *guard) post(ctx context.Context, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	ctx, cancel := context.WithTimeout(ctx, exchangeLimit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, g.conf.Trust.PCRPolicy, f)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	resp, err := g.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s answers with status %d", g.conf.Trust.PCRPolicy, resp.StatusCode)
	}
	return nil
}

// secrets runs the host's program for secrets that are bound to a boot, if there is one: "arm SLOT" before a slot is armed, "confirm SLOT" when it has booted
// well, "disarm SLOT" when it will not boot any more. Status 75 (EX_TEMPFAIL) means not now.
func (g *guard) secrets(ctx context.Context, action, slot string, env ...string) error {
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
	var out head
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
		return fmt.Errorf("%w: %s: it took longer than %s", errGuard, why, limit)
	case ctx.Err() != nil, !errors.As(err, &exit), exit.ExitCode() == 75:
		return fmt.Errorf("%w: %s", errGuard, why)
	}
	return fmt.Errorf("%w: %s", errSecrets, why)
}

// head keeps the beginning of what is written to it.
type head []byte

func (h *head) Write(p []byte) (int, error) {
	*h = append(*h, p[:min(len(p), 4096-len(*h))]...)
	return len(p), nil
}

// admits refuses to go back to a release below the floor, or to one of which nobody knows whether it is.
func (g *guard) admits(slot string) error {
	if err := g.floor.Admits(slot); err != nil {
		return fmt.Errorf("%w: %w", updater.ErrBelowFloor, err)
	}
	return nil
}

// propose remembers the number of the release that is armed now.
func (g *guard) propose(u updater.Update, number int64) error {
	return g.floor.Propose(trust.Pending{Number: number, Slot: u.ToSlot, Version: u.Offer.Version})
}

// confirmed is called when a slot has booted and was found healthy, and its bits say so. That the floor cannot be raised now does not make the boot
// bad: it is tried again before the next payload and at the next start.
func (g *guard) confirmed(ctx context.Context, slot, version string) {
	if err := g.secrets(ctx, "confirm", slot, "VERSION="+version); err != nil {
		g.log.Error("the secrets of the old slot stay as they are", "error", err)
	}
	g.raise(ctx, slot, version)
	g.proves(slot, version)
	g.prove(ctx)
}

// proves remembers what is to be proven: that this slot has booted and is good.
func (g *guard) proves(slot, version string) {
	g.proving.Lock()
	defer g.proving.Unlock()
	if g.conf.Trust.Proof != "" {
		g.unproven = [2]string{slot, version}
	}
}

// prove sends the proof of this boot, if it is still to be sent. What cannot be sent, or is not believed yet, is tried again with the next check: the server may be
// away, or an administrator may have to accept the key first. What no later try can change is said once.
func (g *guard) prove(ctx context.Context) {
	g.proving.Lock()
	defer g.proving.Unlock()
	if g.unproven == [2]string{} {
		return
	}
	switch err := g.sendProof(ctx, g.machineID, g.unproven[0], g.unproven[1]); {
	case errors.Is(err, trust.ErrNoBank), errors.Is(err, trust.ErrNoTPM), errors.Is(err, trust.ErrNoDeviceKey):
		g.log.Warn("this boot cannot be proven to the release server", "error", err)
	case err != nil:
		g.log.Warn("the release server has no proof of this boot; it is tried again with the next check", "error", err)
		return
	}
	g.unproven = [2]string{}
}

func (g *guard) raise(ctx context.Context, slot, version string) {
	rose, err := g.floor.Confirm(ctx, slot, version)
	g.owed = [2]string{}
	switch {
	case errors.Is(err, trust.ErrBehind):
		g.owed = [2]string{slot, version}
		g.log.Info("the floor in the TPM rises in steps and goes on with the next check", "left", err)
	case err != nil:
		g.owed = [2]string{slot, version}
		g.log.Error("the floor of releases could not be raised; it is tried again", "error", err)
	}
	if rose {
		g.log.Info("older releases are not accepted any more", "version", version)
	}
}

func (g *guard) disarmed(ctx context.Context, slot string) {
	if err := g.secrets(ctx, "disarm", slot); err != nil {
		g.log.Error("the secrets of a slot that does not boot any more stay as they are", "slot", slot, "error", err)
	}
}

// sendProof sends the release server a TPM quote of this boot. That it cannot be sent stops no update.
func (g *guard) sendProof(ctx context.Context, host, slot, version string) error {
	t, err := trust.OpenTPM(g.conf.Trust.TPM)
	if err != nil {
		return err
	}
	defer t.Close()
	key, err := t.AttestationKey()
	if err != nil {
		return err
	}
	base := strings.TrimSuffix(g.conf.Trust.Proof, "/") + "/" + url.PathEscape(host)
	data, err := g.exchange(ctx, http.MethodGet, base+"?key="+url.QueryEscape(key), nil)
	if err != nil {
		return err
	}
	var q struct {
		Nonce       []byte `json:"nonce"`
		Endorsement bool   `json:"endorsement"`
	}
	if err := json.Unmarshal(data, &q); err != nil {
		return fmt.Errorf("the server's nonce cannot be read: %w", err)
	}
	nonce := "?nonce=" + base64.RawURLEncoding.EncodeToString(q.Nonce)
	p, err := t.Prove(trust.Claim{Host: host, Nonce: q.Nonce, Slot: slot, Version: version})
	if err != nil {
		return err
	}
	if q.Endorsement {
		e, err := g.endorse(ctx, t, base+"/endorsement"+nonce)
		if err != nil { // the server decides what the proof is worth without it
			g.log.Warn("the release server cannot be shown whose TPM this is", "error", err)
			e.Problem = omaha.Printable(err.Error())
			e.Problem = e.Problem[:min(len(e.Problem), 200)]
		}
		p.Endorsement = &e
	}
	if data, err = json.Marshal(p); err != nil {
		return err
	}
	_, err = g.exchange(ctx, http.MethodPost, base+nonce, data)
	return err
}

// endorse shows the server the certificates of the TPM's maker, and that its key is in that TPM.
func (g *guard) endorse(ctx context.Context, t *trust.TPM, url string) (trust.Endorsement, error) {
	r, err := t.Endorsement(g.conf.Trust.Endorsement)
	if err != nil {
		return trust.Endorsement{}, err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return trust.Endorsement{}, err
	}
	if data, err = g.exchange(ctx, http.MethodPost, url, data); err != nil {
		return trust.Endorsement{}, err
	}
	c, err := trust.DecodeChallenge(data)
	if err != nil {
		return trust.Endorsement{}, err
	}
	return t.Answer(r, c)
}

func (g *guard) exchange(ctx context.Context, method, url string, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, exchangeLimit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := g.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		var said struct{ Error string }
		if json.Unmarshal(data, &said) != nil || said.Error == "" {
			said.Error = strings.TrimSpace(string(data))
		}
		return nil, fmt.Errorf("the server answers with status %d: %s", resp.StatusCode, omaha.Printable(said.Error[:min(len(said.Error), 300)]))
	}
	return data, nil
}
