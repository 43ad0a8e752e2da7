package server

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
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

// What was recorded of a Nebraska 3.0 with PostgreSQL 15 for one check of a known, up-to-date host, and of go-omaha's
// example server in the same hour on the same machine: the least CPU of the one and the most of the other. The ratio is
// what can be taken to another machine, where the reference is measured anew.
const (
	nebraskaCPU  = 3600 * time.Microsecond
	referenceCPU = 130 * time.Microsecond
)

// TestBenchOmaha measures the server as a process of its own, with a hundred thousand known hosts, on 64 connections,
// turn by turn with go-omaha's example server, which keeps no state. It prints and judges nothing by the clock.
// FLIPSIDE_LONG=1 lets it run.
func TestBenchOmaha(t *testing.T) {
	if os.Getenv("FLIPSIDE_LONG") == "" {
		t.Skip("FLIPSIDE_LONG is not set")
	}
	const hosts, rounds, each = 100_000, 5, 6400
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	dir := func() string {
		s := benchServer(t, hosts)
		s.commit(true)
		runtime.GC()
		runtime.ReadMemStats(&after)
		t.Logf("memory: %d bytes per known host, of %d hosts", (after.HeapAlloc-before.HeapAlloc)/hosts, hosts)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return s.dir
	}()
	ours, reference := startBench(t, "FLIPSIDE_TEST_SERVER="+dir), startBench(t, "FLIPSIDE_TEST_REFERENCE=1")
	var a, b measured
	for range rounds {
		a.add(ours.load(t, each, hosts, "1.1.0", 0))
		b.add(reference.load(t, each, hosts, "1.1.0", 0))
	}
	t.Logf("this server, up to date:   %s", a)
	t.Logf("go-omaha's example server: %s", b)
	ratio := float64(b.cpu) / float64(a.cpu) * float64(a.n) / float64(b.n)
	t.Logf("checks per CPU second: %.2f times go-omaha's example server, thus at least %.0f times Nebraska, which took at least %.0f times as much CPU as that one when both were recorded",
		ratio, ratio*float64(nebraskaCPU)/float64(referenceCPU), float64(nebraskaCPU)/float64(referenceCPU))
	const calm = 2000 // a second: five million hosts that ask every 45 minutes
	t.Logf("at %d checks a second:     %s", calm, ours.load(t, 2*each, hosts, "1.1.0", calm))
	t.Logf("a grant, saved before the answer: %s", ours.load(t, each, hosts, "1.0.0", 0))
}

// measured is what came of a number of checks.
type measured struct {
	n     int
	cpu   time.Duration // of the server's process, user and system
	wall  time.Duration
	times []time.Duration
}

func (l *measured) add(m measured) {
	l.n, l.cpu, l.wall, l.times = l.n+m.n, l.cpu+m.cpu, l.wall+m.wall, append(l.times, m.times...)
}

func (l measured) String() string {
	times := slices.Sorted(slices.Values(l.times))
	return fmt.Sprintf("%d checks, %s of the server's CPU each, %.0f per CPU second, p50 %s, p99 %s on 64 connections, %.0f/s", l.n, l.cpu/time.Duration(l.n),
		float64(l.n)/l.cpu.Seconds(), times[len(times)/2].Round(10*time.Microsecond), times[len(times)*99/100].Round(10*time.Microsecond), float64(l.n)/l.wall.Seconds())
}

// benched is a server that runs as a process of its own.
type benched struct {
	pid int
	url string
}

func startBench(t *testing.T, env string) benched {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env, cmd.Stderr = append(os.Environ(), env), os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	url, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return benched{cmd.Process.Pid, strings.TrimSpace(url)}
}

// load asks n times on 64 connections, each time for another of the hosts. They are open before the first check counts, and the client is as
// light as it can be: it shares the machine's cores with the server, and a heavy one would measure itself. With perSecond 0 each connection asks
// again as soon as it has its answer, so that the times are those of a server that has all it can do.
func (b benched) load(t *testing.T, n, hosts int, version string, perSecond int) measured {
	t.Helper()
	const conns = 64
	address := strings.TrimPrefix(b.url, "http://")
	open := make([]*benchConn, conns)
	for c := range open {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		open[c] = &benchConn{conn: conn, answers: bufio.NewReaderSize(conn, 16<<10), host: address}
		if err := open[c].check(benchBody(c, version)); err != nil {
			t.Fatal(err)
		}
	}
	times := make([][]time.Duration, conns)
	for c := range times {
		times[c] = make([]time.Duration, 0, n)
	}
	var next atomic.Int64
	cpu, start := processTime(t, b.pid), time.Now()
	var wg sync.WaitGroup
	for c, conn := range open {
		wg.Go(func() {
			for {
				i := int(next.Add(1))
				if i > n {
					return
				}
				body := benchBody(i*7919%hosts, version)
				if perSecond > 0 {
					time.Sleep(time.Until(start.Add(time.Duration(i) * time.Second / time.Duration(perSecond))))
				}
				begin := time.Now()
				if err := conn.check(body); err != nil {
					t.Error(err)
					return
				}
				times[c] = append(times[c], time.Since(begin))
			}
		})
	}
	wg.Wait()
	return measured{n, processTime(t, b.pid) - cpu, time.Since(start), slices.Concat(times...)}
}

// benchConn is one connection that is kept.
type benchConn struct {
	conn    net.Conn
	answers *bufio.Reader
	host    string
	buf     []byte
}

func (c *benchConn) check(body []byte) error {
	c.buf = fmt.Appendf(c.buf[:0], "POST /v1/update/ HTTP/1.1\r\nHost: %s\r\nContent-Type: text/xml\r\nContent-Length: %d\r\n\r\n%s", c.host, len(body), body)
	if _, err := c.conn.Write(c.buf); err != nil {
		return err
	}
	resp, err := http.ReadResponse(c.answers, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("a check was answered with %s", resp.Status)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// processTime reads how much CPU a process has used: fields 14 and 15 of /proc/PID/stat, in hundredths of a second (man 5 proc).
func processTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	user, err1 := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	if err1 != nil || err2 != nil {
		t.Fatalf("/proc/%d/stat: %v, %v", pid, err1, err2)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}
