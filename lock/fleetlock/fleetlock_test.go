package fleetlock

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/lock"
	"github.com/flipside-linux/flipside/lock/locktest"
)

func serve(t *testing.T, h http.Handler) (*Client, string) {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	c, err := New(s.URL+"/", Options{Pause: func(ctx context.Context, _ time.Duration) error {
		time.Sleep(2 * time.Millisecond)
		return ctx.Err()
	}})
	if err != nil {
		t.Fatal(err)
	}
	return c, s.URL
}

func TestBasic(t *testing.T) {
	for name, limit := range map[string]int{"one": 1, "three": 3} {
		t.Run("client and server, "+name, func(t *testing.T) {
			k := lock.On(lock.NewMemory(), lock.Options{})
			if err := k.SetMax(t.Context(), "basic", limit); err != nil {
				t.Fatal(err)
			}
			locktest.RunBasic(t, limit, func(t *testing.T) lock.Semaphore { c, _ := serve(t, &Server{Semaphore: k}); return c })
		})
		t.Run("memory, "+name, func(t *testing.T) {
			k := lock.On(lock.NewMemory(), lock.Options{})
			if err := k.SetMax(t.Context(), "basic", limit); err != nil {
				t.Fatal(err)
			}
			locktest.RunBasic(t, limit, func(*testing.T) lock.Semaphore { return k })
		})
	}
}

// A failure that is told over this protocol halts the version as any other does.
func TestVerdict(t *testing.T) {
	k := lock.On(lock.NewMemory(), lock.Options{})
	c, _ := serve(t, &Server{Semaphore: k})
	cl := lock.Claim{Group: "web", Host: "a", To: "2"}
	if st, err := c.Request(t.Context(), cl); err != nil || !st.Granted {
		t.Fatalf("%+v, %v", st, err)
	}
	if err := c.Release(t.Context(), "web", "a", lock.Verdict{Outcome: lock.Failed, Version: "2", Reason: "it smokes"}); err != nil {
		t.Fatal(err)
	}
	cl.Host = "b"
	if st, err := c.Request(t.Context(), cl); err != nil || st.Granted || !strings.Contains(st.Halted, "it smokes") {
		t.Errorf("after the failure: %+v, %v", st, err)
	}
}

// A host that is granted a slot and then finds its window closed gives it back; one that has said that it goes down does not.
func TestPhases(t *testing.T) {
	k := lock.On(lock.NewMemory(), lock.Options{})
	c, base := serve(t, &Server{Semaphore: k})
	holders := func(want int) {
		t.Helper()
		if s, err := k.State(t.Context(), "web"); err != nil || len(s.Holders) != want {
			t.Errorf("holders %+v, %v, want %d", s.Holders, err, want)
		}
	}
	withdraw := func() {
		t.Helper()
		if err := c.Release(t.Context(), "web", "a", lock.Verdict{Outcome: lock.Withdrawn}); err != nil {
			t.Error(err)
		}
	}
	cl := lock.Claim{Group: "web", Host: "a", To: "2"}
	for _, mark := range []bool{false, true} {
		if st, err := c.Request(t.Context(), cl); err != nil || !st.Granted {
			t.Fatalf("%+v, %v", st, err)
		}
		want := 0
		if mark {
			if err := c.Mark(t.Context(), "web", "a", lock.Mark{Phase: lock.Rebooting}); err != nil {
				t.Fatal(err)
			}
			want = 1
		}
		withdraw()
		holders(want)
	}
	// Another client says nothing more: the grant is the mark.
	if err := k.Release(t.Context(), "web", "a", lock.Verdict{Outcome: lock.Healthy}); err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), "POST", base+"/v1/pre-reboot", strings.NewReader(`{"client_params":{"id":"z","group":"web"}}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("fleet-lock-protocol", "true")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if s, err := k.State(t.Context(), "web"); err != nil || resp.StatusCode != 200 || len(s.Holders) != 1 || s.Holders[0].Phase != lock.Rebooting {
		t.Errorf("%d, %+v, %v", resp.StatusCode, s.Holders, err)
	}
}

// What airlock answers, as observed: one kind for most things, JSON under a text content type, no body on success.
func TestAirlock(t *testing.T) {
	for _, tt := range []struct {
		name, body string
		status     int
		want       error
		blocked    bool
	}{
		{"granted", "", 200, nil, false},
		{"full", `{"kind":"failed_lock","value":"all 1 semaphore slots currently locked"}`, 500, nil, true},
		{"lost a race", `{"kind":"failed_lock","value":"conflict on semaphore detected, aborting"}`, 500, lock.ErrConflict, false},
		{"store away", `{"kind":"failed_sem_init","value":"x: context deadline exceeded"}`, 500, lock.ErrUnavailable, false},
		{"no such group", `{"kind":"unknown_group","value":"unknown group \"nosuch\""}`, 400, lock.ErrInvalid, false},
		{"not a FleetLock server", `<html>no</html>`, 404, lock.ErrUnavailable, false},
		{"empty", ``, 500, lock.ErrUnavailable, false},
		{"endless", strings.Repeat("x", 10<<20), 500, lock.ErrUnavailable, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, _ := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				var m map[string]map[string]string
				if json.Unmarshal(body, &m) != nil || m["client_params"]["id"] != "a" || m["client_params"]["group"] != "web" || r.Header.Get("fleet-lock-protocol") != "true" {
					t.Errorf("request %s", body)
				}
				w.Header().Set("Content-Type", "text/plain; charset=utf-8")
				w.WriteHeader(tt.status)
				io.WriteString(w, tt.body)
			}))
			st, err := c.Request(t.Context(), lock.Claim{Group: "web", Host: "a"})
			if tt.want == nil && err != nil || !errors.Is(err, tt.want) || (st.Blocked != "") != tt.blocked || st.Granted != (tt.status == 200) {
				t.Errorf("%+v, %v", st, err)
			}
			if err != nil && len(err.Error()) > 1000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		})
	}
}

// A server that cannot be told of a failure must not pass the slot on.
func TestFailureIsNotPassedOn(t *testing.T) {
	released := false
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/pre-reboot", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("POST /v1/steady-state", func(http.ResponseWriter, *http.Request) { released = true })
	c, _ := serve(t, mux)
	if err := c.Release(t.Context(), "web", "a", lock.Verdict{Outcome: lock.Failed}); !errors.Is(err, ErrNoVerdict) || released {
		t.Errorf("Release = %v, released %v", err, released)
	}
	if err := c.Release(t.Context(), "web", "a", lock.Verdict{Outcome: lock.Healthy}); err != nil || !released {
		t.Errorf("Release = %v, released %v", err, released)
	}
}

// What stands between a client and its server says 200 to anything: a page to log in at, or a redirect to one. Nobody may reboot for that.
func TestAnotherAnswers(t *testing.T) {
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/empty" {
			io.WriteString(w, "<html>please log in")
		}
	}))
	t.Cleanup(page.Close)
	redirect := func(code int, to string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, page.URL+to, code) }
	}
	answer := func(contentType, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", contentType)
			io.WriteString(w, body)
		}
	}
	for name, h := range map[string]http.HandlerFunc{
		"301": redirect(301, "/"), "302": redirect(302, "/"), "303": redirect(303, "/empty"), "307": redirect(307, "/"), "308": redirect(308, "/empty"),
		"a page": answer("text/html; charset=utf-8", "please log in"), "a page by another type": answer("application/json", "\n <!DOCTYPE html>"),
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := serve(t, h)
			if st, err := c.Request(t.Context(), lock.Claim{Group: "web", Host: "a"}); st.Granted || !errors.Is(err, lock.ErrUnavailable) {
				t.Errorf("Request = %+v, %v, want ErrUnavailable", st, err)
			}
			if err := c.Mark(t.Context(), "web", "a", lock.Mark{Phase: lock.Rebooting}); !errors.Is(err, lock.ErrUnavailable) {
				t.Errorf("Mark = %v, want ErrUnavailable", err)
			}
			for _, o := range []lock.Outcome{lock.Healthy, lock.Failed} {
				if err := c.Release(t.Context(), "web", "a", lock.Verdict{Outcome: o}); !errors.Is(err, lock.ErrUnavailable) {
					t.Errorf("Release as %s = %v, want ErrUnavailable", o, err)
				}
			}
		})
	}
}

// Mark makes no new grant: a slot that is gone was taken for a reason, and another host may have it by now.
func TestMarkOfALostSlot(t *testing.T) {
	k := lock.On(lock.NewMemory(), lock.Options{})
	p := lock.DefaultPolicy()
	p.Max, p.ZoneMax = 3, 1
	if err := k.SetPolicy(t.Context(), "web", p, ""); err != nil {
		t.Fatal(err)
	}
	c, _ := serve(t, &Server{Semaphore: k})
	ask := func(host, to string) {
		t.Helper()
		if st, err := c.Request(t.Context(), lock.Claim{Group: "web", Host: host, To: to, Zone: "r1"}); err != nil || !st.Granted {
			t.Fatalf("%s: %+v, %v", host, st, err)
		}
	}
	ask("a", "2")
	if err := k.Release(t.Context(), "web", "a", lock.Verdict{Outcome: lock.Forced}); err != nil {
		t.Fatal(err)
	}
	ask("b", "3")
	for range 2 {
		if err := c.Mark(t.Context(), "web", "a", lock.Mark{Phase: lock.Rebooting}); !errors.Is(err, lock.ErrNotHeld) {
			t.Errorf("Mark = %v, want ErrNotHeld", err)
		}
	}
	if s, err := k.State(t.Context(), "web"); err != nil || len(s.Holders) != 1 || s.Holders[0].Host != "b" || len(s.Queue) != 0 {
		t.Errorf("holders %+v, queue %+v, %v, want b alone", s.Holders, s.Queue, err)
	}
}

// Another server knows of no marks: there Mark asks again, and says all that Request has said.
func TestMarkElsewhere(t *testing.T) {
	var got []message
	c, _ := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var m message
		if err := json.NewDecoder(r.Body).Decode(&m); err != nil {
			t.Error(err)
		}
		got = append(got, m)
	}))
	if _, err := c.Request(t.Context(), lock.Claim{Group: "web", Host: "a", BootID: "1", From: "1", To: "2", Zone: "r1", Class: "canary", Reason: "update"}); err != nil {
		t.Fatal(err)
	}
	if err := c.Mark(t.Context(), "web", "a", lock.Mark{Phase: lock.Rebooting, BootID: "1"}); err != nil {
		t.Fatal(err)
	}
	want := *got[0].More
	want.Phase = "rebooting"
	if got[1].Client != got[0].Client || *got[1].More != want {
		t.Errorf("Mark said %+v %+v, want %+v", got[1].Client, *got[1].More, want)
	}
}

// A client may only speak for whom it is permitted to.
func TestPermit(t *testing.T) {
	k := lock.On(lock.NewMemory(), lock.Options{})
	c, _ := serve(t, &Server{Semaphore: k, Permit: func(_ *http.Request, host string) error {
		if host != "a" {
			return errors.New("the certificate is that of \"a\"")
		}
		return nil
	}})
	if st, err := c.Request(t.Context(), lock.Claim{Group: "web", Host: "a"}); err != nil || !st.Granted {
		t.Errorf("%+v, %v", st, err)
	}
	if err := c.Release(t.Context(), "web", "b", lock.Verdict{Outcome: lock.Healthy}); !errors.Is(err, os.ErrPermission) {
		t.Errorf("in the name of another: %v, want a permission error", err)
	}
}

// The hosts of a signed group have keys, which a server speaks for none of: it lets nobody in, whether or not it believes the owner, and says why.
func TestSignedGroup(t *testing.T) {
	store := lock.NewMemory()
	owner, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	op := lock.On(store, lock.Options{Owner: owner})
	if err := op.Sign(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	for name, opt := range map[string]lock.Options{"without the owner's key": {}, "with it": {Owners: []crypto.PublicKey{owner.Public()}}} {
		c, _ := serve(t, &Server{Semaphore: lock.On(store, opt)})
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		st, err := c.Request(ctx, lock.Claim{Group: "web", Host: "a"})
		cancel()
		why := st.Blocked
		if err != nil {
			why = err.Error()
		}
		if st.Granted || !strings.Contains(why, "signed") && !strings.Contains(why, "key") {
			t.Errorf("%s: %+v, %v", name, st, err)
		}
	}
	if st, err := op.State(t.Context(), "web"); err != nil || len(st.Holders) > 0 {
		t.Errorf("%+v, %v", st, err)
	}
}

func TestServerRefuses(t *testing.T) {
	k := lock.On(lock.NewMemory(), lock.Options{})
	if _, err := k.Request(t.Context(), lock.Claim{Group: "web", Host: "a"}); err != nil {
		t.Fatal(err)
	}
	_, base := serve(t, &Server{Semaphore: k})
	const good = `{"client_params":{"id":"b","group":"web"}}`
	for _, tt := range []struct {
		name, method, path, header, body string
		status                           int
		kind                             string
	}{
		{"full", "POST", "/v1/pre-reboot", "true", good, 409, KindFull},
		{"release of nothing", "POST", "/v1/steady-state", "true", good, 200, ""},
		{"no header", "POST", "/v1/pre-reboot", "", good, 400, KindIdentity},
		{"GET", "GET", "/v1/pre-reboot", "true", "", 405, ""},
		{"elsewhere", "POST", "/v2/pre-reboot", "true", good, 404, ""},
		{"no JSON", "POST", "/v1/pre-reboot", "true", "id=b", 400, KindIdentity},
		{"empty id", "POST", "/v1/pre-reboot", "true", `{"client_params":{"id":"","group":"web"}}`, 400, KindIdentity},
		{"strange group", "POST", "/v1/pre-reboot", "true", `{"client_params":{"id":"b","group":"a/b"}}`, 400, KindIdentity},
		{"endless", "POST", "/v1/pre-reboot", "true", `{"client_params":{"id":"` + strings.Repeat("b", 1<<20) + `"}}`, 400, KindIdentity},
		{"a verdict that is none", "POST", "/v1/verdict", "true", good, 400, KindIdentity},
	} {
		t.Run(tt.name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), tt.method, base+tt.path, strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			if tt.header != "" {
				req.Header.Set("fleet-lock-protocol", tt.header)
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, _ := io.ReadAll(resp.Body)
			var r refusal
			if tt.kind != "" && (json.Unmarshal(body, &r) != nil || r.Value == "") {
				t.Errorf("body %s", body)
			}
			if resp.StatusCode != tt.status || r.Kind != tt.kind {
				t.Errorf("%d %s, want %d %s", resp.StatusCode, body, tt.status, tt.kind)
			}
			if tt.status == 409 && resp.Header.Get("Retry-After") == "" {
				t.Error("no Retry-After")
			}
		})
	}
}
