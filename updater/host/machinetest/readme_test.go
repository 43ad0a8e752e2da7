package machinetest

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/flipside-linux/flipside/payload/keytest"
)

// TestReadme does what the README tells a person who installs Flipside on a host, line by line, and nothing else. What the machine is told beside it is
// what it is no real host in: it has its disk in a file, and no certificate for the server.
func TestReadme(t *testing.T) {
	data, err := os.ReadFile("../../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, host, _ := strings.Cut(string(data), "\n## A host\n")
	_, host, found := strings.Cut(host, "As root on such a host")
	_, host, _ = strings.Cut(host, "\n\n")
	var lines []string
	for line := range strings.Lines(host) {
		command, ok := strings.CutPrefix(line, "    ")
		if !ok {
			break
		}
		lines = append(lines, strings.TrimSpace(command))
	}
	if !found || len(lines) < 4 {
		t.Fatalf("the README has no commands for a host: %q", lines)
	}
	l := newLab(t)
	l.publish("2.0.0", "")
	m := l.bare("m1")
	m.Must(fmt.Sprintf("mkdir /root/new && cd /root/new && cp /var/lib/flipside/software flipside_1.0_amd64.deb && cat >release.pem.pub <<'E'\n%sE", keytest.Public(l.t, l.key)))
	m.Must(`mkdir -p /usr/local/lib/flipside/flipside.toml.d && cat >/usr/local/lib/flipside/flipside.toml.d/50-machine.toml <<'E'
[host]
boot_id = "/run/boot-id"
[update]
allow_http = true
app = "test"
[slots]
disk = "/var/lib/flipside/disk.img"
E`)
	for _, line := range lines {
		if strings.HasPrefix(line, "apt install") && !strings.HasPrefix(l.install, "dpkg") {
			line = l.install // there is no package
		}
		line = strings.ReplaceAll(line, "https://updates.example.org", l.web.URL)
		if line == "flipside check" { // it may end with "waits for a reboot", and the machine may be on its way down
			out, _ := m.Run("cd /root/new && " + line)
			t.Logf("# %s\n%s", line, out)
			continue
		}
		t.Logf("# %s\n%s", line, m.Must("cd /root/new && "+line))
	}
	m.Until("the second boot", func() bool { return len(m.Boots()) == 2 })
	confirmed(m, "2.0.0")
	t.Logf("# flipside status\n%s", m.Must("flipside status"))
}
