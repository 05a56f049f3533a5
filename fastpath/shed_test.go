package fastpath

import (
	"slices"
	"testing"
	"time"
)

// A flood is shed at once, for longer each time that it is there again, and for
// the shortest time after two minutes of peace. It ends soon after the flood does.
func TestShedder(t *testing.T) {
	var s shedder
	var set []bool
	put := func(on bool) error { set = append(set, on); return nil }
	now := time.Unix(1000, 0)
	var held []time.Duration
	var rate uint64 // SYNs in a tick
	var total uint64
	passed := func() (uint64, error) { return total, nil }
	flood := func(lasts time.Duration) {
		t.Helper()
		begin := now
		rate = calmSYNs
		for range 3 { // told again and again
			if err := s.crowded(now, put); err != nil {
				t.Fatal(err)
			}
		}
		for set = set[:1]; len(set) == 1; now = now.Add(100 * time.Millisecond) {
			if now.Sub(begin) >= lasts {
				rate = 1
			}
			total += rate
			if err := s.tick(now, passed, put); err != nil {
				t.Fatal(err)
			}
		}
		if !slices.Equal(set, []bool{true, false}) {
			t.Fatalf("set to %v", set)
		}
		set = nil
		held = append(held, now.Sub(begin)-100*time.Millisecond)
	}
	for range 6 {
		flood(time.Hour)
	}
	flood(0)
	flood(20 * time.Second)
	now = now.Add(floodEvery)
	flood(time.Hour)
	flood(0)
	want := []time.Duration{8, 16, 32, 64, 64, 64, 8, 22, 8, 8}
	for i := range want {
		want[i] *= time.Second
	}
	if !slices.Equal(held, want) {
		t.Errorf("shed for %v, want %v", held, want)
	}
}
