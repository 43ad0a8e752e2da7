package omaha

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestFailures(t *testing.T) {
	week := Backoff{time.Hour, 7 * 24 * time.Hour}
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	var f Failures
	for i, want := range []time.Duration{1, 2, 4, 8, 16, 32, 64, 128, 168, 168} {
		f = f.With("1.1.0", now, "did not come\nup", week)
		if got := f.Remaining("1.1.0", now); got != want*time.Hour {
			t.Errorf("failure %d: %s, want %s", i+1, got, want*time.Hour)
		}
	}
	if got := f.Remaining("1.2.0", now); got != 0 {
		t.Errorf("another version waits %s", got)
	}
	if got := f.Remaining("1.1.0", now.Add(200*time.Hour)); got != 0 {
		t.Errorf("after the wait: %s", got)
	}
	if got := f.Remaining("1.1.0", now.Add(-10000*time.Hour)); got != 168*time.Hour {
		t.Errorf("with a clock that was set back: %s", got)
	}
	data, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	var back Failures
	if err := json.Unmarshal(data, &back); err != nil || !cmp.Equal(f, back) {
		t.Errorf("%s reads back as %+v, %v", data, back, err)
	}
	if e := f.Entries["1.1.0"]; e.Reason != "did not come\ufffdup" {
		t.Errorf("reason %q", e.Reason)
	}
	if g := f.Without("1.1.0"); g.Remaining("1.1.0", now) != 0 || f.Remaining("1.1.0", now) == 0 {
		t.Error("Without changed the wrong value")
	}
	for i := range 200 {
		f = f.With(fmt.Sprint(i), now.Add(time.Duration(i)*time.Minute), "x", week)
	}
	if len(f.Entries) != maxFailures || f.Remaining("199", now) == 0 {
		t.Errorf("%d entries", len(f.Entries))
	}
}

func TestFailuresOrder(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	f := Failures{}.With("a", now, "", AddressBackoff()).With("a", now, "", AddressBackoff()).With("b", now, "", AddressBackoff())
	if got := f.Order([]string{"a", "b", "c", "d"}, now); !cmp.Equal(got, []string{"c", "d", "b", "a"}) {
		t.Errorf("order %v", got)
	}
}
