package etcd

import "testing"

// What was read holds until etcd may be another: one that was reached anew, or one whose counters have gone back.
func TestKnownHolds(t *testing.T) {
	was := known{conns: 2, revision: 100, term: 5}
	for _, tt := range []struct {
		now  known
		want bool
	}{
		{known{conns: 2, revision: 100, term: 5}, true},
		{known{conns: 2, revision: 170, term: 6}, true},
		{known{conns: 3, revision: 170, term: 5}, false},
		{known{conns: 2, revision: 99, term: 5}, false},
		{known{conns: 2, revision: 170, term: 4}, false},
	} {
		if got := was.holds(tt.now); got != tt.want {
			t.Errorf("%+v: %t", tt.now, got)
		}
	}
}
