package lock

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"
	"time"
)

// FuzzDecodeState: whatever is in the store makes an error or a state that can be written and read again without losing a field.
func FuzzDecodeState(f *testing.F) {
	for _, s := range []string{
		"", "null", "{}", `{"schema":1}`, `{"schema":2}`, `{"schema":1,"policy":{"max":-1}}`, `{"schema":1,"Schema":1,"holders":[null]}`,
		`{"schema":1,"policy":{"max":2,"failure_budget":1,"boot_deadline":"5m0s","x":1},"holders":[{"host":"a","phase":"granted","granted":"2026-01-01T00:00:00Z","y":[2]}],"z":{"a":1}}`,
		`{"schema":1,"policy":{"windows":[{"start":"04:00","length":"1h","zone":"UTC"}],"blackouts":[{"from":"2026-01-01","zone":"UTC"}],"classes":["a","b"]}}`,
	} {
		f.Add([]byte(s))
	}
	now := time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := decodeState(data, 7)
		if err != nil {
			if !errors.Is(err, ErrSchema) {
				t.Fatalf("error %v, want ErrSchema", err)
			}
			return
		}
		first, err := json.Marshal(s)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		again, err := decodeState(first, 8)
		if err != nil {
			t.Fatalf("what was written cannot be read: %v\n%s", err, first)
		}
		second, err := json.Marshal(again)
		if err != nil || !bytes.Equal(first, second) {
			t.Fatalf("%v\n%s\n%s", err, first, second)
		}
		st := s.begin(now, "")
		st.findLate()
		st.takeBack()
		st.admit([]Waiter{{Claim: Claim{Host: "w", To: "2"}, Arrival: 1}})
		s.standing(Claim{Host: "w"}, 1, now)
		if n := len(st.Holders); n > len(s.Holders) && n > s.Policy.Max {
			t.Fatalf("%d holders were admitted, max is %d", n, s.Policy.Max)
		}
	})
}

func TestTokenIsTheRevisionOfTheGrant(t *testing.T) {
	s, err := decodeState([]byte(`{"schema":1,"holders":[{"host":"a","token":5,"granted":"2026-01-01T00:00:00Z"},{"host":"b","granted":"2026-01-01T00:00:00Z"}]}`), 9)
	if err != nil || s.Holders[0].Token != 5 || s.Holders[1].Token != 9 {
		t.Errorf("%+v, %v", s.Holders, err)
	}
}

func TestExpect(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	s := State{Policy: Policy{Max: 2, RebootTime: Duration(10 * time.Minute)}, Holders: []Holder{
		{Host: "a", Granted: now.Add(-4 * time.Minute)}, {Host: "b", Granted: now.Add(-20 * time.Minute)},
	}}
	for position, want := range map[int]time.Duration{1: 0, 2: 6 * time.Minute, 3: 10 * time.Minute, 4: 16 * time.Minute} {
		if got := s.expect(position, now, time.Time{}).Sub(now); got != want {
			t.Errorf("position %d is expected in %s, want %s", position, got, want)
		}
	}
	if !(State{Policy: Policy{Max: 2}}).expect(1, now, time.Time{}).IsZero() {
		t.Error("an expectation without a measure")
	}
	s.Policy.Max = 1000000
	if got := s.expect(3, now, time.Time{}); !got.Equal(now) {
		t.Errorf("with many free slots: %s", got)
	}
}
