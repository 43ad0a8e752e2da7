package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// Several publish the same version at the same moment, each with a payload of its own: one of them wins, with its payload and its digest, and the others are told.
func TestPublishTogether(t *testing.T) {
	p := &Publisher{Dir: t.TempDir()}
	const publishers = 4
	var payloads [publishers]string
	for i := range payloads {
		payloads[i] = fakePayload(t, byte(i+1), 100_000)
	}
	for round := range 15 {
		version := fmt.Sprintf("1.%d.0", round)
		var wg sync.WaitGroup
		var errs [publishers]error
		begin := make(chan struct{})
		for i := range publishers {
			wg.Go(func() {
				<-begin
				_, errs[i] = p.Add(context.Background(), version, payloads[i])
			})
		}
		close(begin)
		wg.Wait()
		won := 0
		for i, err := range errs {
			switch {
			case err == nil:
				won++
			case !errors.Is(err, ErrExists) || !strings.Contains(err.Error(), "publish "+version):
				t.Errorf("%s: publisher %d: %v", version, i, err)
			}
		}
		if won != 1 {
			t.Errorf("%s: %d of %d publishers were told that they published it", version, won, publishers)
		}
		rel, err := readRelease(p.Dir, version)
		if err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(filepath.Join(p.Dir, "payloads", rel.Payload))
		if err != nil {
			t.Fatal(err)
		}
		if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != rel.SHA256 {
			t.Errorf("%s: the payload has digest %x, the release says %s", version, sum, rel.SHA256)
		}
	}
}

// The same release published again mends a payload that was damaged since.
func TestPublishMends(t *testing.T) {
	p := &Publisher{Dir: t.TempDir()}
	file := fakePayload(t, 1, 1000)
	rel, err := p.Add(t.Context(), "1.0.0", file)
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(p.Dir, "payloads", rel.Payload)
	if err := os.WriteFile(path, make([]byte, 1000), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Add(t.Context(), "1.0.0", file); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != string(want) {
		t.Errorf("the payload is still another one: %v", err)
	}
}

// A rollback goes to the last version that hosts can be given.
func TestRollback(t *testing.T) {
	p := &Publisher{Dir: t.TempDir()}
	for i, version := range []string{"1.0.0", "1.1.0", "1.2.0", "1.3.0"} {
		if _, _, err := p.Publish(t.Context(), Release{Version: version}, fakePayload(t, byte(i), 1000), "stable"); err != nil {
			t.Fatal(err)
		}
	}
	remove := func(version string) {
		t.Helper()
		if err := os.Remove(filepath.Join(p.Dir, "releases", version+".toml")); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.Change("stable", func(c *Channel) error { c.Blacklist = []string{"1.1.0"}; return nil }); err != nil {
		t.Fatal(err)
	}
	remove("1.2.0")
	if c, err := p.Rollback("stable", false); err != nil || c.Version != "1.0.0" || len(c.Previous) != 0 {
		t.Fatalf("past one that is gone and one that is withdrawn: %+v, %v", c, err)
	}
	if _, err := p.Move("stable", "1.3.0"); err != nil {
		t.Fatal(err)
	}
	remove("1.0.0")
	before, err := p.Channel("stable")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Rollback("stable", false); err == nil || !strings.Contains(err.Error(), "1.0.0") {
		t.Errorf("nothing is left: %v", err)
	}
	if after, err := p.Channel("stable"); err != nil || after.Version != before.Version {
		t.Errorf("the channel holds %+v, %v", after, err)
	}
}

// A channel names only what is there.
func TestChannelNamesWhatIsThere(t *testing.T) {
	p := &Publisher{Dir: t.TempDir()}
	for i, version := range []string{"1.0.0", "1.1.0"} {
		if _, _, err := p.Publish(t.Context(), Release{Version: version}, fakePayload(t, byte(i), 1000), "stable"); err != nil {
			t.Fatal(err)
		}
	}
	set := func(edit func(c *Channel)) error {
		_, err := p.Change("stable", func(c *Channel) error { edit(c); return nil })
		return err
	}
	if err := set(func(c *Channel) { c.Floors = []string{"1.0.0"} }); err != nil {
		t.Error(err)
	}
	if err := set(func(c *Channel) { c.Floors = []string{"1.0.0", "1.0.5"} }); !errors.Is(err, ErrUnknown) {
		t.Errorf("a floor that nobody has published: %v", err)
	}
	if err := os.Remove(filepath.Join(p.Dir, "payloads", "1.0.0.payload")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Move("stable", "1.0.0"); err == nil {
		t.Error("the channel moved to a release without its payload")
	}
	if err := set(func(c *Channel) { c.Paused = true }); err != nil {
		t.Errorf("a channel with a floor that is gone cannot be paused: %v", err)
	}
}

// A server removes what programs left in its directory that were killed, and leaves alone what others work on.
func TestSweep(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.1.0", 1)
	l.Close()
	long := time.Now().Add(-2 * leftAfter)
	gone := []string{"payloads/.upload-1", "payloads/.mirror-2", "payloads/.import-3", "payloads/.1.2.0.payload4444", "channels/.stable.toml55", "releases/.1.2.0.toml6"}
	stay := []string{"payloads/.mirror-7", "payloads/.1.3.0.payload88", "channels/.gitignore", "payloads/1.1.0.payload", "channels/stable.toml", "releases/1.1.0.toml"}
	for i, name := range append(gone, stay...) {
		path := filepath.Join(l.dir, name)
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		if i > 0 && i < len(gone) || i > len(gone)+1 {
			if err := os.Chtimes(path, long, long); err != nil {
				t.Fatal(err)
			}
		}
	}
	l.start()
	for _, name := range gone {
		if _, err := os.Stat(filepath.Join(l.dir, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", name, err)
		}
	}
	for _, name := range stay {
		if _, err := os.Stat(filepath.Join(l.dir, name)); err != nil {
			t.Error(err)
		}
	}
	l.wants(l.client(1, "1.0.0"), "1.1.0", "")
}
