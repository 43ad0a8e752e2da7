package server

import (
	"bytes"
	"encoding/xml"
	"io"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
)

// FuzzUpdate gives any bytes to the server as a request. It answers with an Omaha document or refuses, and what it
// remembers stays bounded and printable.
func FuzzUpdate(f *testing.F) {
	app := `<app appid="` + testApp + `" version="1.0.0" track="stable" machineid="m" machinealias="&#27;" hold="why"><ping active="1"/><updatecheck/><event eventtype="3" eventresult="0" errorcode="44"/></app>`
	f.Add([]byte(`<request protocol="3.0">` + app + `</request>`))
	f.Add([]byte(`<request protocol="3.0">` + app + app + `</request>`))
	f.Add([]byte(`<!DOCTYPE request><request protocol="3.0"/>`))
	f.Add([]byte(`<request protocol="3.0"><app appid="x" version="1"/></request>`))
	names, _ := filepath.Glob(filepath.Join("..", "..", "..", "shared", "samples", "nebraska", "*.request.xml"))
	for _, name := range names {
		if data, err := os.ReadFile(name); err == nil {
			f.Add(data)
		}
	}
	s, err := New(f.TempDir(), Options{Now: newClock().Now, MaxHosts: 100})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.Close() })
	if _, err := s.Publish(f.Context(), "stable", "1.1.0", fakePayload(f, 1, 1000)); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		w := httptest.NewRecorder()
		s.ServeHTTP(w, httptest.NewRequest("POST", "/v1/update/", bytes.NewReader(data)))
		switch w.Code {
		case 400:
			return
		case 200:
		default:
			t.Fatalf("status %d", w.Code)
		}
		d := xml.NewDecoder(w.Body)
		for {
			if _, err := d.Token(); err == io.EOF {
				break
			} else if err != nil {
				t.Fatalf("the answer is not well-formed: %v", err)
			}
		}
		hosts := s.Hosts()
		if len(hosts) > 100 {
			t.Errorf("%d hosts", len(hosts))
		}
		for _, h := range hosts {
			for _, text := range []string{h.ID, h.Alias, h.Track, h.Board, h.OEM, h.Waits, h.Why, h.Previous} {
				if clean(text) != text || len(text) > 400 {
					t.Errorf("%q is remembered", text)
				}
			}
		}
	})
}
