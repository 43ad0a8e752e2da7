package server

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/omaha"
)

// pcr is a value of a PCR.
func pcr(digit string) string { return strings.Repeat(digit, 64) }

// proves lets a host prove its boot with this evidence.
func (l *lab) proves(host string, ev Evidence) int {
	l.t.Helper()
	l.clock.Add(1)
	l.opt.Prover = func(string, []byte, []byte) (Evidence, error) { return ev, nil }
	_, body := l.get("/v1/proof/" + host)
	var q struct{ Nonce []byte }
	if err := json.Unmarshal([]byte(body), &q); err != nil {
		l.t.Fatal(err)
	}
	resp, err := http.Post(l.url+"/v1/proof/"+host+"?nonce="+base64.RawURLEncoding.EncodeToString(q.Nonce), "application/json", strings.NewReader("{}"))
	if err != nil {
		l.t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

func (l *lab) measures(version string, p PCRs) {
	l.t.Helper()
	if _, err := l.publish.Measure(version, func(PCRs) (PCRs, error) { return p, nil }); err != nil {
		l.t.Fatal(err)
	}
	if err := l.Reload(); err != nil {
		l.t.Fatal(err)
	}
	l.clock.Add(2 * time.Second)
	l.Hosts() // looks at all again
}

// A boot is compared with what its release must have measured: in JSON, on the pages, in the metrics, and where a channel asks for it the rollout stops.
func TestMeasuredBoots(t *testing.T) {
	l := newLab(t)
	l.opt.Prover = func(string, []byte, []byte) (Evidence, error) { return Evidence{}, errors.New("not asked") }
	l.publishVersion("1.0.0", 1)
	l.publishVersion("1.1.0", 2)
	l.change(func(c *Channel) { c.StopDiffers = 2 })
	hosts := make([]*omaha.Client, 5)
	for i := range hosts {
		hosts[i] = l.client(i, "1.1.0")
		l.check(hosts[i])
	}
	boots := func(n int, version string, pcrs map[string]string) {
		t.Helper()
		key := fmt.Sprintf("sha256:%064x", n)
		if code := l.proves(hosts[n].MachineID, Evidence{Slot: "USR-A", Version: version, Key: key, PCRs: pcrs}); code != http.StatusNoContent {
			t.Fatalf("host %d: status %d", n, code)
		}
	}
	wants := func(n int, boot, words string) {
		t.Helper()
		h, _ := l.Host(hosts[n].MachineID)
		if h.Proof.Boot != boot || h.Proof.Words() != words {
			t.Errorf("host %d: %q (%s), want %q (%s)", n, h.Proof.Boot, h.Proof.Words(), boot, words)
		}
	}
	good := map[string]string{"04": pcr("a"), "07": pcr("7"), "11": pcr("b")}
	boots(0, "1.1.0", good)
	wants(0, "", "") // nobody has said anything
	l.measures("1.1.0", PCRs{"4": {pcr("a"), pcr("c")}, "11": {strings.ToUpper(pcr("b"))}})
	wants(0, AsReleased, "boots as released")
	boots(1, "1.1.0", map[string]string{"04": pcr("c"), "11": pcr("b")})
	wants(1, AsReleased, "boots as released")
	boots(2, "1.1.0", map[string]string{"04": pcr("a"), "11": pcr("d")})
	wants(2, Differs, "differs in PCR 11")
	boots(3, "1.0.0", map[string]string{"11": pcr("d")}) // another release, of which nothing is said
	wants(3, "", "")
	halted := func() string {
		return l.Status().Channels["stable"].Halted()
	}
	if h := halted(); h != "" {
		t.Fatalf("one of two that may differ: %s", h)
	}
	if h, _ := l.Host(hosts[2].MachineID); h.Proof.Differs[0] != "11" {
		t.Errorf("%+v", h.Proof)
	}
	for path, want := range map[string]string{
		"/v1/hosts?boot=differs":          `"total": 1,`,
		"/v1/hosts?boot=as%20released":    `"total": 2,`,
		"/?boot=differs":                  "its boot differs in PCR 11",
		"/":                               "<strong>1</strong> boots differ",
		"/hosts/" + hosts[2].MachineID:    `<b class="bad">It differs in PCR 11.</b>`,
		"/hosts/" + hosts[0].MachineID:    "<b>It boots as released.</b>",
		"/v1/hosts/" + hosts[0].MachineID: `"boot": "as released"`,
		"/v1/releases":                    pcr("c"),
	} {
		if _, body := l.get(path); !strings.Contains(body, want) {
			t.Errorf("%s lacks %q:\n%s", path, want, body)
		}
	}
	_, metrics := l.get("/metrics")
	for verdict, n := range map[string]int{"as_released": 2, "differs": 1, "unjudged": 1, "unproven": 1} {
		if want := fmt.Sprintf(`flipside_host_boots{channel="stable",verdict="%s"} %d`, verdict, n); !strings.Contains(metrics, want) {
			t.Errorf("the metrics lack %s:\n%s", want, metrics)
		}
	}
	boots(2, "1.1.0", map[string]string{"04": pcr("a"), "11": pcr("e")}) // again: one host
	if h := halted(); h != "" {
		t.Fatalf("one of two that may differ, twice: %s", h)
	}
	boots(4, "1.1.0", map[string]string{"11": pcr("b")}) // one that was not quoted
	wants(4, Differs, "differs in PCR 4")
	if h := halted(); h != "stopped: 2 boots of 1.1.0 measured something else than the release" {
		t.Fatalf("two of two that may differ: %q", h)
	}
	if _, err := l.publish.Pause("stable", false); err != nil {
		t.Fatal(err)
	}
	l.clock.Add(10e9)
	l.check(hosts[0])
	if h := halted(); h != "" { // counted anew
		t.Errorf("resumed: %q", h)
	}

	// Said anew, all are looked at again.
	l.measures("1.1.0", PCRs{"11": {pcr("f")}})
	l.clock.Add(10e9)
	l.check(hosts[0])
	wants(0, Differs, "differs in PCR 11")
	if h := halted(); h != "stopped: 4 boots of 1.1.0 measured something else than the release" {
		t.Errorf("said anew: %q", h)
	}
	l.measures("1.1.0", nil)
	wants(0, "", "")
	if _, err := os.Stat(filepath.Join(l.dir, "pcrs", "1.1.0.toml")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file of a release of which nothing is said: %v", err)
	}
}

// What is said while no server runs counts from its start on, before any host proves anything; what was said before is not counted again after a rollout was resumed.
func TestMeasuredWhileDown(t *testing.T) {
	l := newLab(t)
	l.opt.Prover = func(string, []byte, []byte) (Evidence, error) { return Evidence{}, errors.New("not asked") }
	l.publishVersion("1.1.0", 1)
	l.change(func(c *Channel) { c.StopDiffers = 2 })
	for i := range 3 {
		c := l.client(i, "1.1.0")
		l.check(c)
		if code := l.proves(c.MachineID, Evidence{Version: "1.1.0", Key: fmt.Sprintf("sha256:%064x", i), PCRs: map[string]string{"11": pcr(fmt.Sprint(i))}}); code != http.StatusNoContent {
			t.Fatalf("host %d: status %d", i, code)
		}
	}
	restart := func(edit func(p *Publisher) error) string {
		t.Helper()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l.clock.Add(time.Hour)
		p := &Publisher{Dir: l.dir, Now: l.clock.Now}
		if err := edit(p); err != nil {
			t.Fatal(err)
		}
		l.start()
		c, err := p.Channel("stable")
		if err != nil {
			t.Fatal(err)
		}
		return c.Halted()
	}
	says := func(values ...string) func(p *Publisher) error {
		return func(p *Publisher) error {
			_, err := p.Measure("1.1.0", func(PCRs) (PCRs, error) { return PCRs{"11": values}, nil })
			return err
		}
	}
	resume := func(p *Publisher) error { _, err := p.Pause("stable", false); return err }
	for i, step := range []struct {
		edit func(p *Publisher) error
		want string
	}{
		{says(pcr("0"), pcr("1")), ""}, // one of two that may differ
		{says(pcr("0")), "stopped: 2 boots of 1.1.0 measured something else than the release"},
		{resume, ""},
		{says(pcr("0")), ""}, // nothing new
		{says(pcr("9")), "stopped: 3 boots of 1.1.0 measured something else than the release"},
	} {
		if got := restart(step.edit); got != step.want {
			t.Errorf("step %d: halted %q, want %q", i, got, step.want)
		}
	}
}

// What is said of a release's PCRs is checked, also when a hand has written it; a file with a mistake keeps what was said before.
func TestMeasureIsChecked(t *testing.T) {
	l := newLab(t)
	l.publishVersion("1.0.0", 1)
	for name, tt := range map[string]struct {
		version string
		p       PCRs
		want    string
	}{
		"a PCR that does not exist": {"1.0.0", PCRs{"24": {pcr("a")}}, `no PCR "24"`},
		"no PCR":                    {"1.0.0", PCRs{"x": {pcr("a")}}, `no PCR "x"`},
		"a PCR with a sign":         {"1.0.0", PCRs{"+4": {pcr("a")}}, `no PCR "+4"`},
		"a short value":             {"1.0.0", PCRs{"11": {"abcd"}}, "64 hexadecimal digits"},
		"an unknown release":        {"9.0.0", PCRs{"11": {pcr("a")}}, "not known"},
		"a path":                    {"../1.0.0", PCRs{"11": {pcr("a")}}, "three numbers"},
	} {
		if _, err := l.publish.Measure(tt.version, func(PCRs) (PCRs, error) { return tt.p, nil }); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	var many []string
	for i := range maxValues + 1 {
		many = append(many, fmt.Sprintf("%064x", i))
	}
	if _, err := (PCRs{"11": many}).check(); err == nil {
		t.Error("values without end")
	}
	l.measures("1.0.0", PCRs{"11": {pcr("a")}})
	path := filepath.Join(l.dir, "pcrs", "1.0.0.toml")
	if err := os.WriteFile(path, []byte("[pcrs]\n12 = [\"abc\"]\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := l.Reload(); err != nil {
		t.Fatal(err)
	}
	c := l.catalog.Load()
	if len(c.problems) != 1 || !strings.Contains(c.problems[0], "pcrs/1.0.0.toml: PCR 12") || c.releases["1.0.0"].PCRs["11"][0] != pcr("a") {
		t.Errorf("%q, %+v", c.problems, c.releases["1.0.0"])
	}
}

// A server that knows the makers of TPMs believes no key at first sight; it knows a cleared TPM again, and no other.
func TestEndorsedKeys(t *testing.T) {
	l := newLab(t)
	l.opt.Endorser = func(_, _ []byte) ([]byte, error) { return nil, errors.New("not asked") }
	c := l.client(1, "1.0.0")
	l.publishVersion("1.0.0", 1)
	l.check(c)
	key := func(d string) string { return "sha256:" + pcr(d) }
	tpm := func(d string) *TPM { return &TPM{Maker: "IFX", Issuer: "Muster", Key: key(d)} }
	last := ""
	for i, step := range []struct {
		key     string
		tpm     *TPM
		accept  bool // by an administrator, before
		code    int
		counts  string // the host's key then
		refused string
	}{
		{key("1"), nil, false, 403, "", "no key is believed at first sight here: no certificate"},
		{key("1"), nil, true, 204, key("1"), ""},
		{key("1"), tpm("a"), false, 204, key("1"), ""},
		{key("1"), nil, false, 204, key("1"), ""},                         // shown once
		{key("2"), tpm("a"), false, 204, key("2"), ""},                    // the same TPM, cleared
		{key("3"), tpm("b"), false, 403, key("2"), "this host's is sha2"}, // a new board
		{key("3"), nil, false, 403, key("2"), "this host's is sha2"},      // a cleared one without its certificate
		{key("3"), tpm("b"), true, 204, key("3"), ""},
	} {
		if step.accept {
			if err := l.AcceptKey(c.MachineID, step.key, "alice"); err != nil {
				t.Fatal(err)
			}
		}
		code := l.proves(c.MachineID, Evidence{Slot: "USR-A", Version: "1.0.0", Key: step.key, TPM: step.tpm, Unendorsed: "no certificate"})
		h, _ := l.Host(c.MachineID)
		if code != step.code || h.Proof.Key != step.counts || !strings.Contains(h.Proof.Refused, step.refused) || (step.refused == "") != (h.Proof.Refused == "") {
			t.Errorf("step %d: status %d, %+v", i, code, h.Proof)
		}
		if step.code == 204 && step.tpm == nil && i > 2 && h.Proof.TPM == nil {
			t.Errorf("step %d: it forgets whose TPM it is", i)
		}
		last = h.Proof.Key
	}
	asks := func(k string) bool {
		_, body := l.get("/v1/proof/" + c.MachineID + "?key=" + k)
		return strings.Contains(body, `"endorsement": true`)
	}
	if asks(last) || !asks(key("9")) || !asks("") {
		t.Error("it asks for what it knows, or not for what it does not know")
	}
	if _, page := l.get("/hosts/" + c.MachineID); !strings.Contains(page, "is IFX’s, says Muster") {
		t.Errorf("the page does not say whose TPM it is:\n%s", page)
	}
}
