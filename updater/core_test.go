package updater

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flipside-linux/flipside/omaha"
	"github.com/flipside-linux/flipside/reboot"
)

var rewrite = flag.Bool("rewrite", false, "rewrite the expected output of the transcripts; commit only what you understand")

// TestTranscripts runs the stories under testdata. A block is a command, a line of dashes, and what the core did:
//
//	at +7m: wake
//	----
//	effects, one per line
//	= phase, and the one-line why
//
// Commands: start k=v… (facts: boot, run, other, version, and one priority/tries/successful per slot), restart k=v… (the process or the machine
// died: a new core with only what was saved), wake, check, offer VERSION, none REASON, wedged, check-fails ERROR, gates [go | wait WHY | halted WHY],
// gates-changed, checkpoint N, applied, apply-fails [transient] ERROR, armed, cancel, rollback, reboot, reboot-now, reboot-fails ERROR, healthy, unhealthy WHY, confirmed,
// delivered N, undelivered, verdict-taken, verdict-fails; delta VERSION (an offer), misfits (the apply of one fails, because the old image is another one).
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			r := newRun()
			var out strings.Builder
			for _, block := range strings.Split(strings.TrimSpace(string(data)), "\n\n") {
				var comment []string
				lines := strings.Split(block, "\n")
				for len(lines) > 0 && strings.HasPrefix(lines[0], "#") {
					comment, lines = append(comment, lines[0]), lines[1:]
				}
				for _, c := range comment {
					fmt.Fprintln(&out, c)
				}
				if len(lines) > 0 {
					fmt.Fprintf(&out, "%s\n----\n%s", lines[0], r.command(t, lines[0]))
				}
				fmt.Fprintln(&out)
			}
			got := strings.TrimSpace(out.String()) + "\n"
			if *rewrite {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != string(data) {
				t.Errorf("the story went differently:\n%s\nwant:\n%s", got, data)
			}
		})
	}
}

type transcript struct {
	core  *Core
	saved State
	asked Stage // by the last AskGates
	start time.Time
	now   time.Time
}

func newRun() *transcript {
	start := time.Date(2026, 1, 5, 12, 0, 0, 0, time.UTC)
	return &transcript{core: &Core{Timing: DefaultTiming()}, start: start, now: start}
}

func (r *transcript) command(t *testing.T, line string) string {
	t.Helper()
	at, cmd, ok := strings.Cut(line, ": ")
	if !ok {
		t.Fatalf("%q has no time", line)
	}
	d, err := time.ParseDuration(strings.TrimPrefix(at, "at +"))
	if err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	r.now = r.start.Add(d)
	verb, arg, _ := strings.Cut(cmd, " ")
	var ev Event
	switch verb {
	case "start":
		ev = Start{facts(t, arg)}
	case "restart":
		r.core = &Core{State: r.saved, Timing: DefaultTiming()}
		ev = Start{facts(t, arg)}
	case "wake":
		if next := r.core.Next(); next.IsZero() || next.After(r.now) {
			t.Fatalf("%q: the core did not ask to be woken before %v", line, next)
		}
		ev = Wake{}
	case "check":
		ev = CheckNow{By: "a person"}
	case "offer":
		ev = Answered{Offer: &omaha.Offer{Version: arg, Size: 1 << 20, SHA256: sha256.Sum256([]byte(arg)), URLs: []string{"http://updates.example/" + arg}}}
	case "delta":
		ev = Answered{Offer: &omaha.Offer{Version: arg, Size: 1 << 10, Delta: true, SHA256: sha256.Sum256([]byte("delta to " + arg)), URLs: []string{"http://updates.example/" + arg}}}
	case "none":
		ev = Answered{Reason: arg}
	case "wedged":
		ev = Answered{Reason: "the server believes that an update is under way", Wedged: true}
	case "check-fails":
		ev = Answered{Err: errors.New(arg)}
	case "gates":
		what, why, _ := strings.Cut(arg, " ")
		ga := GatesAnswered{Stage: r.asked}
		switch what {
		case "go":
			ga.Answers = []reboot.Answer{{Gate: "strategy", Verdict: reboot.Go}}
		case "wait":
			ga.Answers = []reboot.Answer{{Gate: "window", Verdict: reboot.Wait, Why: why}}
		case "halted":
			ga.Answers = []reboot.Answer{{Gate: "semaphore", Verdict: reboot.Wait, Why: "halted: " + why}}
			ga.Halted = why
		default:
			t.Fatalf("%q: unknown answer", line)
		}
		ev = ga
	case "gates-changed":
		ev = GatesChanged{}
	case "checkpoint":
		ev = Checkpointed{json.RawMessage(arg)}
	case "cancel", "rollback", "reboot", "reboot-now":
		ev = map[string]Event{"cancel": Cancelled{"a person"}, "rollback": WentBack{By: "a person"}, "reboot": Hurried{By: "a person"}, "reboot-now": Hurried{By: "a person", Waive: true}}[verb]
		if err := r.core.Refuses(ev); err != nil {
			return fmt.Sprintf("refused: %v\n", err)
		}
	case "applied":
		ev = Applied{}
	case "apply-fails":
		why, transient := strings.CutPrefix(arg, "transient ")
		ev = ApplyFailed{Err: errors.New(why), Code: 10, Transient: transient}
	case "misfits":
		ev = ApplyFailed{Err: errors.New("the old image is another one"), Code: 20}
	case "armed":
		ev = ArmedNow{}
	case "reboot-fails":
		ev = RebootFailed{errors.New(arg)}
	case "healthy":
		ev = Judged{Good: true}
	case "unhealthy":
		ev = Judged{Reason: arg}
	case "confirmed":
		ev = Confirmed{}
	case "delivered":
		ev = Delivered{N: len(r.core.State.Reports)}
	case "undelivered":
		ev = Delivered{Err: errors.New("connection refused")}
	case "verdict-taken":
		ev = VerdictTaken{}
	case "verdict-fails":
		ev = VerdictTaken{errors.New("etcd is unreachable")}
	default:
		t.Fatalf("%q: unknown command", line)
	}
	var out strings.Builder
	for _, e := range r.core.Step(r.now, ev) {
		if _, ok := e.(Save); ok {
			// Through JSON, as the file would: what is not saved must not survive a restart.
			data, err := json.Marshal(r.core.State)
			if err != nil {
				t.Fatal(err)
			}
			r.saved = State{}
			if err := json.Unmarshal(data, &r.saved); err != nil {
				t.Fatal(err)
			}
		}
		if g, ok := e.(AskGates); ok {
			r.asked = g.Stage
		}
		fmt.Fprintln(&out, effectText(r.core, e))
	}
	st := r.core.Status(r.now)
	next := "an event"
	if n := r.core.Next(); !n.IsZero() {
		next = "+" + n.Sub(r.start).String()
	}
	fmt.Fprintf(&out, "= %s, waits for %s: %s\n", st.Phase, next, st.Why)
	if err := wakesInVain(r.core); err != nil {
		t.Errorf("after %q: %v", line, err)
	}
	return out.String()
}

// wakesInVain tells whether a core that is woken when it asks for that does nothing and wants to be woken at once again, which would be a busy loop.
func wakesInVain(c *Core) error {
	next := c.Next()
	if next.IsZero() {
		return nil
	}
	twin := *c
	data, err := json.Marshal(c.State)
	if err != nil {
		return err
	}
	twin.State = State{}
	if err := json.Unmarshal(data, &twin.State); err != nil {
		return err
	}
	if effects := twin.Step(next, Wake{}); len(effects) > 0 {
		return nil
	}
	if again := twin.Next(); !again.IsZero() && !again.After(next) {
		return fmt.Errorf("phase %s: a wake at %v does nothing, and the next is due at %v", c.State.Phase, next, again)
	}
	return nil
}

// A server that goes on saying that this host is mid-update is asked less and less often, and never earlier than it wants.
func TestWedgedBacksOff(t *testing.T) {
	now := time.Date(2026, 12, 1, 4, 0, 0, 0, time.UTC)
	c := &Core{Timing: DefaultTiming()}
	c.Step(now, Start{facts(t, "boot=b1 run=USR-A other=USR-B version=1.0.0 USR-A=1/0/1 USR-B=0/0/0")})
	c.Step(now, VerdictTaken{})
	ask := func(retry time.Duration) time.Duration {
		now = c.NextCheck()
		c.Step(now, Wake{})
		c.Step(now, Answered{Reason: "an update is under way", Wedged: true, Retry: retry})
		return c.NextCheck().Sub(now)
	}
	last := time.Duration(0)
	for range 4 {
		wait := ask(0)
		if wait <= last || wait > c.Timing.Interval {
			t.Errorf("the next check is in %v, after one in %v", wait, last)
		}
		last = wait
	}
	if wait := ask(6 * time.Hour); wait != 6*time.Hour {
		t.Errorf("the next check is in %v, and the server wants 6h", wait)
	}
	now = c.NextCheck()
	c.Step(now, Wake{})
	c.Step(now, Answered{Reason: "up to date"})
	if wait := ask(0); wait != c.Timing.MinRetry {
		t.Errorf("after a sound answer the next check is in %v, want %v", wait, c.Timing.MinRetry)
	}
}

func effectText(c *Core, e Effect) string {
	switch e := e.(type) {
	case Note:
		if e.Warn {
			return "warn: " + e.Text
		}
		return "note: " + e.Text
	case AskServer:
		s := "ask the server"
		if e.OnDemand {
			s += ", on demand"
		}
		if e.Unwedge {
			s += ", and clear its idea of us"
		}
		if e.Whole {
			s += ", for whole releases"
		}
		return s
	case AskGates:
		s := fmt.Sprintf("ask the %s gates about %s", e.Stage, e.Offer.Version)
		if e.Waive {
			s += ", and pass over the host's own"
		}
		return s
	case Apply:
		return fmt.Sprintf("apply %s to %s from checkpoint %s", c.State.Update.Offer.Version, c.State.Update.ToSlot, c.State.Update.Checkpoint)
	case Deliver:
		var rs []string
		for _, r := range c.State.Reports {
			s := fmt.Sprintf("%d/%d", r.Type, r.Result)
			if r.ErrorCode != 0 {
				s += fmt.Sprintf(" code %d", r.ErrorCode)
			}
			if r.PreviousVersion != "" {
				s += " previous " + r.PreviousVersion
			}
			rs = append(rs, s)
		}
		return "report " + strings.Join(rs, ", ")
	case GiveVerdict:
		v := c.State.Verdict
		if v.Healthy {
			return fmt.Sprintf("verdict: %s healthy", v.Version)
		}
		if v.Cancelled {
			return fmt.Sprintf("verdict: %s cancelled, %s", v.Version, v.Reason)
		}
		return fmt.Sprintf("verdict: %s failed, %s", v.Version, v.Reason)
	case Reboot:
		return "reboot: " + e.Reason
	case LeaveQueue:
		return "leave the queue: " + e.Reason
	case Disarm:
		return "disarm " + e.Slot
	case Stay:
		if e.Booted {
			return "stay, and keep " + e.Slot + " unless it was tried"
		}
		return "stay, and keep " + e.Slot
	}
	return strings.ToLower(strings.TrimPrefix(fmt.Sprintf("%T", e), "updater."))
}

func facts(t *testing.T, arg string) Facts {
	t.Helper()
	f := Facts{Slots: map[string]SlotFacts{}}
	for _, kv := range strings.Fields(arg) {
		k, v, _ := strings.Cut(kv, "=")
		switch k {
		case "boot":
			f.BootID = v
		case "run":
			f.Running = v
		case "other":
			f.Other = v
		case "version":
			f.Version = v
		default:
			var s SlotFacts
			var succ int
			if _, err := fmt.Sscanf(v, "%d/%d/%d", &s.Priority, &s.Tries, &succ); err != nil {
				t.Fatalf("fact %q: %v", kv, err)
			}
			s.Successful = succ == 1
			f.Slots[k] = s
		}
	}
	return f
}
