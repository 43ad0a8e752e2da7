package locktest

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// BehindProxy reports whether the environment of this process names a proxy that nobody answers at. If not, it runs the test again in one where it does, and the test is
// over: a process reads these variables once. What belongs to the cluster is asked directly there, too.
func BehindProxy(t *testing.T) bool {
	t.Helper()
	const inner = "FLIPSIDE_TEST_BEHIND_PROXY"
	if os.Getenv(inner) != "" {
		return true
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inner+"=1", "HTTP_PROXY=http://127.0.0.1:1", "HTTPS_PROXY=http://127.0.0.1:1", "NO_PROXY=", "no_proxy=")
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "PASS: "+t.Name()) {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

// Elsewhere is a server of this machine at an address that no library takes for one: to loopback there is never a proxy.
func Elsewhere(url string) string { return strings.Replace(url, "127.0.0.1", "0.0.0.0", 1) }
