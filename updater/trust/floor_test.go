package trust

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/flipside-linux/flipside/updater/trust/trusttest"
)

func newFloor(t *testing.T, mode Mode, device string) *Floor {
	t.Helper()
	if device == "" {
		device = filepath.Join(t.TempDir(), "no-tpm")
	}
	return &Floor{Path: filepath.Join(t.TempDir(), "trust.json"), Mode: mode, Device: device}
}

func take(t *testing.T, f *Floor, slot, version string, number int64) {
	t.Helper()
	if err := f.Propose(Pending{Number: number, Slot: slot, Version: version}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Confirm(context.Background(), slot, version); err != nil {
		t.Fatal(err)
	}
}

func wantLevel(t *testing.T, f *Floor, want int64, keeper string) {
	t.Helper()
	l, err := f.Level()
	if err != nil || l.Number != want || l.Keeper != keeper {
		t.Fatalf("%+v, %v; want %d kept by %s", l, err, want, keeper)
	}
}

func TestFloorInAFile(t *testing.T) {
	f := newFloor(t, Auto, "")
	wantLevel(t, f, 0, "file")
	if err := f.Propose(Pending{Number: 100, Slot: "USR-B", Version: "2"}); err != nil {
		t.Fatal(err)
	}
	wantLevel(t, f, 0, "file") // armed is not good
	for _, other := range [][2]string{{"USR-A", "2"}, {"USR-B", "1"}} {
		if rose, err := f.Confirm(context.Background(), other[0], other[1]); rose || err != nil {
			t.Fatalf("the floor rose for another boot: %v, %v", rose, err)
		}
	}
	if rose, err := f.Confirm(context.Background(), "USR-B", "2"); !rose || err != nil {
		t.Fatal(rose, err)
	}
	if rose, err := f.Confirm(context.Background(), "USR-B", "2"); rose || err != nil {
		t.Fatal("it rose twice", err)
	}
	wantLevel(t, f, 100, "file")
	take(t, f, "USR-A", "1", 50)
	wantLevel(t, f, 100, "file")
	f.Release = 150
	wantLevel(t, f, 150, "file")
	f.Release = 0
	if err := f.Reset(nil, 70); err != nil {
		t.Fatal(err)
	}
	wantLevel(t, f, 70, "file")
	if err := os.WriteFile(f.Path, []byte("{rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := f.Level(); err != nil || l.Number != 0 || l.Warning == "" {
		t.Fatalf("%+v, %v", l, err)
	}
	if err := f.Propose(Pending{Number: MaxNumber + 1}); !errors.Is(err, ErrNumber) {
		t.Error(err)
	}
}

func TestFloorInTheTPM(t *testing.T) {
	e := trusttest.Start(t)
	f := newFloor(t, Auto, e.Socket)
	take(t, f, "USR-A", "1", 10*day+5)
	wantLevel(t, f, 10*day+5, "file") // there is a TPM, and nobody has provisioned it
	if err := f.Provision(context.Background(), nil, 0); err != nil {
		t.Fatal(err)
	}
	take(t, f, "USR-B", "2", 20*day+7)
	wantLevel(t, f, 20*day+7, "tpm")

	backup, err := os.ReadFile(f.Path)
	if err != nil {
		t.Fatal(err)
	}
	take(t, f, "USR-A", "3", 30*day+9)
	t.Run("the file is deleted", func(t *testing.T) {
		if err := os.Remove(f.Path); err != nil {
			t.Fatal(err)
		}
		wantLevel(t, f, 30*day+5, "tpm") // to the day of where it began
	})
	t.Run("the disk is restored from a backup", func(t *testing.T) {
		if err := os.WriteFile(f.Path, backup, 0o600); err != nil {
			t.Fatal(err)
		}
		wantLevel(t, f, 30*day+5, "tpm")
	})
	t.Run("the TPM has no power", func(t *testing.T) {
		e.Kill()
		if _, err := f.Level(); !errors.Is(err, ErrTPM) {
			t.Fatalf("the floor is known without the TPM that keeps it: %v", err)
		}
		if err := f.Propose(Pending{Number: 40 * day, Slot: "USR-B", Version: "4"}); err != nil {
			t.Fatal(err)
		}
		if rose, err := f.Confirm(context.Background(), "USR-B", "4"); !rose || !errors.Is(err, ErrTPM) {
			t.Fatal(rose, err)
		}
		e.Power()
		if _, err := f.Confirm(context.Background(), "USR-B", "4"); err != nil { // at the next start
			t.Fatal(err)
		}
		if err := os.Remove(f.Path); err != nil {
			t.Fatal(err)
		}
		wantLevel(t, f, 39*day+5, "tpm")
	})
	t.Run("the TPM is another one", func(t *testing.T) {
		e.Replace()
		if _, err := f.Level(); !errors.Is(err, ErrLost) {
			t.Fatalf("the floor is known from a TPM that never had it: %v", err)
		}
		if err := f.Reset(nil, 50*day); err != nil {
			t.Fatal(err)
		}
		wantLevel(t, f, 50*day, "tpm")
	})
	t.Run("it is reset with a wrong password", func(t *testing.T) {
		setOwner(t, openTPM(t, e), nil, []byte("secret"))
		if err := f.Reset([]byte("wrong"), 0); !errors.Is(err, ErrOwnerAuth) {
			t.Fatal(err)
		}
		wantLevel(t, f, 50*day, "tpm")
		if err := f.Reset([]byte("secret"), 5*day); err != nil {
			t.Fatal(err)
		}
		wantLevel(t, f, 5*day, "tpm")
	})
}

func TestFloorThatMustBeInATPM(t *testing.T) {
	f := newFloor(t, WithTPM, "")
	if _, err := f.Level(); !errors.Is(err, ErrNoTPM) {
		t.Errorf("without a TPM: %v", err)
	}
	f.Device = trusttest.Start(t).Socket
	if _, err := f.Level(); !errors.Is(err, ErrNotPrepared) {
		t.Errorf("with an empty TPM: %v", err)
	}
	if err := f.Provision(context.Background(), nil, 0); err != nil {
		t.Fatal(err)
	}
	wantLevel(t, f, 0, "tpm")
}

// A host that was provisioned with nothing, and one whose release is years ahead of its floor: the file knows at once, the TPM in steps.
func TestFloorCatchesUp(t *testing.T) {
	e := trusttest.Start(t)
	f := newFloor(t, WithTPM, e.Socket)
	if err := f.Provision(t.Context(), nil, 10*day); err != nil {
		t.Fatal(err)
	}
	wantLevel(t, f, 10*day, "tpm")
	const number = (10 + budget + 30) * day
	if err := f.Propose(Pending{Number: number, Slot: "USR-B", Version: "2"}); err != nil {
		t.Fatal(err)
	}
	if rose, err := f.Confirm(t.Context(), "USR-B", "2"); !rose || !errors.Is(err, ErrBehind) {
		t.Fatal(rose, err)
	}
	wantLevel(t, f, number, "tpm")
	if rose, err := f.Confirm(t.Context(), "USR-B", "2"); rose || err != nil {
		t.Fatal(rose, err)
	}
	if l, err := f.Level(); err != nil || l.TPM != number {
		t.Fatal(l, err)
	}
	// What a person asks for is done to the end.
	if err := f.Provision(t.Context(), nil, number+2*budget*day); err != nil {
		t.Fatal(err)
	}
	if l, err := f.Level(); err != nil || l.TPM != number+2*budget*day {
		t.Fatal(l, err)
	}
	if err := f.Provision(t.Context(), nil, -1); !errors.Is(err, ErrNumber) {
		t.Error(err)
	}
}

// Power lost between any two commands of a reset must not leave a host that takes everything.
func TestResetIsInterrupted(t *testing.T) {
	e := trusttest.Start(t)
	f := newFloor(t, Auto, e.Socket)
	take(t, f, "USR-A", "1", 10*day)
	if err := f.Provision(context.Background(), nil, 0); err != nil {
		t.Fatal(err)
	}
	tpm := openTPM(t, e)
	if err := tpm.Remove(nil); err != nil { // as far as a reset got
		t.Fatal(err)
	}
	if _, err := f.Level(); !errors.Is(err, ErrLost) {
		t.Fatalf("half a reset: %v", err)
	}
	if err := f.Reset(nil, 3*day); err != nil {
		t.Fatal(err)
	}
	wantLevel(t, f, 3*day, "tpm")
}

func TestReleaseNumber(t *testing.T) {
	for _, tt := range []struct {
		text string
		want int64
		ok   bool
	}{
		{"VERSION_ID=1\n", 0, true},
		{"VERSION_ID=1\nFLIPSIDE_TIMESTAMP=1717200000\n", 1717200000, true},
		{"FLIPSIDE_TIMESTAMP=\"7\"", 7, true},
		{"FLIPSIDE_TIMESTAMP=1717200000000\n", 0, false},
		{"FLIPSIDE_TIMESTAMP=-1\n", 0, false},
		{"FLIPSIDE_TIMESTAMP=x\n", 0, false},
	} {
		got, err := ReleaseNumber([]byte(tt.text))
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("%q: %d, %v", tt.text, got, err)
		}
	}
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"schema":"flipside.trust/v1","floor":1717200000,"tpm":true,"pending":{"number":1,"slot":"USR-B","version":"2"}}`))
	f.Add([]byte(`{"schema":"flipside.trust/v1","floor":-1}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decodeRecord(data)
		if err == nil && (r.Floor < 0 || r.Floor > MaxNumber) {
			t.Fatalf("%+v", r)
		}
	})
}

// A file that is not root's says nothing to root: in a directory that others may write to, anybody may have made it. Who only looks writes nothing.
func TestFloorOfSomebodyElse(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a file away")
	}
	f := newFloor(t, Auto, "")
	take(t, f, "USR-A", "1", 100)
	wantLevel(t, f, 100, "file")
	if err := errors.Join(os.Chown(f.Path, 1, 1), os.Chmod(filepath.Dir(f.Path), 0o770|fs.ModeSticky)); err != nil {
		t.Fatal(err)
	}
	wantLevel(t, f, 0, "file")
	if l, err := f.Level(); err != nil || l.Warning == "" {
		t.Errorf("%+v, %v", l, err)
	}
	take(t, f, "USR-A", "1", 200)
	wantLevel(t, f, 200, "file")
}
