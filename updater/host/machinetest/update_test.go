package machinetest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	releases "github.com/flipside-linux/flipside/omaha/server"
	"github.com/flipside-linux/flipside/partition/bootsim"
	"github.com/flipside-linux/flipside/partition/gptimage"
	"github.com/flipside-linux/flipside/payload/build"
)

// deb is the package under test; "make machines" builds it.
func deb(t *testing.T) string {
	t.Helper()
	found, _ := filepath.Glob(filepath.Join(os.Getenv("FLIPSIDE_DIST"), "flipside_*.deb"))
	if os.Getenv("FLIPSIDE_DIST") == "" || len(found) != 1 {
		t.Skip("no package to install: make machines builds one and runs this")
	}
	return found[0]
}

const (
	slotSize  = 4 << 20
	imageSize = 2 << 20
)

func image(version string) []byte {
	img := make([]byte, imageSize)
	rand.Read(img)
	copy(img, version+"\x00")
	return img
}

// TestUpdateThroughARealReboot installs the package as a person would, and follows one update from the poll to a confirmed boot on the other
// slot: a real Reboot call to the real logind while a program holds an inhibitor and then does not.
func TestUpdateThroughARealReboot(t *testing.T) {
	Need(t)
	pkg := deb(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	server, err := releases.New(filepath.Join(dir, "releases"), releases.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	web := httptest.NewServer(server)
	t.Cleanup(web.Close)

	next := image("2.0.0")
	var pay bytes.Buffer
	if _, err := build.Full(t.Context(), &pay, build.Spec{Images: []build.Image{{Name: "usr", Data: bytes.NewReader(next), Size: imageSize}}, Keys: []crypto.Signer{key}, TempDir: dir}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "2.0.0.payload")
	if err := os.WriteFile(path, pay.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Publish(t.Context(), "stable", "2.0.0", path); err != nil {
		t.Fatal(err)
	}

	parts := []gptimage.Partition{
		{Label: "USR-A", Type: gptimage.TypeUSR, UUID: "7130c94a-213a-4e5a-8e26-6cce9662f132", Size: slotSize, Attributes: gptimage.Attributes(1, 0, true)},
		{Label: "USR-B", Type: gptimage.TypeUSR, UUID: "e03dd35c-7c2d-4a47-b3fe-27f15780a57c", Size: slotSize},
	}
	var disk string
	prepare := func(share string) {
		disk = filepath.Join(share, "disk.img")
		if err := gptimage.Create(disk, 512, "22222222-2222-4222-8222-222222222222", parts); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(disk, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(image("1.0.0"), parts[0].Start); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(pkg)
		if err == nil {
			err = os.WriteFile(filepath.Join(share, "flipside.deb"), data, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	load := func() (Slot, error) {
		s, err := bootsim.BootFile(disk)
		if err != nil {
			return Slot{}, err
		}
		f, err := os.Open(disk)
		if err != nil {
			return Slot{}, err
		}
		defer f.Close()
		head := make([]byte, 16)
		for _, p := range parts {
			if p.Label == s.Label {
				if _, err := f.ReadAt(head, p.Start); err != nil {
					return Slot{}, err
				}
			}
		}
		version, _, _ := strings.Cut(string(head), "\x00")
		return Slot{Label: s.Label, Version: version}, nil
	}
	port := web.Listener.Addr().String()
	m := New(t, "m1", map[int]string{portOf(web): port}, prepare, load)
	m.Up()
	m.Must("dpkg -i /var/lib/flipside/flipside.deb")
	m.Must(fmt.Sprintf("cat >/etc/flipside/keys.d/release.pem <<'E'\n%sE", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))
	m.Must(fmt.Sprintf(`cat >/etc/flipside/flipside.toml <<'E'
[update]
server = "http://%s/v1/update/"
app = "test"
allow_http = true
first_check = "1ms"
[slots]
disk = "/var/lib/flipside/disk.img"
[reboot]
gate_retry = "1s"
[health]
soak = "1s"
E`, port))
	m.Must("systemd-run --unit=backup systemd-inhibit --what=shutdown --mode=block --who=backup --why='nightly backup' sleep infinity")
	m.Must("systemctl enable --now flipsided")
	m.Until("it waits for the inhibitor", func() bool {
		out, _ := m.Run("flipside status")
		return strings.Contains(out, "nightly backup")
	})
	if out := m.Must("systemctl show -p StatusText flipsided"); !strings.Contains(out, "armed: release 2.0.0") {
		t.Errorf("systemctl shows %q", out)
	}
	if n := len(m.Boots()); n != 1 {
		t.Fatalf("it rebooted (%d boots) while a program inhibited it", n)
	}
	m.Must("systemctl stop backup")
	m.Until("the second boot", func() bool { return len(m.Boots()) == 2 })
	if b := m.Boots()[1]; b.Label != "USR-B" || b.Version != "2.0.0" {
		t.Fatalf("it booted %+v", b)
	}
	m.Until("it is confirmed", func() bool {
		out, _ := m.Run("journalctl -b -t flipsided FLIPSIDE_KIND=healthy -o cat --no-pager")
		return strings.Contains(out, "release 2.0.0 is healthy and confirmed")
	})
	t.Logf("\n%s", m.Must("flipside status; systemctl status --no-pager -n 20 flipsided"))
}

// portOf is the server's port: in a machine it is the same one, so that the addresses that the server gives out lead to it.
func portOf(s *httptest.Server) int { return s.Listener.Addr().(*net.TCPAddr).Port }
