package metrics

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/flipside-linux/flipside/reboot"
	"github.com/flipside-linux/flipside/updater"
)

func full(t *testing.T) *Metrics {
	t.Helper()
	m := New()
	at := time.Date(2026, 11, 23, 4, 0, 0, 0, time.UTC)
	m.Note(updater.Note{Kind: updater.FellBack})
	m.Observe(updater.Status{
		Schema: "flipside.status/v1", Version: "1.0.0", Slot: "USR-A", Phase: updater.Armed, Since: at, Blocked: true, Stage: updater.BeforeReboot,
		Update: &updater.UpdateStatus{Version: "2.0.0", Slot: "USR-B", Size: 1 << 20},
		Gates:  []reboot.Answer{{Gate: "window", Verdict: reboot.Wait}, {Gate: "window", Verdict: reboot.Go}, {Gate: "strategy", Verdict: reboot.Go}},
		Slots:  []updater.SlotStatus{{Label: "USR-A", Priority: 1, Successful: true}, {Label: "USR-B", Priority: 2, Tries: 1, Next: true}},
		// A failed version that may be tried again counts no more.
		Quarantine: map[string]updater.Failure{"3": {Until: time.Now().Add(time.Hour)}, "4": {Until: at}},
		LastCheck:  at, NextCheck: at, ErrorAt: at, LastUpdate: &updater.Done{To: "1.0.0", At: at, Good: true}, Unsent: 2, Verdict: &updater.Verdict{}, KeysEnd: at,
	})
	return m
}

func text(t *testing.T, m *Metrics) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "flipside.prom")
	written, err := m.Text()
	if err == nil {
		err = Replace(path, written)
	}
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o044 != 0o044 {
		t.Errorf("node-exporter cannot read %v, %v", info.Mode(), err)
	}
	return string(data)
}

func TestWriteFile(t *testing.T) {
	got := text(t, full(t))
	for _, want := range []string{
		`flipside_os_info{slot="USR-A",version="1.0.0"} 1`,
		`flipside_update_phase{phase="armed"} 1`,
		`flipside_update_phase{phase="idle"} 0`,
		`flipside_update_payload_written_bytes 1.048576e+06`,
		`flipside_gate_open{gate="window",stage="reboot"} 0`,
		`flipside_slot_next{slot="USR-B"} 1`,
		`flipside_events_total{kind="fell-back"} 1`,
		`flipside_events_total{kind="unhealthy"} 0`,
		`flipside_quarantined_releases 1`,
		`flipside_last_check_timestamp_seconds 1.7954064e+09`,
		`flipside_last_update_timestamp_seconds{result="good",version="1.0.0"} 1.7954064e+09`,
	} {
		if !strings.Contains(got, want+"\n") {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
	problems, err := promlint.New(strings.NewReader(got)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v, %v", problems, err)
	}
	if before := text(t, New()); strings.Contains(before, "os_info") {
		t.Error("before the engine has begun nothing is known of the host")
	}
}

var metricName = regexp.MustCompile(`\bflipside_[a-z_]+\b`)

// The reference lists what there is and nothing else, and rules and dashboard use nothing else.
func TestReferenceRulesAndDashboard(t *testing.T) {
	there := map[string]bool{}
	for _, line := range strings.Split(text(t, full(t)), "\n") {
		if name, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, _, _ = strings.Cut(name, " ")
			there[name] = true
		}
	}
	if len(there) < 20 {
		t.Fatalf("only %d metrics", len(there))
	}
	for _, file := range []string{"../../docs/metrics.md", "../../packaging/prometheus/flipside.rules.yml", "../../packaging/prometheus/flipside.dashboard.json"} {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Error(err)
			continue
		}
		used := map[string]bool{}
		for _, name := range metricName.FindAllString(string(data), -1) {
			if used[name] = true; !there[name] {
				t.Errorf("%s names %s, which is not a metric", file, name)
			}
		}
		if strings.HasSuffix(file, ".md") {
			for name := range there {
				if !used[name] {
					t.Errorf("%s does not explain %s", file, name)
				}
			}
		}
	}
}

func TestPromtool(t *testing.T) {
	if testing.Short() {
		t.Skip("runs promtool three times")
	}
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed (Debian's prometheus has it)")
	}
	cmd := exec.Command(promtool, "check", "metrics")
	cmd.Stdin = strings.NewReader(text(t, full(t)))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
	for _, args := range [][]string{{"check", "rules", "../../packaging/prometheus/flipside.rules.yml"}, {"test", "rules", "../../packaging/prometheus/flipside.rules.test.yml"}} {
		if out, err := exec.Command(promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
}

func TestServeOnLoopbackOnly(t *testing.T) {
	for _, addr := range []string{"0.0.0.0:0", ":0", "192.0.2.1:9476", "example.org:9476"} {
		if _, err := Listen(addr); !errors.Is(err, ErrNotLoopback) {
			t.Errorf("Listen(%q): %v", addr, err)
		}
	}
	l, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	m := full(t)
	go func() { done <- m.Serve(ctx, l) }()
	resp, err := http.Get("http://" + l.Addr().String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || !strings.Contains(string(body), "flipside_blocked 1") {
		t.Errorf("%s, %v", body, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
