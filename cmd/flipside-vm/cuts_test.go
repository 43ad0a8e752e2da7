package main

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// However many cuts there are, each stage gets as many as the others, a host goes through the stages of a leg in order, and a cut in a trial boot is the
// leg's last. No life is longer than there are releases, and nobody who could live side by side waits.
func TestDeal(t *testing.T) {
	for seed := range uint64(50) {
		for _, n := range []int{0, 1, 2, 3, 7, 14, 30, 100} {
			total, legs, of := 0, 0, map[stage]int{}
			lives := deal(n, 2, rand.New(rand.NewPCG(seed, 0)))
			for i, l := range lives {
				if l.number != i+1 || len(l.legs) == 0 || len(l.legs) > legsOfLife {
					t.Fatalf("seed %d, %d cuts: life %d is %+v", seed, n, i, l)
				}
				for k, leg := range l.legs {
					legs++
					if len(leg) == 0 || k > 0 && onTrial(leg) > onTrial(l.legs[k-1]) {
						t.Fatalf("seed %d, %d cuts: life %d is %+v", seed, n, i, l)
					}
					for j, s := range leg {
						total++
						of[s]++
						if j < len(leg)-1 && (slices.Contains(trialStages, s) || slices.Index(stages, s) >= slices.Index(stages, leg[j+1])) {
							t.Fatalf("seed %d, %d cuts: a leg with %v", seed, n, leg)
						}
					}
				}
			}
			if total != n || len(lives) < min(2, legs) {
				t.Fatalf("seed %d: %d cuts in %d lives, want %d", seed, total, len(lives), n)
			}
			for _, s := range stages {
				if of[s] < n/len(stages) || of[s] > n/len(stages)+1 {
					t.Errorf("seed %d, %d cuts: %v", seed, n, of)
				}
			}
		}
	}
}

// What a tape says of a record is the same however much of it was there at a time.
func TestTape(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	sector := func(n int) []byte { return make([]byte, 512*n) }
	writeLog(t, path,
		[3]any{0, 0, sector(2)}, [3]any{2048, 0, sector(8)}, [3]any{0, flagFlush, []byte(nil)}, [3]any{4096, 0, sector(1)}, [3]any{9000, flagFUA, sector(1)}, [3]any{0, flagFlush, []byte(nil)})
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := []area{tableArea, "EFI-SYSTEM", flushed, "USR-A", tableArea, flushed}
	for _, step := range []int{len(whole), 512, 100} {
		part := filepath.Join(t.TempDir(), "part")
		if err := os.WriteFile(part, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(part, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		tp := &tape{log: f, spans: []span{{"EFI-SYSTEM", 2048 * 512, 4096 * 512}, {"USR-A", 4096 * 512, 8192 * 512}}}
		for at := 0; at < len(whole); at += step {
			f.Write(whole[at:min(at+step, len(whole))])
			tp.read()
			if !slices.Equal(tp.areas, want[:len(tp.areas)]) {
				t.Fatalf("by %d bytes: %q", step, tp.areas)
			}
		}
		if !slices.Equal(tp.areas, want) {
			t.Fatalf("by %d bytes: %q", step, tp.areas)
		}
		if tp.first(1, tableArea) != 4 || tp.first(5, tableArea) != -1 || tp.last(3) != "EFI-SYSTEM" || tp.last(0) != "" || tp.last(99) != tableArea {
			t.Error("first or last is wrong")
		}
	}
}

// A record with a hole is not guessed at.
func TestHole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	writeLog(t, path, [3]any{0, 0, make([]byte, 512)}, [3]any{0, 0, []byte(nil)}, [3]any{0, flagFlush, []byte(nil)})
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, _, err := readLog(f); err != errHole {
		t.Errorf("readLog: %v", err)
	}
}
