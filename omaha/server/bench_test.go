package server

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// benchBody is one check of host n, as update_engine writes it.
func benchBody(n int, version string) []byte {
	return fmt.Appendf(nil, `<?xml version="1.0" encoding="UTF-8"?>
<request protocol="3.0" version="update_engine-0.4.10" updaterversion="update_engine-0.4.10" installsource="scheduler" ismachine="1">
    <os version="Chateau" platform="CoreOS" sp="1.0.0_x86_64"></os>
    <app appid="%s" version="%s" track="stable" bootid="{11111111-2222-3333-4444-555555555555}" oem="qemu" oemversion="0.1" alephversion="1.0.0" machineid="%032x" machinealias="" lang="en-US" board="amd64-usr" hardware_class="" delta_okay="false" >
        <ping active="1"></ping>
        <updatecheck></updatecheck>
    </app>
</request>`, testApp, version, n)
}

func benchServer(b testing.TB, hosts int) *Server {
	dir := b.TempDir()
	s, err := New(dir, Options{AppID: testApp, PublicURL: "http://127.0.0.1:1"})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.Close() })
	if _, err := s.Publish(b.Context(), "stable", "1.1.0", fakePayload(b, 1, 1000)); err != nil {
		b.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range 64 {
		wg.Go(func() {
			for n := w; n < hosts; n += 64 {
				answer(s, benchBody(n, "1.1.0"))
			}
		})
	}
	wg.Wait()
	return s
}

func answer(s *Server, body []byte) int {
	r := httptest.NewRequest("POST", "/v1/update/", bytes.NewReader(body))
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w.Code
}

// BenchmarkCheck is one check of a known, up-to-date host without the network.
func BenchmarkCheck(b *testing.B) {
	s := benchServer(b, 2000)
	bodies := make([][]byte, 2000)
	for i := range bodies {
		bodies[i] = benchBody(i, "1.1.0")
	}
	b.ReportAllocs()
	var n int
	for b.Loop() {
		n++
		if code := answer(s, bodies[n%len(bodies)]); code != 200 {
			b.Fatal(code)
		}
	}
}

// TestBenchOmaha measures a server with a hundred thousand known hosts over HTTP on 64 connections. It prints and
// judges nothing by the clock. FLIPSIDE_LONG=1 lets it run.
func TestBenchOmaha(t *testing.T) {
	if os.Getenv("FLIPSIDE_LONG") == "" {
		t.Skip("FLIPSIDE_LONG is not set")
	}
	const hosts, conns, each = 100_000, 64, 400
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	s := benchServer(t, hosts)
	s.commit(true)
	runtime.GC()
	runtime.ReadMemStats(&after)
	t.Logf("memory: %d bytes per known host", (after.HeapAlloc-before.HeapAlloc)/hosts)

	web := httptest.NewServer(s)
	defer web.Close()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: conns}}
	for _, version := range []string{"1.1.0", "1.0.0"} {
		times := make([][]time.Duration, conns)
		var next atomic.Int64
		cpu, start := cpuTime(t), time.Now()
		var wg sync.WaitGroup
		for c := range conns {
			wg.Go(func() {
				for range each {
					n := int(next.Add(1)) * 7919 % hosts
					begin := time.Now()
					resp, err := client.Post(web.URL+"/v1/update/", "text/xml", bytes.NewReader(benchBody(n, version)))
					if err != nil {
						t.Error(err)
						return
					}
					io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
					times[c] = append(times[c], time.Since(begin))
				}
			})
		}
		wg.Wait()
		wall, spent := time.Since(start), cpuTime(t)-cpu
		all := slices.Concat(times...)
		slices.Sort(all)
		what := map[string]string{"1.1.0": "up to date", "1.0.0": "grant, saved before the answer"}[version]
		t.Logf("%s: %d checks, %.0f/s, %s of CPU each with the client's part, p50 %s, p99 %s", what, len(all),
			float64(len(all))/wall.Seconds(), spent/time.Duration(len(all)), all[len(all)/2], all[len(all)*99/100])
	}
}

func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
