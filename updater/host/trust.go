package host

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/payload"
	"github.com/flipside-linux/flipside/updater/config"
	"github.com/flipside-linux/flipside/updater/trust"
	"github.com/flipside-linux/flipside/updater/writer"
)

// guard is what the engine asks of [writer.Guard], with what of it takes the network.
type guard struct {
	*writer.Guard
	conf config.Config
	log  *slog.Logger
	http *omaha.HTTP
	// start starts a writer: it alone changes the floor.
	start writer.Start

	machineID string

	owed [2]string // slot and version that the TPM has not been told of

	proving  sync.Mutex
	unproven [2]string // slot and version that run, are good, and have not been proven to the release server
}

// exchangeLimit bounds one exchange with the release server beside the protocol.
const exchangeLimit = time.Minute

func newGuard(c config.Config, h *omaha.HTTP, start writer.Start, log *slog.Logger) (*guard, error) {
	g, err := writer.NewGuard(c, log)
	if err != nil {
		return nil, err
	}
	g.Floor().ReadOnly = true
	return &guard{Guard: g, conf: c, log: log, http: h, start: start}, nil
}

// tpmPatience is how long the start of the daemon waits for a TPM.
const tpmPatience = 20 * time.Second

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
	answer := make(chan error, 1)
	go func() {
		t, err := trust.OpenTPM(c.Trust.TPM)
		if err == nil {
			_, err = t.PCRs(trust.ProofPCRs)
			t.Close()
		}
		answer <- err
	}()
	var err error
	select {
	case err = <-answer:
	case <-time.After(tpmPatience): // the daemon starts without it
		return []string{fmt.Sprintf("%s: the TPM has not answered within %s", strings.Join(wants, " and "), tpmPatience)}
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
	return g.Options()
}

// handOn sends the PCR policy of a release, which is verified and not yet armed, to whoever seals the host's secrets, if the host is to do that.
func (g *guard) handOn(ctx context.Context, version, path string) error {
	if g.conf.Trust.PCRPolicy == "" {
		return nil
	}
	if err := g.post(ctx, path); err != nil {
		return fmt.Errorf("%w: handing on the PCR policy of release %s: %w", writer.ErrGuard, version, err)
	}
	return nil
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

// confirmed is called when a slot has booted and was found healthy, and its bits say so. That the floor cannot be raised now does not make the boot
// bad: it is tried again before the next payload and at the next start.
func (g *guard) confirmed(ctx context.Context, slot, version string) {
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
	rose, err := g.rises(ctx)
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

func (g *guard) rises(ctx context.Context) (bool, error) {
	w, err := g.start(ctx)
	if err != nil {
		return false, err
	}
	rose, err := w.Raise(ctx)
	return rose, errors.Join(err, w.Close())
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
