package reboot

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Answers as Prometheus gives them, written from its HTTP API documentation; TestAlertsOnPrometheus asks a real one where it is installed.
func TestAlertsGate(t *testing.T) {
	vector := func(series string) string {
		return `{"status":"success","data":{"resultType":"vector","result":[` + series + `]}}`
	}
	const one = `{"metric":{"__name__":"ALERTS","alertname":"DiskFull","alertstate":"firing","instance":"db-1:9100"},"value":[1795000000,"1"]}`
	for _, tt := range []struct {
		name, body string
		status     int
		verdict    Verdict
		why        string
	}{
		{"nothing fires", vector(""), 200, Go, ""},
		{"one fires", vector(one), 200, Wait, "alerts: DiskFull on db-1:9100"},
		{"many fire", vector(strings.Repeat(one+",", 6) + one), 200, Wait, "and 4 more"},
		{"without names", vector(`{"metric":{},"value":[1,"1"]}`), 200, Wait, "without a name"},
		{"a bad query", `{"status":"error","errorType":"bad_data","error":"1:5: parse error"}`, 400, Unknown, "parse error"},
		{"a scalar", `{"status":"success","data":{"resultType":"scalar","result":[1,"1"]}}`, 200, Unknown, "a vector is wanted"},
		{"not whole", `{"status":"success","warnings":["a store is away"],"data":{"resultType":"vector","result":[]}}`, 200, Unknown, "a store is away"},
		{"a proxy's page", "<html>502</html>", 502, Unknown, "502"},
		{"empty", "", 200, Unknown, ""},
		{"endless", vector(strings.Repeat(one+",", 1<<16)), 200, Unknown, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/prom/api/v1/query" || r.URL.Query().Get("query") != FiringAlerts {
					t.Errorf("asked for %s", r.URL)
				}
				w.WriteHeader(tt.status)
				fmt.Fprint(w, tt.body)
			}))
			defer srv.Close()
			a := Alerts{URL: srv.URL + "/prom/"}.Ask(t.Context(), time.Now())
			if a.Verdict != tt.verdict || !strings.Contains(a.Why, tt.why) || len(a.Why) > 1000 {
				t.Errorf("%+v", a)
			}
		})
	}
	if a := (Alerts{URL: "http://127.0.0.1:1"}).Ask(t.Context(), time.Now()); a.Verdict != Unknown {
		t.Errorf("nobody answers: %+v", a)
	}
}

func TestAlertsOnPrometheus(t *testing.T) {
	path, err := exec.LookPath("prometheus")
	if err != nil {
		t.Skip("prometheus is not installed (package prometheus): a real one is not asked")
	}
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	for name, text := range map[string]string{
		"prometheus.yml": "global: {evaluation_interval: 1s}\nrule_files: [rules.yml]\n",
		"rules.yml":      "groups: [{name: g, rules: [{alert: DiskFull, expr: vector(1), labels: {severity: page}}]}]\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(path, "--config.file="+filepath.Join(dir, "prometheus.yml"), "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+address)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	ask := func(query string) Answer {
		return Alerts{URL: "http://" + address, Query: query}.Ask(t.Context(), time.Now())
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		a := ask("")
		if a.Verdict == Wait {
			if !strings.Contains(a.Why, "DiskFull") {
				t.Errorf("it fires: %+v", a)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the alert never fires: %+v", a)
		}
	}
	if a := ask(`ALERTS{alertstate="firing",severity="ticket"}`); a.Verdict != Go {
		t.Errorf("none of that kind: %+v", a)
	}
	if a := ask(`ALERTS{`); a.Verdict != Unknown || !strings.Contains(a.Why, "parse error") {
		t.Errorf("a bad query: %+v", a)
	}
}

func TestSeriesIsFitForATerminal(t *testing.T) {
	if got := describeSeries(map[string]string{"alertname": "Disk\u009b2Jfull\x1b\u202e", "instance": "büro\u2028"}); got != "Disk2Jfull on büro" {
		t.Errorf("the series is %q", got)
	}
}
