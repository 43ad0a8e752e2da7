package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Lines are read as they are written: nothing is taken for the number that it begins with.
func TestReadPCRs(t *testing.T) {
	value := strings.Repeat("ab", 32)
	for text, want := range map[string]string{
		"11:sha256=" + value:                      "map[11:[" + value + "]]",
		"4:sha256=0x" + strings.ToUpper(value):    "map[04:[" + value + "]]",
		"# PCR\n\n11:sha1=00\n 7:sha256=" + value: "map[07:[" + value + "]]",
		"11abc:sha256=" + value:                   `line 1 is not like 11:sha256=0123…: there is no PCR "11abc"`,
		"+11:sha256=" + value:                     `there is no PCR "+11"`,
		"-1:sha256=" + value:                      `there is no PCR "-1"`,
		" :sha256=" + value:                       `there is no PCR ""`,
		"24:sha256=" + value:                      `there is no PCR "24"`,
		"999999999999999999999:sha256=" + value:   `there is no PCR "9`,
		"11:sha256=" + value[2:]:                  "64 hexadecimal digits",
		"11:sha256=" + value + "zz":               "64 hexadecimal digits",
		"11:sha256=\x1b[2J":                       "64 hexadecimal digits",
		"11=sha256:" + value:                      "line 1 is not like",
		"11:sha1=" + value:                        "holds no line",
	} {
		p, err := readPCRs("values", strings.NewReader(text))
		got := fmt.Sprint(p)
		if err != nil {
			got = err.Error()
		}
		if got != want && (err == nil || !strings.Contains(got, want)) || strings.Contains(got, "\x1b") {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// What a server says of a host is hostile until it was looked at: its length, its numbers, where it sends us.
func TestHostPCRs(t *testing.T) {
	value := strings.Repeat("ab", 32)
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("another server was asked") }))
	defer other.Close()
	says := func(pcrs string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, `{"host": {"proof": {"version": "1.0.0", "at": "2026-01-02T03:04:05Z", "pcrs": {%s}}}}`, pcrs)
		}
	}
	for name, tt := range map[string]struct {
		server http.HandlerFunc
		want   string
	}{
		"as it should be":     {says(`"11": "` + value + `"`), ""},
		"more than a number":  {says(`"11abc": "` + value + `"`), `there is no PCR "11abc"`},
		"for the terminal":    {says(`"\u001b[2J": "` + value + `"`), "there is no PCR"},
		"no value":            {says(`"11": "\u001b"`), "64 hexadecimal digits"},
		"the same PCR, twice": {says(`"4": "` + value + `", "04": "` + strings.Repeat("cd", 32) + `"`), "two values of PCR 04"},
		"without end": {func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, `{"events": [`)
			block := []byte(strings.Repeat(" ", 1<<16))
			for range 2 * maxDetail / len(block) {
				if _, err := w.Write(block); err != nil {
					return
				}
			}
		}, "more than 4 MiB"},
		"something after it": {func(w http.ResponseWriter, r *http.Request) { says("")(w, r); fmt.Fprint(w, "x") }, "invalid character"},
		"elsewhere": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
		}, "to another server"},
		"not there": {http.NotFound, "404"},
	} {
		srv := httptest.NewServer(tt.server)
		p, err := hostPCRs(t.Context(), srv.URL, "m1", "1.0.0")
		srv.Close()
		switch {
		case tt.want == "":
			if err != nil || len(p) != 1 || p["11"][0] != value {
				t.Errorf("%s: %v, %v", name, p, err)
			}
		case err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\x1b"):
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}

// An administrator's token goes to the server that was named, also when that one sends elsewhere.
func TestTokenFollowsNoRedirect(t *testing.T) {
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("it went to the other server") }))
	defer other.Close()
	named := httptest.NewServer(http.RedirectHandler(other.URL, http.StatusTemporaryRedirect))
	defer named.Close()
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("an administrator's token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := backupFrom(t.Context(), named.URL, token, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "307") {
		t.Errorf("%v, want the answer 307", err)
	}
}
