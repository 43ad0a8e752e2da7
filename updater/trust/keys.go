package trust

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/flipside-linux/flipside/omaha/shallow"
	"github.com/flipside-linux/flipside/payload"
)

// Role says what a key may sign.
type Role string

// The roles of keys.
const (
	ReleaseKey     Role = "release"
	DevelopmentKey Role = "development" // counts only on hosts that say so
)

// Key is a pinned key as a drop-in describes it.
type Key struct {
	Name        string    `json:"name"`
	Role        Role      `json:"role"`
	Fingerprint string    `json:"fingerprint"` // "sha256:" and the SHA-256 of its SubjectPublicKeyInfo
	File        string    `json:"file"`
	NotBefore   time.Time `json:"not_before,omitzero"`
	NotAfter    time.Time `json:"not_after,omitzero"`
	Counts      bool      `json:"counts"`
	Why         string    `json:"why,omitempty"` // it does not count

	public crypto.PublicKey
}

// KeyPolicy says which of the pinned keys count.
type KeyPolicy struct {
	Signatures  int   // that a payload needs, by different keys; 0 is 1
	Development bool  // development keys count
	Floor       int64 // a key that ended below it is of no use any more
}

// Keys are the pinned keys of a host.
type Keys struct {
	All  []Key
	Need int
	ring *payload.Keyring
}

// Ring returns the keys that count, for reading payloads with.
func (k *Keys) Ring() *payload.Keyring { return k.ring }

const (
	keyFile  = 64 << 10 // the longest drop-in
	keyFiles = 256
	// warnBefore is how long before a key's end people hear of it.
	warnBefore = 180 * 24 * time.Hour
)

// dropIn is the content of a .toml drop-in.
type dropIn struct {
	Name      string    `toml:"name"` // "" is the file's name
	Role      Role      `toml:"role"` // "" is release
	PublicKey string    `toml:"public_key"`
	NotBefore time.Time `toml:"not_before"`
	NotAfter  time.Time `toml:"not_after"`
	Revoke    []string  `toml:"revoke"` // fingerprints of keys that must not count, wherever they are pinned
}

// LoadKeys reads key files and directories of them. In a directory, NAME.pem holds public keys without bounds, and NAME.toml one key with its role and
// time, or a list of keys to revoke. A later directory's file replaces one of the same name in an earlier directory; an empty one, or a link to
// /dev/null, takes it away. A revocation counts whatever the order, and cannot be taken away by a key file. Paths that are not there are left out. A file
// that cannot be read as what it should be is an error, not a key less: it might have been the revocation. With no key that counts the error
// is payload.ErrNoKey.
func LoadKeys(paths []string, policy KeyPolicy) (*Keys, error) {
	files := map[string]string{} // by name
	for _, path := range paths {
		info, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading keys: %w", err)
		}
		if !info.IsDir() {
			files[path] = path
			continue
		}
		entries, err := os.ReadDir(path)
		if err != nil {
			return nil, fmt.Errorf("reading keys: %w", err)
		}
		for _, e := range entries {
			if ext := filepath.Ext(e.Name()); ext == ".pem" || ext == ".toml" {
				files[e.Name()] = filepath.Join(path, e.Name())
			}
		}
	}
	if len(files) > keyFiles {
		return nil, fmt.Errorf("reading keys: %d files, at most %d", len(files), keyFiles)
	}
	k := &Keys{Need: max(1, policy.Signatures), ring: &payload.Keyring{Need: policy.Signatures}}
	revoked := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		file := files[name]
		data, err := readKeyFile(file)
		if err != nil {
			return nil, fmt.Errorf("reading keys: %w", err)
		}
		if len(bytes.TrimSpace(data)) == 0 {
			continue // masked
		}
		keys, revoke, err := parseKeyFile(file, data)
		if err != nil {
			return nil, fmt.Errorf("reading key %s: %w", file, err)
		}
		k.All = append(k.All, keys...)
		for _, r := range revoke {
			revoked[r] = file
		}
	}
	for i := range k.All {
		key := &k.All[i]
		switch {
		case revoked[key.Fingerprint] != "":
			key.Why = "it is revoked by " + revoked[key.Fingerprint]
		case key.Role == DevelopmentKey && !policy.Development:
			key.Why = "it is a development key, and trust.development is false"
		case !key.NotAfter.IsZero() && key.NotAfter.Unix() < policy.Floor:
			key.Why = "it ended before the release that this host has confirmed"
		default:
			if err := k.ring.Pin(payload.Key{Public: key.public, Name: key.Name, NotBefore: seconds(key.NotBefore), NotAfter: seconds(key.NotAfter)}); err != nil {
				return nil, fmt.Errorf("reading key %s: %w", key.File, err)
			}
			key.Counts = true
		}
	}
	switch n := k.ring.Len(); {
	case n == 0 && len(k.All) > 0:
		return k, fmt.Errorf("%w: none of %d keys in %s counts: key %q: %s", payload.ErrNoKey, len(k.All), strings.Join(paths, ", "), k.All[0].Name, k.All[0].Why)
	case len(paths) == 0:
		return k, fmt.Errorf("%w: no file or directory of them is named (update.keys)", payload.ErrNoKey)
	case n == 0:
		return k, fmt.Errorf("%w: looked in %s", payload.ErrNoKey, strings.Join(paths, ", "))
	case n < k.Need:
		return k, fmt.Errorf("%w: a payload needs %d signatures (trust.signatures), and %d keys count", payload.ErrNoKey, k.Need, n)
	}
	return k, nil
}

func seconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

// readKeyFile reads a small file. /dev/null is an empty one.
func readKeyFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode()&os.ModeDevice != 0 {
		return nil, nil
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file", path)
	}
	if info.Size() > keyFile {
		return nil, fmt.Errorf("%s has %d bytes, at most %d", path, info.Size(), keyFile)
	}
	return os.ReadFile(path)
}

// parseKeyFile reads one drop-in. Whether its keys count is for others to say.
func parseKeyFile(file string, data []byte) (keys []Key, revoke []string, err error) {
	name := strings.TrimSuffix(filepath.Base(file), filepath.Ext(file))
	if filepath.Ext(file) != ".toml" {
		publics, err := payload.ParsePEM(data)
		if err != nil {
			return nil, nil, err
		}
		for _, p := range publics {
			key, err := newKey(name, file, p)
			if err != nil {
				return nil, nil, err
			}
			keys = append(keys, key)
		}
		return keys, nil, nil
	}
	var d dropIn
	meta, err := shallow.Decode(data, &d)
	if err != nil {
		return nil, nil, err
	}
	if un := meta.Undecoded(); len(un) > 0 {
		return nil, nil, fmt.Errorf("unknown key %q", un[0].String())
	}
	for _, f := range d.Revoke {
		h, ok := strings.CutPrefix(f, "sha256:")
		if raw, err := hex.DecodeString(h); !ok || err != nil || len(raw) != sha256.Size || h != strings.ToLower(h) {
			return nil, nil, fmt.Errorf("%q is not a fingerprint such as sha256:0123…, in lower case", f)
		}
	}
	if d.PublicKey == "" {
		if len(d.Revoke) == 0 {
			return nil, nil, errors.New("it has neither public_key nor revoke")
		}
		return nil, d.Revoke, nil
	}
	publics, err := payload.ParsePEM([]byte(d.PublicKey))
	if err != nil {
		return nil, nil, fmt.Errorf("public_key: %w", err)
	}
	if len(publics) != 1 {
		return nil, nil, fmt.Errorf("public_key holds %d keys, want one", len(publics))
	}
	if d.Name != "" {
		name = d.Name
	}
	key, err := newKey(name, file, publics[0])
	if err != nil {
		return nil, nil, err
	}
	switch d.Role {
	case "", ReleaseKey:
	case DevelopmentKey:
		key.Role = DevelopmentKey
	default:
		return nil, nil, fmt.Errorf("role %q is not one of release, development", d.Role)
	}
	key.NotBefore, key.NotAfter = d.NotBefore.UTC(), d.NotAfter.UTC()
	for _, t := range []time.Time{d.NotBefore, d.NotAfter} {
		if !t.IsZero() && (t.Unix() <= 0 || t.Unix() > MaxNumber) {
			return nil, nil, fmt.Errorf("%s is not between 1970 and 2100", t.UTC().Format(time.RFC3339))
		}
	}
	if d.NotBefore.IsZero() {
		key.NotBefore = time.Time{}
	}
	if d.NotAfter.IsZero() {
		key.NotAfter = time.Time{}
	} else if d.NotAfter.Before(d.NotBefore) {
		return nil, nil, errors.New("not_after is before not_before")
	}
	return []Key{key}, d.Revoke, nil
}

func newKey(name, file string, public crypto.PublicKey) (Key, error) {
	print, err := Fingerprint(public)
	return Key{Name: name, Role: ReleaseKey, File: file, Fingerprint: print, public: public}, err
}

// Fingerprint is what a public key is called in revocations and lists.
func Fingerprint(public crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return "sha256:" + hex.EncodeToString(sum[:]), nil
}

// End is when so many of the keys that count have ended that no release made after it is taken; zero if they do not end.
func (k *Keys) End() time.Time {
	var ends []time.Time
	open := 0
	for _, key := range k.All {
		switch {
		case !key.Counts:
		case key.NotAfter.IsZero():
			open++
		default:
			ends = append(ends, key.NotAfter)
		}
	}
	if open >= k.Need || open+len(ends) < k.Need {
		return time.Time{}
	}
	slices.SortFunc(ends, func(a, b time.Time) int { return b.Compare(a) })
	return ends[k.Need-open-1]
}

// Warnings says what people should do something about: keys that end within half a year by the clock now, which is good enough for a
// warning and is asked for nothing else.
func (k *Keys) Warnings(now time.Time) []string {
	var list []string
	left := 0
	for _, key := range k.All {
		if !key.Counts {
			continue
		}
		left++
		switch d := key.NotAfter.Sub(now); {
		case key.NotAfter.IsZero():
		case d < 0:
			left--
			list = append(list, fmt.Sprintf("key %q ended on %s by this host's clock: releases made since then need another key", key.Name, key.NotAfter.Format(time.DateOnly)))
		case d < warnBefore:
			left--
			list = append(list, fmt.Sprintf("key %q ends on %s, in %d days: a release signed with it and with its successor should come before", key.Name, key.NotAfter.Format(time.DateOnly), int(d.Hours()/24)))
		}
	}
	if len(list) > 0 && left < k.Need {
		list = append(list, fmt.Sprintf("after that, %d keys are left and a payload needs %d", left, k.Need))
	}
	return list
}
