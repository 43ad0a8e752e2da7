// Package demo shows the whole of Flipside at work on one machine: three hosts with real disk images, a release server, an
// etcd, and three releases, the last of which is bad.
//
// Everything is real but the hardware: the images have GPTs and file systems made from this machine's own files, the payloads are
// signed, flipsided is the shipped binary, Omaha goes over HTTP, the semaphore is in an etcd. What stands for firmware, boot
// loader and kernel is the type machine.
package demo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/etcd"
	"github.com/flipside-linux/flipside/lock/etcd/etcdtest"
	"github.com/flipside-linux/flipside/omaha/server"
	"github.com/flipside-linux/flipside/updater"
)

// Options say how the demo runs.
type Options struct {
	Flipsided string    // path of the daemon's binary
	Dir       string    // where it works, new or empty, and never removed; "" is a new temporary directory
	Keep      bool      // leave the temporary directory behind
	Out       io.Writer // where the story goes
}

const (
	hosts = 3
	group = "demo"
)

// Run tells the story. An error means that something was not as it should be.
func Run(ctx context.Context, o Options) (err error) {
	sc := newScreen(o.Out)
	dir := o.Dir
	if dir == "" {
		if dir, err = os.MkdirTemp("", "flipside-demo-"); err != nil {
			return err
		}
		if !o.Keep {
			defer os.RemoveAll(dir)
		}
	} else if err := claimDir(dir); err != nil {
		return err
	}
	d := &show{screen: sc, dir: dir}
	if err := d.build(ctx, o.Flipsided); err != nil {
		return err
	}
	defer d.closeServers()
	running, switchOff := context.WithCancel(ctx)
	defer switchOff()
	if err := d.start(running); err != nil {
		return err
	}
	err = d.story(running)
	switchOff()
	d.hosts.Wait()
	sc.done()
	if err != nil {
		return errors.Join(err, fmt.Errorf("run it with --keep and see the logs in %s", dir))
	}
	if err := d.judge(ctx); err != nil {
		return err
	}
	if o.Keep || o.Dir != "" {
		sc.print("\nEverything is kept in " + dir)
	}
	return nil
}

// claimDir makes a directory that somebody named, or makes sure that it is empty: what is in it is not the demo's to touch.
func claimDir(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if len(entries) > 0 {
		return fmt.Errorf("%s is not empty; the demo works only in a new or empty directory", dir)
	}
	return nil
}

// show is the demo's stage.
type show struct {
	screen   *screen
	dir      string
	releases []*release
	machines []*machine
	key      keys

	server    *server.Server
	semaphore *lock.Keeper
	closers   []func()       // of the servers, in the order in which they were started
	hosts     sync.WaitGroup // the machines that are on
	failed    chan error
}

func (d *show) path(elem ...string) string { return filepath.Join(append([]string{d.dir}, elem...)...) }

// build makes the releases and the hosts' disks.
func (d *show) build(ctx context.Context, flipsided string) error {
	d.screen.chapter("Building three releases from this machine's own files")
	tree := d.path("tree")
	files, total, err := stageTree(ctx, tree)
	if err != nil {
		return err
	}
	if err := d.makeKeys(); err != nil {
		return err
	}
	for _, r := range []*release{{version: "1.0.0"}, {version: "2.0.0"}, {version: "3.0.0", sick: true}} {
		began := time.Now()
		r.image = d.path(r.version + ".img")
		if err := dressTree(tree, *r); err != nil {
			return fmt.Errorf("making release %s: %w", r.version, err)
		}
		if err := makeExt4(ctx, r.image, tree, imageSize); err != nil {
			return fmt.Errorf("making release %s: %w", r.version, err)
		}
		if r.sha256, err = hashFile(r.image, 0, imageSize); err != nil {
			return err
		}
		size, err := d.makePayload(ctx, r)
		if err != nil {
			return fmt.Errorf("making the payload of release %s: %w", r.version, err)
		}
		d.screen.say("release %s: %d files, %d MiB, ext4 image %d MiB, signed payload %d MiB, in %.1f s", r.version, files, total/mib, imageSize/mib, size/mib, time.Since(began).Seconds())
		d.releases = append(d.releases, r)
	}
	if err := os.RemoveAll(tree); err != nil {
		return err
	}
	d.screen.chapter("Installing release 1.0.0 on three hosts")
	for i := range hosts {
		m := &machine{name: "host-" + string(rune('a'+i)), flipsided: flipsided, log: d.screen.say}
		m.dir = d.path(m.name)
		m.disk = m.path("disk.img")
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := d.makeDisk(ctx, m.disk, i); err != nil {
			return fmt.Errorf("making the disk of %s: %w", m.name, err)
		}
		id := sha256.Sum256([]byte(m.dir))
		if err := os.WriteFile(m.path("machine-id"), []byte(hex.EncodeToString(id[:16])+"\n"), 0o644); err != nil {
			return err
		}
		d.machines = append(d.machines, m)
	}
	d.screen.say("three disk images with EFI-SYSTEM, USR-A, USR-B and ROOT; USR-A holds release 1.0.0")
	return nil
}

// start brings up the release server, etcd and the hosts.
func (d *show) start(ctx context.Context) error {
	d.screen.chapter("Starting a release server, an etcd, and the hosts")
	endpoint, stopEtcd, err := etcdtest.StartEmbedded(d.path("etcd"))
	if err != nil {
		return fmt.Errorf("starting etcd: %w", err)
	}
	d.closers = append(d.closers, stopEtcd)
	client, err := etcd.New(etcd.Config{Endpoints: []string{endpoint}})
	if err != nil {
		return fmt.Errorf("connecting to etcd: %w", err)
	}
	d.closers = append(d.closers, func() { client.Close() })
	d.semaphore = client
	if err := client.SetMax(ctx, group, 1); err != nil {
		return fmt.Errorf("setting the semaphore up: %w", err)
	}
	if d.server, err = server.New(d.path("releases"), server.Options{}); err != nil {
		return err
	}
	d.closers = append(d.closers, func() { d.server.Close() })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	serving, stopServing := context.WithCancel(context.Background())
	served := make(chan struct{})
	go func() { defer close(served); d.server.Serve(serving, l) }()
	d.closers = append(d.closers, func() { stopServing(); <-served })
	if _, err := d.server.Publish(ctx, "stable", "1.0.0", d.payload(d.releases[0])); err != nil {
		return err
	}
	url := "http://" + l.Addr().String() + "/v1/update/"
	d.screen.say("releases at %s, etcd at %s, reboot semaphore of 1", url, endpoint)
	d.failed = make(chan error, len(d.machines))
	for _, m := range d.machines {
		if err := os.WriteFile(m.path("flipside.toml.in"), []byte(hostConfig(m, url, endpoint, d.key.public)), 0o644); err != nil {
			return err
		}
		d.hosts.Go(func() {
			if err := m.run(ctx); err != nil {
				d.failed <- err
			}
		})
	}
	return nil
}

func (d *show) closeServers() {
	for i := len(d.closers) - 1; i >= 0; i-- {
		d.closers[i]()
	}
}

// story publishes releases and waits for what must come of them.
func (d *show) story(ctx context.Context) error {
	err := d.until(ctx, 30*time.Second, "all hosts are up to date with release 1.0.0", func(st updater.Status) bool {
		return st.Version == "1.0.0" && st.Phase == updater.Idle && !st.LastCheck.IsZero()
	})
	if err != nil {
		return err
	}

	d.screen.chapter("Publishing release 2.0.0 on channel stable")
	if _, err := d.server.Publish(ctx, "stable", "2.0.0", d.payload(d.releases[1])); err != nil {
		return err
	}
	go d.cutPower(ctx, d.machines[1])
	err = d.until(ctx, 90*time.Second, "all hosts run release 2.0.0, healthy", func(st updater.Status) bool {
		return st.Version == "2.0.0" && st.Phase == updater.Idle && st.LastUpdate != nil && st.LastUpdate.Good && st.Verdict == nil
	})
	if err != nil {
		return err
	}

	d.screen.chapter("Publishing release 3.0.0, whose health check fails")
	if _, err := d.server.Publish(ctx, "stable", "3.0.0", d.payload(d.releases[2])); err != nil {
		return err
	}
	return d.until(ctx, 90*time.Second, "the first host fell back to 2.0.0; the others do not follow it", func(st updater.Status) bool {
		return st.Version == "2.0.0" && st.Phase == updater.Idle && st.Verdict == nil && !st.Asking &&
			(strings.Contains(st.Why, "3.0.0") || strings.Contains(st.LastAnswer, "3.0.0"))
	}, func() bool { return d.bootsOf("3.0.0") == 1 })
}

// cutPower pulls the plug of a host in the middle of its download. It must go on where it was.
func (d *show) cutPower(ctx context.Context, m *machine) {
	for ctx.Err() == nil {
		st, seen, _ := m.view()
		if p := st.Progress; seen && st.Phase == updater.Applying && p != nil && p.Total > 0 && p.Done*100/p.Total >= 60 {
			d.screen.say("%s loses power at %d %% of the download", m.name, p.Done*100/p.Total)
			m.pullPlug()
			return
		}
		if seen && st.Phase != updater.Applying && st.Version == "2.0.0" {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// bootsOf counts the hosts that have ever booted a version.
func (d *show) bootsOf(version string) int {
	n := 0
	for _, m := range d.machines {
		if m.booted(version) {
			n++
		}
	}
	return n
}

// until waits until every host satisfies ok, and the further conditions hold.
func (d *show) until(ctx context.Context, limit time.Duration, what string, ok func(updater.Status) bool, more ...func() bool) error {
	deadline := time.Now().Add(limit)
	for {
		d.screen.show(d.machines)
		all := true
		for _, m := range d.machines {
			st, seen, _ := m.view()
			all = all && seen && ok(st)
		}
		for _, f := range more {
			all = all && f()
		}
		if all {
			d.screen.say("%s", d.screen.style("32", what))
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("after %s it is not so that %s", limit, what)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-d.failed:
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func hashFile(path string, off, n int64) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, off, n)); err != nil {
		return "", fmt.Errorf("hashing %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
