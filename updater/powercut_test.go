package updater

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/partition/powercut"
	"github.com/flipside-linux/flipside/reboot"
)

// savedStates are what the real core saves in the course of an update, by the step of package powercut at which it does.
func savedStates(t *testing.T) map[powercut.Step][]byte {
	t.Helper()
	now := time.Date(2026, 1, 5, 12, 0, 0, 0, time.UTC)
	saved := map[powercut.Step][]byte{}
	var c *Core
	start := func(from powercut.Step, f Facts) []Effect {
		c = &Core{Timing: DefaultTiming()}
		if err := json.Unmarshal(saved[from], &c.State); err != nil {
			t.Fatal(err)
		}
		return c.Step(now, Start{f})
	}
	keep := func(step powercut.Step, effects []Effect) {
		t.Helper()
		for _, e := range effects {
			if _, ok := e.(Save); ok {
				c.State.Schema = stateSchema
				data, err := json.Marshal(c.State)
				if err != nil {
					t.Fatal(err)
				}
				saved[step] = data
				return
			}
		}
		t.Fatalf("the core saves nothing at step %q", step)
	}
	good, old, spent := SlotFacts{2, 0, true}, SlotFacts{1, 0, true}, SlotFacts{3, 0, false}
	facts := func(boot int, running, other string, a, b SlotFacts) Facts {
		return Facts{BootID: fmt.Sprint("boot", boot), Running: running, Other: other, Version: map[string]string{"USR-A": "1.0.0", "USR-B": "2.0.0"}[running],
			Slots: map[string]SlotFacts{"USR-A": a, "USR-B": b}}
	}
	gates := func(stage Stage) GatesAnswered {
		return GatesAnswered{Stage: stage, Answers: []reboot.Answer{{Gate: "all", Verdict: reboot.Go}}}
	}
	saved[powercut.Idle] = []byte(`{}`)
	keep(powercut.Idle, start(powercut.Idle, facts(1, "USR-A", "USR-B", good, old)))
	c.Step(now, Answered{Offer: &omaha.Offer{Version: "2.0.0", Size: 1, SHA256: sha256.Sum256([]byte("2.0.0"))}})
	keep(powercut.Applying, c.Step(now, gates(BeforeDownload)))
	keep(powercut.Checkpoint, c.Step(now, Checkpointed{json.RawMessage(`{"operations":3}`)}))
	c.Step(now, Applied{})
	keep(powercut.Armed, c.Step(now, ArmedNow{}))
	keep(powercut.Rebooting, c.Step(now, gates(BeforeReboot)))
	keep(powercut.Trial, start(powercut.Rebooting, facts(2, "USR-B", "USR-A", good, spent)))
	c.Step(now, Judged{Good: true})
	keep(powercut.Confirmed, c.Step(now, Confirmed{}))
	keep(powercut.FellBack, start(powercut.Rebooting, facts(3, "USR-A", "USR-B", good, spent)))
	return saved
}

// TestExplainsPowerCuts: whatever a power cut leaves of disk and saved state, the next start reads the state, goes on from what the disk says, and status
// tells what is going on.
func TestExplainsPowerCuts(t *testing.T) {
	opt := powercut.Options{
		Sectors: []int{512}, Starts: []powercut.Start{powercut.Healthy}, Paths: []powercut.Path{powercut.Good, powercut.Failed},
		Boots: []powercut.FileSystem{powercut.Journal}, All: 3, Random: 3, Workers: 1,
	}
	if os.Getenv("FLIPSIDE_LONG") != "" {
		opt.Kill, opt.Random, opt.Sectors, opt.Boots = 3, 50, []int{512, 4096}, []powercut.FileSystem{powercut.Journal, powercut.FAT}
	}
	saved := savedStates(t)
	now := time.Date(2026, 1, 5, 12, 10, 0, 0, time.UTC)
	opt.Saved = func(s powercut.Step) []byte { return saved[s] }
	store := Store{Path: filepath.Join(t.TempDir(), "state.json")}
	states, told := map[string]State{}, map[string]int{}
	opt.Judge = func(left powercut.Left) error {
		st, ok := states[string(left.State)]
		if !ok {
			if err := os.WriteFile(store.Path, left.State, 0o600); err != nil {
				return err
			}
			var err error
			if st, err = store.Load(); err != nil {
				return err
			}
			states[string(left.State)] = st
		}
		if st.Update != nil {
			u := *st.Update // the core changes it
			st.Update = &u
		}
		f := Facts{BootID: "next", Running: left.Running, Version: "1.0.0", Other: "USR-B", Slots: map[string]SlotFacts{}}
		if f.Running == "USR-B" {
			f.Version, f.Other = "2.0.0", "USR-A"
		}
		for _, s := range left.Slots {
			f.Slots[s.Label] = SlotFacts{s.Priority, s.Tries, s.Successful}
		}
		before := st.Phase
		c := Core{State: st, Timing: DefaultTiming()}
		c.State.Failures = nil
		c.Step(now, Start{f})
		status := c.Status(now)
		here := fmt.Sprintf("state %s, runs from %s, other slot %+v: now %s, %q", before, f.Running, f.Slots[f.Other], status.Phase, status.Why)
		switch run := f.Slots[f.Running]; {
		case status.Why == "" || strings.Contains(status.Why, "forgotten"):
			return fmt.Errorf("it does not explain itself: %s", here)
		case !run.Successful && status.Phase != Trial:
			return fmt.Errorf("a slot on trial is not on trial: %s", here)
		case status.Phase == Armed && !f.Slots[f.Other].Bootable():
			return fmt.Errorf("it waits to boot what does not boot: %s", here)
		case run.Successful && status.Phase == Trial && f.Running == "USR-A":
			return fmt.Errorf("the old slot is on trial: %s", here)
		case status.Phase == Rebooting || status.Phase == Failing:
			return fmt.Errorf("it does what only an earlier boot can have meant to do: %s", here)
		}
		told[fmt.Sprintf("%s, state %s: %s", f.Running, before, status.Why)]++
		return nil
	}
	c, err := powercut.Enumerate(opt)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range c.Violations {
		t.Error(v)
	}
	for text, n := range told {
		t.Logf("%5d × %s", n, text)
	}
	t.Log(c)
	if len(told) < 8 {
		t.Errorf("only %d different situations", len(told))
	}
}
