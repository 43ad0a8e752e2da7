package server

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	wire "github.com/flatcar/go-omaha/omaha"

	"github.com/flipside-linux/flipside/omaha"
)

// TestMain turns the test binary into a server when the kill test asks for one, or into the reference of the measures.
func TestMain(m *testing.M) {
	if os.Getenv("FLIPSIDE_TEST_REFERENCE") != "" {
		ref, err := wire.NewTrivialServer("127.0.0.1:0")
		if err == nil {
			ref.SetVersion("1.1.0")
			fmt.Println("http://" + ref.Addr().String())
			err = ref.Serve()
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	dir := os.Getenv("FLIPSIDE_TEST_SERVER")
	if dir == "" {
		os.Exit(m.Run())
	}
	s, err := New(dir, Options{AppID: testApp})
	if err == nil {
		var l net.Listener
		if l, err = net.Listen("tcp", "127.0.0.1:0"); err == nil {
			fmt.Println("http://" + l.Addr().String())
			err = s.Serve(context.Background(), l)
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// A server that is killed in the middle of its work forgets nothing that it has answered: each grant and event that a
// host got an answer for is there after the restart, and the limit holds across it.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	p := &Publisher{Dir: dir}
	if _, err := p.Add(context.Background(), "1.1.0", fakePayload(t, 1, 1000)); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Move("stable", "1.1.0"); err != nil {
		t.Fatal(err)
	}
	const limit = 40
	if _, err := p.Change("stable", func(c *Channel) error { c.MaxConcurrent = limit; return nil }); err != nil {
		t.Fatal(err)
	}
	h, err := omaha.NewHTTP(omaha.HTTPOptions{Proxy: "direct", Retries: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer h.CloseIdle()

	answered := map[string]State{} // what the hosts were told
	next := 0
	for round := range 4 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "FLIPSIDE_TEST_SERVER="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		url, err := bufio.NewReader(out).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		var mu sync.Mutex
		done := 0
		for range 8 {
			wg.Go(func() {
				for {
					mu.Lock()
					next++
					n := next
					mu.Unlock()
					c := &omaha.Client{URL: strings.TrimSpace(url) + "/v1/update/", AppID: testApp, Version: "1.0.0", Track: "stable", MachineID: fmt.Sprintf("%032x", n), HTTP: h}
					a, err := c.Check(context.Background(), omaha.CheckRequest{})
					if err != nil {
						return // it is dead
					}
					state := Held
					if a.Offer != nil {
						state = Granted
						if c.Report(context.Background(), omaha.DownloadStarted()) == nil {
							state = Downloading
						}
					}
					mu.Lock()
					answered[c.MachineID] = state
					if done++; done == 30+round*20 {
						cmd.Process.Kill()
					}
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		cmd.Wait()
	}

	s, err := New(dir, Options{AppID: testApp})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	updating := 0
	for _, h := range s.Hosts() {
		if h.State.active() {
			updating++
		}
		want, ok := answered[h.ID]
		// A host whose last answer was lost may be further than it was told, and not less far.
		if ok && h.State != want && !(want == Granted && h.State == Downloading) {
			t.Errorf("host %s was told %s and is %s", h.ID, want, h.State)
		}
		delete(answered, h.ID)
	}
	if len(answered) > 0 {
		t.Errorf("%d hosts got an answer and are forgotten", len(answered))
	}
	if updating != limit {
		t.Errorf("%d hosts update, the limit is %d", updating, limit)
	}
}
