package build

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// Whatever waits for what, there is an order when the circles are broken, and as little is cut as there has to be.
func TestBreakCircles(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for round := range 300 {
		next := make([][]edge, 1+rng.IntN(40))
		for range rng.IntN(3 * len(next)) {
			if from, to := rng.IntN(len(next)), rng.IntN(len(next)); from != to {
				next[from] = append(next[from], edge{to: to, blocks: 1 + rng.IntN(20)})
			}
		}
		sizes := make([]size, len(next))
		for i := range next {
			next[i] = sum(next[i])
			sizes[i] = size{writes: rng.IntN(200), reads: rng.IntN(400), patch: true}
		}
		joined := make([][]edge, len(next))
		for i := range next {
			joined[i] = slices.Clone(next[i])
		}
		group := breakCircles(joined, slices.Clone(sizes))
		all := make([]size, len(next))
		for i, g := range group {
			if group[g] != g {
				t.Fatalf("round %d: %d is in the group of %d, which is in that of %d", round, i, g, group[g])
			}
			if all[g] = all[g].and(sizes[i]); !all[g].fits() {
				t.Fatalf("round %d: what is joined with %d writes %d blocks and reads %d", round, g, all[g].writes, all[g].reads)
			}
		}
		breakCircles(next, nil)
		order := inOrder(next)
		turn := make([]int, len(next))
		for at, i := range order {
			turn[i] = at
		}
		if len(order) != len(next) {
			t.Fatalf("round %d: %d of %d operations have their turn", round, len(order), len(next))
		}
		for i := range next {
			for _, e := range next[i] {
				if early := turn[e.to] < turn[i]; early && !e.cut {
					t.Fatalf("round %d: %d has its turn before %d", round, e.to, i)
				}
			}
		}
	}
}

// Of a circle that is too large for one operation, the edge that costs the least is cut.
func TestBreakCirclesCutsTheCheapest(t *testing.T) {
	next := [][]edge{{{to: 1, blocks: 7}}, {{to: 2, blocks: 3}}, {{to: 0, blocks: 5}}}
	big := size{writes: maxUnit, reads: maxUnit, patch: true}
	if group := breakCircles(next, []size{big, big, big}); !slices.Equal(group, []int{0, 1, 2}) {
		t.Errorf("groups %v, want none", group)
	}
	if next[0][0].cut || !next[1][0].cut || next[2][0].cut {
		t.Errorf("cut: %v, want the one of 3 blocks", next)
	}
}
