package trust

import (
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/flipside-linux/flipside/updater/trust/trusttest"
)

const day = 24 * 60 * 60

func openTPM(t *testing.T, e *trusttest.Emulator) *TPM {
	t.Helper()
	tpm, err := OpenTPM(e.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tpm.Close() })
	return tpm
}

func wantFloor(t *testing.T, tpm *TPM, want int64) {
	t.Helper()
	got, err := tpm.Floor()
	if err != nil || got != want {
		t.Fatalf("the floor is %d, %v; want %d", got, err, want)
	}
}

func TestCounterOnlyRises(t *testing.T) {
	e := trusttest.Start(t)
	tpm := openTPM(t, e)
	if _, err := tpm.Floor(); !errors.Is(err, ErrNotPrepared) {
		t.Fatalf("an empty TPM has a floor: %v", err)
	}
	if err := tpm.Raise(context.Background(), 1); !errors.Is(err, ErrNotPrepared) {
		t.Fatalf("raising without a floor: %v", err)
	}
	const from = 1717200000
	if err := tpm.Provision(nil, from); err != nil {
		t.Fatal(err)
	}
	wantFloor(t, tpm, from)
	for _, tt := range []struct{ to, want int64 }{
		{from + day - 1, from}, {from + 3*day + 5, from + 3*day}, {from, from + 3*day}, {0, from + 3*day}, {from + 30*day, from + 30*day},
	} {
		if err := tpm.Raise(context.Background(), tt.to); err != nil {
			t.Fatal(err)
		}
		wantFloor(t, tpm, tt.want)
	}
	if err := tpm.Raise(context.Background(), from*1000); !errors.Is(err, ErrNumber) {
		t.Errorf("raising to milliseconds: %v", err)
	}
	if err := tpm.Raise(context.Background(), -1); !errors.Is(err, ErrNumber) {
		t.Errorf("raising to -1: %v", err)
	}
	if err := tpm.Provision(nil, 0); err != nil {
		t.Fatal(err)
	}
	wantFloor(t, tpm, from+30*day)
	e.Kill()
	if _, err := tpm.Floor(); !errors.Is(err, ErrTPM) {
		t.Errorf("a TPM without power answers: %v", err)
	}
	e.Power()
	wantFloor(t, tpm, from+30*day)

	// Nothing writes the counter or the base again.
	for _, h := range []tpm2.TPMHandle{nvCounter, nvBase} {
		pub, err := tpm2.NVReadPublic{NVIndex: h}.Execute(tpm.t)
		if err != nil {
			t.Fatal(err)
		}
		data := make([]byte, 8)
		if h == nvBase {
			data = base{counter: 1}.encode()
		}
		if _, err := (tpm2.NVWrite{AuthHandle: plain(h, pub.NVName), NVIndex: tpm2.NamedHandle{Handle: h, Name: pub.NVName}, Data: tpm2.TPM2BMaxNVBuffer{Buffer: data}}).Execute(tpm.t); err == nil {
			t.Errorf("NV index %#x can be overwritten", uint32(h))
		}
	}
}

// Whoever lacks the owner's password cannot lower the floor; who has it can.
func TestOwnerPassword(t *testing.T) {
	e := trusttest.Start(t)
	tpm := openTPM(t, e)
	setOwner(t, tpm, nil, []byte("secret"))
	if err := tpm.Provision([]byte("wrong"), 5*day); !errors.Is(err, ErrOwnerAuth) {
		t.Fatalf("provisioning with a wrong password: %v", err)
	}
	if err := tpm.Provision([]byte("secret"), 5*day); err != nil {
		t.Fatal(err)
	}
	if err := tpm.Raise(context.Background(), 8*day); err != nil { // takes no password
		t.Fatal(err)
	}
	for _, wrong := range []string{"", "wrong"} {
		if err := tpm.Remove([]byte(wrong)); !errors.Is(err, ErrOwnerAuth) {
			t.Fatalf("removing with password %q: %v", wrong, err)
		}
	}
	wantFloor(t, tpm, 8*day)
	if err := tpm.Remove([]byte("secret")); err != nil {
		t.Fatal(err)
	}
	if err := tpm.Provision([]byte("secret"), 2*day); err != nil {
		t.Fatal(err)
	}
	wantFloor(t, tpm, 2*day)
}

func setOwner(t *testing.T, tpm *TPM, old, password []byte) {
	t.Helper()
	if _, err := (tpm2.HierarchyChangeAuth{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(old)}, NewAuth: tpm2.TPM2BAuth{Buffer: password}}).Execute(tpm.t); err != nil {
		t.Fatal(err)
	}
}

// commands counts how often a TPM was asked for something.
type commands struct {
	*TPM
	counts map[tpm2.TPMCC]int
}

func (c *commands) Send(in []byte) ([]byte, error) {
	c.counts[tpm2.TPMCC(binary.BigEndian.Uint32(in[6:]))]++
	return c.TPM.t.Send(in)
}

func (c *commands) Close() error { return nil }

// A floor that was provisioned before any number was known begins where the first release with a number is, without counting up to it.
func TestFloorBeginsWithTheFirstRelease(t *testing.T) {
	e := trusttest.Start(t)
	c := &commands{openTPM(t, e), map[tpm2.TPMCC]int{}}
	tpm := NewTPM(c)
	if err := tpm.Provision(nil, 0); err != nil {
		t.Fatal(err)
	}
	wantFloor(t, tpm, 0)
	if err := tpm.Raise(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	wantFloor(t, tpm, 0)
	const first = 1717200000
	clear(c.counts)
	if err := tpm.Raise(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if n, w := c.counts[tpm2.TPMCCNVIncrement], c.counts[tpm2.TPMCCNVWrite]+c.counts[tpm2.TPMCCNVWriteLock]; n != 0 || w != 2 {
		t.Errorf("%d increments and %d writes for the first release", n, w)
	}
	wantFloor(t, tpm, first)
	for _, lower := range []int64{1, first - day} {
		if err := errors.Join(tpm.Raise(t.Context(), lower), tpm.Provision(nil, lower)); err != nil {
			t.Fatal(err)
		}
		wantFloor(t, tpm, first)
	}
	if err := tpm.Raise(t.Context(), first+2*day); err != nil {
		t.Fatal(err)
	}
	wantFloor(t, tpm, first+2*day)
}

// A long way is gone in bounded steps, each of which is kept, and a context ends it.
func TestRaiseIsBounded(t *testing.T) {
	e := trusttest.Start(t)
	c := &commands{openTPM(t, e), map[tpm2.TPMCC]int{}}
	tpm := NewTPM(c)
	if err := tpm.Provision(nil, day); err != nil {
		t.Fatal(err)
	}
	clear(c.counts)
	if err := tpm.Raise(t.Context(), (budget+51)*day); !errors.Is(err, ErrBehind) || !strings.Contains(err.Error(), "50 days to go") {
		t.Fatal(err)
	}
	if n := c.counts[tpm2.TPMCCNVIncrement]; n != budget {
		t.Errorf("%d increments, the budget is %d", n, budget)
	}
	wantFloor(t, tpm, (budget+1)*day)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := tpm.Raise(ended, (budget+51)*day); !errors.Is(err, ErrBehind) || !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	wantFloor(t, tpm, (budget+1)*day)
	if err := tpm.Raise(t.Context(), (budget+51)*day); err != nil {
		t.Fatal(err)
	}
	wantFloor(t, tpm, (budget+51)*day)
}

// cutTPM is a TPM that loses its power before the nth command, and after it without the answer having arrived.
type cutTPM struct {
	*TPM
	e      *trusttest.Emulator
	left   int
	after  bool
	failed bool
}

func (c *cutTPM) Send(in []byte) ([]byte, error) {
	if c.failed {
		return nil, errors.New("no power")
	}
	c.left--
	if c.left > 0 {
		return c.TPM.t.Send(in)
	}
	c.failed = true
	if c.after {
		c.TPM.t.Send(in)
	}
	c.e.Kill()
	return nil, errors.New("no power")
}

func (c *cutTPM) Close() error { return nil }

// Power lost before or after any command: the floor is never below what it was, and doing the same again brings it where it should be.
func TestPowerLoss(t *testing.T) {
	for _, tt := range []struct {
		name    string
		prepare bool
		do      func(*TPM) error
		least   int64
		want    int64
	}{
		{"provisioning", false, func(t *TPM) error { return t.Provision(nil, 7*day) }, 0, 7 * day},
		{"raising", true, func(t *TPM) error { return t.Raise(context.Background(), 6*day) }, 3 * day, 6 * day},
		{"making it anew", true, func(t *TPM) error {
			if err := t.Remove(nil); err != nil {
				return err
			}
			return t.Provision(nil, 5*day)
		}, 3 * day, 5 * day},
		{"beginning", false, func(t *TPM) error {
			if err := t.Provision(nil, 0); err != nil {
				return err
			}
			return t.Raise(context.Background(), 9*day)
		}, 0, 9 * day},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cuts := 0
			for n := 1; ; n++ {
				done := false
				for _, after := range []bool{false, true} {
					e := trusttest.Start(t)
					tpm := openTPM(t, e)
					if tt.prepare {
						if err := tpm.Provision(nil, 3*day); err != nil {
							t.Fatal(err)
						}
					}
					c := &cutTPM{TPM: tpm, e: e, left: n, after: after}
					err := tt.do(NewTPM(c))
					if !c.failed {
						if err != nil {
							t.Fatal(err)
						}
						done = true
						break
					}
					cuts++
					e.Power()
					if got, err := tpm.Floor(); err == nil && got < tt.least {
						t.Fatalf("cut at command %d (after: %v): the floor is %d", n, after, got)
					} else if err != nil && !errors.Is(err, ErrNotPrepared) {
						t.Fatalf("cut at command %d (after: %v): %v", n, after, err)
					}
					if err := tt.do(tpm); err != nil {
						t.Fatalf("cut at command %d (after: %v), and again: %v", n, after, err)
					}
					if got, err := tpm.Floor(); err != nil || got != tt.want {
						t.Fatalf("cut at command %d (after: %v), and again: the floor is %d, %v; want %d", n, after, got, err, tt.want)
					}
					e.Kill()
				}
				if done {
					break
				}
			}
			if cuts < 10 {
				t.Errorf("only %d cuts", cuts)
			}
			t.Logf("%d cuts", cuts)
		})
	}
}

func TestFullTPM(t *testing.T) {
	tpm := openTPM(t, trusttest.Start(t))
	n := 0
	for ; n < 1000; n++ { // until nothing more fits
		h := tpm2.TPMHandle(0x01800000 + n)
		if err := tpm.define(h, tpm2.TPMANV{NT: tpm2.TPMNTOrdinary, OwnerRead: true, OwnerWrite: true}, 2048, nil); err != nil {
			t.Log(n, err)
			break
		}
	}
	for ; n < 2000; n++ {
		if err := tpm.define(tpm2.TPMHandle(0x01800000+n), tpm2.TPMANV{NT: tpm2.TPMNTOrdinary, OwnerRead: true, OwnerWrite: true}, 8, nil); err != nil {
			break
		}
	}
	if err := tpm.Provision(nil, 0); !errors.Is(err, ErrFull) {
		t.Fatalf("provisioning a full TPM: %v", err)
	}
	if _, err := tpm.Floor(); !errors.Is(err, ErrNotPrepared) {
		t.Errorf("the floor of a full TPM: %v", err)
	}
}

// lockOut types wrong passwords until the TPM does not listen any more.
func lockOut(t *testing.T, tpm *TPM) {
	t.Helper()
	const h = tpm2.TPMHandle(0x01800001)
	if _, err := (tpm2.NVDefineSpace{
		AuthHandle: owner(nil), Auth: tpm2.TPM2BAuth{Buffer: []byte("right")},
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{NVIndex: h, NameAlg: tpm2.TPMAlgSHA256, Attributes: tpm2.TPMANV{NT: tpm2.TPMNTOrdinary, AuthRead: true, AuthWrite: true}, DataSize: 8}),
	}).Execute(tpm.t); err != nil {
		t.Fatal(err)
	}
	pub, err := tpm2.NVReadPublic{NVIndex: h}.Execute(tpm.t)
	if err != nil {
		t.Fatal(err)
	}
	locked := false
	for range 100 {
		auth := tpm2.AuthHandle{Handle: h, Name: pub.NVName, Auth: tpm2.PasswordAuth([]byte("wrong"))}
		_, err := tpm2.NVWrite{AuthHandle: auth, NVIndex: tpm2.NamedHandle{Handle: h, Name: pub.NVName}, Data: tpm2.TPM2BMaxNVBuffer{Buffer: make([]byte, 8)}}.Execute(tpm.t)
		if locked = errors.Is(explain("writing", err), ErrLocked); locked {
			break
		}
	}
	if !locked {
		t.Fatal("the TPM does not lock out")
	}
}

// Wrong passwords elsewhere lock a TPM; the floor needs none and goes on.
func TestLockedOutTPM(t *testing.T) {
	tpm := openTPM(t, trusttest.Start(t))
	if err := tpm.Provision(nil, 0); err != nil {
		t.Fatal(err)
	}
	lockOut(t, tpm)
	if err := tpm.Raise(context.Background(), 4*day); err != nil {
		t.Fatal(err)
	}
	wantFloor(t, tpm, 4*day)
}

func TestForeignIndex(t *testing.T) {
	tpm := openTPM(t, trusttest.Start(t))
	if err := tpm.define(nvCounter, tpm2.TPMANV{NT: tpm2.TPMNTOrdinary, OwnerRead: true, OwnerWrite: true}, 8, nil); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{"provision": tpm.Provision(nil, 0), "raise": tpm.Raise(context.Background(), 1), "remove": tpm.Remove(nil)} {
		if !errors.Is(err, ErrForeign) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A clear by the platform deletes what the owner had: the floor is not there, which is not the same as a floor of 0.
func TestClear(t *testing.T) {
	e := trusttest.Start(t)
	tpm := openTPM(t, e)
	if err := tpm.Provision(nil, 9*day); err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}).Execute(tpm.t); err != nil {
		t.Fatal(err)
	}
	if _, err := tpm.Floor(); !errors.Is(err, ErrNotPrepared) {
		t.Errorf("after a clear: %v", err)
	}
}

func FuzzBase(f *testing.F) {
	f.Add(base{counter: 7, floor: 1717200000}.encode(), uint64(9))
	f.Add([]byte("FLIPFLR1"), uint64(0))
	f.Add(base{counter: 1 << 63, floor: MaxNumber}.encode(), uint64(1<<64-1))
	f.Fuzz(func(t *testing.T, data []byte, counter uint64) {
		b, err := decodeBase(data)
		if err != nil {
			return
		}
		if n, err := b.number(counter); err == nil && (n < b.floor || counter < b.counter) {
			t.Fatalf("counter %d of %+v is %d", counter, b, n)
		}
		if string(b.encode()) != string(data) {
			t.Fatal("it does not encode to itself")
		}
	})
}
