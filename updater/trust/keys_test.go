package trust

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/payload"
)

func newPEM(t testing.TB) (string, crypto.Signer) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), key
}

// Who names no place at all is told so.
func TestLoadKeysNowhere(t *testing.T) {
	if _, err := LoadKeys(nil, KeyPolicy{}); !errors.Is(err, payload.ErrNoKey) || !strings.HasSuffix(err.Error(), "named (update.keys)") {
		t.Error(err)
	}
}

func TestLoadKeys(t *testing.T) {
	pem1, key1 := newPEM(t)
	pem2, _ := newPEM(t)
	pem3, _ := newPEM(t)
	print1, err := Fingerprint(key1.Public())
	if err != nil {
		t.Fatal(err)
	}
	inTOML := func(pem, more string) string { return fmt.Sprintf("public_key = '''%s'''\n%s", pem, more) }
	for _, tt := range []struct {
		name   string
		files  map[string]string // usr/… and etc/…; "/dev/null" is a link to it
		policy KeyPolicy
		count  string // names of the keys that count
		err    string
	}{
		{"none", nil, KeyPolicy{}, "", "no key is pinned"},
		{"a plain one", map[string]string{"usr/a.pem": pem1}, KeyPolicy{}, "a", ""},
		{"other files are none", map[string]string{"usr/a.pem": pem1, "usr/README": "x"}, KeyPolicy{}, "a", ""},
		{"one with a role", map[string]string{"usr/a.toml": inTOML(pem1, "role = 'release'\nname = '2026'")}, KeyPolicy{}, "2026", ""},
		{"a development key", map[string]string{"usr/a.pem": pem1, "usr/b.toml": inTOML(pem2, "role = 'development'")}, KeyPolicy{}, "a", ""},
		{"a development key that is wanted", map[string]string{"usr/a.pem": pem1, "usr/b.toml": inTOML(pem2, "role = 'development'")}, KeyPolicy{Development: true}, "a b", ""},
		{"only a development key", map[string]string{"usr/b.toml": inTOML(pem2, "role = 'development'")}, KeyPolicy{}, "", "trust.development"},
		{"the administrator's file replaces the image's", map[string]string{"usr/a.pem": pem1, "etc/a.pem": pem2}, KeyPolicy{}, "a", ""},
		{"masked", map[string]string{"usr/a.pem": pem1, "usr/b.pem": pem2, "etc/a.pem": "/dev/null"}, KeyPolicy{}, "b", ""},
		{"revoked by the image, pinned by the administrator", map[string]string{"usr/r.toml": "revoke = ['" + print1 + "']", "etc/a.pem": pem1, "etc/b.pem": pem2}, KeyPolicy{}, "b", ""},
		{"all revoked", map[string]string{"usr/r.toml": "revoke = ['" + print1 + "']", "etc/a.pem": pem1}, KeyPolicy{}, "", "revoked"},
		{"ended below the floor", map[string]string{"usr/a.toml": inTOML(pem1, "not_after = 2020-01-01T00:00:00Z"), "usr/b.pem": pem2}, KeyPolicy{Floor: 1717200000}, "b", ""},
		{"ended by the clock, above the floor", map[string]string{"usr/a.toml": inTOML(pem1, "not_after = 2020-01-01T00:00:00Z")}, KeyPolicy{Floor: 100}, "a", ""},
		{"two needed, three there", map[string]string{"usr/a.pem": pem1, "usr/b.pem": pem2, "usr/c.pem": pem3}, KeyPolicy{Signatures: 2}, "a b c", ""},
		{"two needed, one there twice", map[string]string{"usr/a.pem": pem1, "usr/b.pem": pem1}, KeyPolicy{Signatures: 2}, "a b", "2 signatures"},
		{"an unknown setting", map[string]string{"usr/a.toml": inTOML(pem1, "not_affter = 2020-01-01T00:00:00Z")}, KeyPolicy{}, "", "unknown key"},
		{"a wrong role", map[string]string{"usr/a.toml": inTOML(pem1, "role = 'boss'")}, KeyPolicy{}, "", "boss"},
		{"a broken revocation", map[string]string{"usr/a.pem": pem1, "usr/r.toml": "revoke = ['sha256:12']"}, KeyPolicy{}, "", "fingerprint"},
		{"nothing in it", map[string]string{"usr/a.pem": pem1, "usr/r.toml": "name = 'x'"}, KeyPolicy{}, "", "neither"},
		{"an end before the beginning", map[string]string{"usr/a.toml": inTOML(pem1, "not_before = 2021-01-01T00:00:00Z\nnot_after = 2020-01-01T00:00:00Z")}, KeyPolicy{}, "", "before"},
		{"rubbish", map[string]string{"usr/a.pem": "rubbish"}, KeyPolicy{}, "", "no PEM block"},
		{"too long", map[string]string{"usr/a.pem": strings.Repeat("x", keyFile+1)}, KeyPolicy{}, "", "at most"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range tt.files {
				path := filepath.Join(dir, name)
				err := os.MkdirAll(filepath.Dir(path), 0o755)
				if text == "/dev/null" {
					err = errors.Join(err, os.Symlink(text, path))
				} else {
					err = errors.Join(err, os.WriteFile(path, []byte(text), 0o644))
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			k, err := LoadKeys([]string{filepath.Join(dir, "usr"), filepath.Join(dir, "etc")}, tt.policy)
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Fatalf("%v, want %q", err, tt.err)
			}
			if k == nil {
				return
			}
			var names []string
			for _, key := range k.All {
				if key.Counts {
					names = append(names, key.Name)
				} else if key.Why == "" {
					t.Errorf("key %q does not count and nobody says why", key.Name)
				}
			}
			if got := strings.Join(names, " "); got != tt.count {
				t.Errorf("%q count, want %q", got, tt.count)
			}
			if err == nil && k.Ring().Len() == 0 {
				t.Error("no key to read payloads with")
			}
		})
	}
}

func TestKeyWarnings(t *testing.T) {
	text, _ := newPEM(t)
	path := filepath.Join(t.TempDir(), "a.toml")
	if err := os.WriteFile(path, []byte("public_key = '''"+text+"'''\nnot_after = 2028-01-01T00:00:00Z\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	k, err := LoadKeys([]string{path}, KeyPolicy{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ now, want string }{
		{"2027-01-01", ""}, {"2027-09-01", `key "a" ends on 2028-01-01, in 122 days`}, {"2028-02-01", `key "a" ended on 2028-01-01`}, {"1970-01-01", ""},
	} {
		now, err := time.Parse(time.DateOnly, tt.now)
		if err != nil {
			t.Fatal(err)
		}
		got := strings.Join(k.Warnings(now), "\n")
		if !strings.HasPrefix(got, tt.want) || tt.want == "" && got != "" {
			t.Errorf("on %s: %q, want %q", tt.now, got, tt.want)
		}
		if tt.want != "" && !strings.Contains(got, "0 keys are left and a payload needs 1") {
			t.Errorf("on %s: %q", tt.now, got)
		}
	}
	if end := k.End(); end.Format(time.DateOnly) != "2028-01-01" {
		t.Errorf("the keys end on %s", end)
	}
	// No clock ends a key: only the floor, which is signed, does.
	if !errors.Is(loadWith(path, 1830297601), payload.ErrNoKey) || loadWith(path, 1830297600) != nil {
		t.Error("the end of a key is not where the floor passes it")
	}
}

// The keys end when fewer are left than a payload needs.
func TestKeysEnd(t *testing.T) {
	at := func(year int) time.Time {
		if year == 0 {
			return time.Time{}
		}
		return time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC)
	}
	for _, tt := range []struct {
		ends []int
		need int
		want int
	}{
		{[]int{0}, 1, 0}, {[]int{2028}, 1, 2028}, {[]int{2028, 2030}, 1, 2030}, {[]int{2028, 2030}, 2, 2028}, {[]int{2030, 0}, 2, 2030}, {[]int{0, 2028}, 1, 0}, {nil, 1, 0},
	} {
		k := &Keys{Need: tt.need}
		for _, e := range tt.ends {
			k.All = append(k.All, Key{Counts: true, NotAfter: at(e)})
		}
		k.All = append(k.All, Key{NotAfter: at(2099)}) // one that does not count
		if got := k.End(); !got.Equal(at(tt.want)) {
			t.Errorf("%v, %d needed: %s", tt.ends, tt.need, got)
		}
	}
}

func loadWith(path string, floor int64) error {
	_, err := LoadKeys([]string{path}, KeyPolicy{Floor: floor})
	return err
}

func FuzzKeyFile(f *testing.F) {
	text, _ := newPEM(f)
	f.Add([]byte(text), false)
	f.Add([]byte("public_key = '''"+text+"'''\nrole = 'development'\nname='x'\nnot_before = 2020-01-01T00:00:00Z\nnot_after = 2021-01-01T00:00:00Z\n"), true)
	f.Add([]byte("revoke = ['sha256:"+strings.Repeat("0a", 32)+"']"), true)
	f.Add([]byte("not_after = 9999-12-31T23:59:59Z\npublic_key = 'x'"), true)
	f.Fuzz(func(t *testing.T, data []byte, inTOML bool) {
		name := "a.pem"
		if inTOML {
			name = "a.toml"
		}
		keys, revoke, err := parseKeyFile(name, data)
		if err == nil && len(keys) == 0 && len(revoke) == 0 {
			t.Fatal("a drop-in that does nothing is accepted")
		}
		for _, k := range keys {
			if k.public == nil || len(k.Fingerprint) != 71 || k.Role == "" || seconds(k.NotAfter) < 0 {
				t.Fatalf("%+v", k)
			}
		}
	})
}
