package machinetest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"net"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
	releases "github.com/flipside-linux/flipside/omaha/server"
	"github.com/flipside-linux/flipside/partition/bootsim"
	"github.com/flipside-linux/flipside/partition/gptimage"
	"github.com/flipside-linux/flipside/payload/build"
	"github.com/flipside-linux/flipside/payload/keytest"
)

const (
	slotSize  = 4 << 20
	imageSize = 2 << 20
)

// software is what is installed in the machines, and how: the package that FLIPSIDE_DIST holds, or the tree that "make install" staged in
// FLIPSIDE_TREE.
func software(t *testing.T) (file, command string) {
	t.Helper()
	if dist := os.Getenv("FLIPSIDE_DIST"); dist != "" {
		found, _ := filepath.Glob(filepath.Join(dist, "flipside_*.deb"))
		if len(found) != 1 {
			t.Fatalf("%d packages in FLIPSIDE_DIST=%s", len(found), dist)
		}
		return found[0], "dpkg -i /var/lib/flipside/software"
	}
	tree := os.Getenv("FLIPSIDE_TREE")
	if tree == "" {
		t.Skip("nothing to install in a machine: make machines builds the package and runs this, make machines-short a part of it")
	}
	file = filepath.Join(t.TempDir(), "tree.tar")
	if out, err := exec.Command("tar", "-C", tree, "--owner=0", "--group=0", "-cf", file, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return file, "tar -C / --no-overwrite-dir --keep-directory-symlink -xf /var/lib/flipside/software && systemd-sysusers flipside.conf && systemd-tmpfiles --create flipside.conf && systemctl daemon-reload && systemctl reload dbus"
}

// lab is a release server, a cluster's etcd, and machines.
type lab struct {
	t        *testing.T
	dir      string
	file     string // to install
	install  string // the command that does it
	key      crypto.Signer
	server   *releases.Server
	web      *httptest.Server
	endpoint string // of etcd
	cluster  *lock.Keeper

	mu     sync.Mutex
	config map[string]string // what a release's /usr brings of configuration, by version
}

func newLab(t *testing.T) *lab {
	Need(t)
	l := &lab{t: t, dir: t.TempDir(), config: map[string]string{}}
	l.file, l.install = software(t)
	var err error
	if l.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	if l.server, err = releases.New(filepath.Join(l.dir, "releases"), releases.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.server.Close() })
	l.web = httptest.NewServer(l.server)
	t.Cleanup(l.web.Close)
	return l
}

// withCluster starts an etcd.
func (l *lab) withCluster() {
	endpoint, stop, err := etcdtest.StartEmbedded(filepath.Join(l.dir, "etcd"))
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(stop)
	l.endpoint = endpoint
	if l.cluster, err = etcd.New(etcd.Config{Endpoints: []string{endpoint}}); err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { l.cluster.Close() })
}

// image is a release: its version, and noise.
func image(version string) []byte {
	img := make([]byte, imageSize)
	rand.Read(img)
	copy(img, version+"\x00")
	return img
}

// publish makes a release and offers it. config is what its /usr brings of configuration.
func (l *lab) publish(version, config string) {
	l.t.Helper()
	l.publishImage(version, config, build.Image{Data: bytes.NewReader(image(version)), Size: imageSize})
}

// publishImage is publish with a /usr of the caller's, which must begin with its version as that of [image] does.
func (l *lab) publishImage(version, config string, img build.Image) {
	l.t.Helper()
	l.mu.Lock()
	l.config[version] = config
	l.mu.Unlock()
	var pay bytes.Buffer
	img.Name = "usr"
	spec := build.Spec{Images: []build.Image{img}, Keys: []crypto.Signer{l.key}, TempDir: l.dir}
	if _, err := build.Full(l.t.Context(), &pay, spec); err != nil {
		l.t.Fatal(err)
	}
	path := filepath.Join(l.dir, version+".payload")
	if err := os.WriteFile(path, pay.Bytes(), 0o600); err != nil {
		l.t.Fatal(err)
	}
	if _, err := l.server.Publish(l.t.Context(), "stable", version, path); err != nil {
		l.t.Fatal(err)
	}
}

// port is that of a URL's host. In a machine it is the same one, so that the addresses that the server gives out lead to it.
func (l *lab) port(address string) int {
	u, err := url.Parse(address)
	if err != nil {
		l.t.Fatal(err)
	}
	_, text, err := net.SplitHostPort(u.Host)
	if err != nil {
		l.t.Fatal(err)
	}
	port, err := strconv.Atoi(text)
	if err != nil {
		l.t.Fatal(err)
	}
	return port
}

// machine boots a machine that runs release 1.0.0 and has Flipside installed and configured, and not started.
func (l *lab) machine(name, config string) *Machine {
	l.t.Helper()
	m := l.bare(name)
	m.Must(l.install)
	m.Must(fmt.Sprintf("cat >/etc/flipside/keys.d/release.pem <<'E'\n%sE", keytest.Public(l.t, l.key)))
	if l.endpoint != "" {
		config += fmt.Sprintf("[lock]\nendpoints = [%q]\n", l.endpoint)
	}
	m.Must(fmt.Sprintf(`cat >/etc/flipside/flipside.toml <<'E'
[host]
alias = %q
boot_id = "/run/boot-id"
[update]
server = "%s/v1/update/"
app = "test"
allow_http = true
first_check = "1ms"
interval = "5s"
retry = "1s"
[slots]
disk = "/var/lib/flipside/disk.img"
[health]
soak = "1s"
%sE`, name, l.web.URL, config))
	return m
}

// bare boots a machine that runs release 1.0.0 and has Flipside's package, and not installed it. At each boot after the first, the
// machine must hold the only slot of the semaphore, if there is one: asked is the etcd itself, by the boot loader.
func (l *lab) bare(name string) *Machine {
	l.t.Helper()
	parts := []gptimage.Partition{
		{Label: "USR-A", Type: gptimage.TypeUSR, UUID: "7130c94a-213a-4e5a-8e26-6cce9662f132", Size: slotSize, Attributes: gptimage.Attributes(1, 0, true)},
		{Label: "USR-B", Type: gptimage.TypeUSR, UUID: "e03dd35c-7c2d-4a47-b3fe-27f15780a57c", Size: slotSize},
	}
	var disk string
	prepare := func(share string) {
		disk = filepath.Join(share, "disk.img")
		if err := gptimage.Create(disk, 512, "22222222-2222-4222-8222-222222222222", parts); err != nil {
			l.t.Fatal(err)
		}
		f, err := os.OpenFile(disk, os.O_RDWR, 0)
		if err != nil {
			l.t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(image("1.0.0"), parts[0].Start); err != nil {
			l.t.Fatal(err)
		}
		data, err := os.ReadFile(l.file)
		if err == nil {
			err = os.WriteFile(filepath.Join(share, "software"), data, 0o644)
		}
		if err != nil {
			l.t.Fatal(err)
		}
	}
	booted := false
	load := func() (Slot, error) {
		if booted && l.cluster != nil {
			if err := l.alone(name); err != nil {
				return Slot{}, err
			}
		}
		booted = true
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
		l.mu.Lock()
		defer l.mu.Unlock()
		return Slot{Label: s.Label, Version: version, Config: l.config[version]}, nil
	}
	addresses := []string{l.web.URL}
	if l.endpoint != "" {
		addresses = append(addresses, l.endpoint)
	}
	forwards := map[int]string{}
	for _, a := range addresses {
		forwards[l.port(a)] = strings.TrimPrefix(a, "http://")
	}
	m := New(l.t, name, forwards, prepare, load)
	m.Up()
	return m
}

// alone says whether the machine called name holds a slot of the semaphore, and nobody else does.
func (l *lab) alone(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	st, err := l.cluster.State(ctx, "default")
	if err != nil {
		return err
	}
	if len(st.Holders) != 1 || !strings.HasPrefix(st.Holders[0].Host, name+"-") {
		return fmt.Errorf("%s reboots, and the semaphore of 1 is held by %+v", name, st.Holders)
	}
	return nil
}

// confirmed waits until a machine has found a release healthy.
func confirmed(m *Machine, version string) {
	m.t.Helper()
	m.Until("it confirms "+version, func() bool {
		out, _ := m.Run("journalctl -b -t flipsided FLIPSIDE_KIND=healthy -o cat --no-pager")
		return strings.Contains(out, "release "+version+" is healthy and confirmed")
	})
}

// says waits until flipside status says something.
func says(m *Machine, what string) {
	m.t.Helper()
	last := ""
	defer func() {
		if m.t.Failed() {
			m.t.Logf("%s: flipside status said last:\n%s", m.Name, last)
		}
	}()
	m.Until("it says "+what, func() bool {
		last, _ = m.Run("flipside status")
		return strings.Contains(last, what)
	})
}
