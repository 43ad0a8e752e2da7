package machinetest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// asAgent runs a command in the machine as the agent's user, with the one capability that the agent has.
func asAgent(command string) string {
	return "setpriv --reuid flipside --regid flipside --init-groups --inh-caps +dac_read_search --ambient-caps +dac_read_search --no-new-privs sh -c '" + command + "'"
}

// The part of the installed service that talks to the network is no root: nobody who trusts root trusts it. All the same an update goes through, on a host whose state an older
// release has left as root's, with a health check and a gate that need root.
func TestTheAgentIsNobody(t *testing.T) {
	l := newLab(t)
	l.publish("2.0.0", "")
	m := l.machine("m1", "[metrics]\ntextfile = \"/var/lib/prometheus/node-exporter/flipside.prom\"\n[reboot]\ngate_retry = \"1s\"\n")
	m.Must("mkdir -p /var/lib/prometheus/node-exporter /etc/flipside/gate.d && install -m 600 /dev/null /etc/secret")
	m.Must("printf '#!/bin/sh\\n[ $(id -u) = 0 ] && exec cat /etc/secret\\n' >/etc/flipside/health.d/10-root && cp /etc/flipside/health.d/10-root /etc/flipside/gate.d/ && chmod 755 /etc/flipside/*.d/10-root")
	// What an older release has left.
	m.Must("chown -R root:root /var/lib/flipside && chmod 700 /var/lib/flipside && mkdir -p /var/lib/flipside/failed-boots/20260101T000000Z-0.9 && echo bad >/var/lib/flipside/failed-boots/20260101T000000Z-0.9/reason")
	m.Must("echo maintenance >/var/lib/flipside/paused && echo '{\"schema\":\"flipside.trust/v1\",\"floor\":0}' >/var/lib/flipside/trust.json && chmod 600 /var/lib/flipside/*")
	m.Must("systemctl enable --now flipsided")
	says(m, "maintenance")
	main := "$(systemctl show -P MainPID flipsided)"
	if out := m.Must("ps -o user=,args= --ppid " + main); !strings.Contains(out, "flipside /usr/sbin/flipsided -part agent") {
		t.Errorf("its children are\n%s", out)
	}
	if out := m.Must("grep -h -E '^(CapEff|CapAmb|Seccomp|NoNewPrivs):' /proc/$(pgrep -u flipside flipsided)/status"); !strings.Contains(out, "CapEff:\t0000000000000004\n") || !strings.Contains(out, "Seccomp:\t2\n") {
		t.Errorf("the agent has\n%s", out)
	}
	if out := m.Must("flipside status"); strings.Contains(out, "rights that it does not need: a user") {
		t.Errorf("it complains:\n%s", out)
	}
	if out := m.Must("busctl --no-pager --acquired list"); !strings.Contains(out, "org.flipside.Updater1") || !strings.Contains(out, "com.coreos.update1") {
		t.Errorf("it is not on the message bus:\n%s", out)
	}
	for _, try := range []string{
		"systemd-run --wait true",
		"systemctl start flipside-deadman.service",
		"systemctl --no-ask-password reboot",
		"busctl call org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager Reboot b false",
		"systemctl set-environment A=B",
		"echo >>/var/lib/flipside/disk.img",
		"echo >>/var/lib/flipside/trust.json",
		"mv /var/lib/flipside/trust.json /var/lib/flipside/x",
		"rm -f /var/lib/flipside/trust.json",
		"echo >>/etc/flipside/flipside.toml",
		"kill -0 " + m.Must("echo -n "+main),
	} {
		if out, err := m.Run(asAgent(try)); err == nil {
			t.Errorf("the agent's user may %s: %s", try, out)
		}
	}
	if out, err := m.Run(asAgent("cat /etc/secret && touch /var/lib/flipside/probe && rm /var/lib/flipside/probe")); err != nil { // or the tries above prove nothing
		t.Errorf("the agent's user cannot do what it may: %v %s", err, out)
	}
	// Root made the file that pauses it; it takes it away all the same.
	m.Must("flipside resume")
	m.Until("the second boot", func() bool { return len(m.Boots()) == 2 })
	if b := m.Boots()[1]; b.Label != "USR-B" || b.Version != "2.0.0" {
		t.Fatalf("it booted %+v", b)
	}
	confirmed(m, "2.0.0")
	// While it runs, too.
	m.Must("touch /var/lib/flipside/paused && flipside status && flipside resume && flipside pause work && flipside resume && flipside pin 2 && flipside unpin")
	planted := "/var/lib/flipside/.trust.json.new"
	m.Must(asAgent("touch " + planted))
	m.Must("systemctl reload flipsided && flipside pause again && flipside resume")
	if out := m.Must("stat -c %U " + planted + " && rm " + planted); out != "flipside\n" {
		t.Errorf("what the agent has made is now %q's", out)
	}
	if _, err := m.Run("test -x /usr/lib/polkit-1/polkitd"); err == nil { // whom polkit lets is asked by the agent, which polkit must let ask
		m.Must(`echo 'polkit.addRule(function(a, s) { if (s.user == "ann" && a.id == "org.flipside.updater1.pause") return polkit.Result.YES; });' >/etc/polkit-1/rules.d/10-ann.rules`)
		m.Must("useradd -m ann && systemctl restart polkit")
		const call = "setpriv --reuid ann --regid ann --clear-groups busctl call org.flipside.Updater1 /org/flipside/Updater1 org.flipside.Updater1 "
		m.Must(call + "Pause sx work 0")
		if out, err := m.Run(call + "Resume"); err == nil || !strings.Contains(out, "org.flipside.updater1.resume") || strings.Contains(out, "cannot be asked") {
			t.Errorf("whom polkit does not let: %v %s", err, out)
		}
		m.Must("flipside resume")
	} else {
		t.Log("polkit is not installed: whether it lets the agent ask is not tested")
	}
	m.Until("it writes its metrics", func() bool {
		out, _ := m.Run("cat /var/lib/prometheus/node-exporter/flipside.prom")
		return strings.Contains(out, `version="2.0.0"`)
	})
	out := m.Must("stat -c '%U:%G %a %n' /var/lib/flipside /var/lib/flipside/state.json /var/lib/flipside/trust.json /var/lib/flipside/history.log /var/lib/flipside/failed-boots/*/reason /run/flipside /run/flipside/control.sock")
	t.Logf("\n%s", out)
	for _, want := range []string{"root:flipside 1770 /var/lib/flipside\n", "flipside:flipside 600 /var/lib/flipside/state.json\n", "root:root 600 /var/lib/flipside/trust.json\n", "flipside:flipside 755 /run/flipside\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("there is no %q", want)
		}
	}
	if data, err := os.ReadFile(filepath.Join(m.Share, "trust.json")); err != nil || !strings.Contains(string(data), `"USR-B"`) {
		t.Errorf("the floor's file: %s, %v", data, err)
	}
	if out := m.Must("journalctl -b -t flipsided -o cat --no-pager"); strings.Contains(out, "permission denied") || strings.Contains(out, "not permitted") {
		t.Errorf("it was not permitted something:\n%s", out)
	}
	m.Must("systemctl stop flipsided")
	if out := m.Must("systemctl show -P Result flipsided; pgrep -c flipsided || true"); out != "success\n0\n" {
		t.Errorf("stopped, it is %q", out)
	}
}
