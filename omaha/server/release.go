package server

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/blang/semver/v4"
)

// Release is one published version, or a delta to it. Its file is written once and never changed.
type Release struct {
	Version      string    `toml:"version" json:"version"`
	From         string    `toml:"from,omitempty" json:"from,omitempty"` // of a delta: the version that it changes
	Payload      string    `toml:"payload" json:"payload"`               // file name below payloads/
	Size         int64     `toml:"size" json:"size"`
	SHA256       string    `toml:"sha256" json:"sha256"`                 // of the payload file, hexadecimal
	SHA1         string    `toml:"sha1,omitempty" json:"-"`              // base64: older clients and servers want one, and nothing here relies on it
	MetadataSize int64     `toml:"metadata_size" json:"metadata_size"`   // header and manifest, without the metadata signature
	URLs         []string  `toml:"urls,omitempty" json:"urls,omitempty"` // mirrors: addresses of directories; default is this server
	Notes        string    `toml:"notes,omitempty" json:"notes,omitempty"`
	Published    time.Time `toml:"published" json:"published"`
	PCRs         PCRs      `toml:"-" json:"pcrs,omitempty"` // what a boot of it must have measured, from a file of its own
}

// Errors of publishing that a caller may want to tell apart.
var (
	ErrNotPayload = errors.New("not an update payload")
	ErrExists     = errors.New("this version is already published with another payload")
	ErrUnknown    = errors.New("not known")
	errUnlogged   = errors.New("is changed, and only the audit log does not say so") // whoever gave the order must not give it again
	ErrInvalid    = errors.New("not valid")                                          // a version, the name of a channel, or a number that nothing can have
)

// namePattern is what a channel may be called: it becomes a file name and travels as an attribute.
var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(@[A-Za-z0-9_-]{1,32})?$`)

func checkChannel(name string) error {
	if !namePattern.MatchString(name) {
		return fmt.Errorf("channel %q is %w: it has to be a plain name", name, ErrInvalid)
	}
	return nil
}

// payloadHeader is what the first bytes of a payload say.
type payloadHeader struct {
	major        uint64
	metadataSize int64
}

// readHeader reads the beginning of a payload: magic, major version, manifest size. All integers are big-endian. Major 2
// has a fourth field, the size of the metadata signature, which does not count as metadata.
func readHeader(r io.Reader, size int64) (payloadHeader, error) {
	var raw [24]byte
	if _, err := io.ReadFull(r, raw[:]); err != nil {
		return payloadHeader{}, fmt.Errorf("%w: it has only %d bytes", ErrNotPayload, size)
	}
	if !bytes.Equal(raw[:4], []byte("CrAU")) {
		return payloadHeader{}, fmt.Errorf("%w: it begins with %q", ErrNotPayload, raw[:4])
	}
	h := payloadHeader{major: binary.BigEndian.Uint64(raw[4:12])}
	manifest := binary.BigEndian.Uint64(raw[12:20])
	var header, signature uint64
	switch h.major {
	case 1:
		header = 20
	case 2:
		header, signature = 24, uint64(binary.BigEndian.Uint32(raw[20:24]))
	default:
		return payloadHeader{}, fmt.Errorf("%w: major version %d", ErrNotPayload, h.major)
	}
	if manifest == 0 || manifest > uint64(size) || header+manifest+signature > uint64(size) {
		return payloadHeader{}, fmt.Errorf("%w: a manifest of %d bytes in a file of %d", ErrNotPayload, manifest, size)
	}
	h.metadataSize = int64(header + manifest)
	return h, nil
}

// file is where a release's file is below the directory, without its ending; the payload has the same base.
func (r Release) file() string {
	if r.From != "" {
		return filepath.Join("deltas", r.Version+"_from_"+r.From)
	}
	return filepath.Join("releases", r.Version)
}

func readRelease(dir, version string) (Release, error) {
	return readFile(dir, Release{Version: version}.file())
}

// readFile reads the file of a release or a delta.
func readFile(dir, file string) (Release, error) {
	var r Release
	if err := readTOML(filepath.Join(dir, file+".toml"), &r); err != nil {
		return r, err
	}
	return r, r.check(file)
}

// check keeps a hand-written file from leading outside the directory or to an offer that no client accepts.
func (r Release) check(file string) error {
	if err := checkVersion(r.Version); err != nil {
		return err
	}
	version := filepath.Base(file)
	sum, err := hex.DecodeString(r.SHA256)
	switch {
	case r.file() != file && r.From != "":
		return fmt.Errorf("release %s: its file says version %q, from %q", version, r.Version, r.From)
	case r.file() != file:
		return fmt.Errorf("release %s: its file says version %q", version, r.Version)
	case r.Payload == "" || r.Payload != filepath.Base(r.Payload) || strings.ContainsAny(r.Payload, `/\%`) || strings.HasPrefix(r.Payload, "."):
		return fmt.Errorf("release %s: payload %q is not a plain file name", version, r.Payload)
	case r.Size <= 0:
		return fmt.Errorf("release %s: size %d", version, r.Size)
	case err != nil || len(sum) != sha256.Size:
		return fmt.Errorf("release %s: sha256 %q is not 64 hexadecimal digits", version, r.SHA256)
	}
	return nil
}

func checkVersion(version string) error {
	if _, err := semver.Parse(version); err != nil || len(version) > 100 {
		return fmt.Errorf("version %q is %w: it has to be three numbers with an optional -pre and +build", version, ErrInvalid)
	}
	return nil
}
