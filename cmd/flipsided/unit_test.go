package main

import (
	"os/exec"
	"strings"
	"testing"
)

// What the services may do is kept small: systemd's own score of each, times ten, stays under a limit. 0 is a service that may do nothing, 100
// one without any sandbox.
func TestUnitsAreHardened(t *testing.T) {
	if out, err := exec.Command("systemd-analyze", "security", "--help").CombinedOutput(); err != nil || !strings.Contains(string(out), "--threshold") {
		t.Skip("systemd-analyze is not installed, or too old to look at a unit file")
	}
	for unit, limit := range map[string]string{"flipsided.service": "30", "flipside-deadman.service": "30"} {
		out, err := exec.Command("systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold="+limit, "../../packaging/systemd/"+unit).CombinedOutput()
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		if err != nil {
			t.Errorf("%s: over %s: %v\n%s", unit, limit, err, out)
			continue
		}
		t.Log(lines[len(lines)-1])
	}
}
