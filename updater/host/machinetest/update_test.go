package machinetest

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// stays fails the test if the machine reboots within a short time.
func stays(m *Machine, why string) {
	m.t.Helper()
	boots := len(m.Boots())
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if len(m.Boots()) != boots {
			m.t.Fatalf("it rebooted, and %s", why)
		}
	}
}

// TestUpdateThroughARealReboot installs Flipside as a person would, and follows one update from the poll to a confirmed boot on the other slot. A
// program holds an inhibitor, logind is killed, and is away, and somebody is logged in: only when none of that is against it any more comes
// the real Reboot call to the real logind.
func TestUpdateThroughARealReboot(t *testing.T) {
	l := newLab(t)
	l.publish("2.0.0", "")
	m := l.machine("m1", "[reboot]\ngate_retry = \"1s\"\nusers_grace = \"1h\"\n")
	m.Must("systemd-run --unit=backup systemd-inhibit --what=shutdown --mode=block --who=backup --why='nightly backup' sleep infinity")
	m.Must("systemctl enable --now flipsided")
	says(m, "nightly backup")
	m.Until("systemctl shows it, too", func() bool {
		out, _ := m.Run("systemctl show -p StatusText flipsided")
		return strings.Contains(out, "armed: release 2.0.0")
	})
	stays(m, "a program inhibits it")

	m.Must("systemctl kill -s KILL systemd-logind")
	m.Until("logind is back", func() bool { _, err := m.Run("loginctl list-sessions"); return err == nil })
	says(m, "nightly backup") // systemd keeps the locks of a logind that died
	stays(m, "a program inhibits it, whose lock a new logind knows")

	m.Must("useradd -m ann")
	m.Must("systemd-run --unit=shell -p PAMName=login -p User=ann -p Environment='XDG_SESSION_CLASS=user XDG_SESSION_TYPE=tty' sleep infinity")
	m.Until("ann has a session", func() bool {
		out, _ := m.Run("loginctl list-sessions --no-legend")
		return strings.Contains(out, "ann")
	})
	m.Must("systemctl stop backup")
	says(m, "ann logged in; they have until")
	stays(m, "somebody is logged in")

	m.Must("systemctl mask --runtime systemd-logind && systemctl stop systemd-logind")
	says(m, "logind cannot be asked")
	m.Must("systemctl stop shell")
	stays(m, "nobody can say whether it may")
	m.Must("systemctl unmask --runtime systemd-logind && systemctl start systemd-logind")
	m.Until("the second boot", func() bool { return len(m.Boots()) == 2 })
	if b := m.Boots()[1]; b.Label != "USR-B" || b.Version != "2.0.0" {
		t.Fatalf("it booted %+v", b)
	}
	confirmed(m, "2.0.0")
	t.Logf("\n%s", m.Must("flipside status; systemctl status --no-pager -n 20 flipsided"))
	// With the message bus, the units and the sandbox that it has on a host.
	t.Logf("the daemon's memory on a machine:\n%s", m.Must("for p in $(pgrep flipsided); do grep -E '^(Uid|RssAnon|VmRSS)' /proc/$p/status; done"))
}

// A release whose flipsided does not even start is gone back from by the timer, and reported by the old side.
func TestDeadman(t *testing.T) {
	l := newLab(t)
	l.publish("2.0.0", "[nonsense]\n") // flipsided refuses to start with it
	m := l.machine("m1", "[reboot]\ngate_retry = \"1s\"\n")
	m.Must("mkdir -p /etc/systemd/system/flipside-deadman.timer.d && printf '[Timer]\\nOnBootSec=\\nOnBootSec=5s\\nOnUnitInactiveSec=2s\\n' >/etc/systemd/system/flipside-deadman.timer.d/soon.conf")
	m.Must("systemd-run --unit=backup systemd-inhibit --what=shutdown --mode=block --who=backup --why='nightly backup' sleep infinity")
	m.Must("systemctl daemon-reload && systemctl enable --now flipsided")
	says(m, "nightly backup")
	note := filepath.Join(m.Share, "on-trial")
	text, err := os.ReadFile(note)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(text), "\n")
	lines[2] = "6" // seconds, instead of half an hour
	// Many a kernel lets nobody, not even root, write into another's file in a directory that others write to, too.
	if err := errors.Join(os.Remove(note), os.WriteFile(note, []byte(strings.Join(lines, "\n")), 0o600)); err != nil {
		t.Fatal(err)
	}
	m.Must("systemctl stop backup")
	m.Until("the third boot", func() bool { return len(m.Boots()) == 3 })
	if b := m.Boots(); b[1].Version != "2.0.0" || b[2].Version != "1.0.0" {
		t.Fatalf("it booted %+v", b)
	}
	says(m, "the new side did not come up")
	if _, err := os.Stat(note); err == nil {
		t.Error("the note is still there")
	}
}
