package trust

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
)

// What can be wrong with a TPM, for callers to decide on.
var (
	ErrNoTPM       = errors.New("there is no TPM")
	ErrTPM         = errors.New("the TPM cannot be asked")
	ErrOwnerAuth   = errors.New("the TPM's owner password is wrong")
	ErrFull        = errors.New("the TPM has no room left")
	ErrLocked      = errors.New("the TPM is locked out after too many wrong passwords")
	ErrForeign     = errors.New("the TPM holds something else in this place")
	ErrNotPrepared = errors.New("the TPM is not provisioned")
	// ErrNoBank is final: the banks of a TPM change with its firmware's settings, and a restart.
	ErrNoBank = errors.New("the TPM has no SHA-256 bank of PCRs; the firmware's settings switch it on, or tpm2_pcrallocate sha256:all and a restart")
)

// DefaultDevice is the kernel's TPM with its resource manager.
const DefaultDevice = "/dev/tpmrm0"

// TPM is an open TPM 2.0. Its methods are safe for use by several goroutines.
type TPM struct {
	mu sync.Mutex
	t  transport.TPMCloser
}

// OpenTPM opens a TPM device, or the Unix socket of an emulator. "" is [DefaultDevice]. It returns ErrNoTPM if there is none.
func OpenTPM(path string) (*TPM, error) {
	if path == "" {
		path = DefaultDevice
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s does not exist", ErrNoTPM, path)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTPM, err)
	}
	var t transport.TPMCloser
	if info.Mode()&os.ModeSocket != 0 {
		t, err = linuxudstpm.Open(path)
	} else {
		t, err = linuxtpm.Open(path)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: opening %s: %w", ErrTPM, path, err)
	}
	return &TPM{t: t}, nil
}

// NewTPM uses a TPM that is open already, such as a simulator.
func NewTPM(t transport.TPMCloser) *TPM { return &TPM{t: t} }

// Close closes the connection. What the TPM keeps stays.
func (t *TPM) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.t.Close()
	if errors.Is(err, linuxudstpm.ErrNotOpen) {
		return nil // it dials for each command
	}
	return err
}

// owner authorises as the owner by an HMAC session, so that the password itself does not cross the bus.
func owner(password []byte) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Auth(password))}
}

// plain authorises with the empty password: who may talk to the TPM may use the object.
func plain(h tpm2.TPMHandle, name tpm2.TPM2BName) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: h, Name: name, Auth: tpm2.PasswordAuth(nil)}
}

// explain says what a TPM's error means for people, and keeps it.
func explain(doing string, err error) error {
	if err == nil {
		return nil
	}
	kind := ErrTPM
	for _, k := range []struct {
		rc   tpm2.TPMRC
		kind error
	}{
		{tpm2.TPMRCLockout, ErrLocked}, {tpm2.TPMRCBadAuth, ErrOwnerAuth}, {tpm2.TPMRCAuthFail, ErrOwnerAuth},
		{tpm2.TPMRCNVSpace, ErrFull}, {tpm2.TPMRCObjectMemory, ErrFull}, {tpm2.TPMRCMemory, ErrFull},
	} {
		if errors.Is(err, k.rc) {
			kind = k.kind
		}
	}
	return fmt.Errorf("%s: %w: %w", doing, kind, err)
}

// absent reports whether the TPM says that a handle is not there.
func absent(err error) bool {
	return errors.Is(err, tpm2.TPMRCHandle) || errors.Is(err, tpm2.TPMRCValue)
}
