package omaha

import (
	"bufio"
	"context"
	"encoding/xml"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	wire "github.com/flatcar/go-omaha/omaha"
)

// samples finds the captures next to the repository.
func samples(t testing.TB, sub string) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		if filepath.Dir(dir) == dir {
			t.Fatal("no go.mod above the test")
		}
		dir = filepath.Dir(dir)
	}
	path := filepath.Join(dir, "..", "shared", "samples", sub)
	if _, err := os.Stat(path); err != nil {
		t.Skipf("the recorded samples are not here: %v", err)
	}
	return path
}

// capture is one recorded exchange and what the index says about it.
type capture struct {
	name, sent, http, app, check string
	request, response            []byte
	contentType                  string
}

func captures(t testing.TB) []capture {
	dir := samples(t, "nebraska")
	index, err := os.Open(filepath.Join(dir, "INDEX.md"))
	if err != nil {
		t.Fatal(err)
	}
	defer index.Close()
	read := func(name string) []byte {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	contentType := regexp.MustCompile(`(?m)^Content-Type: (.*)$`)
	row := regexp.MustCompile(`^\| ([0-9]+-\S+) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|`)
	var out []capture
	for lines := bufio.NewScanner(index); lines.Scan(); {
		m := row.FindStringSubmatch(lines.Text())
		if m == nil {
			continue
		}
		c := capture{name: m[1], sent: m[2], http: m[3], app: strings.TrimSpace(m[4]), check: strings.TrimSpace(m[5])}
		c.request, c.response = read(c.name+".request.xml"), read(c.name+".response.xml")
		if m := contentType.FindSubmatch(read(c.name + ".meta.txt")); m != nil {
			c.contentType = strings.TrimSpace(string(m[1]))
		}
		out = append(out, c)
	}
	if len(out) != 116 {
		t.Fatalf("the index lists %d captures, not 116", len(out))
	}
	return out
}

// documented says what the index means for a client, in one word and a version.
func documented(t *testing.T, c capture) (Kind, string) {
	app, _, _ := strings.Cut(c.app, ";")
	check, _, _ := strings.Cut(c.check, ";")
	switch {
	case c.http != "200", app == "-":
		return "error", ""
	case strings.HasPrefix(c.name, "87-"): // no SHA-256 at all
		return "error", ""
	case strings.HasPrefix(c.name, "95-"): // size 0 and a name with a slash
		return "error", ""
	case app != "ok":
		kind, ok := map[string]Kind{
			"error-updateInProgressOnInstance":        InProgress,
			"error-failedToRetrieveUpdatePackageInfo": Misconfigured,
			"error-instanceRegistrationFailed":        Misconfigured,
			"error-noPackageFound":                    NothingThere,
			"error-maxUpdatesPerPeriodLimitReached":   Deferred,
			"error-maxConcurrentUpdatesLimitReached":  Deferred,
			"error-maxTimedOutUpdatesLimitReached":    Deferred,
			"error-updatesDisabled":                   Deferred,
		}[app]
		if !ok {
			t.Fatalf("the index names a status %q that this test does not know", app)
		}
		return kind, ""
	case check == "-":
		return "acknowledged", ""
	case check == "noupdate":
		return UpToDate, ""
	case check == "error-internal":
		return ServerTrouble, ""
	}
	if versions, ok := strings.CutPrefix(check, "ok "); ok {
		first, _, _ := strings.Cut(versions, ",")
		return Offered, first
	}
	if check == "ok" {
		_, versions, _ := strings.Cut(c.check, " ")
		first, _, _ := strings.Cut(versions, ",")
		return Offered, first
	}
	t.Fatalf("the index says %q, which this test does not understand", c.check)
	return "", ""
}

// TestRecordedAnswers gives every answer of a real Nebraska to the client, over HTTP and with the recorded status and
// type, and compares the decision with what the index documents.
func TestRecordedAnswers(t *testing.T) {
	for _, c := range captures(t) {
		t.Run(c.name, func(t *testing.T) {
			status, err := strconv.Atoi(c.http)
			if err != nil {
				t.Fatal(err)
			}
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				w.Header().Set("Content-Type", c.contentType)
				w.WriteHeader(status)
				w.Write(c.response)
			}))
			defer s.Close()
			client := newClient(t, s.URL)
			if req, err := wire.ParseRequest("", strings.NewReader(string(c.request))); err == nil {
				client.AppID = req.Apps[0].ID
				if _, err := parseVersion(req.Apps[0].Version); err == nil {
					client.Version = req.Apps[0].Version
				}
			}
			want, version := documented(t, c)
			if want == "acknowledged" {
				if err := client.Report(context.Background(), DownloadStarted()); err != nil {
					t.Error(err)
				}
				return
			}
			a, err := client.Check(context.Background(), CheckRequest{})
			if want == "error" {
				var e *Error
				if !errors.As(err, &e) {
					t.Fatalf("got %+v, %v; want an error", a, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if a.Reason.Kind != want || (a.Offer != nil) != (want == Offered) {
				t.Errorf("got %s, want %s", a.Reason.Kind, want)
			}
			if a.Offer != nil && a.Offer.Version != version {
				t.Errorf("offered %s, want %s", a.Offer.Version, version)
			}
		})
	}
}

// TestRecordedRequests puts the client into the situation of every recorded request and compares what it sends,
// attribute by attribute. Requests that a server refuses or misreads are not sent at all.
func TestRecordedRequests(t *testing.T) {
	refused := map[string]string{
		"27-d-no-machineid": "", "28-d-machineid-51-chars": "", "29-d-version-not-semver": "", "30-d-version-4-parts": "",
		"101-l-braced-uuid-machineid-counts-as-fake": "",
	}
	notOurs := map[string]string{ // situations that this client does not get into
		"34-e-malformed-xml": "broken XML", "35-e-empty-body": "nothing", "37-e-get-method": "GET", "39-e-json-v3.1": "JSON",
		"97-k-request-with-doctype": "DOCTYPE", "98-k-trailing-garbage": "garbage", "103-l-unescaped-quote-in-alias": "broken XML",
		"38-e-protocol-3.1": "protocol 3.1", "36-e-body-over-64k": "64 KiB of comment", "47-e-no-ping": "a check without a ping",
	}
	compared := 0
	for _, c := range captures(t) {
		t.Run(c.name, func(t *testing.T) {
			if why, ok := notOurs[c.name]; ok {
				t.Skipf("not a request of ours: %s", why)
			}
			want, err := wire.ParseRequest("", strings.NewReader(string(c.request)))
			if err != nil {
				t.Fatal(err)
			}
			app := want.Apps[0]
			client := &Client{
				URL: "http://127.0.0.1/", HTTP: &HTTP{}, AppID: app.ID, Version: app.Version, Track: app.Track, Board: app.Board,
				MachineID: app.MachineID, MachineAlias: app.MachineAlias, BootID: strings.Trim(app.BootID, "{}"),
				OEM: app.OEM, OEMVersion: app.OEMVersion, AlephVersion: app.AlephVersion, UserAgent: want.Version, OSArch: want.OS.Arch, OSPlatform: want.OS.Platform, OSVersion: want.OS.Version,
			}
			r := request{onDemand: want.InstallSource != "scheduler", ping: app.Ping != nil, check: app.UpdateCheck != nil}
			noise := false
			for _, e := range app.Events {
				if e.Type == TypeUpdateComplete && e.Result == ResultSuccessReboot && (e.PreviousVersion == "" || e.PreviousVersion == "0.0.0.0") {
					noise = true // a 3/2 that tells of no update: does harm, is never sent
					continue
				}
				r.events = append(r.events, Event{int(e.Type), int(e.Result), e.ErrorCode, e.PreviousVersion})
			}
			body, err := client.request(r)
			if _, ok := refused[c.name]; ok {
				if !errors.Is(err, ErrConfig) {
					t.Errorf("a request that servers refuse was made: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			ours, theirs := elements(t, body), elements(t, c.request)
			for path, attrs := range theirs {
				if noise && strings.Contains(path, "event") || strings.HasPrefix(path, "request/app[1]") {
					continue
				}
				if ours[path] == nil {
					t.Errorf("%s is missing", path)
					continue
				}
				for name, value := range attrs {
					if name == "multi_manifest_ok" || name == "sp" {
						continue // the first is for servers; the second was frozen in the recordings, see below
					}
					if got, ok := ours[path][name]; !ok || got != value {
						t.Errorf("%s@%s is %q, recorded %q", path, name, got, value)
					}
				}
			}
			if sp := ours["request/os"]["sp"]; sp != app.Version+"_x86_64" {
				t.Errorf("request/os@sp is %q", sp)
			}
			compared++
		})
	}
	if compared < 95 {
		t.Errorf("only %d requests were compared", compared)
	}
}

// elements flattens a document to its elements' attributes, keyed by a path that counts equal siblings from the second on.
func elements(t *testing.T, doc []byte) map[string]map[string]string {
	t.Helper()
	out := map[string]map[string]string{}
	var path []string
	d := xml.NewDecoder(strings.NewReader(string(doc)))
	for {
		token, err := d.Token()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		switch e := token.(type) {
		case xml.StartElement:
			key := strings.Join(append(path, e.Name.Local), "/")
			name := e.Name.Local
			for n := 1; out[key] != nil; n++ {
				name = e.Name.Local + "[" + strconv.Itoa(n) + "]"
				key = strings.Join(append(path, name), "/")
			}
			out[key] = map[string]string{}
			for _, a := range e.Attr {
				out[key][a.Name.Local] = a.Value
			}
			path = append(path, name)
		case xml.EndElement:
			path = path[:len(path)-1]
		}
	}
}
