package server

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The disk was full, or the power went, in the middle of an entry. The next one can be read.
func TestAuditAfterATornLine(t *testing.T) {
	l := newLab(t)
	path := filepath.Join(l.dir, "audit.jsonl")
	if err := os.WriteFile(path, []byte(`{"at":"2026-11-23T12:00:00Z","who":"a","what":"channel","detail":{}}`+"\n"+`{"at":"2026-11-23T12:0`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, what := range []string{"one", "two"} {
		if err := l.publish.audit(what, nil); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := l.audits(t.Context(), 10)
	if err != nil || len(entries) != 3 || entries[0].What != "two" || entries[1].What != "one" {
		t.Errorf("%+v, %v", entries, err)
	}
}

// A change that is not in the audit log is in force all the same. Whoever ordered it is told so: a rollback that is ordered again would go back further.
func TestChangeWithoutAudit(t *testing.T) {
	l := newLab(t)
	for i, version := range []string{"1.0.0", "1.1.0", "1.2.0"} {
		l.publishVersion(version, byte(i))
	}
	l.opt.Admins.Tokens = map[string]string{"ops": "secret"}
	path := filepath.Join(l.dir, "audit.jsonl")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil { // nothing can be appended to that
		t.Fatal(err)
	}
	req, err := http.NewRequest("POST", l.url+"/v1/admin/channels/stable", strings.NewReader(`{"action":"rollback"}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer secret")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	said := make([]byte, 1000)
	n, _ := resp.Body.Read(said)
	if ch := l.catalog.Load().channels["stable"]; resp.StatusCode != 500 || !strings.Contains(string(said[:n]), "channel stable is changed") || ch.Version != "1.1.0" {
		t.Errorf("%s %s, and the channel holds %s", resp.Status, said[:n], ch.Version)
	}
}
