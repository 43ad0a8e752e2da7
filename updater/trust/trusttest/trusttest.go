// Package trusttest runs a TPM 2.0 emulator (swtpm) for tests: a real TPM's program and state, in a process that can lose its power.
package trusttest

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// Emulator is a running swtpm.
type Emulator struct {
	t      testing.TB
	dir    string
	cmd    *exec.Cmd
	Socket string // path of its socket, which goes where a device's path goes
}

// Start starts an emulator with an empty state, or skips the test where swtpm is not installed.
func Start(t testing.TB) *Emulator {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err != nil {
		t.Skip("swtpm is not installed (apt-get install swtpm)")
	}
	// A socket's path must be short, and a test's own directory may be long.
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		t.Fatal(err)
	}
	e := &Emulator{t: t, dir: dir, Socket: filepath.Join(dir, "s")}
	t.Cleanup(func() {
		e.Kill()
		os.RemoveAll(dir)
	})
	e.Power()
	return e
}

// Power starts the emulator on the state that it has.
func (e *Emulator) Power() {
	e.t.Helper()
	os.Remove(e.Socket)
	os.Remove(e.Socket + ".ctrl")
	e.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+e.dir, "--server", "type=unixio,path="+e.Socket,
		"--ctrl", "type=unixio,path="+e.Socket+".ctrl", // which TPM2-TSS wants, and so systemd's tools
		"--flags", "not-need-init,startup-clear")
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		if c, err := net.Dial("unix", e.Socket); err == nil {
			c.Close()
			return
		}
		if time.Now().After(deadline) {
			e.t.Fatal("swtpm does not listen")
		}
	}
}

// Kill takes the emulator's power away: what it has not written to its state is lost.
func (e *Emulator) Kill() {
	if e.cmd == nil {
		return
	}
	e.cmd.Process.Kill()
	e.cmd.Wait()
	e.cmd = nil
}

// Replace takes the power away and puts an empty TPM in its place.
func (e *Emulator) Replace() {
	e.t.Helper()
	e.Kill()
	old, err := filepath.Glob(filepath.Join(e.dir, "tpm2-*"))
	if err != nil {
		e.t.Fatal(err)
	}
	for _, f := range old {
		if err := os.Remove(f); err != nil {
			e.t.Fatal(err)
		}
	}
	e.Power()
}

// Setup takes the power away, makes an empty TPM with swtpm_setup and these options, and starts it.
func (e *Emulator) Setup(options ...string) {
	e.t.Helper()
	e.Replace()
	e.Kill()
	out, err := exec.Command("swtpm_setup", append([]string{"--tpm2", "--tpmstate", e.dir, "--overwrite"}, options...)...).CombinedOutput()
	if err != nil {
		e.t.Fatalf("swtpm_setup: %v\n%s", err, out)
	}
	e.Power()
}

// WithoutSHA256 puts an empty TPM in the emulator's place that has a SHA-1 bank of PCRs only. It skips the test where swtpm_setup is not installed.
func (e *Emulator) WithoutSHA256() {
	e.t.Helper()
	if _, err := exec.LookPath("swtpm_setup"); err != nil {
		e.t.Skip("swtpm_setup is not installed (apt-get install swtpm-tools)")
	}
	e.Setup("--pcr-banks", "sha1")
}

// Save returns what the TPM keeps over a loss of power, and Restore brings it back while the power is off: the same TPM as it was, many times over.
func (e *Emulator) Save() []byte {
	e.t.Helper()
	data, err := os.ReadFile(filepath.Join(e.dir, stateFile))
	if err != nil {
		e.t.Fatal(err)
	}
	return data
}

// Restore is the way back from [Emulator.Save].
func (e *Emulator) Restore(saved []byte) {
	e.t.Helper()
	if err := os.WriteFile(filepath.Join(e.dir, stateFile), saved, 0o600); err != nil {
		e.t.Fatal(err)
	}
}

const stateFile = "tpm2-00.permall"
